//! Reads metadata blocks: up to 8 KiB each, compressed, one behind the other, with structures running across them.

use super::compressor::Compressor;
use super::error::SquashfsError;
use super::format::{METADATA_SIZE, u16_at};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Metadata blocks kept unpacked. A directory and its inodes lie close together.
const CACHED: usize = 64;

/// What holds a squashfs.
pub trait Source {
    /// Fills `buffer` from `offset`.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// How many bytes there are.
    fn size(&self) -> u64;
}

/// The bytes of a squashfs with what is needed to read them.
pub(super) struct Blocks<S> {
    source: S,
    decoder: Compressor,
    cache: VecDeque<Arc<Unpacked>>,
}

/// One metadata block.
struct Unpacked {
    /// Where it is.
    position: u64,
    /// Where the next one is.
    next: u64,
    bytes: Vec<u8>,
}

/// A place in a table of metadata: the block's offset in the file, and a byte of its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) block: u64,
    pub(super) offset: usize,
}

impl Place {
    /// The place a reference means: 48 bits of block, 16 bits of offset, relative to a table.
    pub(super) fn of_reference(table: u64, reference: u64, what: &'static str) -> Result<Self, SquashfsError> {
        let corrupt = SquashfsError::Corrupt { what, offset: reference, why: "it points outside of the squashfs" };
        let block = table.checked_add(reference >> 16).ok_or(corrupt)?;
        Ok(Self { block, offset: usize::from((reference & 0xFFFF) as u16) })
    }
}

impl<S: Source> Blocks<S> {
    pub(super) fn new(source: S, decoder: Compressor) -> Self {
        Self { source, decoder, cache: VecDeque::new() }
    }

    /// Bytes as they are in the file.
    pub(super) fn raw(&self, what: &'static str, offset: u64, buffer: &mut [u8]) -> Result<(), SquashfsError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.source.size()) {
            return Err(SquashfsError::Corrupt { what, offset, why: "it reaches beyond the end of the squashfs" });
        }
        self.source.read_exact_at(buffer, offset).map_err(|cause| SquashfsError::Input { what, offset, cause })
    }

    /// A data block or fragment block of `stored` bytes (with its "not compressed" bit), unpacked into `buffer`.
    pub(super) fn data(
        &mut self,
        what: &'static str,
        offset: u64,
        stored: u32,
        buffer: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), SquashfsError> {
        const NOT_COMPRESSED: u32 = 1 << 24;
        let corrupt = |why| SquashfsError::Corrupt { what, offset, why };
        let size = (stored & (NOT_COMPRESSED - 1)) as usize;
        if size > limit || stored & !(NOT_COMPRESSED | (NOT_COMPRESSED - 1)) != 0 {
            return Err(corrupt("its stored size is larger than a block"));
        }
        if stored & NOT_COMPRESSED != 0 {
            buffer.resize(size, 0);
            return self.raw(what, offset, buffer);
        }
        let mut packed = vec![0; size];
        self.raw(what, offset, &mut packed)?;
        buffer.resize(limit, 0);
        let size = self.decoder.decompress(&packed, buffer).ok_or_else(|| corrupt("it cannot be decompressed"))?;
        buffer.truncate(size);
        Ok(())
    }

    /// The metadata block at `position`.
    fn metadata(&mut self, what: &'static str, position: u64) -> Result<Arc<Unpacked>, SquashfsError> {
        if let Some(block) = self.cache.iter().rev().find(|block| block.position == position) {
            return Ok(Arc::clone(block));
        }
        let mut header = [0; 2];
        self.raw(what, position, &mut header)?;
        let header = u16_at(&header, 0);
        let size = header & 0x7FFF;
        let corrupt = |why| SquashfsError::Corrupt { what, offset: position, why };
        if size == 0 || usize::from(size) > METADATA_SIZE {
            return Err(corrupt("a metadata block has an impossible size"));
        }
        let mut bytes = vec![0; usize::from(size)];
        self.raw(what, position + 2, &mut bytes)?;
        if header & 0x8000 == 0 {
            let mut unpacked = vec![0; METADATA_SIZE];
            let length = self.decoder.decompress(&bytes, &mut unpacked);
            let length = length.ok_or_else(|| corrupt("a metadata block cannot be decompressed"))?;
            unpacked.truncate(length);
            bytes = unpacked;
        }
        let block = Arc::new(Unpacked { position, next: position + 2 + u64::from(size), bytes });
        if self.cache.len() == CACHED {
            self.cache.pop_front();
        }
        self.cache.push_back(Arc::clone(&block));
        Ok(block)
    }

    /// Fills `buffer` from `place` on and moves `place` behind it.
    pub(super) fn read(
        &mut self,
        what: &'static str,
        place: &mut Place,
        buffer: &mut [u8],
    ) -> Result<(), SquashfsError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let block = self.metadata(what, place.block)?;
            let Some(rest) = block.bytes.get(place.offset..).filter(|rest| !rest.is_empty()) else {
                // Only a full block is continued by the next one; and a place may be at the end of a full block.
                if block.bytes.len() == METADATA_SIZE && place.offset == METADATA_SIZE {
                    *place = Place { block: block.next, offset: 0 };
                    continue;
                }
                let why = "it reaches beyond the end of its metadata block";
                return Err(SquashfsError::Corrupt { what, offset: place.block, why });
            };
            let step = rest.len().min(buffer.len() - filled);
            buffer[filled..filled + step].copy_from_slice(&rest[..step]);
            filled += step;
            place.offset += step;
        }
        Ok(())
    }

    /// Like [`Self::read`] into an array.
    pub(super) fn take<const N: usize>(
        &mut self,
        what: &'static str,
        place: &mut Place,
    ) -> Result<[u8; N], SquashfsError> {
        let mut buffer = [0; N];
        self.read(what, place, &mut buffer)?;
        Ok(buffer)
    }
}
