//! The image's tree in a writable file system: everything that squashfs holds, with owners, modes, times, extended attributes, devices,
//! hard links and holes.

use super::{RootError, step};
use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr, lsetxattr, utimensat};
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, lchown,
};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Files that are copied side by side: each waits for the network and unpacks on a processor of its own.
const SIDE_BY_SIDE: usize = 4;
/// Read in one go: a squashfs block.
const PIECE: usize = 128 << 10;
/// What a file system allocates.
const BLOCK: usize = 4096;
/// Longest list of names of attributes, and longest attribute (Linux: `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const ATTRIBUTES: usize = 64 << 10;

/// What a tree takes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Bytes of its files and directories, in whole blocks.
    pub(super) bytes: u64,
    /// Files, directories, and whatever else has an inode.
    pub(super) inodes: u64,
}

fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootError {
    step(format!("{doing} '{}'", path.display()))
}

/// Looks at the whole tree once; of squashfs that reads the tables only.
pub(super) fn measure(root: &Path) -> Result<Size, RootError> {
    let mut size = Size::default();
    let mut linked = HashSet::new();
    walk(root, &mut |_, meta| {
        let is_first = meta.is_dir() || meta.nlink() == 1 || linked.insert(meta.ino());
        if is_first {
            size.inodes += 1;
            let bytes = if meta.is_file() { meta.len().next_multiple_of(BLOCK as u64) } else { BLOCK as u64 };
            size.bytes = size.bytes.saturating_add(bytes);
        }
        Ok(())
    })?;
    Ok(size)
}

/// Everything below `dir`, and `dir` itself first; a directory before what is in it.
fn walk(dir: &Path, each: &mut impl FnMut(&Path, &Metadata) -> Result<(), RootError>) -> Result<(), RootError> {
    let mut directories = vec![dir.to_owned()];
    each(dir, &dir.symlink_metadata().map_err(at("look at", dir))?)?;
    while let Some(dir) = directories.pop() {
        for entry in std::fs::read_dir(&dir).map_err(at("read the directory", &dir))? {
            let path = entry.map_err(at("read the directory", &dir))?.path();
            let meta = path.symlink_metadata().map_err(at("look at", &path))?;
            each(&path, &meta)?;
            if meta.is_dir() {
                directories.push(path);
            }
        }
    }
    Ok(())
}

/// Copies the tree `from` into the empty directory `to`.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), RootError> {
    let place = |path: &Path| match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
        Ok(rest) => to.join(rest),
        // Everything that is walked is below.
        Err(_) => path.to_owned(),
    };
    let mut first: HashMap<u64, PathBuf> = HashMap::new();
    let (mut files, mut links, mut directories) = (Vec::new(), Vec::new(), Vec::new());
    walk(from, &mut |path, meta| {
        let target = place(path);
        if !meta.is_dir() && meta.nlink() > 1 {
            if let Some(first) = first.get(&meta.ino()) {
                links.push((first.clone(), target));
                return Ok(());
            }
            first.insert(meta.ino(), target.clone());
        }
        if meta.is_dir() {
            if target != to {
                std::fs::create_dir(&target).map_err(at("make", &target))?;
            }
            // Their times change with what is put into them: last.
            directories.push((path.to_owned(), target, meta.clone()));
        } else if meta.is_file() {
            files.push((path.to_owned(), target, meta.clone()));
        } else {
            special(path, &target, meta)?;
        }
        Ok(())
    })?;
    // The order of the walk is about that of the image.
    files.reverse();
    copy_files(&Mutex::new(files))?;
    for (first, link) in links {
        std::fs::hard_link(&first, &link).map_err(at("make the hard link", &link))?;
    }
    for (path, target, meta) in directories.into_iter().rev() {
        dress(&path, &target, &meta)?;
    }
    Ok(())
}

type Files = Mutex<Vec<(PathBuf, PathBuf, Metadata)>>;

fn copy_files(files: &Files) -> Result<(), RootError> {
    std::thread::scope(|scope| {
        let work = || {
            let mut buffer = vec![0; PIECE];
            loop {
                let next = files.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
                let Some((path, target, meta)) = next else { return Ok(()) };
                if let Err(error) = file(&path, &target, &mut buffer).and_then(|()| dress(&path, &target, &meta)) {
                    // The others need not go on.
                    files.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
                    return Err(error);
                }
            }
        };
        let workers: Vec<_> = (0..SIDE_BY_SIDE).map(|_| scope.spawn(work)).collect();
        let lost = || Err(step("copy the image's files")(io::Error::other("a thread of it panicked")));
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| lost()))
    })
}

/// The content of a file; where it has nothing but zeros, the copy has a hole.
fn file(path: &Path, target: &Path, buffer: &mut [u8]) -> Result<(), RootError> {
    let mut source = File::open(path).map_err(at("open", path))?;
    let copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target).map_err(at("make", target))?;
    let mut offset = 0;
    loop {
        let mut length = 0;
        // Whole pieces, so that blocks stay blocks.
        while length < buffer.len() {
            match source.read(&mut buffer[length..]).map_err(at("read", path))? {
                0 => break,
                more => length += more,
            }
        }
        if length == 0 {
            break;
        }
        for (block, start) in buffer[..length].chunks(BLOCK).zip((offset..).step_by(BLOCK)) {
            if block.iter().any(|byte| *byte != 0) {
                copy.write_all_at(block, start).map_err(at("write", target))?;
            }
        }
        offset += length as u64;
    }
    copy.set_len(offset).map_err(at("write", target))
}

/// What is neither a file nor a directory.
fn special(path: &Path, target: &Path, meta: &Metadata) -> Result<(), RootError> {
    let kind = meta.file_type();
    if kind.is_symlink() {
        let to = std::fs::read_link(path).map_err(at("read the link", path))?;
        std::os::unix::fs::symlink(to, target).map_err(at("make the link", target))?;
    } else {
        let (flag, device) = if kind.is_char_device() {
            (SFlag::S_IFCHR, meta.rdev())
        } else if kind.is_block_device() {
            (SFlag::S_IFBLK, meta.rdev())
        } else if kind.is_fifo() {
            (SFlag::S_IFIFO, 0)
        } else {
            (SFlag::S_IFSOCK, 0)
        };
        mknod(target, flag, Mode::from_bits_truncate(0o600), device)
            .map_err(|error| at("make the node", target)(error.into()))?;
    }
    dress(path, target, meta)
}

/// Owner, mode, attributes, times: in this order, because each may undo the one after it.
fn dress(path: &Path, target: &Path, meta: &Metadata) -> Result<(), RootError> {
    lchown(target, Some(meta.uid()), Some(meta.gid())).map_err(at("give away", target))?;
    if !meta.is_symlink() {
        std::fs::set_permissions(target, Permissions::from_mode(meta.mode() & 0o7777))
            .map_err(at("set the mode of", target))?;
    }
    attributes(path, target)?;
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps {
        last_access: time(meta.mtime(), meta.mtime_nsec()),
        last_modification: time(meta.mtime(), meta.mtime_nsec()),
    };
    utimensat(CWD, target, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| at("set the times of", target)(error.into()))
}

fn attributes(path: &Path, target: &Path) -> Result<(), RootError> {
    let mut names = [0; 1024];
    // Nearly no file has more, or any.
    let list = match llistxattr(path, &mut names[..]) {
        Ok(0) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        Ok(length) => names[..length].to_vec(),
        Err(rustix::io::Errno::RANGE) => {
            let mut names = vec![0; ATTRIBUTES];
            let length =
                llistxattr(path, &mut names[..]).map_err(|error| at("read the attributes of", path)(error.into()))?;
            names.truncate(length);
            names
        }
        Err(error) => return Err(at("read the attributes of", path)(error.into())),
    };
    let mut value = vec![0; ATTRIBUTES];
    for name in list.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let length =
            lgetxattr(path, name, &mut value[..]).map_err(|error| at("read the attributes of", path)(error.into()))?;
        lsetxattr(target, name, &value[..length], XattrFlags::empty())
            .map_err(|error| at("set the attributes of", target)(error.into()))?;
    }
    Ok(())
}
