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

/// Seconds of processor time, user and system, that a running process took so far.
///
/// # Errors
/// It is gone.
pub fn cpu(pid: u32) -> anyhow::Result<f64> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("looking at process {pid}"))?;
    // proc(5): fields 14 and 15, counted behind the name, which may hold anything.
    let ticks = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().skip(11).take(2);
    let ticks: u32 = ticks.filter_map(|field| field.parse::<u32>().ok()).sum();
    // USER_HZ is 100 on every machine that Linux runs on.
    Ok(f64::from(ticks) / 100.0)
}

/// The largest resident memory of a running process so far, in bytes.
///
/// # Errors
/// It is gone.
pub fn peak(pid: u32) -> anyhow::Result<u64> {
    memory(pid, "VmHWM:")
}

/// The resident memory of a running process now, in bytes.
///
/// # Errors
/// It is gone.
pub fn resident(pid: u32) -> anyhow::Result<u64> {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, figure: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.with_context(|| format!("looking at process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(figure)).context("a process without memory")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("reading its memory")?;
    Ok(kib * 1024)
}
