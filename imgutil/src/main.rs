//! `imgutil`: parses arguments and calls the library.

use clap::{Parser, Subcommand};
use imgutil::cmd;
use std::process::ExitCode;

/// Builds root images, starts them like containers, and packs them into sealed images.
#[derive(Parser)]
#[command(name = "imgutil", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Build(cmd::build::Args),
    Exec(cmd::exec::Args),
    Pack(cmd::pack::Args),
    Unpack(cmd::unpack::Args),
    Inspect(cmd::inspect::Args),
    Verify(cmd::verify::Args),
    Test(cmd::test::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Build(args) => cmd::build::run(args),
        Command::Exec(args) => cmd::exec::run(args),
        Command::Pack(args) => cmd::pack::run(args),
        Command::Unpack(args) => cmd::unpack::run(&args),
        Command::Inspect(args) => cmd::inspect::run(&args),
        Command::Verify(args) => cmd::verify::run(&args),
        Command::Test(args) => cmd::test::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("imgutil: error: {}", cmd::error_line(&error));
            ExitCode::FAILURE
        }
    }
}
