//! What becomes of the log's database: its tables, each change of them, how changes lie in a record of the journal, and how those of a journal that is
//! opened are taken over.

use crate::store::StoreError;
use crate::store::raft::journal::{Journal, JournalError, LogName};
use redb::{ReadableTable as _, StorageBackend, TableDefinition, TableError, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

pub(super) const ENTRIES: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("entries");
/// What is one of a kind: `vote`, `committed`, `purged`, `journal`.
pub(super) const MARKS: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("marks-2");
/// [`MARKS`] had this name before there was a journal, and a build of then, which would not see what is in the journal alone, opens no table of
/// another type. Under [`FORMAT_KEY`] it has the format of the log, so that a build that does not know that one does not open it either.
const FORMATS: TableDefinition<'static, &'static str, u64> = TableDefinition::new("marks");
const BEFORE: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("marks");
const FORMAT_KEY: &str = "format";
/// What this build writes: 1 was a log without a format, 2 is one whose newest entries may be in the journal alone.
const FORMAT: u64 = 2;

/// The mark of the [`Taken`], and what errors call the journal.
pub(super) const JOURNAL: &str = "journal";

/// Its file, beside that of the log.
pub(super) const FILE: &str = "log.journal";

/// Which journal the log has, and up to which generation of it all is in redb.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Taken {
    pub(super) log: LogName,
    pub(super) generation: u64,
}

/// What a job does to redb, sooner or later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Entry(u64, Vec<u8>),
    Mark(String, Vec<u8>),
    /// Removes the entries from this one on.
    From(u64),
    /// Removes the entries up to this one.
    UpTo(u64),
}

impl Change {
    /// Whether it goes into the journal: what is removed there is still there.
    pub(super) fn is_journaled(&self) -> bool {
        matches!(self, Self::Entry(..) | Self::Mark(..))
    }

    pub(super) fn make(&self, transaction: &WriteTransaction) -> Result<(), StoreError> {
        match self {
            Self::Entry(index, bytes) => {
                transaction.open_table(ENTRIES)?.insert(index, bytes.as_slice())?;
            }
            Self::Mark(name, bytes) => {
                transaction.open_table(MARKS)?.insert(name.as_str(), bytes.as_slice())?;
            }
            Self::From(first) => transaction.open_table(ENTRIES)?.retain_in(*first.., |_, _| false)?,
            Self::UpTo(last) => transaction.open_table(ENTRIES)?.retain_in(..=*last, |_, _| false)?,
        }
        Ok(())
    }
}

/// A record of the journal: for each change 0 and the entry's index, or 1 and the length of the mark's name, in 8 bytes; the length of the bytes, in
/// 8; the name; the bytes.
pub(super) fn record_of(changes: &[Change]) -> Vec<u8> {
    let mut record = Vec::new();
    let mut put = |kind: u8, number: u64, name: &str, bytes: &[u8]| {
        record.push(kind);
        record.extend_from_slice(&number.to_le_bytes());
        record.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        record.extend_from_slice(name.as_bytes());
        record.extend_from_slice(bytes);
    };
    for change in changes {
        match change {
            Change::Entry(index, bytes) => put(0, *index, "", bytes),
            Change::Mark(name, bytes) => put(1, name.len() as u64, name, bytes),
            // Goes into redb at once.
            Change::From(_) | Change::UpTo(_) => {}
        }
    }
    record
}

/// `None`: it is none.
fn changes_of(mut record: &[u8]) -> Option<Vec<Change>> {
    let mut changes = Vec::new();
    while let Some((kind, rest)) = record.split_first() {
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (number, length) = (u64::from_le_bytes(*number), usize::try_from(u64::from_le_bytes(*length)).ok()?);
        let (name, rest) = match kind {
            0 => ("", rest),
            1 => {
                let (name, rest) = rest.split_at_checked(usize::try_from(number).ok()?)?;
                (std::str::from_utf8(name).ok()?, rest)
            }
            _ => return None,
        };
        let (bytes, rest) = rest.split_at_checked(length)?;
        changes.push(match kind {
            0 => Change::Entry(number, bytes.to_vec()),
            _ => Change::Mark(name.to_owned(), bytes.to_vec()),
        });
        record = rest;
    }
    Some(changes)
}

/// A mark as it lies on the disk.
pub(super) fn mark<T: DeserializeOwned>(
    table: &impl redb::ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<T>, StoreError> {
    let Some(value) = table.get(key)? else { return Ok(None) };
    serde_json::from_slice(value.value()).map(Some).map_err(|error| damaged("marks", key, &error))
}

pub(super) fn damaged(table: &str, key: &str, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError::Record { table: table.to_owned(), key: key.to_owned(), cause: cause.to_string() }
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| StoreError::Encode(error.to_string()))
}

/// Looks at the format of the log, and makes one that has none yet to one of [`FORMAT`].
fn check_format(transaction: &WriteTransaction) -> Result<(), StoreError> {
    match transaction.open_table(FORMATS) {
        Ok(mut formats) => {
            let found = formats.get(FORMAT_KEY)?.map(|format| format.value());
            match found {
                Some(FORMAT) => return Ok(()),
                Some(found) => return Err(StoreError::Format { found, known: FORMAT }),
                // A new one.
                None => formats.insert(FORMAT_KEY, FORMAT)?,
            };
            return Ok(());
        }
        Err(TableError::TableTypeMismatch { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    {
        let before = transaction.open_table(BEFORE)?;
        let mut marks = transaction.open_table(MARKS)?;
        for mark in before.iter()? {
            let (name, bytes) = mark?;
            marks.insert(name.value(), bytes.value())?;
        }
    }
    transaction.delete_table(BEFORE)?;
    transaction.open_table(FORMATS)?.insert(FORMAT_KEY, FORMAT)?;
    Ok(())
}

/// The journal of the log that is being opened, with all that is in it put into redb, and whether it is to begin anew once that is durable.
pub(super) fn journal_of(
    transaction: &WriteTransaction,
    open: impl FnOnce(bool) -> Result<Box<dyn StorageBackend>, StoreError>,
    size: u64,
    disk: &Path,
) -> Result<(Journal, bool), StoreError> {
    check_format(transaction)?;
    let taken: Option<Taken> = mark(&transaction.open_table(MARKS)?, JOURNAL)?;
    let Some(taken) = taken else {
        // A new log, or one of a release that had no journal.
        let journal = Journal::make(open(true)?, *uuid::Uuid::new_v4().as_bytes(), size);
        let journal = journal.map_err(|error| unwritten(error, disk))?;
        let taken = Taken { log: journal.log(), generation: 0 };
        Change::Mark(JOURNAL.to_owned(), json(&taken)?).make(transaction)?;
        return Ok((journal, false));
    };
    let (journal, records) = Journal::open(open(false)?, taken.log).map_err(|error| match error {
        JournalError::Io(error) => unwritten(error, disk),
        JournalError::Damaged(cause) => damaged(JOURNAL, "records", &cause),
    })?;
    if journal.generation() == taken.generation {
        return Ok((journal, true));
    }
    if journal.generation() != taken.generation + 1 {
        return Err(damaged(JOURNAL, "generation", &"it is of another time than the log"));
    }
    for record in &records {
        let changes = changes_of(record).ok_or_else(|| damaged(JOURNAL, "records", &"a record is not understood"))?;
        changes.iter().try_for_each(|change| change.make(transaction))?;
    }
    // Also without any: what the kernel shows of a header may not be on the disk, if syncing it failed before this start.
    Change::Mark(JOURNAL.to_owned(), json(&Taken { generation: journal.generation(), ..taken })?).make(transaction)?;
    Ok((journal, true))
}

/// Reading or writing the journal failed, which is a file of its own in the directory `disk`.
pub(super) fn unwritten(error: io::Error, disk: &Path) -> StoreError {
    failed(error).within(&disk.join(FILE))
}

pub(super) fn failed(error: io::Error) -> StoreError {
    StoreError::Database(Box::new(redb::Error::Io(error)))
}
