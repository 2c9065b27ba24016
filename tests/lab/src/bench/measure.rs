//! What one command costs: wall time, processor time and memory, of it and of everything it started and waited for.
//!
//! The kernel adds up the costs of children per parent (getrusage(2), `RUSAGE_CHILDREN`), so each command gets a parent of its
//! own: this program, started again as a wrapper. That needs no tool and no unsafe code.

use anyhow::{Context as _, bail};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::time::Instant;

/// First argument of this program when it is only to run a command and tell what it cost.
pub const WRAPPER: &str = "--measure";

/// What a command cost.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Usage {
    /// Seconds from start to end.
    pub wall: f64,
    /// Seconds of processor time, user and system, of the command and the children it waited for.
    pub cpu: f64,
    /// Largest resident memory of any one process of it, in bytes.
    pub peak: u64,
}

/// Runs a command to its end and tells what it cost. Its standard output is dropped; what it says on the standard error is in
/// the error if it fails.
///
/// # Errors
/// It could not be started, or ended with a status other than 0.
pub fn measure(command: &Command) -> anyhow::Result<Usage> {
    let program = command.get_program();
    let mut wrapper = crate::process::tied(std::env::current_exe().context("finding this program")?);
    wrapper.arg(WRAPPER).arg(program).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        wrapper.current_dir(dir);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapper.env(name, value),
            None => wrapper.env_remove(name),
        };
    }
    let output = wrapper.output().with_context(|| format!("starting {}", program.display()))?;
    if !output.status.success() {
        bail!("{} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim_end());
    }
    serde_json::from_slice(&output.stdout).context("reading what the wrapper measured")
}

/// The wrapper's side: runs `command`, prints what it cost as JSON.
///
/// # Errors
/// It could not be started, or ended with a status other than 0.
pub fn run_wrapped(command: &[OsString]) -> anyhow::Result<()> {
    let (program, arguments) = command.split_first().context("no command to measure")?;
    let started = Instant::now();
    let status = crate::process::tied(program)
        .args(arguments)
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    let wall = started.elapsed().as_secs_f64();
    if !status.success() {
        bail!("{} ended with {status}", program.display());
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    #[allow(clippy::cast_precision_loss)] // microseconds of a run
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    let usage = Usage {
        wall,
        cpu: seconds(usage.user_time()) + seconds(usage.system_time()),
        // Linux counts in KiB.
        peak: u64::try_from(usage.max_rss()).unwrap_or(0) * 1024,
    };
    println!("{}", serde_json::to_string(&usage)?);
    Ok(())
}
