//! Child processes that cannot outlive the thread that started them, and commands whose failure shows what they printed.

use anyhow::{Context as _, bail};
use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A command that is killed when the calling thread ends (`setpriv` keeps the process id, so the child is the program itself).
#[must_use]
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// The same as an unprivileged numeric user without groups.
#[must_use]
pub fn tied_as(uid: u32, program: impl AsRef<OsStr>) -> Command {
    let id = uid.to_string();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--pdeathsig", "KILL", "--"])
        .arg(program);
    command.stdin(Stdio::null());
    command
}

/// A child that is killed and reaped on drop.
pub struct Guard(Option<Child>);

impl Guard {
    /// Takes it over.
    #[must_use]
    pub fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Nothing yet.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Its process id; `None` once it was reaped.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.0.as_ref().map(Child::id)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.0.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end by SIGTERM, then waits; kills it after `limit`.
    pub fn terminate(&mut self, limit: Duration) {
        if let Some(child) = self.0.as_mut() {
            if let Ok(pid) = i32::try_from(child.id()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
            }
            let end = Instant::now() + limit;
            while Instant::now() < end {
                if !matches!(child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.kill();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or its status is not 0; then with what it printed.
pub fn run(command: &mut Command) -> anyhow::Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// Runs a command that takes a while to its end; its progress goes to this program's standard error.
///
/// # Errors
/// It cannot be started, or its status is not 0.
pub fn run_shown(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Runs a command and returns its standard output as text, without the last newline.
///
/// # Errors
/// As [`run`].
pub fn text(command: &mut Command) -> anyhow::Result<String> {
    let output = run(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Asks `ready` every 50 ms until it says so.
///
/// # Errors
/// It did not within `limit`; `what` names it.
pub fn wait_for(what: &str, limit: Duration, mut ready: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    loop {
        if ready().with_context(|| format!("waiting for {what}"))? {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("{what} did not happen within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
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

/// Resident memory of a running process, in bytes.
///
/// # Errors
/// It is gone.
pub fn resident(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.with_context(|| format!("looking at process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process without memory")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("reading VmRSS")?;
    Ok(kib * 1024)
}
