//! `moor-tether status`.

use anyhow::{Result, bail};
use moor_tether::prometheus;
use moor_tether::state::{DEFAULT_PATH, State};
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

/// Show what the tether has fetched, and how its servers stand
#[derive(clap::Args)]
pub(crate) struct Args {
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
    /// As metrics of Prometheus, for the textfile collector of `node_exporter`
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
    /// The tether's state file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    state: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let state = match State::read(&args.state) {
        Ok(state) => state,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("no image is mounted here: '{}' is not there", args.state.display())
        }
        Err(error) => bail!("cannot read '{}': {error}", args.state.display()),
    };
    let mut out = std::io::stdout().lock();
    if args.prometheus {
        // Whether it is up is one of them.
        write!(out, "{}", prometheus::Text(&state))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&state)?)?;
    } else {
        write!(out, "{state}")?;
    }
    if !state.is_up() {
        bail!("the process {} that wrote '{}' is gone", state.pid, args.state.display());
    }
    Ok(ExitCode::SUCCESS)
}
