//! A tree as it would be packed, for those who compare it.

use super::scan::{self, Tree, join};
use crate::diff;
use crate::inodes::{InodeIndex, Kind};
use crate::scrub::{View, ViewOptions};
use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The tree's handle, its files by path, and the bytes of its regular files.
pub(crate) fn look_at_tree(
    path: &Path,
    options: &ViewOptions,
) -> Result<(OwnedFd, BTreeMap<PathBuf, diff::Entry>, u64)> {
    let root = scan::open_root(path)?;
    let mut view = View::new(options)?;
    let tree = scan::scan(root.as_fd(), &mut view).with_context(|| format!("in the tree '{}'", path.display()))?;
    let bytes = (0..).zip(&tree.inodes).map(|(index, _)| tree.size(InodeIndex(index))).sum();
    let mut entries = BTreeMap::new();
    list(&tree, InodeIndex(0), PathBuf::from("/"), &mut entries);
    Ok((root, entries, bytes))
}

fn list(tree: &Tree, index: InodeIndex, path: PathBuf, entries: &mut BTreeMap<PathBuf, diff::Entry>) {
    let inode = &tree.inodes[index.0 as usize];
    let mut entry = diff::Entry {
        kind: diff::Kind::Directory,
        mode: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        size: tree.size(index),
        mtime: inode.mtime,
        target: None,
        device: None,
        xattrs: BTreeMap::new(),
    };
    match &inode.kind {
        Kind::Directory(children) => {
            for (name, child) in children {
                list(tree, *child, join(&path, name), entries);
            }
        }
        Kind::File(_) => entry.kind = diff::Kind::File,
        Kind::Symlink(target) => {
            entry.kind = diff::Kind::Symlink;
            entry.target = Some(PathBuf::from(OsStr::from_bytes(target)));
            // Its own bits mean nothing.
            entry.mode = 0o777;
        }
        Kind::BlockDevice(major, minor) => {
            (entry.kind, entry.device) = (diff::Kind::BlockDevice, Some((*major, *minor)));
        }
        Kind::CharDevice(major, minor) => {
            (entry.kind, entry.device) = (diff::Kind::CharDevice, Some((*major, *minor)));
        }
        Kind::Fifo => entry.kind = diff::Kind::Fifo,
        Kind::Socket => entry.kind = diff::Kind::Socket,
    }
    if let Some(set) = inode.xattrs {
        for (name, value) in &tree.xattrs[set as usize] {
            entry.xattrs.insert(name.to_string_lossy().into_owned(), hex::encode(value));
        }
    }
    entries.insert(path, entry);
}
