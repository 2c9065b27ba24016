//! A tree as it would be packed, for those who compare it.

use super::scan::{self, Tree, join};
use crate::diff;
use crate::inodes::{InodeIndex, Kind};
use crate::scrub::{View, ViewOptions};
use anyhow::{Context as _, Result};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// A tree as it would be packed.
pub(crate) struct Looked {
    /// The tree's handle.
    pub(crate) root: OwnedFd,
    /// Its files by path.
    pub(crate) entries: BTreeMap<PathBuf, diff::Entry>,
    /// Of files with several names each name, and which file it is.
    pub(crate) linked: HashMap<PathBuf, u64>,
    /// Bytes of its regular files.
    pub(crate) bytes: u64,
}

/// Looks at the tree at `path`.
pub(crate) fn look_at_tree(path: &Path, options: &ViewOptions) -> Result<Looked> {
    let root = scan::open_root(path)?;
    let mut view = View::new(options)?;
    let tree = scan::scan(root.as_fd(), &mut view).with_context(|| format!("in the tree '{}'", path.display()))?;
    let bytes = (0..).zip(&tree.inodes).map(|(index, _)| tree.size(InodeIndex(index))).sum();
    let mut looked = Looked { root, entries: BTreeMap::new(), linked: HashMap::new(), bytes };
    list(&tree, InodeIndex(0), PathBuf::from("/"), &mut looked);
    Ok(looked)
}

fn list(tree: &Tree, index: InodeIndex, path: PathBuf, looked: &mut Looked) {
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
                list(tree, *child, join(&path, name), looked);
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
    if inode.links > 1 && entry.kind != diff::Kind::Directory {
        looked.linked.insert(path.clone(), index.0.into());
    }
    looked.entries.insert(path, entry);
}
