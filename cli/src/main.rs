//! `moor`: parses arguments and calls the library.

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    moor::run(moor::args::Cli::parse())
}
