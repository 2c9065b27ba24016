//! The library behind `moor`, the administrator's command: range first, then the action; `node: value` out, one line each.

pub mod args;
mod cmd;
mod connect;
mod output;

use std::process::ExitCode;

/// Runs one command. Failures go to standard error in one line; the exit status is not 0 when any node failed.
#[must_use]
pub fn run(cli: args::Cli) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("moor: error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(cmd::dispatch(cli)) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moor: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
