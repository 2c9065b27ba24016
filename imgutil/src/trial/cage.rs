//! A cage for a test: processes, mounts and files that end with it, whether it ends well, fails, or is interrupted.

use crate::exec::{self, ExecError, Outcome, PASSED_ON, SignalWatch};
use anyhow::{Context as _, Result};
use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// What was in the cage.
#[derive(Debug)]
pub struct Caged {
    /// How the program ended.
    pub outcome: Outcome,
    /// Where its logs are, if they were to be kept.
    pub logs: Option<PathBuf>,
}

/// Runs this program once more in a cage, with `arguments` made of the folder that it has for its files, and removes that folder.
///
/// # Errors
/// Not root; the cage cannot be made.
pub fn enclosed(arguments: impl FnOnce(&std::path::Path) -> Vec<OsString>, keep: bool) -> Result<Caged> {
    if !rustix::process::geteuid().is_root() {
        return Err(ExecError::NotRoot).context("a test makes namespaces");
    }
    let signals = SignalWatch::start(&PASSED_ON)?;
    let dir =
        tempfile::Builder::new().prefix("imgutil-test-").tempdir().context("cannot make a folder for the test")?;
    // The servers run as another user and have to reach their own folders in here.
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o711))
        .context("cannot open the folder for the test")?;
    let mut command: Vec<OsString> = vec![std::env::current_exe().context("cannot find this program")?.into()];
    command.extend(arguments(dir.path()));
    let finished = exec::run(&exec::Options::on_host(command, streams()?), Some(&signals))?;
    let logs = if keep { keep_logs(&dir)? } else { None };
    dir.close().context("cannot remove the test's folder")?;
    Ok(Caged { outcome: finished.outcome, logs })
}

/// This program's own streams, under numbers above 2.
fn streams() -> Result<[OwnedFd; 3]> {
    let above = |fd: std::os::fd::BorrowedFd<'_>| {
        rustix::io::fcntl_dupfd_cloexec(fd, 3).context("cannot pass on the standard streams")
    };
    Ok([above(std::io::stdin().as_fd())?, above(std::io::stdout().as_fd())?, above(std::io::stderr().as_fd())?])
}

/// Only the logs, where it came to any: everything else of a test (keys, states of servers) is worth nothing and may be secret.
fn keep_logs(dir: &tempfile::TempDir) -> Result<Option<PathBuf>> {
    let from = dir.path().join("logs");
    if !from.exists() {
        return Ok(None);
    }
    let kept = tempfile::Builder::new().prefix("imgutil-test-logs-").tempdir().context("cannot keep the logs")?;
    for entry in std::fs::read_dir(&from).with_context(|| format!("cannot read '{}'", from.display()))? {
        let entry = entry.with_context(|| format!("cannot read '{}'", from.display()))?;
        std::fs::copy(entry.path(), kept.path().join(entry.file_name()))
            .with_context(|| format!("cannot keep '{}'", entry.path().display()))?;
    }
    Ok(Some(kept.keep()))
}
