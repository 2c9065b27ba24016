//! `moor-tether`: parses arguments and calls the library.

mod cmd;

use std::process::ExitCode;

fn main() -> ExitCode {
    cmd::run()
}
