//! `moord`: parses arguments and calls the library.

use clap::Parser as _;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    moor_api::fail_stop::abort_on_panic();
    match moord::run::main(moord::args::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moord: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
