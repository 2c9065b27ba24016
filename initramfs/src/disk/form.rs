//! How a disk cache lies on its disk, and what it takes to have one there.
//!
//! ```text
//! 0     4096  magic 4D 4F 4F 52 43 48 45 31 ("MOORCHE1"), digest of the image (32), chunks (8), length of a sealed chunk (8), slots (8)
//! 4096        index: for each slot the number of its chunk + 1, 0: empty (8 bytes each, little-endian), then zeros to a whole page
//!             slots: chunk i is in slot i mod slots
//! ```

use super::DiskError;
use moor_image::Header;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

pub(super) const MAGIC: &[u8; 8] = b"MOORCHE1";
pub(super) const PAGE: u64 = 4096;
/// Bytes of a slot's entry in the index.
pub(super) const ENTRY: u64 = 8;
/// A partition that has anything in its first bytes, or its last, belongs to somebody else.
const LOOKED_AT: u64 = 128 << 10;

/// A partition or file that nobody else uses.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) is_device: bool,
    /// Its size as it was found.
    pub(super) there: u64,
}

impl Opened {
    pub(super) fn new(path: &Path, size: Option<u64>) -> Result<Self, DiskError> {
        let failed = |doing| move |source: io::Error| DiskError::Step { doing, path: path.to_owned(), source };
        let is_device = path.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if is_device {
            // Fails where it is mounted, or a part of something.
            options.custom_flags(nix::libc::O_EXCL);
        } else {
            // A partition that is missing must not become a file in the memory behind /dev.
            options.create(size.is_some()).truncate(false);
        }
        let mut file = options.open(path).map_err(failed("open"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("have for itself")(error.into()))?;
        let there = file.seek(SeekFrom::End(0)).map_err(failed("look at"))?;
        Ok(Self { file, is_device, there })
    }
}

/// Where things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) slots: u64,
    /// Length of a sealed chunk.
    pub(super) length: u64,
}

impl Layout {
    /// What fits into `capacity` bytes of an image.
    pub(super) fn new(header: &Header, capacity: u64) -> Self {
        let length = header.chunk_size() + header.tag_length();
        let room = capacity.saturating_sub(2 * PAGE);
        Self { slots: (room / (length + ENTRY)).min(header.chunks), length }
    }

    pub(super) fn data(self) -> u64 {
        PAGE + (self.slots * ENTRY).next_multiple_of(PAGE)
    }

    pub(super) fn end(self) -> u64 {
        self.data() + self.slots * self.length
    }

    /// The first page.
    pub(super) fn page(self, header: &Header) -> Vec<u8> {
        let mut page = MAGIC.to_vec();
        page.extend_from_slice(&header.digest());
        for number in [header.chunks, self.length, self.slots] {
            page.extend_from_slice(&number.to_le_bytes());
        }
        page.resize(4096, 0);
        page
    }
}

/// As much as there is of `length` bytes.
pub(super) fn read_at_most(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    let mut have = 0;
    while have < bytes.len() {
        match file.read_at(&mut bytes[have..], offset + have as u64)? {
            0 => break,
            more => have += more,
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}

pub(super) fn is_blank(file: &File, there: u64) -> io::Result<bool> {
    let is_zero = |bytes: Vec<u8>| bytes.iter().all(|byte| *byte == 0);
    Ok(is_zero(read_at_most(file, 0, LOOKED_AT.min(there))?)
        && is_zero(read_at_most(file, there.saturating_sub(LOOKED_AT), LOOKED_AT.min(there))?))
}

/// Takes out what was there, and begins anew. The first page comes last: what was cut off before begins anew once more.
pub(super) fn clear(file: &File, is_device: bool, layout: Layout, page: &[u8]) -> io::Result<()> {
    // Ours, and of no image: after a cut nobody takes what is behind it for somebody else's.
    let mut begun = MAGIC.to_vec();
    begun.resize(page.len(), 0);
    file.write_all_at(&begun, 0)?;
    file.sync_data()?;
    if is_device {
        // Gives the blocks back where the disk can; what stays is sealed, and its key is gone.
        let _ = fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, PAGE, layout.end() - PAGE);
        let zeros = vec![0; 1 << 20];
        let mut at = PAGE;
        while at < layout.data() {
            let length = (layout.data() - at).min(1 << 20);
            file.write_all_at(&zeros[..usize::try_from(length).map_err(io::Error::other)?], at)?;
            at += length;
        }
    } else {
        file.set_len(0)?;
        file.set_len(layout.end())?;
    }
    // A chunk that is there already must not be found by an index of before.
    file.sync_data()?;
    file.write_all_at(page, 0)?;
    file.sync_data()
}
