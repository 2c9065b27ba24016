//! First half of writing: file contents, cut into blocks and compressed by libsquashfs's workers.
#![allow(unsafe_code)] // calls into libsquashfs

use super::SUPERBLOCK_SIZE;
use super::compressor::{Compressor, destroy};
use super::error::SquashfsError;
use super::ffi;
use super::sink::{Shared, Sink, SinkBlocks, SinkFile};
use super::tree::TreeWriter;
use super::workers::Workers;
use std::io::Write;
use std::ptr::{self, NonNull};

#[allow(clippy::cast_possible_truncation)] // some 56 bytes
const DESC_SIZE: u32 = size_of::<ffi::BlockProcessorDesc>() as u32;

/// How a squashfs is written.
#[derive(Debug, Clone, Copy)]
pub struct WriterOptions {
    /// How blocks are compressed.
    pub compression: Compression,
    /// Bytes in a block, a power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// Threads that compress, if `memory` is enough for so many.
    pub workers: u32,
    /// Bytes that compressing may take.
    pub memory: u64,
    /// Time in the superblock, Unix seconds.
    pub modified: u32,
}

/// Compression of a squashfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// zstd at a level from 1 to 22.
    Zstd(u32),
    /// xz: a tenth smaller than zstd, and read four times slower.
    Xz,
}

/// A stored content; files with the same bytes share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentId(pub(super) usize);

/// Writes contents. [`Self::finish_data`] leads to the second half.
pub struct DataWriter<W: Write> {
    // Order of fields is order of destruction: whoever holds a pointer goes before what it points to.
    processor: Processor,
    contents: Contents,
    fragments: FragTable,
    blocks: Shared<SinkBlocks<W>>,
    parts: Parts<W>,
    block_size: u64,
}

/// What both halves need.
pub(super) struct Parts<W> {
    pub(super) superblock: ffi::Super,
    pub(super) compressor: Compressor,
    pub(super) file: Shared<SinkFile<W>>,
    pub(super) sink: Sink<W>,
}

impl<W: Write> Parts<W> {
    /// Turns a library's code into an error; the output's own error goes first.
    pub(super) fn check(&self, step: &'static str, code: i32) -> Result<(), SquashfsError> {
        if code >= 0 {
            return Ok(());
        }
        Err(match self.sink.take_failure() {
            Some(cause) => SquashfsError::Output { step, cause },
            None => SquashfsError::library(step, code),
        })
    }
}

impl<W: Write> DataWriter<W> {
    /// Starts a squashfs at the beginning of `out`: room for the superblock and the compressor's options are written.
    pub fn new(out: W, options: WriterOptions) -> Result<Self, SquashfsError> {
        let sink = Sink::new(out);
        let file = SinkFile::create(sink.clone());
        let mut superblock = ffi::Super::default();
        // SAFETY: `superblock` is a valid structure of the library's layout.
        let code = unsafe {
            ffi::sqfs_super_init(
                &raw mut superblock,
                options.block_size as usize,
                options.modified,
                u32::from(options.compression.id()),
            )
        };
        if code != 0 {
            return Err(SquashfsError::library("set up the superblock", code));
        }
        let step = "write the start of the squashfs";
        sink.append(&[0; SUPERBLOCK_SIZE]).map_err(|cause| SquashfsError::Output { step, cause })?;
        let compressor = Compressor::encoder(options.compression, options.block_size)?;
        let mut parts = Parts { superblock, compressor, file, sink };
        match parts.compressor.write_options(parts.file.as_ptr()) {
            Ok(true) => parts.superblock.flags |= super::format::FLAG_COMPRESSOR_OPTIONS,
            Ok(false) => {}
            Err(error) => {
                return Err(match parts.sink.take_failure() {
                    Some(cause) => SquashfsError::Output { step, cause },
                    None => error,
                });
            }
        }

        let blocks = SinkBlocks::create(parts.sink.clone());
        let fragments = FragTable::new()?;
        let workers = Workers::within(options.memory, options.workers, options.compression, options.block_size);
        let desc = ffi::BlockProcessorDesc {
            size: DESC_SIZE,
            max_block_size: options.block_size,
            num_workers: workers.count,
            max_backlog: workers.backlog,
            cmp: parts.compressor.as_ptr(),
            wr: blocks.as_ptr(),
            tbl: fragments.0.as_ptr(),
            // No file to read from: fragments are never compared by reading back (and are marked not to be compared).
            file: ptr::null_mut(),
            uncmp: ptr::null_mut(),
        };
        let mut processor = ptr::null_mut();
        // SAFETY: all pointers in `desc` are live and outlive the processor (field order of `Self`, shared objects do not move).
        let code = unsafe { ffi::sqfs_block_processor_create_ex(&raw const desc, &raw mut processor) };
        let processor = match NonNull::new(processor) {
            Some(processor) if code == 0 => Processor(processor),
            _ => return Err(SquashfsError::library("start the compressing threads", code)),
        };
        let block_size = u64::from(options.block_size);
        Ok(Self { processor, contents: Contents(Vec::new()), fragments, blocks, parts, block_size })
    }

    /// Begins a content of `size` bytes; [`Self::append`] follows, then [`Self::end_file`].
    pub fn begin_file(&mut self, size: u64) -> Result<ContentId, SquashfsError> {
        let slot: *mut *mut ffi::Inode = Box::into_raw(Box::new(ptr::null_mut()));
        let id = ContentId(self.contents.0.len());
        self.contents.0.push(slot);
        // Our own decision about duplicates is final, so the library's checksums are not needed either; but it keeps every
        // fragment in a hash table under its checksum, and without one 20,000 small files are 20,000 times as slow to insert.
        let mut flags = ffi::BLK_DONT_DEDUPLICATE;
        if size >= self.block_size {
            flags |= ffi::BLK_DONT_HASH;
        }
        // SAFETY: the processor is alive; `slot` lives until `Contents` is dropped, after the processor.
        let code =
            unsafe { ffi::sqfs_block_processor_begin_file(self.processor.0.as_ptr(), slot, ptr::null_mut(), flags) };
        self.parts.check("begin a file", code)?;
        Ok(id)
    }

    /// Adds bytes to the content that was begun.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), SquashfsError> {
        // SAFETY: the processor is alive; the library copies the bytes before it returns.
        let code =
            unsafe { ffi::sqfs_block_processor_append(self.processor.0.as_ptr(), bytes.as_ptr().cast(), bytes.len()) };
        self.parts.check("write file data", code)
    }

    /// Ends the content that was begun.
    pub fn end_file(&mut self) -> Result<(), SquashfsError> {
        // SAFETY: the processor is alive.
        let code = unsafe { ffi::sqfs_block_processor_end_file(self.processor.0.as_ptr()) };
        self.parts.check("write file data", code)
    }

    /// Waits for the workers and goes on to inodes and directories.
    pub fn finish_data(self) -> Result<TreeWriter<W>, SquashfsError> {
        let Self { processor, contents, fragments, blocks, parts, .. } = self;
        // SAFETY: the processor is alive.
        let code = unsafe { ffi::sqfs_block_processor_finish(processor.0.as_ptr()) };
        parts.check("write file data", code)?;
        drop(processor);
        drop(blocks);
        TreeWriter::new(parts, contents, fragments)
    }
}

/// Owns the block processor and its threads.
struct Processor(NonNull<ffi::BlockProcessor>);

impl Drop for Processor {
    fn drop(&mut self) {
        // SAFETY: owned and alive; its threads end here, so nobody touches blocks, fragments or contents afterwards.
        unsafe { destroy(self.0.as_ptr()) }
    }
}

/// The inodes that the block processor fills in: where each content's blocks are. One slot per content, because the
/// library moves an inode when it grows.
pub(super) struct Contents(Vec<*mut *mut ffi::Inode>);

impl Contents {
    /// The inode of a content; null for an id that is not of this writer.
    pub(super) fn inode(&self, id: ContentId) -> *mut ffi::Inode {
        // SAFETY: every slot was made by `Box::into_raw` and is freed only in `drop`.
        self.0.get(id.0).map_or(ptr::null_mut(), |slot| unsafe { **slot })
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        for slot in self.0.drain(..) {
            // SAFETY: the slot came from `Box::into_raw`; its inode from the library's allocator (or it is null).
            unsafe {
                let inode = *Box::from_raw(slot);
                if !inode.is_null() {
                    ffi::sqfs_free(inode.cast());
                }
            }
        }
    }
}

/// Owns the fragment table.
pub(super) struct FragTable(pub(super) NonNull<ffi::FragTable>);

impl FragTable {
    fn new() -> Result<Self, SquashfsError> {
        // SAFETY: no arguments to get wrong.
        let table = NonNull::new(unsafe { ffi::sqfs_frag_table_create(0) });
        table.map(Self).ok_or_else(|| SquashfsError::library("set up the fragment table", -1))
    }
}

impl Drop for FragTable {
    fn drop(&mut self) {
        // SAFETY: owned and alive.
        unsafe { destroy(self.0.as_ptr()) }
    }
}
