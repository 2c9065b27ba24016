//! The inodes of an image between the two ends of packing: a scan of a tree or a stream of files fills them in, and when all contents
//! are stored they are written as the end of a squashfs. Where they came from is not known here.

use crate::squashfs::{Attributes, ContentId, Entry, InodeRef, SUPERBLOCK_SIZE, Special, TreeWriter, XattrId};
use anyhow::{Context as _, Result, bail};
use std::collections::HashMap;
use std::ffi::CString;
use std::io::Write;

/// Directories below each other, at most: each takes a stack frame, here and where they come from.
pub(crate) const MAX_DEPTH: usize = 1024;
/// The squashfs ends on a multiple of this (a loop device has no partial pages).
const PADDING: u64 = 4096;

/// Index into a list of inodes. The root is the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct InodeIndex(pub(crate) u32);

/// One inode.
#[derive(Debug)]
pub(crate) struct Inode {
    /// `st_mode`.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Unix seconds, as a squashfs holds them: 1970 to 2106.
    pub(crate) mtime: u32,
    /// Names found in the tree; for a directory 2 and one per subdirectory.
    pub(crate) links: u32,
    /// Index into the list of sets.
    pub(crate) xattrs: Option<u32>,
    pub(crate) kind: Kind,
}

/// What an inode is, with what only this kind has.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A directory's entries, sorted by the bytes of their names.
    Directory(Vec<(CString, InodeIndex)>),
    /// A regular file of this size, in bytes.
    File(u64),
    Symlink(Vec<u8>),
    BlockDevice(u32, u32),
    CharDevice(u32, u32),
    Fifo,
    Socket,
}

/// A set of xattrs: full names and values, in order of names.
pub(crate) type XattrSet = Vec<(CString, Vec<u8>)>;

/// Different sets of xattrs, each once.
#[derive(Debug, Default)]
pub(crate) struct XattrSets {
    sets: Vec<XattrSet>,
    known: HashMap<XattrSet, u32>,
}

impl XattrSets {
    /// Whether a squashfs has room for an attribute of this name.
    pub(crate) fn hold(name: &[u8]) -> bool {
        [&b"user."[..], b"trusted.", b"security."].iter().any(|prefix| name.starts_with(prefix))
    }

    /// The index of a set; none for an empty one.
    pub(crate) fn add(&mut self, mut set: XattrSet) -> Result<Option<u32>> {
        if set.is_empty() {
            return Ok(None);
        }
        set.sort_unstable();
        if let Some(index) = self.known.get(&set) {
            return Ok(Some(*index));
        }
        let index = u32::try_from(self.sets.len()).context("too many different extended attributes")?;
        self.sets.push(set.clone());
        self.known.insert(set, index);
        Ok(Some(index))
    }

    /// All sets, by index.
    pub(crate) fn into_sets(self) -> Vec<XattrSet> {
        self.sets
    }
}

/// The index that the next inode of a list gets.
pub(crate) fn next_index(inodes: &[Inode]) -> Result<InodeIndex> {
    let index = u32::try_from(inodes.len()).ok().filter(|index| *index < u32::MAX - 1);
    Ok(InodeIndex(index.context("the tree has more inodes than a squashfs can number")?))
}

/// A squashfs that is complete but for its superblock.
pub(crate) struct Written<W> {
    /// The output, at its end.
    pub(crate) out: W,
    /// Belongs at the squashfs's beginning, where zeros were written.
    pub(crate) superblock: [u8; SUPERBLOCK_SIZE],
    /// Bytes of the squashfs, padding included.
    pub(crate) length: u64,
}

/// Writes `inodes` behind their contents; `contents` has that of each regular file.
pub(crate) fn write<W: Write>(
    inodes: &[Inode],
    xattrs: &[XattrSet],
    contents: &[Option<ContentId>],
    mut writer: TreeWriter<W>,
) -> Result<Written<W>> {
    let mut sets = Vec::with_capacity(xattrs.len());
    for set in xattrs {
        sets.push(writer.xattrs(set.iter().map(|(name, value)| (name.as_c_str(), value.as_slice())))?);
    }
    let written = vec![None; inodes.len()];
    let mut writing = Writing { inodes, contents, writer, xattrs: sets, written, next_number: 1 };
    // The root is written last, so its number is the count of inodes.
    let root_number = u32::try_from(inodes.len()).context("too many inodes for a squashfs")?;
    let root = writing.directory(InodeIndex(0), root_number, root_number + 1)?;
    let (mut out, superblock) = writing.writer.finish(root, root_number)?;
    let used = u64::from_le_bytes(superblock[40..48].try_into().context("superblock")?);
    let length = used.next_multiple_of(PADDING);
    out.write_all(&vec![0; usize::try_from(length - used)?]).context("cannot write the end of the squashfs")?;
    Ok(Written { out, superblock, length })
}

/// Writes inodes and directories, children first.
struct Writing<'a, W: Write> {
    inodes: &'a [Inode],
    contents: &'a [Option<ContentId>],
    writer: TreeWriter<W>,
    xattrs: Vec<XattrId>,
    /// Where each inode went, and under what number.
    written: Vec<Option<(u32, InodeRef)>>,
    next_number: u32,
}

impl<W: Write> Writing<'_, W> {
    /// Writes all that is below a directory, then the directory. Its number must be known to its subdirectories, which
    /// are written before: numbers of directories are given on the way down, from the top.
    fn directory(&mut self, index: InodeIndex, own: u32, parent: u32) -> Result<InodeRef> {
        let inodes = self.inodes;
        let Kind::Directory(children) = &inodes[index.0 as usize].kind else {
            bail!("an inode that is no directory has entries")
        };
        for (_, child) in children {
            if self.written[child.0 as usize].is_some() {
                continue;
            }
            let number = self.next_number;
            self.next_number += 1;
            let place = if let Kind::Directory(_) = inodes[child.0 as usize].kind {
                self.directory(*child, number, own)?
            } else {
                self.leaf(*child, number)?
            };
            self.written[child.0 as usize] = Some((number, place));
        }
        let mut entries = Vec::with_capacity(children.len());
        for (name, child) in children {
            let (number, inode) = self.written[child.0 as usize].context("an entry's inode was not written")?;
            entries.push(Entry { name, number, inode, mode: inodes[child.0 as usize].mode });
        }
        let attributes = self.attributes(index, own);
        Ok(self.writer.directory(&attributes, parent, entries)?)
    }

    fn leaf(&mut self, index: InodeIndex, number: u32) -> Result<InodeRef> {
        let attributes = self.attributes(index, number);
        let special = match &self.inodes[index.0 as usize].kind {
            Kind::File(_) => {
                let content = self.contents[index.0 as usize].context("a file's content was not stored")?;
                return Ok(self.writer.file(&attributes, content)?);
            }
            Kind::Directory(_) => bail!("a directory is no leaf"),
            Kind::Symlink(target) => Special::Symlink(target),
            Kind::BlockDevice(major, minor) => Special::BlockDevice(*major, *minor),
            Kind::CharDevice(major, minor) => Special::CharDevice(*major, *minor),
            Kind::Fifo => Special::Fifo,
            Kind::Socket => Special::Socket,
        };
        Ok(self.writer.special(&attributes, special)?)
    }

    fn attributes(&self, index: InodeIndex, number: u32) -> Attributes {
        let inode = &self.inodes[index.0 as usize];
        Attributes {
            #[allow(clippy::cast_possible_truncation)] // twelve bits
            mode: (inode.mode & 0o7777) as u16,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            number,
            links: inode.links,
            xattrs: inode.xattrs.map_or(XattrId::NONE, |set| self.xattrs[set as usize]),
        }
    }
}
