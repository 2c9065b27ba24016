//! The command line: parsed here, done by the library.

mod mount;
mod root;
mod status;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The network root of a node: a sealed image on HTTPS servers becomes a file, and the file a root file system.
#[derive(Parser)]
#[command(name = "moor-tether", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mount(mount::Args),
    Root(root::Args),
    Unmount(root::UnmountArgs),
    Status(status::Args),
}

pub(crate) fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Mount(args) => mount::run(&args),
        Command::Root(args) => root::run(args),
        Command::Unmount(args) => root::unmount(&args),
        Command::Status(args) => status::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("moor-tether: error: {}", error_line(&error));
        ExitCode::FAILURE
    })
}

/// An error and its causes in one line, whatever a file is called. Causes that a message names itself are not said twice.
fn error_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line.replace(char::is_control, " ")
}
