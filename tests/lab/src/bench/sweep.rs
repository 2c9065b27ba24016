//! What a killed bench leaves: mounts, most of all. They are taken down when the next one begins, and when this one is told to end.

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Status of a program that was told to end, as a shell counts it for SIGINT.
const INTERRUPTED: i32 = 130;

/// The place of all tables, for one bench at a time: what lies there belongs to this one.
pub struct Place {
    /// The folder.
    pub dir: PathBuf,
    _lock: Flock<File>,
}

impl Place {
    /// Takes the folder, waits for no other bench, and removes what an earlier one has left there. From here on SIGINT and SIGTERM
    /// end this program with nothing left; so it comes before any other thread.
    ///
    /// # Errors
    /// Another bench runs, or the folder cannot be used.
    pub fn take(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making '{}'", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("finding '{}'", dir.display()))?;
        let file = File::create(dir.join("lock")).context("making the lock of the bench")?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| error)
            .with_context(|| format!("another bench runs in '{}'", dir.display()))?;
        sweep(&dir)?;
        let mut ends = SigSet::empty();
        ends.add(Signal::SIGINT);
        ends.add(Signal::SIGTERM);
        // Children begin with no signal blocked: `Command` sees to that.
        ends.thread_block().context("waiting for signals")?;
        let place = dir.clone();
        let watch = move || {
            if ends.wait().is_ok() {
                if let Err(error) = sweep(&place) {
                    eprintln!("bench: cannot clean up: {error:#}");
                }
                // What was started goes with this process, and with its users what was unmounted.
                std::process::exit(INTERRUPTED);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch).context("waiting for signals")?;
        Ok(Self { dir, _lock: lock })
    }
}

/// Unmounts what is mounted in `dir`, and removes the folders of tables.
fn sweep(dir: &Path) -> anyhow::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    // The last mounted first: it may stand on one before it.
    for place in mounts.lines().rev().filter_map(place).filter(|place| place.starts_with(dir)) {
        // Gone with one below it is as good.
        let _ = umount2(&place, MntFlags::MNT_DETACH);
    }
    for entry in dir.read_dir().with_context(|| format!("reading '{}'", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "cache") {
            std::fs::remove_dir_all(&path).with_context(|| format!("removing '{}'", path.display()))?;
        }
    }
    Ok(())
}

/// `36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/zram1 rw` (proc(5)): the place. None of ours has a character that is escaped there.
fn place(line: &str) -> Option<PathBuf> {
    line.split(' ').nth(4).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_taken_down_and_inputs_are_kept() {
        let home = tempfile::tempdir().unwrap();
        let left = home.path().join("root-x1/at");
        std::fs::create_dir_all(&left).unwrap();
        std::fs::create_dir_all(home.path().join("cache/root-web")).unwrap();
        std::fs::write(home.path().join("root.json"), "[]").unwrap();
        nix::mount::mount(Some("bench"), &left, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
        sweep(home.path()).unwrap();
        assert!(!home.path().join("root-x1").exists());
        assert!(home.path().join("cache/root-web").exists() && home.path().join("root.json").exists());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(mounts.lines().filter_map(place).all(|place| !place.starts_with(home.path())));
    }
}
