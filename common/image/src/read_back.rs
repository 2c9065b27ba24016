//! Reads back what was sealed: compares it with what was written, makes the leaf hashes, and hashes the plaintext. When this begins nothing
//! else is left to do, so three threads share the work: one reads, one opens and makes the leaves, one hashes the plaintext.

use crate::error::ImageError;
use crate::hash;
use crate::header::{HEADER_LENGTH, TAG_LENGTH};
use crate::keys::Keys;
use aws_lc_rs::digest;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

/// Bytes that are read at once, rounded to whole chunks.
const GROUP: usize = 1 << 20;
/// So many groups wait for the next thread.
const AHEAD: usize = 2;

/// What was written behind the header.
pub(crate) struct Written<'a> {
    /// None for a plain image.
    pub(crate) keys: Option<&'a Keys>,
    /// Plaintext bytes of a chunk that is not the last.
    pub(crate) chunk_size: usize,
    /// Plaintext bytes of all.
    pub(crate) length: u64,
    /// Number of chunks.
    pub(crate) chunks: u64,
}

/// What is known once all was read back.
pub(crate) struct Seen {
    /// The leaf hash of each chunk, 32 bytes each.
    pub(crate) leaves: Vec<u8>,
    /// SHA-256 of the plaintext.
    pub(crate) payload_sha256: [u8; 32],
}

/// Whole chunks in a row as they are in the file; behind the second thread their plaintexts, each with its tag's place behind it.
struct Group {
    first: u64,
    bytes: Vec<u8>,
}

impl Written<'_> {
    /// Reads all chunks from `file`, which is at the first one. `expected` are the leaves of what was written: those of an encrypted image are
    /// not looked at, because its tags say the same.
    ///
    /// # Errors
    /// Reading; what was read is not what was written.
    pub(crate) fn read_back(&self, file: &mut impl Read, expected: &[u8]) -> Result<Seen, ImageError> {
        let (to_open, sealed) = sync_channel(AHEAD);
        let (to_hash, opened) = sync_channel(AHEAD);
        let (used, reuse) = channel();
        std::thread::scope(|scope| {
            let thread = |name: &str| std::thread::Builder::new().name(name.into());
            let opener = thread("open-chunks")
                .spawn_scoped(scope, move || self.open_all(&sealed, &to_hash, expected))
                .map_err(ImageError::io("starting the thread that opens"))?;
            let hasher = thread("payload-hash")
                .spawn_scoped(scope, move || {
                    let mut context = digest::Context::new(&digest::SHA256);
                    for group in opened {
                        self.each(&group).for_each(|(_, place)| context.update(&group.bytes[self.plain(place)]));
                        // The reader may be done: then nobody wants the buffer.
                        let _ = used.send(group.bytes);
                    }
                    context.finish()
                })
                .map_err(ImageError::io("starting the thread that hashes"))?;
            let read = self.read_all(file, &to_open, &reuse);
            drop(to_open);
            let opened = opener.join().map_err(|_| ImageError::Crypto("opening what was read back"))?;
            let payload = hasher.join().map_err(|_| ImageError::Crypto("hashing the plaintext"))?;
            // If the opener has found something, the reader has merely noticed that it ended.
            let leaves = opened?;
            read?;
            let mut payload_sha256 = [0; 32];
            payload_sha256.copy_from_slice(payload.as_ref());
            Ok(Seen { leaves, payload_sha256 })
        })
    }

    fn read_all(
        &self,
        file: &mut impl Read,
        groups: &SyncSender<Group>,
        reuse: &Receiver<Vec<u8>>,
    ) -> Result<(), ImageError> {
        let step = (GROUP / self.sealed_size()).max(1) as u64;
        let mut first = 0;
        while first < self.chunks {
            let next = (first + step).min(self.chunks);
            let length = (first..next).map(|index| self.sealed_length(index)).sum();
            let mut bytes = reuse.try_recv().unwrap_or_default();
            bytes.resize(length, 0);
            let read = fill(file, &mut bytes).map_err(ImageError::io("reading the image back"))?;
            if read < length {
                return Err(self.differs(first + (read / self.sealed_size()) as u64));
            }
            // An opener that has ended has the reason.
            if groups.send(Group { first, bytes }).is_err() {
                return Ok(());
            }
            first = next;
        }
        Ok(())
    }

    fn open_all(
        &self,
        groups: &Receiver<Group>,
        opened: &SyncSender<Group>,
        expected: &[u8],
    ) -> Result<Vec<u8>, ImageError> {
        let mut leaves = Vec::new();
        for mut group in groups {
            for (index, place) in self.each(&group) {
                let sealed = &mut group.bytes[place];
                let leaf = hash::leaf(index, sealed);
                // What is there is what was written: by the tag, which only this packer can make; without one, by the hash of what was written.
                let is_same = match self.keys {
                    Some(keys) => keys.open_chunk_slice(index, sealed).is_some(),
                    None => expected.get(leaves.len()..leaves.len() + 32) == Some(leaf.as_slice()),
                };
                if !is_same {
                    return Err(self.differs(index));
                }
                leaves.extend_from_slice(&leaf);
            }
            opened.send(group).map_err(|_| ImageError::Crypto("hashing the plaintext"))?;
        }
        Ok(leaves)
    }

    /// The chunks of a group: index and place.
    fn each(&self, group: &Group) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
        let (size, length) = (self.sealed_size(), group.bytes.len());
        (group.first..).zip((0..length).step_by(size).map(move |start| start..(start + size).min(length)))
    }

    /// Where the plaintext is of an opened chunk.
    fn plain(&self, place: Range<usize>) -> Range<usize> {
        place.start..place.end - self.tag()
    }

    #[allow(clippy::cast_possible_truncation)] // 16
    fn tag(&self) -> usize {
        if self.keys.is_some() { TAG_LENGTH as usize } else { 0 }
    }

    /// Bytes in the file of a chunk that is not the last.
    fn sealed_size(&self) -> usize {
        self.chunk_size + self.tag()
    }

    /// The same of any.
    #[allow(clippy::cast_possible_truncation)] // at most the size of a chunk
    fn sealed_length(&self, index: u64) -> usize {
        let size = self.chunk_size as u64;
        (self.length - index * size).min(size) as usize + self.tag()
    }

    fn differs(&self, index: u64) -> ImageError {
        let start = HEADER_LENGTH as u64 + index * self.sealed_size() as u64;
        ImageError::ReadBack { start, end: start + self.sealed_length(index) as u64 }
    }
}

/// Reads until the buffer is full or the file ends: how much it was.
fn fill(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
