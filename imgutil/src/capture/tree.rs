//! The tree of one file system as it arrives: entries in the order of the stream, kept small, until all contents are written and the
//! inodes can follow.

use super::tar::{Entry, Kind};
use crate::squashfs::ContentId;
use anyhow::{Result, bail};
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;

/// A set of xattrs: full names and values.
pub(super) type Xattrs = Vec<(CString, Vec<u8>)>;

/// An inode.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) what: What,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: u32,
    /// Names of it; of a directory: 2 and one for each directory in it.
    pub(super) links: u32,
    /// In [`Tree::xattrs`].
    pub(super) xattrs: Option<usize>,
}

/// What an inode is.
#[derive(Debug)]
pub(super) enum What {
    Directory(BTreeMap<CString, usize>),
    File(ContentId),
    Symlink(Vec<u8>),
    BlockDevice(u32, u32),
    CharDevice(u32, u32),
    Fifo,
}

/// The tree; node 0 is its root.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    /// Each different set once.
    pub(super) xattrs: Vec<Xattrs>,
    known_xattrs: HashMap<Xattrs, usize>,
    by_path: HashMap<Vec<Vec<u8>>, usize>,
    /// What could not be kept.
    pub(super) acls: Vec<Vec<Vec<u8>>>,
}

/// Prefixes of names that a squashfs can hold.
const XATTR_KINDS: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

impl Tree {
    /// Adds an entry; `content` is that of a regular file. A hard link to something that is not there (it was left out) is left out too:
    /// then `false`.
    pub(super) fn add(&mut self, entry: Entry, content: Option<ContentId>) -> Result<bool> {
        if let Kind::HardLink(target) = &entry.kind {
            let Some(index) = self.by_path.get(&super::tar::parts(target)?).copied() else { return Ok(false) };
            self.nodes[index].links += 1;
            self.place(&entry.path, index)?;
            return Ok(true);
        }
        let what = match entry.kind {
            Kind::Directory => What::Directory(BTreeMap::new()),
            Kind::Symlink(target) => What::Symlink(target),
            Kind::CharDevice(major, minor) => What::CharDevice(major, minor),
            Kind::BlockDevice(major, minor) => What::BlockDevice(major, minor),
            Kind::Fifo => What::Fifo,
            Kind::File(_) | Kind::HardLink(_) => match content {
                Some(content) => What::File(content),
                None => bail!("a file came without contents"),
            },
        };
        if entry.has_acl {
            self.acls.push(entry.path.clone());
        }
        let links = if matches!(what, What::Directory(_)) { 2 } else { 1 };
        let xattrs = self.xattrs_of(entry.xattrs);
        let index = self.nodes.len();
        self.nodes.push(Node {
            what,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            // What a squashfs can hold: 1970 to 2106.
            mtime: u32::try_from(entry.mtime.max(0)).unwrap_or(u32::MAX),
            links,
            xattrs,
        });
        if index == 0 {
            if !entry.path.is_empty() || !matches!(self.nodes[0].what, What::Directory(_)) {
                bail!("the stream of files does not begin with its root");
            }
        } else {
            self.place(&entry.path, index)?;
        }
        self.by_path.insert(entry.path, index);
        Ok(true)
    }

    /// Gives an inode a name in the directory that it is in.
    fn place(&mut self, path: &[Vec<u8>], index: usize) -> Result<()> {
        let Some((name, parent)) = path.split_last() else { bail!("the root comes twice in the stream of files") };
        let Some(parent) = self.by_path.get(parent).copied() else { bail!("a file comes before its directory") };
        let is_directory = matches!(self.nodes[index].what, What::Directory(_));
        let name = CString::new(name.clone())?;
        let What::Directory(entries) = &mut self.nodes[parent].what else { bail!("a file lies in a file") };
        if entries.insert(name, index).is_some() {
            bail!("a name comes twice in the stream of files");
        }
        if is_directory {
            self.nodes[parent].links += 1;
        }
        Ok(())
    }

    fn xattrs_of(&mut self, pairs: Vec<(Vec<u8>, Vec<u8>)>) -> Option<usize> {
        let set: Xattrs = pairs
            .into_iter()
            .filter(|(name, _)| XATTR_KINDS.iter().any(|kind| name.starts_with(kind)))
            .filter_map(|(name, value)| Some((CString::new(name).ok()?, value)))
            .collect();
        if set.is_empty() {
            return None;
        }
        if let Some(known) = self.known_xattrs.get(&set) {
            return Some(*known);
        }
        self.xattrs.push(set.clone());
        self.known_xattrs.insert(set, self.xattrs.len() - 1);
        Some(self.xattrs.len() - 1)
    }
}
