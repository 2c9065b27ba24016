//! Reads the extended attributes of a tree's inodes while the scan goes on. That is more than a third of a scan's work, nothing in it
//! waits for it, and nothing else could be done meanwhile: so a thread of its own does it.

use super::scan::{ImagePath, join};
use crate::inodes::{InodeIndex, XattrSet, XattrSets};
use anyhow::{Context as _, Result};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::Receiver;

/// Inodes of one directory.
pub(super) struct Batch {
    /// The directory.
    pub(super) directory: OwnedFd,
    /// Its path, for messages.
    pub(super) path: ImagePath,
    /// The directory's own inode, in one of its batches.
    pub(super) own: Option<InodeIndex>,
    /// What lies in it, directories apart.
    pub(super) entries: Vec<(CString, InodeIndex)>,
}

/// An inode that has attributes.
pub(super) struct Attributes {
    pub(super) index: InodeIndex,
    pub(super) path: ImagePath,
    /// What a squashfs can hold.
    pub(super) set: XattrSet,
    /// Names of what it cannot.
    pub(super) others: Vec<CString>,
}

/// Reads those of all batches; in the order of their inodes.
pub(super) fn read(batches: Receiver<Batch>) -> Result<Vec<Attributes>> {
    let mut all = Vec::new();
    for Batch { directory, path, own, entries } in batches {
        let directory = directory.as_fd();
        if let Some(index) = own {
            all.extend(of_inode(&Reader::File(directory), index, || path.clone())?);
        }
        for (name, index) in entries {
            let reader = Reader::of_entry(directory, &name)?;
            all.extend(of_inode(&reader, index, || join(&path, &name))?);
        }
    }
    all.sort_unstable_by_key(|attributes| attributes.index.0);
    Ok(all)
}

fn of_inode(reader: &Reader<'_>, index: InodeIndex, path: impl Fn() -> ImagePath) -> Result<Option<Attributes>> {
    let context = || format!("cannot read the extended attributes of '{}'", path().display());
    let names = reader.names().with_context(context)?;
    if names.is_empty() {
        return Ok(None);
    }
    let (mut set, mut others) = (XattrSet::new(), Vec::new());
    for name in names {
        if !XattrSets::hold(name.to_bytes()) {
            others.push(name);
        } else if let Some(value) = reader.value(&name).with_context(context)? {
            set.push((name, value));
        } // else it was removed meanwhile: as if it had not been listed
    }
    Ok(Some(Attributes { index, path: path(), set, others }))
}

/// Reads xattrs of a handle, or of a directory's entry without opening it (a device must not be opened).
enum Reader<'a> {
    File(BorrowedFd<'a>),
    /// A path below `/proc/self/fd/N`: the handle of the directory, then one name that is not followed.
    Entry(CString),
}

impl Reader<'_> {
    fn of_entry(parent: BorrowedFd<'_>, name: &CStr) -> Result<Self> {
        let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        Ok(Self::Entry(CString::new(path)?))
    }

    fn names(&self) -> rustix::io::Result<Vec<CString>> {
        let list = grow(|buffer| match self {
            Self::File(fd) => rustix::fs::flistxattr(fd, buffer),
            Self::Entry(path) => rustix::fs::llistxattr(path, buffer),
        });
        match list {
            Ok(list) => Ok(list
                .split_inclusive(|byte| *byte == 0)
                .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
                .map(CStr::to_owned)
                .collect()),
            Err(Errno::NOTSUP) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn value(&self, name: &CStr) -> rustix::io::Result<Option<Vec<u8>>> {
        let value = grow(|buffer| match self {
            Self::File(fd) => rustix::fs::fgetxattr(fd, name, buffer),
            Self::Entry(path) => rustix::fs::lgetxattr(path, name, buffer),
        });
        match value {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Calls with a small buffer, then with the largest that the kernel allows (64 KiB, `XATTR_SIZE_MAX`).
fn grow(mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut small = [0; 256];
    match call(&mut small) {
        Ok(length) => return Ok(small[..length].to_vec()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut large = vec![0; 65_536];
    let length = call(&mut large)?;
    large.truncate(length);
    Ok(large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn an_entry_is_read_without_being_opened_and_one_that_is_gone_is_an_error() {
        let work = tempfile::tempdir().expect("directory");
        nix::unistd::mkfifo(&work.path().join("pipe"), nix::sys::stat::Mode::S_IRUSR).expect("pipe");
        let batch = |name: &CStr| {
            let directory = std::fs::File::open(work.path()).expect("opens").into();
            let entries = vec![(name.to_owned(), InodeIndex(1))];
            Batch { directory, path: Path::new("/d").to_owned(), own: Some(InodeIndex(0)), entries }
        };
        let read = |batch: Batch| {
            let (send, batches) = std::sync::mpsc::channel();
            send.send(batch).expect("is taken");
            drop(send);
            super::read(batches)
        };
        // A pipe would be waited for.
        assert!(read(batch(c"pipe")).is_ok_and(|all| all.is_empty()));
        let error = read(batch(c"gone")).err().expect("is not there");
        assert!(format!("{error:#}").starts_with("cannot read the extended attributes of '/d/gone': "), "{error:#}");
    }
}
