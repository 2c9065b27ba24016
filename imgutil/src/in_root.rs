//! Opens files of a root tree as that root would: absolute links stay inside, and nothing leads out.

use anyhow::{Context as _, Result};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::BorrowedFd;

/// Opens a regular file of the tree; `None` if there is none.
pub(crate) fn open(root: BorrowedFd<'_>, path: &str) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file = match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
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
    let directory = match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
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
