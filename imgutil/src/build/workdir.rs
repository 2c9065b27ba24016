//! Where an image is built: a directory beside its final place, locked, and removed whatever happens. The tree gets its
//! final name by one rename, when nothing more can fail.

use super::BuildError;
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The directory `.NAME.imgutil-build` beside `NAME`.
pub(super) struct WorkDir {
    path: PathBuf,
    tree: PathBuf,
    _lock: OwnedFd,
}

impl WorkDir {
    /// Makes the directory for building `tree`, which must not exist. What a killed build has left there is removed.
    pub(super) fn create(tree: &Path) -> Result<Self, BuildError> {
        let tree = std::path::absolute(tree).map_err(|error| BuildError::io("find", tree, error))?;
        if tree.symlink_metadata().is_ok() {
            return Err(BuildError::Exists(tree));
        }
        let (Some(parent), Some(name)) = (tree.parent(), tree.file_name()) else {
            return Err(BuildError::Exists(tree));
        };
        let parent = parent.canonicalize().map_err(|error| BuildError::io("use the directory", parent, error))?;
        let tree = parent.join(name);
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".imgutil-build");
        let path = parent.join(hidden);

        let left_over = match rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)) {
            Ok(()) => false,
            Err(rustix::io::Errno::EXIST) => true,
            Err(error) => return Err(BuildError::io("make the directory", &path, error.into())),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| BuildError::io("open the directory", &path, error.into()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| BuildError::Busy { tree: tree.clone(), work: path.clone() })?;
        if left_over {
            tracing::warn!("a build of this tree was killed: what it left in '{}' is removed", path.display());
            empty(&path)?;
        }
        let work = Self { path, tree, _lock: lock };
        for (directory, mode) in [(work.root(), 0o755), (work.temporary(), 0o700), (work.indexes(), 0o700)] {
            rustix::fs::mkdir(&directory, Mode::from_raw_mode(mode))
                .map_err(|error| BuildError::io("make the directory", &directory, error.into()))?;
        }
        Ok(work)
    }

    /// The directory itself.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The tree while it is built.
    pub(super) fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// Temporary files of the tools.
    pub(super) fn temporary(&self) -> PathBuf {
        self.path.join("tmp")
    }

    /// What a back end fetches and works out before it installs.
    pub(super) fn indexes(&self) -> PathBuf {
        self.path.join("indexes")
    }

    /// Where the node's files wait to be planted.
    pub(super) fn stage(&self) -> PathBuf {
        self.path.join("stage")
    }

    /// All output of the tools.
    pub(super) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// The final place.
    pub(super) fn tree(&self) -> &Path {
        &self.tree
    }

    /// Gives the tree its final name; whatever has come to stand there meanwhile is not replaced.
    pub(super) fn publish(self) -> Result<PathBuf, BuildError> {
        let failed = |error: rustix::io::Errno| match error {
            rustix::io::Errno::EXIST => BuildError::Exists(self.tree.clone()),
            error => BuildError::io("give its name to the tree", &self.tree, error.into()),
        };
        // The packages were written without a sync each.
        let root = rustix::fs::open(self.root(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        rustix::fs::syncfs(&root).map_err(failed)?;
        let cwd = rustix::fs::CWD;
        rustix::fs::renameat_with(cwd, self.root(), cwd, &self.tree, RenameFlags::NOREPLACE).map_err(failed)?;
        Ok(self.tree.clone())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = empty(&self.path) {
            tracing::warn!("{error}");
        } else if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::warn!("cannot remove '{}': {error}", self.path.display());
        }
    }
}

/// Removes all that is in `path`, unless something is mounted there: what is behind a mount is not ours.
pub(crate) fn empty(path: &Path) -> Result<(), BuildError> {
    let mounts =
        std::fs::read("/proc/self/mountinfo").map_err(|error| BuildError::io("read", "/proc/self/mountinfo", error))?;
    if let Some(mount) = mount_below(&mounts, path) {
        return Err(BuildError::io(
            "remove",
            path,
            io::Error::other(format!("something is mounted on '{}': unmount it first", mount.display())),
        ));
    }
    let failed = |error| BuildError::io("remove what is in", path, error);
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let result = if entry.file_type().map_err(failed)?.is_dir() {
            std::fs::remove_dir_all(entry.path())
        } else {
            std::fs::remove_file(entry.path())
        };
        result.map_err(|error| BuildError::io("remove", entry.path(), error))?;
    }
    Ok(())
}

/// The first mount point at or below `path` (proc(5): field 5; blanks and backslashes are octal escapes).
fn mount_below(mountinfo: &[u8], path: &Path) -> Option<PathBuf> {
    mountinfo.split(|byte| *byte == b'\n').find_map(|line| {
        let field = line.split(|byte| *byte == b' ').nth(4)?;
        let point = PathBuf::from(std::ffi::OsStr::from_bytes(&unescaped(field)));
        point.starts_with(path).then_some(point)
    })
}

fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = &after[3..];
            }
            _ => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_in_the_way_is_found_under_its_real_name() {
        let table = b"22 27 0:21 / /proc rw - proc proc rw\n23 27 0:22 / /w\\040x/root/sys rw - sysfs sysfs rw\n";
        assert_eq!(mount_below(table, Path::new("/w x")), Some(PathBuf::from("/w x/root/sys")));
        assert_eq!(mount_below(table, Path::new("/w")), None);
    }

    #[test]
    fn a_build_leaves_nothing_and_two_builds_do_not_meet() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        let work = WorkDir::create(&tree).unwrap();
        std::fs::write(work.root().join("file"), "x").unwrap();
        assert!(matches!(WorkDir::create(&tree), Err(BuildError::Busy { .. })));
        drop(work);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);

        std::fs::create_dir_all(scratch.path().join(".tree.imgutil-build/root/etc")).unwrap();
        let work = WorkDir::create(&tree).unwrap();
        assert_eq!(std::fs::read_dir(work.root()).unwrap().count(), 0, "left-overs are removed");
        std::fs::write(work.root().join("file"), "x").unwrap();
        assert_eq!(work.publish().unwrap(), tree.canonicalize().unwrap());
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1);
        assert!(matches!(WorkDir::create(&tree), Err(BuildError::Exists(_))));
    }
}
