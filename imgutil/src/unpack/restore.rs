//! Makes a directory tree of a squashfs: every object through the handle of its directory, no link ever followed.
//!
//! Order matters: the owner first (changing it drops setuid bits and file capabilities), then xattrs, then the mode,
//! then times; a directory's own attributes after everything in it.

use super::interrupt::Interrupts;
use crate::progress::Progress;
use crate::squashfs::{FileData, Inode, InodeKind, InodePlace, Piece, Reader, Source};
use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::process::{Gid, Uid};
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Directories below each other, at most (as in packing).
const MAX_DEPTH: usize = 1024;

/// Restores a whole squashfs into the empty directory behind `root`.
pub(super) fn restore<S: Source>(
    reader: &mut Reader<S>,
    root: BorrowedFd<'_>,
    progress: &Progress,
    interrupts: &Interrupts,
) -> Result<()> {
    progress.total(u64::from(reader.inode_count()));
    let place = reader.root();
    let inode = reader.inode(place)?;
    let mut restorer = Restorer { reader, root, progress, interrupts, names: HashMap::new(), seen: HashSet::new() };
    restorer.directory(root, place, &inode, &mut Vec::new())
}

struct Restorer<'a, S> {
    reader: &'a mut Reader<S>,
    root: BorrowedFd<'a>,
    progress: &'a Progress,
    interrupts: &'a Interrupts,
    /// The first name of each inode that has several, from the root.
    names: HashMap<InodePlace, Vec<CString>>,
    /// Directories that were entered: an image must not contain one in itself.
    seen: HashSet<InodePlace>,
}

impl<S: Source> Restorer<'_, S> {
    /// Fills the directory behind `fd`, then sets its attributes. `path` is its path from the root.
    fn directory(
        &mut self,
        fd: BorrowedFd<'_>,
        place: InodePlace,
        inode: &Inode,
        path: &mut Vec<CString>,
    ) -> Result<()> {
        let InodeKind::Directory(listing) = &inode.kind else {
            bail!("'{}': the image's root is no directory", display(path).display());
        };
        if path.len() > MAX_DEPTH || !self.seen.insert(place) {
            bail!("'{}': a directory contains itself, or they are nested too deep", display(path).display());
        }
        let mut entries = self.reader.entries(listing);
        loop {
            let entry = entries.next(self.reader);
            let Some(entry) = entry.with_context(|| format!("cannot list '{}'", display(path).display()))? else {
                break;
            };
            path.push(entry.name);
            self.entry(fd, entry.inode, path)?;
            path.pop();
        }
        let context = || format!("cannot set the attributes of '{}'", display(path).display());
        rustix::fs::fchown(fd, Some(uid(inode)), Some(gid(inode))).with_context(context)?;
        for (key, value) in self.reader.xattrs(inode)? {
            rustix::fs::fsetxattr(fd, &key, &value, XattrFlags::empty()).with_context(context)?;
        }
        rustix::fs::fchmod(fd, Mode::from_raw_mode(inode.mode.into())).with_context(context)?;
        rustix::fs::futimens(fd, &times(inode)).with_context(context)?;
        self.progress.advance(1);
        Ok(())
    }

    /// Makes one entry; its name is the last of `path`.
    fn entry(&mut self, parent: BorrowedFd<'_>, place: InodePlace, path: &mut Vec<CString>) -> Result<()> {
        self.interrupts.check()?;
        let context = |path: &[CString]| format!("cannot restore '{}'", display(path).display());
        let name = path.last().context("an entry has no name")?.clone();
        if let Some(first) = self.names.get(&place) {
            return link(self.root, first, parent, &name).with_context(|| context(path));
        }
        let inode = self.reader.inode(place).with_context(|| context(path))?;
        if matches!(inode.kind, InodeKind::Directory(_)) {
            let made = rustix::fs::mkdirat(parent, &name, Mode::RWXU).and_then(|()| open_directory(parent, &name));
            return self.directory(made.with_context(|| context(path))?.as_fd(), place, &inode, path);
        }
        self.leaf(parent, &name, &inode).with_context(|| context(path))?;
        if inode.links > 1 {
            self.names.insert(place, path.clone());
        }
        self.progress.advance(1);
        Ok(())
    }

    /// Makes what is no directory.
    fn leaf(&mut self, parent: BorrowedFd<'_>, name: &CStr, inode: &Inode) -> Result<()> {
        let kind = match &inode.kind {
            InodeKind::Directory(_) => bail!("it is a directory"),
            InodeKind::File(data) => return self.file(parent, name, inode, data),
            InodeKind::Symlink(target) => {
                rustix::fs::symlinkat(target.as_slice(), parent, name)?;
                None
            }
            InodeKind::BlockDevice(major, minor) => Some((FileType::BlockDevice, rustix::fs::makedev(*major, *minor))),
            InodeKind::CharDevice(major, minor) => {
                Some((FileType::CharacterDevice, rustix::fs::makedev(*major, *minor)))
            }
            InodeKind::Fifo => Some((FileType::Fifo, 0)),
            InodeKind::Socket => Some((FileType::Socket, 0)),
        };
        if let Some((kind, device)) = kind {
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)?;
        }
        self.leaf_attributes(parent, name, inode, kind.is_some())
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &CStr, inode: &Inode, data: &FileData) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
        let mut position = 0;
        let mut ends_in_hole = false;
        self.reader.contents::<anyhow::Error>(data, |piece| {
            ends_in_hole = matches!(piece, Piece::Hole(_));
            match piece {
                Piece::Hole(length) => position += length,
                Piece::Data(bytes) => {
                    file.write_all_at(bytes, position)?;
                    position += bytes.len() as u64;
                }
            }
            Ok(())
        })?;
        if ends_in_hole {
            file.set_len(data.size)?;
        }
        rustix::fs::fchown(&file, Some(uid(inode)), Some(gid(inode)))
            .context("cannot set its owner (are you root?)")?;
        for (key, value) in self.reader.xattrs(inode)? {
            let context = || format!("cannot set its extended attribute {}", key.to_string_lossy());
            rustix::fs::fsetxattr(&file, &key, &value, XattrFlags::empty()).with_context(context)?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(inode.mode.into()))?;
        rustix::fs::futimens(&file, &times(inode))?;
        Ok(())
    }

    /// Sets what symlinks, devices, pipes and sockets have, without opening them.
    fn leaf_attributes(&mut self, parent: BorrowedFd<'_>, name: &CStr, inode: &Inode, has_mode: bool) -> Result<()> {
        rustix::fs::chownat(parent, name, Some(uid(inode)), Some(gid(inode)), AtFlags::SYMLINK_NOFOLLOW)
            .context("cannot set its owner (are you root?)")?;
        let xattrs = self.reader.xattrs(inode)?;
        if !xattrs.is_empty() {
            // There is no call that takes a directory's handle and a name on all kernels we serve; the path is that
            // handle and one name, which is not followed.
            let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
            path.extend_from_slice(name.to_bytes());
            for (key, value) in xattrs {
                let context = || format!("cannot set its extended attribute {}", key.to_string_lossy());
                rustix::fs::lsetxattr(path.as_slice(), &key, &value, XattrFlags::empty()).with_context(context)?;
            }
        }
        if has_mode {
            // This call would follow a symbolic link; we made a device, pipe or socket, below a directory only we can enter.
            rustix::fs::chmodat(parent, name, Mode::from_raw_mode(inode.mode.into()), AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, name, &times(inode), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }
}

/// Gives an inode another name. The first one is looked up step by step from the root.
fn link(root: BorrowedFd<'_>, first: &[CString], parent: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let (old_name, directories) = first.split_last().context("a hard link to nothing")?;
    let mut directory: Option<OwnedFd> = None;
    for step in directories {
        let at = directory.as_ref().map_or(root, |fd| fd.as_fd());
        directory = Some(open_directory(at, step)?);
    }
    let at = directory.as_ref().map_or(root, |fd| fd.as_fd());
    rustix::fs::linkat(at, old_name, parent, name, AtFlags::empty()).context("cannot make a hard link")
}

fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn uid(inode: &Inode) -> Uid {
    Uid::from_raw(inode.uid)
}

fn gid(inode: &Inode) -> Gid {
    Gid::from_raw(inode.gid)
}

fn times(inode: &Inode) -> Timestamps {
    let time = Timespec { tv_sec: inode.mtime.into(), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn display(path: &[CString]) -> PathBuf {
    let mut text = PathBuf::from("/");
    text.extend(path.iter().map(|name| Path::new(OsStr::from_bytes(name.to_bytes()))));
    text
}
