//! Sealing: plaintext comes in as a stream, chunks go out sealed. The first chunk of each part waits in memory and is sealed last, because
//! a squashfs writes its superblock last; nothing else may be changed once it was written.

use crate::error::ImageError;
use crate::hash;
use crate::header::{
    Builder, HEADER_LENGTH, LEAVES_PER_PAGE, MAX_HINTS, MAX_METADATA, MAX_PLAINTEXT, Payload, Start, TAG_LENGTH,
};
use crate::keys::{Dek, Keys, Section};
use crate::metadata::Metadata;
use crate::read_back::{Seen, Written};
use aws_lc_rs::rand;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Seek, SeekFrom, Write};

/// How to seal.
pub struct SealOptions {
    /// Kept by all generations of one image name.
    pub lineage: [u8; 16],
    /// Larger than that of every earlier generation.
    pub serial: u64,
    /// Unix seconds.
    pub created: u64,
    /// log2 of the chunk size, 14 to 20; 16 is the default of the format.
    pub chunk_log2: u8,
    /// What the plaintext is.
    pub payload: Payload,
    /// A new key; `None`: a plain image, hashed but not encrypted.
    pub key: Option<Dek>,
}

/// What is known once all plaintext was sealed and read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayloadSummary {
    /// SHA-256 of the plaintext.
    pub sha256: [u8; 32],
    /// Its length in bytes.
    pub length: u64,
}

/// A finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// Its digest.
    pub digest: [u8; 32],
    /// Length of the file in bytes.
    pub size: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// SHA-256 of the plaintext: equal for equal builds.
    pub payload_sha256: [u8; 32],
}

/// The right to seal one chunk. It is consumed by sealing and cannot be copied, and [`Slots`] makes each index once, so no chunk
/// index is ever sealed twice under one key.
struct Slot(u64);

struct Slots {
    next: u64,
}

impl Slots {
    fn take(&mut self) -> Slot {
        let slot = Slot(self.next);
        self.next += 1;
        slot
    }
}

/// Seals a stream. Write the plaintext in order ([`io::Write`]), then [`Self::finish`]. The image begins at offset 0 of `out`, which
/// has to be empty; it is not valid before `finish` has returned, because the header is written last.
pub struct Sealer<W> {
    out: W,
    keys: Option<Keys>,
    key_id: [u8; 16],
    salt: [u8; 32],
    builder: Builder,
    chunk_size: usize,
    tag: u64,
    slots: Slots,
    /// Indices of the first chunks of parts that are not full yet.
    parts: BTreeSet<u64>,
    /// First chunks of parts and the right to seal each, from when it is full.
    held: BTreeMap<u64, (Slot, Vec<u8>)>,
    /// The chunk whose place the output is at.
    at: u64,
    buffer: Vec<u8>,
    /// Leaf hashes of what was written, for a plain image; one that is encrypted has tags.
    leaves: Vec<u8>,
    length: u64,
    failed: bool,
}

impl<W: Read + Write + Seek> Sealer<W> {
    /// Begins an image.
    ///
    /// # Errors
    /// A chunk size out of bounds; no randomness.
    pub fn new(out: W, options: SealOptions) -> Result<Self, ImageError> {
        if !(14..=20).contains(&options.chunk_log2) {
            return Err(ImageError::Argument("the chunk size is 2^14 to 2^20 bytes"));
        }
        let mut salt = [0; 32];
        rand::fill(&mut salt).map_err(|_| ImageError::Crypto("making a salt"))?;
        Self::with_salt(out, options, salt)
    }

    /// With a given salt: for test vectors only, because equal keys and salts give equal key streams.
    pub(crate) fn with_salt(out: W, options: SealOptions, salt: [u8; 32]) -> Result<Self, ImageError> {
        let SealOptions { lineage, serial, created, chunk_log2, payload, key } = options;
        let builder = Builder::new(Start { encrypted: key.is_some(), chunk_log2, payload, lineage, serial, created });
        let keys = key.as_ref().map(|dek| Keys::derive(dek, &salt, builder.context_input())).transpose()?;
        let chunk_size = 1 << chunk_log2;
        Ok(Self {
            out,
            key_id: key.as_ref().map_or([0; 16], Dek::key_id),
            tag: if keys.is_some() { TAG_LENGTH } else { 0 },
            keys,
            salt,
            builder,
            chunk_size,
            slots: Slots { next: 0 },
            parts: BTreeSet::from([0]),
            held: BTreeMap::new(),
            // Behind the header, nothing was written yet: whatever chunk comes first seeks its place.
            at: u64::MAX,
            buffer: Vec::with_capacity(chunk_size + 16),
            leaves: Vec::new(),
            length: 0,
            failed: false,
        })
    }

    /// Plaintext bytes taken so far.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.length
    }

    /// Begins another part of a payload of several: fills up with zeros to a multiple of `alignment` and gives the part's offset. Its first
    /// chunk waits in memory until [`Self::finish`].
    ///
    /// # Errors
    /// `alignment` is no multiple of the chunk size; as for writing.
    pub fn begin_part(&mut self, alignment: u64) -> Result<u64, ImageError> {
        let size = self.chunk_size as u64;
        if alignment == 0 || !alignment.is_multiple_of(size) {
            return Err(ImageError::Argument("a part begins at a multiple of the chunk size"));
        }
        let offset = self.length.next_multiple_of(alignment);
        let zeros = vec![0; self.chunk_size];
        while self.length < offset {
            // Less than a chunk or a whole one, so it fits.
            let step = usize::try_from(offset - self.length).unwrap_or(zeros.len()).min(zeros.len());
            self.push(&zeros[..step]).inspect_err(|_| self.failed = true)?;
        }
        self.parts.insert(offset / size);
        Ok(offset)
    }

    /// Changes plaintext inside the first chunk of a part, which waits in memory until [`Self::finish`].
    ///
    /// # Errors
    /// The range was not written yet, or leaves such a chunk.
    pub fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        const NOT_HELD: ImageError =
            ImageError::Argument("only what was written to the first chunk of a part may be changed");
        let size = self.chunk_size as u64;
        let (index, begin) = (offset / size, usize::try_from(offset % size).map_err(|_| NOT_HELD)?);
        let chunk = match self.held.get_mut(&index) {
            Some((_, chunk)) => chunk,
            // It is not full yet.
            None if index == self.slots.next && self.parts.contains(&index) => &mut self.buffer,
            None => return Err(NOT_HELD),
        };
        let range = begin.checked_add(bytes.len()).and_then(|end| chunk.get_mut(begin..end));
        range.ok_or(NOT_HELD)?.copy_from_slice(bytes);
        Ok(())
    }

    /// The same for the first part.
    ///
    /// # Errors
    /// As for [`Self::patch`].
    pub fn patch_start(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ImageError> {
        self.patch(offset as u64, bytes)
    }

    fn offset_of(&self, index: u64) -> u64 {
        HEADER_LENGTH as u64 + index * (self.chunk_size as u64 + self.tag)
    }

    /// Seals and writes one chunk; consumes its slot.
    #[expect(clippy::needless_pass_by_value, reason = "the slot is used up: that is its purpose")]
    fn seal(&mut self, slot: Slot, chunk: &mut Vec<u8>) -> Result<(), ImageError> {
        if let Some(keys) = &self.keys {
            // Its leaf is made of the bytes that are read back, once their tag has shown that they are these.
            keys.seal_chunk(slot.0, chunk)?;
        } else {
            let leaf = hash::leaf(slot.0, chunk);
            // Leaves of chunks that wait are filled in when they are sealed. A leaf is far smaller than its chunk, so its place fits.
            let place = usize::try_from(slot.0).map_err(|_| ImageError::Argument("an image holds at most 1 TiB"))? * 32;
            if self.leaves.len() < place + 32 {
                self.leaves.resize(place + 32, 0);
            }
            self.leaves[place..place + 32].copy_from_slice(&leaf);
        }
        if slot.0 != self.at {
            let offset = self.offset_of(slot.0);
            self.out.seek(SeekFrom::Start(offset)).map_err(ImageError::io("writing the image"))?;
        }
        self.at = slot.0 + 1;
        self.out.write_all(chunk).map_err(ImageError::io("writing the image"))
    }

    /// Takes a full (or the last) chunk out of the buffer.
    fn complete(&mut self) -> Result<(), ImageError> {
        let slot = self.slots.take();
        if self.parts.remove(&slot.0) {
            let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(self.chunk_size + 16));
            self.held.insert(slot.0, (slot, chunk));
            return Ok(());
        }
        let mut chunk = std::mem::take(&mut self.buffer);
        self.seal(slot, &mut chunk)?;
        chunk.clear();
        self.buffer = chunk;
        Ok(())
    }

    fn push(&mut self, data: &[u8]) -> Result<usize, ImageError> {
        if self.failed {
            return Err(ImageError::Argument("the image is unusable after an error: begin anew, with a new key"));
        }
        let take = data.len().min(self.chunk_size - self.buffer.len());
        if self.length + take as u64 > MAX_PLAINTEXT {
            return Err(ImageError::Argument("an image holds at most 1 TiB"));
        }
        self.buffer.extend_from_slice(&data[..take]);
        self.length += take as u64;
        if self.buffer.len() == self.chunk_size {
            self.complete()?;
        }
        Ok(take)
    }

    /// Seals the rest and what waits, reads everything back and compares, then writes table, metadata, hints and header. The caller
    /// syncs and renames. `metadata` is told what only now is known.
    ///
    /// # Errors
    /// Reading or writing; what was read back differs; a section that is too long.
    pub fn finish(
        mut self,
        metadata: impl FnOnce(PayloadSummary) -> Metadata,
        hints: Option<Vec<u8>>,
    ) -> Result<(W, Sealed), ImageError> {
        if self.failed {
            return Err(ImageError::Argument("the image is unusable after an error: begin anew, with a new key"));
        }
        if !self.buffer.is_empty() {
            self.complete()?;
        }
        let chunks = self.slots.next;
        for (slot, mut chunk) in std::mem::take(&mut self.held).into_values() {
            self.seal(slot, &mut chunk)?;
        }
        self.out.flush().map_err(ImageError::io("writing the image"))?;
        self.out.seek(SeekFrom::Start(HEADER_LENGTH as u64)).map_err(ImageError::io("reading the image back"))?;
        let written = Written { keys: self.keys.as_ref(), chunk_size: self.chunk_size, length: self.length, chunks };
        let Seen { leaves, payload_sha256 } = written.read_back(&mut self.out, &self.leaves)?;

        let mut metadata = metadata(PayloadSummary { sha256: payload_sha256, length: self.length }).to_bytes()?;
        let mut hints = hints.unwrap_or_default();
        if metadata.len() as u64 + TAG_LENGTH > MAX_METADATA || hints.len() as u64 + TAG_LENGTH > MAX_HINTS {
            return Err(ImageError::Argument("metadata and hints have at most 64 MiB each"));
        }
        if let Some(keys) = &self.keys {
            keys.seal_section(Section::Metadata, &mut metadata)?;
            if !hints.is_empty() {
                keys.seal_section(Section::Hints, &mut hints)?;
            }
        }
        let page_length =
            usize::try_from(LEAVES_PER_PAGE * 32).map_err(|_| ImageError::Argument("a page fits into memory"))?;
        let page_hashes: Vec<u8> =
            leaves.chunks(page_length).zip(0..).flat_map(|(leaves, index)| hash::page(index, leaves)).collect();

        let builder = &mut self.builder;
        builder.lay_out(self.length, metadata.len() as u64, hints.len() as u64);
        builder.set(160, &self.salt);
        builder.set(192, &self.key_id);
        builder.set(224, &hash::root(chunks, &page_hashes));
        builder.set(256, &hash::sha256(&[&metadata]));
        if !hints.is_empty() {
            builder.set(288, &hash::sha256(&[&hints]));
        }
        if let Some(keys) = &self.keys {
            let mac = keys.mac(builder.mac_input())?;
            builder.set(320, &mac);
        }
        let header = self.builder.finish()?;
        let mut out = self.out;
        out.seek(SeekFrom::Start(header.table_offset)).map_err(ImageError::io("writing the hash table"))?;
        for part in [&page_hashes, &leaves, &metadata, &hints] {
            out.write_all(part).map_err(ImageError::io("writing what follows the data"))?;
        }
        out.seek(SeekFrom::Start(0)).map_err(ImageError::io("writing the header"))?;
        out.write_all(header.as_bytes()).map_err(ImageError::io("writing the header"))?;
        out.flush().map_err(ImageError::io("writing the image"))?;
        Ok((out, Sealed { digest: header.digest, size: header.file_length(), chunks, payload_sha256 }))
    }
}

impl<W: Read + Write + Seek> Write for Sealer<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        self.push(data).map_err(|error| {
            // A chunk may be half on disk: sealing it once more would use its nonce twice.
            self.failed = true;
            match error {
                ImageError::Io { source, .. } => source,
                other => io::Error::other(other),
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        // A chunk that is not full must stay in memory.
        Ok(())
    }
}
