//! Unpacks an image into a new directory: built beside its place, renamed when complete, removed on failure.

mod image;
mod interrupt;
mod restore;

pub(crate) use image::{SquashfsIn, open, open_with};

use crate::files::must_be_free;
use crate::progress::Progress;
use crate::squashfs::{Reader, Source};
use anyhow::{Context as _, Result};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

/// Restores the tree in the image file `image` as the directory `destination`. Returns the count of inodes.
pub fn unpack_image(image: &Path, key_file: Option<&Path>, destination: &Path, progress: &Progress) -> Result<u32> {
    must_be_free(destination, "name a new directory, or remove it")?;
    let source = image::SquashfsIn::new(open(image, key_file)?, image)?;
    unsquash(source, destination, progress)
        .with_context(|| format!("cannot unpack '{}' to '{}'", image.display(), destination.display()))
}

/// Restores the squashfs in `source` as the directory `destination`, which must not exist. Returns the count of inodes.
pub fn unsquash<S: Source>(source: S, destination: &Path, progress: &Progress) -> Result<u32> {
    must_be_free(destination, "name a new directory, or remove it")?;
    let mut reader = Reader::open(source)?;
    // Before there is something to remove, and until it is removed: the order of the two matters.
    let interrupts = interrupt::Interrupts::hold_back()?;
    let staging = Staging::beside(destination)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, &staging.path, flags, Mode::empty())
        .with_context(|| format!("cannot open '{}'", staging.path.display()))?;
    restore::restore(&mut reader, root.as_fd(), progress, &interrupts)?;
    rustix::fs::syncfs(&root).with_context(|| format!("cannot write out '{}'", staging.path.display()))?;
    interrupts.check()?;
    staging.keep(destination)?;
    Ok(reader.inode_count())
}

/// A directory of a temporary name that is removed unless it is kept.
struct Staging {
    path: PathBuf,
    kept: bool,
}

impl Staging {
    /// Makes one beside `destination`, so that renaming stays within a file system. Nobody else can enter it.
    fn beside(destination: &Path) -> Result<Self> {
        let parent = parent_of(destination);
        let name = destination.file_name().with_context(|| format!("'{}' is no name", destination.display()))?;
        let directory = tempfile::Builder::new()
            .prefix(&format!(".{}.unpacking-", name.to_string_lossy()))
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in '{}'", parent.display()))?;
        Ok(Self { path: directory.keep(), kept: false })
    }

    /// Gives it its final name, unless that has appeared meanwhile.
    fn keep(mut self, destination: &Path) -> Result<()> {
        rustix::fs::renameat_with(CWD, &self.path, CWD, destination, RenameFlags::NOREPLACE)
            .with_context(|| format!("cannot give the finished tree its name '{}'", destination.display()))?;
        self.kept = true;
        let parent = parent_of(destination);
        std::fs::File::open(parent)
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("cannot write out the directory '{}'", parent.display()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            eprintln!("imgutil: warning: cannot remove '{}': {error}; remove it by hand", self.path.display());
        }
    }
}

/// The directory a path is in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
