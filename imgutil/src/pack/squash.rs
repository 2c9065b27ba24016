//! Writes a scanned tree as a squashfs into any output that only grows.

use super::contents;
use super::scan::{self, InodeIndex, Kind, Tree, Warnings};
use super::selinux::{self, Labels};
use crate::progress::Progress;
use crate::scrub::{KeyGuard, LeftOut, View, ViewOptions};
use crate::squashfs::{
    Attributes, BLOCK_SIZE, Compression, ContentId, DataWriter, Entry, InodeRef, SUPERBLOCK_SIZE, Special, TreeWriter,
    WriterOptions, XattrId,
};
use anyhow::{Context as _, Result};
use std::io::Write;
use std::os::fd::AsFd as _;
use std::path::Path;

/// The squashfs ends on a multiple of this (a loop device has no partial pages).
const PADDING: usize = 4096;

/// How a tree is made into a squashfs.
#[derive(Debug, Clone)]
pub struct SquashOptions {
    /// How blocks are compressed.
    pub compression: Compression,
    /// Bytes in a block, a power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// Threads that compress.
    pub processors: u32,
    /// What is left out.
    pub view: ViewOptions,
}

impl Default for SquashOptions {
    /// zstd 9 in blocks of 128 KiB on all processors; nothing is left out.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
        Self {
            compression: Compression::Zstd(9),
            block_size: BLOCK_SIZE,
            processors: u32::try_from(processors).unwrap_or(1),
            view: ViewOptions::default(),
        }
    }
}

/// A squashfs that was written.
pub struct Squashed<W> {
    /// The output, at its end.
    pub out: W,
    /// Belongs at offset 0, where zeros were written.
    pub superblock: [u8; SUPERBLOCK_SIZE],
    /// What could not be kept.
    pub warnings: Warnings,
    /// What was left out on purpose.
    pub left_out: LeftOut,
    /// `SELinux` labels that were set.
    pub labels: Option<Labels>,
    /// Inodes in the image.
    pub inodes: u64,
    /// Bytes of regular files, before compression and sharing.
    pub file_bytes: u64,
}

/// Packs the tree at `path` into `out`.
pub fn squash<W: Write>(path: &Path, out: W, options: &SquashOptions, progress: &Progress) -> Result<Squashed<W>> {
    let root = scan::open_root(path)?;
    let mut view = View::new(&options.view)?;
    let guard = KeyGuard::new(root.as_fd(), &options.view)?;
    let mut tree = scan::scan(root.as_fd(), &mut view).with_context(|| format!("in the tree '{}'", path.display()))?;
    let labels = selinux::label(&mut tree, root.as_fd())?;
    let file_bytes = tree.inodes.iter().map(|inode| if let Kind::File(size) = inode.kind { size } else { 0 }).sum();
    progress.total(file_bytes);
    // The newest time in the tree: the same tree gives the same bytes.
    let modified = tree.inodes.iter().map(|inode| inode.mtime).max().unwrap_or(0);
    let SquashOptions { compression, block_size, processors, .. } = *options;
    let mut data = DataWriter::new(out, WriterOptions { compression, block_size, workers: processors, modified })?;
    let contents = contents::store(&tree, root.as_fd(), guard, &mut data, progress)
        .with_context(|| format!("in the tree '{}'", path.display()))?;
    let mut inodes = Inodes::new(&tree, &contents, data.finish_data()?)?;
    let top = inodes.directory(InodeIndex(0), inodes.root_number() + 1)?;
    let root_number = inodes.root_number();
    let (mut out, superblock) = inodes.writer.finish(top, root_number)?;
    let used = u64::from_le_bytes(superblock[40..48].try_into().context("superblock")?);
    let rest = usize::try_from(used.next_multiple_of(PADDING as u64) - used)?;
    out.write_all(&[0; PADDING][..rest]).context("cannot write the end of the squashfs")?;
    Ok(Squashed {
        out,
        superblock,
        inodes: tree.inodes.len() as u64,
        file_bytes,
        warnings: tree.warnings,
        left_out: view.finish(),
        labels,
    })
}

/// Writes inodes and directories, children first.
struct Inodes<'a, W: Write> {
    tree: &'a Tree,
    contents: &'a [Option<ContentId>],
    writer: TreeWriter<W>,
    xattrs: Vec<XattrId>,
    /// Where each inode went, and under what number.
    written: Vec<Option<(u32, InodeRef)>>,
    next_number: u32,
}

impl<'a, W: Write> Inodes<'a, W> {
    fn new(tree: &'a Tree, contents: &'a [Option<ContentId>], mut writer: TreeWriter<W>) -> Result<Self> {
        let mut xattrs = Vec::with_capacity(tree.xattrs.len());
        for set in &tree.xattrs {
            xattrs.push(writer.xattrs(set.iter().map(|(name, value)| (name.as_c_str(), value.as_slice())))?);
        }
        Ok(Self { tree, contents, writer, xattrs, written: vec![None; tree.inodes.len()], next_number: 1 })
    }

    /// The root is written last, so its number is the count of inodes.
    fn root_number(&self) -> u32 {
        u32::try_from(self.tree.inodes.len()).unwrap_or(u32::MAX)
    }

    fn number(&mut self) -> u32 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Writes all that is below a directory, then the directory. Its number must be known to its subdirectories, which
    /// are written before: numbers of directories are given on the way down, from the top.
    fn directory(&mut self, index: InodeIndex, parent: u32) -> Result<InodeRef> {
        let own = if index == InodeIndex(0) { self.root_number() } else { self.number() };
        let tree = self.tree;
        let inode = &tree.inodes[index.0 as usize];
        let Kind::Directory(children) = &inode.kind else { anyhow::bail!("an inode that is no directory has entries") };
        for (_, child) in children {
            if self.written[child.0 as usize].is_some() {
                continue;
            }
            if let Kind::Directory(_) = tree.inodes[child.0 as usize].kind {
                self.directory(*child, own)?;
            } else {
                self.leaf(*child)?;
            }
        }
        let attributes = self.attributes(index, own);
        let mut entries = Vec::with_capacity(children.len());
        for (name, child) in children {
            let (number, inode) = self.written[child.0 as usize].context("an entry's inode was not written")?;
            entries.push(Entry { name, number, inode, mode: tree.inodes[child.0 as usize].mode });
        }
        let place = self.writer.directory(&attributes, parent, entries)?;
        self.written[index.0 as usize] = Some((own, place));
        Ok(place)
    }

    fn leaf(&mut self, index: InodeIndex) -> Result<()> {
        let number = self.number();
        let attributes = self.attributes(index, number);
        let special = match &self.tree.inodes[index.0 as usize].kind {
            Kind::File(_) => {
                let content = self.contents[index.0 as usize].context("a file's content was not stored")?;
                let place = self.writer.file(&attributes, content)?;
                self.written[index.0 as usize] = Some((number, place));
                return Ok(());
            }
            Kind::Directory(_) => anyhow::bail!("a directory is no leaf"),
            Kind::Symlink(target) => Special::Symlink(target),
            Kind::BlockDevice(major, minor) => Special::BlockDevice(*major, *minor),
            Kind::CharDevice(major, minor) => Special::CharDevice(*major, *minor),
            Kind::Fifo => Special::Fifo,
            Kind::Socket => Special::Socket,
        };
        let place = self.writer.special(&attributes, special)?;
        self.written[index.0 as usize] = Some((number, place));
        Ok(())
    }

    fn attributes(&self, index: InodeIndex, number: u32) -> Attributes {
        let inode = &self.tree.inodes[index.0 as usize];
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
