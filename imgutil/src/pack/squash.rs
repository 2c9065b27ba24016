//! Writes a scanned tree as a squashfs into any output that only grows.

use super::contents;
use super::scan::{self, Warnings};
use super::selinux::{self, Labels};
use crate::inodes::{self, InodeIndex, Written};
use crate::progress::Progress;
use crate::scrub::{KeyGuard, LeftOut, View, ViewOptions};
use crate::squashfs::{BLOCK_SIZE, Compression, DataWriter, MEMORY, SUPERBLOCK_SIZE, WriterOptions};
use anyhow::{Context as _, Result};
use std::io::Write;
use std::os::fd::AsFd as _;
use std::path::Path;

/// Bytes that are remembered of an inode, names, contents and links counted.
const INODE: u64 = 500;

/// How a tree is made into a squashfs.
#[derive(Debug, Clone)]
pub struct SquashOptions {
    /// How blocks are compressed.
    pub compression: Compression,
    /// Bytes in a block, a power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// Threads that compress, if `memory` is enough for so many.
    pub processors: u32,
    /// Bytes that compressing may take.
    pub memory: u64,
    /// What is left out.
    pub view: ViewOptions,
}

impl Default for SquashOptions {
    /// zstd 9 in blocks of 128 KiB on all processors that [`MEMORY`] is enough for; nothing is left out.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
        Self {
            compression: Compression::Zstd(9),
            block_size: BLOCK_SIZE,
            processors: u32::try_from(processors).unwrap_or(1),
            memory: MEMORY,
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
    let file_bytes = (0..).zip(&tree.inodes).map(|(index, _)| tree.size(InodeIndex(index))).sum();
    progress.total(file_bytes);
    // The newest time in the tree: the same tree gives the same bytes.
    let modified = tree.inodes.iter().map(|inode| inode.mtime).max().unwrap_or(0);
    let SquashOptions { compression, block_size, processors: workers, memory, .. } = *options;
    // What is remembered of a large tree is not there for compressing.
    let memory = memory.saturating_sub(tree.inodes.len() as u64 * INODE);
    let mut data = DataWriter::new(out, WriterOptions { compression, block_size, workers, memory, modified })?;
    let contents = contents::store(&tree, root.as_fd(), guard, &mut data, progress)
        .with_context(|| format!("in the tree '{}'", path.display()))?;
    let Written { out, superblock, .. } = inodes::write(&tree.inodes, &tree.xattrs, &contents, data.finish_data()?)?;
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
