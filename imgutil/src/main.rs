//! `imgutil`: parses arguments and calls the library.

use clap::Parser as _;
use imgutil::cmd::{self, Cli};
use std::process::ExitCode;

fn main() -> ExitCode {
    moor_api::fail_stop::abort_on_panic();
    Cli::parse().run().unwrap_or_else(|error| {
        eprintln!("imgutil: error: {}", cmd::error_line(&error));
        ExitCode::FAILURE
    })
}
