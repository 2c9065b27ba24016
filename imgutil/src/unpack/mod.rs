//! Unpacks an image into a new directory: built beside its place, renamed when complete, removed on failure.

mod image;
mod interrupt;
mod restore;

pub(crate) use image::{SquashfsIn, open, open_with, open_with_any};

use crate::build::empty_directory as empty;
use crate::files::must_be_free;
use crate::progress::Progress;
use crate::squashfs::{Reader, Source};
use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// Restores the tree in the image file `image` as the directory `destination`. Returns the count of inodes.
pub fn unpack_image(image: &Path, key_file: Option<&Path>, destination: &Path, progress: &Progress) -> Result<u32> {
    must_be_free(destination, "name a new directory, or remove it")?;
    let parts = SquashfsIn::all(open(image, key_file)?, image)?;
    unsquash_all(parts, destination, progress)
        .with_context(|| format!("cannot unpack '{}' to '{}'", image.display(), destination.display()))
}

/// Restores the squashfs in `source` as the directory `destination`, which must not exist. Returns the count of inodes.
pub fn unsquash<S: Source>(source: S, destination: &Path, progress: &Progress) -> Result<u32> {
    unsquash_all(vec![(PathBuf::from("/"), source)], destination, progress)
}

/// Restores file systems, each at its mount point below `destination`, the root first. Returns the count of inodes.
fn unsquash_all<S: Source>(parts: Vec<(PathBuf, S)>, destination: &Path, progress: &Progress) -> Result<u32> {
    must_be_free(destination, "name a new directory, or remove it")?;
    let mut readers = Vec::new();
    for (mount, source) in parts {
        readers.push((mount, Reader::open(source)?));
    }
    // Before there is something to remove, and until it is removed: the order of the two matters.
    let interrupts = interrupt::Interrupts::hold_back()?;
    let staging = Staging::beside(destination)?;
    let root = staging.root()?;
    let mut inodes: u32 = 0;
    for (mount, reader) in &mut readers {
        let place = mount_point(&root, mount).with_context(|| format!("cannot go to '{}'", mount.display()))?;
        restore::restore(reader, place.as_fd(), progress, &interrupts)?;
        inodes = inodes.saturating_add(reader.inode_count());
    }
    rustix::fs::syncfs(&root).with_context(|| format!("cannot write out '{}'", staging.path.display()))?;
    interrupts.check()?;
    staging.keep(destination)?;
    Ok(inodes)
}

/// The directory that a file system belongs on: it is in what was restored before, or made. Links are not followed.
fn mount_point(root: &OwnedFd, mount: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut place = root.try_clone()?;
    for name in mount.iter().skip(1) {
        match rustix::fs::mkdirat(&place, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        place = rustix::fs::openat(&place, name, flags, Mode::empty())?;
    }
    Ok(place)
}

/// Name of the tree in its [`Staging`].
const TREE: &str = "tree";

/// The directory `.NAME.imgutil-unpack` beside `NAME`, locked, and removed in the end. What a killed run has left there is removed by
/// the next one of the same name. The tree is made in it and not as it: the tree's root gets modes and owner that let others in while
/// other file systems are still restored below it, and restoring trusts that nobody else changes names there.
struct Staging {
    path: PathBuf,
    kept: bool,
    lock: OwnedFd,
}

impl Staging {
    /// Makes it beside `destination`, so that renaming stays within a file system. Nobody else can enter it.
    fn beside(destination: &Path) -> Result<Self> {
        let parent = parent_of(destination);
        let name = destination.file_name().with_context(|| format!("'{}' is no name", destination.display()))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".imgutil-unpack");
        let path = parent.join(hidden);
        let context = || format!("cannot make the directory '{}'", path.display());
        for _ in 0..2 {
            let left_over = match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) => false,
                Err(Errno::EXIST) => true,
                Err(error) => return Err(error).with_context(context),
            };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let lock = rustix::fs::openat(CWD, &path, flags, Mode::empty()).with_context(context)?;
            let is_locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
            // Another run may have removed what we opened, and made its own.
            let (opened, there) = (rustix::fs::fstat(&lock), rustix::fs::lstat(&path));
            let is_there = opened.is_ok_and(|opened| there.is_ok_and(|there| there.st_ino == opened.st_ino));
            if !is_locked || !is_there {
                break;
            }
            if !left_over {
                return Ok(Self { path, kept: false, lock });
            }
            // Removed, not only emptied: by older releases it may have got the owner and attributes of a tree's root.
            empty(&path)
                .map_err(anyhow::Error::from)
                .and_then(|()| Ok(rustix::fs::rmdir(&path)?))
                .with_context(|| format!("cannot remove what an interrupted run left in '{}'", path.display()))?;
        }
        bail!(
            "another imgutil unpacks to '{}' at this moment (it works in '{}')",
            destination.display(),
            path.display()
        );
    }

    /// Makes the directory of the tree.
    fn root(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::mkdirat(&self.lock, TREE, Mode::RWXU)
            .and_then(|()| rustix::fs::openat(&self.lock, TREE, flags, Mode::empty()))
            .with_context(|| format!("cannot make the directory '{}'", self.path.join(TREE).display()))
    }

    /// Gives the tree its final name, unless that has appeared meanwhile.
    fn keep(mut self, destination: &Path) -> Result<()> {
        rustix::fs::renameat_with(&self.lock, TREE, CWD, destination, RenameFlags::NOREPLACE)
            .with_context(|| format!("cannot give the finished tree its name '{}'", destination.display()))?;
        self.kept = true;
        drop(self);
        let parent = parent_of(destination);
        std::fs::File::open(parent)
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("cannot write out the directory '{}'", parent.display()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let removed = if self.kept { std::fs::remove_dir(&self.path) } else { std::fs::remove_dir_all(&self.path) };
        if let Err(error) = removed {
            eprintln!("imgutil: warning: cannot remove '{}': {error}; remove it by hand", self.path.display());
        }
    }
}

/// The directory a path is in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::squashfs::peer::pack;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_file_system_whose_mount_point_is_a_link_of_another_is_not_unpacked_through_it() {
        let work = tempfile::tempdir().expect("directory");
        let place = |name: &str| work.path().join(name);
        for name in ["outside", "root", "home", "good/home"] {
            fs::create_dir_all(place(name)).expect("makes");
        }
        fs::write(place("home/file"), "x").expect("writes");
        symlink(place("outside"), place("root/home")).expect("links");
        let unpack = |root: &str| {
            let parts = vec![("/".into(), pack(&place(root))), ("/home".into(), pack(&place("home")))];
            unsquash_all(parts, &place("tree"), &Progress::new("unpacking"))
        };
        let error = unpack("root").expect_err("is refused");
        assert!(format!("{error:#}").contains("cannot go to '/home'"), "{error:#}");
        assert_eq!(names(&place("outside")), Vec::<OsString>::new());
        // Neither a tree nor what was begun of it.
        assert_eq!(names(work.path()), ["good", "home", "home.squashfs", "outside", "root", "root.squashfs"]);

        unpack("good").expect("unpacks");
        assert_eq!(fs::read(place("tree/home/file")).expect("reads"), b"x");
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(directory).expect("lists");
        let mut names: Vec<OsString> = entries.map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        names
    }
}
