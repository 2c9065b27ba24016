//! What was sealed is read back before the header is written: a disk or memory that changes a byte, or loses the end, is found, and
//! named by chunk.

#![allow(missing_docs, clippy::unwrap_used)]

use moor_image::{Dek, ImageError, Metadata, Payload, SealOptions, Sealer};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};

const HEADER: u64 = 4096;
const CHUNK: u64 = 1 << 14;

/// Keeps what it gets, and gives it back with one bit changed, or not to its end.
struct Faulty {
    kept: Cursor<Vec<u8>>,
    flip: Option<u64>,
    end: u64,
}

impl Read for Faulty {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let start = self.kept.position();
        // Short reads, as a file may give them.
        let most = usize::try_from(self.end.saturating_sub(start)).unwrap().min(buffer.len()).min(70_001);
        let read = self.kept.read(&mut buffer[..most])?;
        if let Some(flip) = self.flip.filter(|flip| (start..start + read as u64).contains(flip)) {
            buffer[usize::try_from(flip - start).unwrap()] ^= 4;
        }
        Ok(read)
    }
}

impl Write for Faulty {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.kept.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Faulty {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.kept.seek(to)
    }
}

/// Seals so many bytes through a faulty file.
fn sealed(length: usize, key: bool, flip: Option<u64>, end: u64) -> Result<(), ImageError> {
    let out = Faulty { kept: Cursor::new(Vec::new()), flip, end };
    let options = SealOptions {
        lineage: [1; 16],
        serial: 1,
        created: 0,
        chunk_log2: 14,
        payload: Payload::Squashfs,
        key: key.then(|| Dek::generate().unwrap()),
    };
    let mut sealer = Sealer::new(out, options)?;
    let payload: Vec<u8> = (0..length).map(|at| u8::try_from((at * 7 + at / 251) % 256).unwrap()).collect();
    sealer.write_all(&payload).unwrap();
    sealer.finish(|_| Metadata::default(), None).map(|_| ())
}

#[test]
fn a_changed_byte_is_found_in_its_chunk() {
    // Three groups of what is read at once, and a last chunk that is not full.
    let length = (3 << 20) + 1234;
    let chunks = (length as u64).div_ceil(CHUNK);
    for key in [true, false] {
        let size = CHUNK + if key { 16 } else { 0 };
        sealed(length, key, None, u64::MAX).unwrap();
        // First and last byte of the first chunk, of those at a group's edges, and of the last.
        for chunk in [0, 63, 64, 65, 128, chunks - 1] {
            let start = HEADER + chunk * size;
            let end = if chunk + 1 == chunks { start + size - CHUNK + length as u64 % CHUNK } else { start + size };
            for flip in [start, end - 1] {
                match sealed(length, key, Some(flip), u64::MAX) {
                    Err(ImageError::ReadBack { start: from, end: to }) => assert_eq!((from, to), (start, end)),
                    other => panic!("chunk {chunk}, byte {flip}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_lost_end_is_found() {
    let length = 2 << 20;
    for key in [true, false] {
        let size = CHUNK + if key { 16 } else { 0 };
        for (end, chunk) in [(HEADER, 0), (HEADER + 70 * size, 70), (HEADER + 71 * size - 1, 70)] {
            match sealed(length, key, None, end) {
                Err(ImageError::ReadBack { start, .. }) => assert_eq!(start, HEADER + chunk * size),
                other => panic!("end at {end}: {other:?}"),
            }
        }
    }
}

#[test]
fn nothing_is_there_to_read_back() {
    sealed(0, true, None, u64::MAX).unwrap();
    sealed(0, false, None, u64::MAX).unwrap();
}
