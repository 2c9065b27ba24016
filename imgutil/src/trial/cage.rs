//! A cage for a test: processes, mounts and files that end with it, whether it ends well, fails, or is interrupted.

use crate::exec::{self, ExecError, Outcome, PASSED_ON, SignalWatch};
use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

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
pub fn enclosed(arguments: impl FnOnce(&Path) -> Vec<OsString>, keep: bool) -> Result<Caged> {
    if !rustix::process::geteuid().is_root() {
        return Err(ExecError::NotRoot).context("a test makes namespaces");
    }
    let signals = SignalWatch::start(&PASSED_ON)?;
    let Folder { dir, lock: _lock } = Folder::new_in(&std::env::temp_dir())?;
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

/// Begins the name of a test's folder; random letters and digits follow.
const PREFIX: &str = "imgutil-test-";
const RANDOM: usize = 6;

/// The folder of a test, locked while that lives. What a test that was killed has left (an image, keys of its servers) goes with the next one.
struct Folder {
    dir: TempDir,
    lock: OwnedFd,
}

impl Folder {
    fn new_in(parent: &Path) -> Result<Self> {
        let context = || format!("cannot make a folder for the test in '{}'", parent.display());
        remove_left_over(parent);
        loop {
            let dir = tempfile::Builder::new().prefix(PREFIX).rand_bytes(RANDOM).tempdir_in(parent);
            let dir = dir.with_context(context)?;
            // Before it was locked another test may have taken it for left over.
            match locked(dir.path()) {
                Ok(lock) if dir.path().exists() => return Ok(Self { dir, lock }),
                Ok(_) | Err(Errno::NOENT | Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error).with_context(context),
            }
        }
    }
}

/// Opens and locks a folder of this user's.
fn locked(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())?;
    // Where everybody may make one, others could name theirs like ours.
    if rustix::fs::fstat(&folder)?.st_uid != rustix::process::geteuid().as_raw() {
        return Err(Errno::PERM);
    }
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Removes the folders of tests in `parent` that no test holds any more.
fn remove_left_over(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let random = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).unwrap_or_default();
        if random.len() != RANDOM || !random.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            continue;
        }
        if let Ok(_lock) = locked(&entry.path())
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            let path = entry.path();
            tracing::warn!("a test was killed, and what it left in '{}' cannot be removed: {error}", path.display());
        }
    }
}

/// This program's own streams, under numbers above 2.
fn streams() -> Result<[OwnedFd; 3]> {
    let above = |fd: std::os::fd::BorrowedFd<'_>| {
        rustix::io::fcntl_dupfd_cloexec(fd, 3).context("cannot pass on the standard streams")
    };
    Ok([above(std::io::stdin().as_fd())?, above(std::io::stdout().as_fd())?, above(std::io::stderr().as_fd())?])
}

/// Only the logs, where it came to any: everything else of a test (keys, states of servers) is worth nothing and may be secret.
fn keep_logs(dir: &TempDir) -> Result<Option<PathBuf>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_test_left_goes_and_what_is_held_or_anothers_stays() {
        let parent = tempfile::tempdir().expect("makes a folder");
        let make = |name: &str| {
            let path = parent.path().join(name);
            std::fs::create_dir(&path).expect("makes it");
            std::fs::write(path.join("key"), "secret").expect("writes");
            path
        };
        let held = Folder::new_in(parent.path()).expect("makes one");
        let left = make("imgutil-test-Ab3dE6");
        let stays = [make("imgutil-test-logs-Ab3dE6"), make("imgutil-test-x"), make("other-Ab3dE6"), make("target")];
        // The name of one, and no folder.
        let link = parent.path().join("imgutil-test-LiNk00");
        std::os::unix::fs::symlink(&stays[3], &link).expect("links");
        let foreign = make("imgutil-test-FoReIg");
        let is_root = rustix::process::geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(&foreign, Some(1000), None).expect("gives it away");
        }
        let next = Folder::new_in(parent.path()).expect("makes another");
        assert!(!left.exists() && held.dir.path().exists() && next.dir.path() != held.dir.path());
        assert!(stays.iter().all(|path| path.join("key").exists()) && link.is_symlink());
        assert_eq!(foreign.exists(), is_root);
        // Killed: its folder is not removed, and the lock is gone. (Closing is not enough here: what another test starts at this moment
        // holds the lock too, until it executes its program.)
        let path = held.dir.keep();
        rustix::fs::flock(&held.lock, FlockOperation::Unlock).expect("lets it go");
        drop(Folder::new_in(parent.path()).expect("makes one more"));
        assert!(!path.exists() && next.dir.path().exists());
    }
}
