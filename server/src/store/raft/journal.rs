//! The journal of the log: what was written last, on its way into the log's database. To commit there costs eight pages in eight places; here
//! a batch is one record behind the one before, in a file that has its full size from the beginning, and one sync of a page or two. Once
//! the journal is full, all of it goes into the database in one transaction, and it begins anew.
//!
//! The file: two headers, of which the newer one that is whole counts (at 0 and 4096: `moorjrn1`, the log's id, 16 bytes, the
//! generation and the file's length, 8 bytes each, and a check of those), and from 8192 on the records, each at a multiple of 4096, so that nothing
//! is written again that a torn write could take with it: generation and sequence in it, 8 bytes each,
//! the length of what is in it, 8 bytes, a check over these and that, and that. Numbers are little-endian; a check is the first 16 bytes of a SHA-256.
//! The generation rises each time the journal begins anew, so that what is left of before is not taken for a record.
//!
//! A record that is not whole is the end: it was being written when the power went, and nobody was told that it was durable. Each is synced before the
//! next is written, so if a whole one comes behind it, it was durable once, and the file is damaged. So it is if a record is of a newer generation
//! than the header: that was durable before there was any.

use aws_lc_rs::digest::{Context, SHA256};
use redb::StorageBackend;
use std::io;

/// What a new journal is made of, in bytes.
pub(super) const SIZE: u64 = 4 << 20;
/// Where records begin.
const RECORDS: u64 = 2 * SLOT;
/// Where they lie.
const ALIGNMENT: u64 = 4096;
const SLOT: u64 = 4096;
const MAGIC: &[u8; 8] = b"moorjrn1";
const CHECK: usize = 16;
const HEADER: usize = 8 + 16 + 8 + 8;
/// In front of what is in a record: generation, sequence, length and check.
const HEAD: usize = 3 * 8 + CHECK;

/// Which log it belongs to.
pub(super) type LogName = [u8; 16];

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("{0}")]
    Damaged(&'static str),
}

/// The journal.
#[derive(Debug)]
pub(super) struct Journal {
    storage: Box<dyn StorageBackend>,
    log: LogName,
    generation: u64,
    /// Of the next record.
    sequence: u64,
    /// Where it goes.
    at: u64,
    end: u64,
}

fn check(parts: &[&[u8]]) -> [u8; CHECK] {
    let mut context = Context::new(&SHA256);
    context.update(b"moor/v1 journal\0");
    for part in parts {
        context.update(part);
    }
    let mut out = [0; CHECK];
    out.copy_from_slice(&context.finish().as_ref()[..CHECK]);
    out
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

fn aligned(length: u64) -> u64 {
    length.next_multiple_of(ALIGNMENT)
}

/// The generation, the log and the file's length of a header that is whole.
fn header(slot: &[u8]) -> Option<(u64, LogName, u64)> {
    let content = slot.get(..HEADER)?;
    let is_whole = content.starts_with(MAGIC) && slot.get(HEADER..HEADER + CHECK)? == check(&[content]);
    let log = content.get(8..24)?.try_into().ok()?;
    is_whole.then_some((number(content, 24)?, log, number(content, 32)?))
}

/// Generation and sequence of a record that is whole, and what is in it.
fn record(bytes: &[u8]) -> Option<(u64, u64, &[u8])> {
    let length = usize::try_from(number(bytes, 16)?).ok()?;
    let content = bytes.get(HEAD..HEAD.checked_add(length)?)?;
    let is_whole = bytes.get(24..HEAD)? == check(&[&bytes[..24], content]);
    is_whole.then_some((number(bytes, 0)?, number(bytes, 8)?, content))
}

impl Journal {
    /// Makes an empty one of `size` bytes for the log of this name, in the generation 1. Whatever was there is gone.
    pub(super) fn make(storage: Box<dyn StorageBackend>, log: LogName, size: u64) -> io::Result<Self> {
        storage.set_len(0)?;
        storage.set_len(size)?;
        // Written once, so that no place has to be found for what is written later, and nothing besides it has to be synced.
        let zeros = vec![0; 1 << 16];
        let mut at = 0;
        while at < size {
            let part = (size - at).min(zeros.len() as u64);
            #[expect(clippy::cast_possible_truncation, reason = "at most the length of a slice")]
            storage.write(at, &zeros[..part as usize])?;
            at += part;
        }
        let mut journal = Self { storage, log, generation: 0, sequence: 0, at: RECORDS, end: size };
        journal.begin_anew()?;
        Ok(journal)
    }

    /// Opens that of the log of this name; also returns what is in its records, oldest first.
    pub(super) fn open(storage: Box<dyn StorageBackend>, log: LogName) -> Result<(Self, Vec<Vec<u8>>), JournalError> {
        let end = storage.len()?;
        if !(RECORDS..=SIZE).contains(&end) {
            return Err(JournalError::Damaged("no journal has this length"));
        }
        let mut bytes = vec![0; usize::try_from(end).map_err(io::Error::other)?];
        storage.read(0, &mut bytes)?;
        let slots = bytes.chunks(usize::try_from(SLOT).map_err(io::Error::other)?).take(2).filter_map(header);
        let Some((generation, name, length)) = slots.max() else {
            return Err(JournalError::Damaged("it has no header that is whole"));
        };
        if length != end {
            return Err(JournalError::Damaged("it has not its full length"));
        }
        if name != log {
            return Err(JournalError::Damaged("it is the journal of another log"));
        }
        let mut journal = Self { storage, log, generation, sequence: 0, at: RECORDS, end };
        let mut records = Vec::new();
        let part = |at: u64| usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        while let Some((of, sequence, content)) = record(part(journal.at))
            && (of, sequence) == (generation, journal.sequence)
        {
            records.push(content.to_vec());
            journal.sequence += 1;
            journal.at += aligned((HEAD + content.len()) as u64);
        }
        let mut behind = (journal.at..end).step_by(usize::try_from(ALIGNMENT).map_err(io::Error::other)?);
        if behind.any(|at| record(part(at)).is_some_and(|(of, _, _)| of >= generation)) {
            return Err(JournalError::Damaged("a record or a header is damaged, and others come behind it"));
        }
        Ok((journal, records))
    }

    /// Which log it belongs to.
    pub(super) fn log(&self) -> LogName {
        self.log
    }

    /// How often it has begun anew.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a record with so many bytes fits behind the others.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        aligned((HEAD + bytes) as u64) <= self.end.saturating_sub(self.at)
    }

    /// Writes one more record, for which there [is room](Self::has_room). It is durable when this returns; when it fails, nothing more may be
    /// written.
    pub(super) fn append(&mut self, content: &[u8]) -> io::Result<()> {
        if !self.has_room(content.len()) {
            return Err(io::Error::other("the journal has no room for it"));
        }
        let mut record = Vec::with_capacity(HEAD + content.len());
        for number in [self.generation, self.sequence, content.len() as u64] {
            record.extend_from_slice(&number.to_le_bytes());
        }
        let check = check(&[&record, content]);
        record.extend_from_slice(&check);
        record.extend_from_slice(content);
        self.storage.write(self.at, &record)?;
        self.storage.sync_data()?;
        self.sequence += 1;
        self.at += aligned(record.len() as u64);
        Ok(())
    }

    /// Forgets all records, durably.
    pub(super) fn begin_anew(&mut self) -> io::Result<()> {
        let generation = self.generation + 1;
        let mut header = Vec::with_capacity(HEADER + CHECK);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&self.log);
        header.extend_from_slice(&generation.to_le_bytes());
        header.extend_from_slice(&self.end.to_le_bytes());
        let check = check(&[&header]);
        header.extend_from_slice(&check);
        self.storage.write(generation % 2 * SLOT, &header)?;
        self.storage.sync_data()?;
        (self.generation, self.sequence, self.at) = (generation, 0, RECORDS);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redb::backends::InMemoryBackend;
    use std::sync::Arc;

    /// Storage that is looked at, and damaged, from outside.
    #[derive(Debug, Clone)]
    struct Shared(Arc<InMemoryBackend>);

    impl Shared {
        fn flip(&self, at: u64) {
            let mut byte = [0];
            self.0.read(at, &mut byte).unwrap();
            self.0.write(at, &[byte[0] ^ 1]).unwrap();
        }
    }

    impl StorageBackend for Shared {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }
        fn set_len(&self, length: u64) -> io::Result<()> {
            self.0.set_len(length)
        }
        fn sync_data(&self) -> io::Result<()> {
            self.0.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write(offset, data)
        }
    }

    const LOG: LogName = [7; 16];

    fn made() -> (Shared, Journal) {
        let storage = Shared(Arc::new(InMemoryBackend::new()));
        let journal = Journal::make(Box::new(storage.clone()), LOG, 1 << 15).unwrap();
        (storage, journal)
    }

    fn opened(storage: &Shared) -> Result<(u64, Vec<Vec<u8>>), String> {
        Journal::open(Box::new(storage.clone()), LOG)
            .map(|(journal, records)| (journal.generation(), records))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_was_appended_is_there_until_it_begins_anew() {
        let (storage, mut journal) = made();
        assert_eq!(opened(&storage).unwrap(), (1, vec![]));
        journal.append(b"one").unwrap();
        journal.append(&[2; 100]).unwrap();
        journal.append(b"").unwrap();
        assert_eq!(opened(&storage).unwrap(), (1, vec![b"one".to_vec(), vec![2; 100], vec![]]));
        journal.begin_anew().unwrap();
        assert_eq!(opened(&storage).unwrap(), (2, vec![]));
        journal.append(b"two").unwrap();
        assert_eq!(opened(&storage).unwrap(), (2, vec![b"two".to_vec()]), "the second of before is no record of now");
    }

    #[test]
    fn it_takes_what_fits_and_no_more() {
        let (storage, mut journal) = made();
        let largest = (1 << 15) - usize::try_from(RECORDS).unwrap() - HEAD;
        assert!(journal.has_room(largest) && !journal.has_room(largest + 1));
        assert!(journal.append(&vec![1; largest + 1]).is_err());
        journal.append(&vec![1; largest]).unwrap();
        assert!(!journal.has_room(0));
        assert_eq!(opened(&storage).unwrap().1, [vec![1; largest]]);
    }

    #[test]
    fn the_last_record_may_be_half_written_and_none_before_it() {
        for byte in [0, 8, 16, 24, HEAD as u64 - 1, HEAD as u64] {
            let (storage, mut journal) = made();
            journal.append(b"one").unwrap();
            let second = journal.at;
            journal.append(b"two").unwrap();
            storage.flip(second + byte);
            assert_eq!(opened(&storage).unwrap().1, [b"one".to_vec()], "byte {byte} of the last");
            storage.flip(second + byte);
            storage.flip(RECORDS + byte);
            assert_eq!(
                opened(&storage).unwrap_err(),
                "a record or a header is damaged, and others come behind it",
                "byte {byte}"
            );
        }
    }

    #[test]
    fn a_header_that_is_not_whole_leaves_the_one_before() {
        let (storage, mut journal) = made();
        journal.append(b"one").unwrap();
        journal.begin_anew().unwrap();
        // Of generation 2, in the first slot.
        storage.flip(30);
        assert_eq!(opened(&storage).unwrap(), (1, vec![b"one".to_vec()]));
        // But not where there was a record of that: then it was durable.
        storage.flip(30);
        journal.append(b"two").unwrap();
        storage.flip(30);
        let error = opened(&storage).unwrap_err();
        assert_eq!(error, "a record or a header is damaged, and others come behind it");
        storage.flip(SLOT + 30);
        assert_eq!(opened(&storage).unwrap_err(), "it has no header that is whole");
    }

    #[test]
    fn another_log_s_is_refused_and_so_is_what_is_none() {
        let (storage, _journal) = made();
        let error = Journal::open(Box::new(storage.clone()), [8; 16]).unwrap_err().to_string();
        assert_eq!(error, "it is the journal of another log");
        storage.set_len(10_000).unwrap();
        assert_eq!(opened(&storage).unwrap_err(), "it has not its full length");
        storage.set_len(100).unwrap();
        assert_eq!(opened(&storage).unwrap_err(), "no journal has this length");
    }
}
