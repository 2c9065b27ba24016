//! The command line of `imgutil` as a whole; its man pages are made from it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds root images, starts them like containers, and packs them into sealed images.
#[derive(Parser)]
#[command(name = "imgutil", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Build(super::build::Args),
    Exec(super::exec::Args),
    Pack(super::pack::Args),
    Unpack(super::unpack::Args),
    Capture(super::capture::Args),
    Inspect(super::inspect::Args),
    Verify(super::verify::Args),
    Diff(super::diff::Args),
    Sbom(super::sbom::Args),
    List(super::list::Args),
    Prune(super::prune::Args),
    Test(super::test::Args),
}

impl Cli {
    /// Does what it says. The error is for the user.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        super::warnings::show();
        match self.command {
            Command::Build(args) => super::build::run(args),
            Command::Exec(args) => super::exec::run(args),
            Command::Pack(args) => super::pack::run(args),
            Command::Unpack(args) => super::unpack::run(&args),
            Command::Capture(args) => super::capture::run(args),
            Command::Inspect(args) => super::inspect::run(&args),
            Command::Verify(args) => super::verify::run(&args),
            Command::Diff(args) => Ok(super::diff::run(&args)),
            Command::Sbom(args) => super::sbom::run(&args),
            Command::List(args) => super::list::run(&args),
            Command::Prune(args) => super::prune::run(&args),
            Command::Test(args) => super::test::run(&args),
        }
    }
}
