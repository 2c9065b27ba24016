//! Processes of the lab: those of [`moor_vm::process`], with `anyhow` where a test waits.

pub use moor_vm::process::{Guard, run, run_shown, text, tied, tied_as};

use anyhow::Context as _;
use std::time::Duration;

/// Asks `ready` every 50 ms until it says so.
///
/// # Errors
/// It did not within `limit`, or `ready` failed; `what` names it.
pub fn wait_for(what: &str, limit: Duration, ready: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    moor_vm::process::wait_for(what, limit, ready).with_context(|| format!("waiting for {what}"))
}
