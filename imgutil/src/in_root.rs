//! Opens files of a root tree as that root would: absolute links stay inside, and nothing leads out.

use anyhow::{Context as _, Result};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::path::Arg;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// As often `openat2` is tried.
const TRIES: usize = 1000;

/// `openat2(2)`, tried again while it answers `EAGAIN`: the kernel says so when anything on the machine was renamed or mounted while it
/// followed a `..`, because it cannot know then whether that led out.
pub(crate) fn openat2(
    directory: impl AsFd,
    path: impl Arg,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    path.into_with_c_str(|path| {
        for _ in 1..TRIES {
            match rustix::fs::openat2(&directory, path, flags, mode, resolve) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
        rustix::fs::openat2(&directory, path, flags, mode, resolve)
    })
}

/// Opens a regular file of the tree; `None` if there is none.
pub(crate) fn open(root: BorrowedFd<'_>, path: &str) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file = match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open '{path}' in the tree")),
    };
    let kind = file.metadata().with_context(|| format!("cannot look at '{path}' in the tree"))?;
    Ok(kind.is_file().then_some(file))
}

/// Reads a text file of the tree, at most `limit` bytes; `None` if there is none.
pub(crate) fn read(root: BorrowedFd<'_>, path: &str, limit: u64) -> Result<Option<String>> {
    let Some(file) = open(root, path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).with_context(|| format!("cannot read '{path}' in the tree"))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The names in a directory of the tree, sorted; none if there is no such directory.
pub(crate) fn list(root: BorrowedFd<'_>, path: &str) -> Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let context = || format!("cannot list '{path}' in the tree");
    let directory = match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(directory) => directory,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(context),
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let name = entry.file_name();
        if name != c"." && name != c".." && entry.file_type() != FileType::Unknown {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Whoever renames something elsewhere must not keep a link with `..` from being followed.
    #[test]
    fn renames_elsewhere_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("../".repeat(40) + "file", root.join("a/b/link")).unwrap();
        let handle = File::open(&root).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (one, other) = (dir.path().join("one"), dir.path().join("other"));
                std::fs::write(&one, "").unwrap();
                while !done.load(Ordering::Relaxed) {
                    std::fs::rename(&one, &other).unwrap();
                    std::fs::rename(&other, &one).unwrap();
                }
            });
            let all = (0..20_000).try_for_each(|_| match open(handle.as_fd(), "a/b/link") {
                Ok(Some(_)) => Ok(()),
                other => Err(format!("{other:?}")),
            });
            done.store(true, Ordering::Relaxed);
            assert_eq!(all, Ok(()));
        });
    }
}
