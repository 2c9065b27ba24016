//! `moor`: parses arguments and calls the library.

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    moor_api::fail_stop::abort_on_panic();
    moor::run(moor::args::Cli::parse())
}
