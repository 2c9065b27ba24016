//! Files by directory handle and name: no symbolic link is ever followed.

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags, openat, statat, unlinkat,
};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// overlayfs' own attributes: of root's overlays, and of those in a user namespace.
const OWN: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

pub(super) fn stat(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Stat>> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// The mark of a name that was removed: a character device 0, 0.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

pub(super) fn open_directory(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// The names in a directory, sorted.
pub(super) fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let listing = openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(listing)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes a file, or a directory with all that is in it; what is not there is no error.
pub(super) fn remove(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = open_directory(at, name)?;
    for inner in names(directory.as_fd())? {
        remove(directory.as_fd(), &inner)?;
    }
    Ok(unlinkat(at, name, AtFlags::REMOVEDIR)?)
}

/// A path to an object, for calls that take no handle of a directory. One name is appended, and not followed by those calls.
fn path_of(at: BorrowedFd<'_>, name: &OsStr) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", at.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.as_bytes());
    path
}

/// All extended attributes but overlayfs' own.
pub(super) fn xattrs(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<BTreeMap<CString, Vec<u8>>> {
    let mut all = all_xattrs(at, name)?;
    all.retain(|key, _| !is_overlays(key));
    Ok(all)
}

fn is_overlays(key: &CString) -> bool {
    OWN.iter().any(|prefix| key.to_bytes().starts_with(prefix))
}

fn all_xattrs(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<BTreeMap<CString, Vec<u8>>> {
    let path = path_of(at, name);
    let mut list = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(path.as_slice(), list.as_mut_slice()) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    let mut found = BTreeMap::new();
    for key in list[..length].split(|byte| *byte == 0).filter(|key| !key.is_empty()) {
        let key = CString::new(key).map_err(io::Error::other)?;
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path.as_slice(), &key, value.as_mut_slice())?;
        value.truncate(length);
        found.insert(key, value);
    }
    Ok(found)
}

/// Whether a directory of the layer hides all that the tree has under its name.
pub(super) fn is_opaque(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<bool> {
    let marks = all_xattrs(at, name)?;
    Ok(OWN.iter().any(|prefix| {
        let key = CString::new([*prefix, b"opaque"].concat()).unwrap_or_default();
        marks.get(&key).is_some_and(|value| value == b"y")
    }))
}

/// Whether a file of the layer began as a copy of the tree's.
pub(super) fn is_copied_up(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<bool> {
    let marks = all_xattrs(at, name)?;
    Ok(marks.keys().any(|key| is_overlays(key) && key.to_bytes().ends_with(b".origin")))
}

/// Takes overlayfs' attributes off an object.
pub(super) fn strip(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let path = path_of(at, name);
    for key in all_xattrs(at, name)?.into_keys().filter(is_overlays) {
        rustix::fs::lremovexattr(path.as_slice(), &key)?;
    }
    Ok(())
}

/// Gives the directory `to` the attributes of the directory `from`, and owner, mode and time of `stat`, in the order that lets
/// each stay.
pub(super) fn copy_attributes(from: BorrowedFd<'_>, stat: &Stat, to: BorrowedFd<'_>) -> io::Result<()> {
    let here = OsStr::new(".");
    rustix::fs::fchown(
        to,
        Some(rustix::process::Uid::from_raw(stat.st_uid)),
        Some(rustix::process::Gid::from_raw(stat.st_gid)),
    )?;
    let (wanted, present) = (xattrs(from, here)?, xattrs(to, here)?);
    for key in present.keys().filter(|key| !wanted.contains_key(*key)) {
        rustix::fs::fremovexattr(to, key)?;
    }
    for (key, value) in wanted.iter().filter(|(key, value)| present.get(*key) != Some(*value)) {
        rustix::fs::fsetxattr(to, key, value, XattrFlags::empty())?;
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    Ok(rustix::fs::futimens(to, &times(stat))?)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: modified(stat),
    }
}

pub(super) fn modified(stat: &Stat) -> Timespec {
    Timespec { tv_sec: stat.st_mtime, tv_nsec: i64::try_from(stat.st_mtime_nsec).unwrap_or(0) }
}

pub(super) fn link_target(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(at, name, Vec::new())?.into_bytes())
}

/// Whether two regular files have the same bytes; their lengths are known to be equal.
pub(super) fn same_content(a: (BorrowedFd<'_>, &OsStr), b: (BorrowedFd<'_>, &OsStr)) -> io::Result<bool> {
    let open = |(at, name): (BorrowedFd<'_>, &OsStr)| {
        openat(at, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .map(File::from)
    };
    let (mut a, mut b) = (open(a)?, open(b)?);
    let (mut left, mut right) = (vec![0; 131_072], vec![0; 131_072]);
    loop {
        let count = a.read(&mut left)?;
        if count == 0 {
            return Ok(b.read(&mut right[..1])? == 0);
        }
        match b.read_exact(&mut right[..count]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        }
        if left[..count] != right[..count] {
            return Ok(false);
        }
    }
}
