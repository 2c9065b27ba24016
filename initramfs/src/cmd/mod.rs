//! The command line: parsed here, done by the library.

mod fetch;
mod mount;
mod root;
mod servers;
mod source;
mod status;

use clap::{Parser, Subcommand};
use moor_tether::kmsg;
use moor_tether::reader::OpenError;
use moor_tether::root::RootError;
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
    Fetch(fetch::Args),
    Root(root::Args),
    Unmount(root::UnmountArgs),
    Status(status::Args),
    Members(servers::MembersArgs),
    Trust(servers::TrustArgs),
}

pub(crate) fn run() -> ExitCode {
    kmsg::log_panics();
    let result = match Cli::parse().command {
        Command::Mount(args) => mount::run(&args),
        Command::Fetch(args) => fetch::run(&args),
        Command::Root(args) => root::run(args),
        Command::Unmount(args) => root::unmount(&args),
        Command::Status(args) => status::run(&args),
        Command::Members(args) => servers::members(args),
        Command::Trust(args) => servers::trust(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("moor-tether: error: {}", error_line(&error));
        status_of(&error)
    })
}

/// What whoever called may make of it (docs/tether.md has them all). 3: this machine cannot do it, however often it is tried (too little memory). 4: the
/// image is not one that may be used, until somebody mends that (wrong key, another digest, no signature that counts). 5: a server does not answer, or is
/// busy, and the others have no such image either; nobody has to mend that. 1: anything else.
fn status_of(error: &anyhow::Error) -> ExitCode {
    let is = |test: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(test);
    if is(|cause| matches!(cause.downcast_ref(), Some(RootError::Memory(_)))) {
        ExitCode::from(3)
    } else if is(|cause| cause.downcast_ref().is_some_and(OpenError::is_of_another_image)) {
        ExitCode::from(4)
    } else if is(|cause| cause.downcast_ref().is_some_and(OpenError::is_passing)) {
        ExitCode::from(5)
    } else {
        ExitCode::FAILURE
    }
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
