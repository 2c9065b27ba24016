//! The log on disk: a redb of its own and a [`journal`](super::journal) in front of it, with one thread that writes. Whatever waits goes into
//! one record, so that a storm shares its fsyncs; an entry counts as flushed once its record is durable, and never before. What is
//! in the journal goes into redb when that is full, and when entries are removed: in one transaction, with the mark that says which
//! [generation](changes::Taken) of the journal is in it, so that none is taken twice.
//!
//! Entries can be read as soon as `append` returns, because the newest are in memory as well.

mod changes;
#[cfg(test)]
mod tests;
mod writer;

use super::journal;
use super::wire::{WireLogId, WireVote, entry_bytes, entry_from};
use super::{Entry, LogId, Raft, Vote};
use crate::store::syncs::Syncs;
use crate::store::{Level, StoreError, database};
use changes::{ENTRIES, FILE, JOURNAL, MARKS, damaged, failed, journal_of, mark, unwritten};
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase as _, StorageBackend};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::OpenOptions;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use writer::{Job, Writer};

/// Flushed entries that are kept in memory: what followers that keep up ask for.
const KEPT: usize = 1024;
/// And at most this many bytes of them.
const KEPT_BYTES: usize = 8 << 20;
/// What a follower gets at a time, in bytes, or one entry.
const PIECE: usize = 512 << 10;
/// What is known without the disk.
#[derive(Default)]
struct Memory {
    /// The newest entries: all that are not in redb, and some that are.
    tail: BTreeMap<u64, (Entry, usize)>,
    bytes: usize,
    /// The newest entry in redb.
    stored: Option<u64>,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

impl Memory {
    /// Lets go of the oldest entries that are in redb.
    fn trim(&mut self) {
        while self.tail.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some(first) = self.tail.first_entry() else { return };
            if self.stored.is_none_or(|stored| *first.key() > stored) {
                return;
            }
            self.bytes -= first.remove().1;
        }
    }

    fn cut(&mut self, remove: impl Fn(u64) -> bool) {
        let gone: Vec<u64> = self.tail.keys().copied().filter(|index| remove(*index)).collect();
        for index in gone {
            if let Some((_, bytes)) = self.tail.remove(&index) {
                self.bytes -= bytes;
            }
        }
    }
}

struct Shared {
    database: Database,
    /// How long the journal takes to become durable, and the database.
    journaled: Arc<Syncs>,
    stored: Arc<Syncs>,
    memory: Mutex<Memory>,
    /// The newest level that this release knows.
    known: Level,
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Every change is made whole before anything could panic.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log.
#[derive(Clone)]
pub(super) struct Log {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
}

impl Log {
    /// Opens it, for a release that knows levels up to `known`. Its thread ends with the last handle.
    ///
    /// # Errors
    /// It cannot be opened, or is damaged; it is of a newer format, or its newest entry of a newer level.
    pub(super) fn open(path: &Path, known: Level) -> Result<Self, StoreError> {
        let database = database::open(path, database::LOG)?;
        let beside = path.with_extension("journal");
        let journal = |is_new: bool| -> Result<Box<dyn StorageBackend>, StoreError> {
            let opened = OpenOptions::new().read(true).write(true).create(is_new).mode(0o600).open(&beside);
            let file = opened.map_err(|error| failed(error).within(&beside))?;
            if is_new && let Some(directory) = beside.parent() {
                // From now on the member does not start without it.
                std::fs::File::open(directory)
                    .and_then(|directory| directory.sync_all())
                    .map_err(|error| failed(error).within(directory))?;
            }
            Ok(Box::new(FileBackend::new(file).map_err(|error| StoreError::from(error).within(&beside))?))
        };
        let opened = Self::over(database, journal, journal::SIZE, path.parent().unwrap_or(path).to_owned(), known);
        opened.map_err(|error| match &error {
            StoreError::Record { table, .. } if table == JOURNAL => error.within(&beside),
            _ => error,
        })
    }

    /// The same over a database that is open; `journal` opens its journal, or makes the file of one that is new, which will have `size` bytes; whether
    /// space is left is asked of the file system of `disk`.
    ///
    /// # Errors
    /// It is damaged; the newest entry is of a newer level.
    pub(super) fn over(
        database: Database,
        journal: impl FnOnce(bool) -> Result<Box<dyn StorageBackend>, StoreError>,
        size: u64,
        disk: PathBuf,
        known: Level,
    ) -> Result<Self, StoreError> {
        let transaction = database.begin_write()?;
        let (mut journal, is_to_begin) = journal_of(&transaction, journal, size, &disk)?;
        let memory = {
            let entries = transaction.open_table(ENTRIES)?;
            let marks = transaction.open_table(MARKS)?;
            let purged: Option<LogId> = mark::<WireLogId>(&marks, "purged")?.map(Into::into);
            let last = match redb::ReadableTable::last(&entries)? {
                Some((index, bytes)) => {
                    Some(entry_from(bytes.value(), known).map_err(|error| error.of_entry(index.value()))?.log_id)
                }
                None => purged,
            };
            let first = redb::ReadableTable::first(&entries)?.map(|(index, _)| index.value());
            if let (Some(first), Some(last)) = (first, last)
                && redb::ReadableTableMetadata::len(&entries)? != last.index() - first + 1
            {
                return Err(damaged("entries", &format!("{first} to {}", last.index()), &"entries are missing"));
            }
            Memory {
                stored: last.map(|id| id.index()),
                last,
                purged,
                vote: mark::<WireVote>(&marks, "vote")?.map(Into::into),
                committed: mark::<WireLogId>(&marks, "committed")?.map(Into::into),
                ..Memory::default()
            }
        };
        let waits = "changes and elections";
        let journaled = Arc::new(Syncs::new(disk.join(FILE), waits));
        let stored = Arc::new(Syncs::new(disk.join("log.redb"), waits));
        stored.time(|| transaction.commit())?;
        if is_to_begin {
            journaled.time(|| journal.begin_anew()).map_err(|error| unwritten(error, &disk))?;
        }
        let shared = Arc::new(Shared { database, journaled, stored, memory: Mutex::new(memory), known });
        let (jobs, queue) = mpsc::channel();
        let mut writer = Writer { journal, shared: shared.clone(), disk, waiting: Vec::new() };
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(&queue))
            .map_err(|error| StoreError::Thread(error.to_string()))?;
        Ok(Self { shared, jobs })
    }

    /// How long the journal takes to become durable, and the database.
    pub(super) fn syncs(&self) -> [Arc<Syncs>; 2] {
        [self.shared.journaled.clone(), self.shared.stored.clone()]
    }

    fn send(&self, job: Job) -> io::Result<()> {
        self.jobs.send(job).map_err(|_| io::Error::other("the log is closed"))
    }

    async fn wait(&self, job: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Job) -> io::Result<()> {
        let (answer, answered) = oneshot::channel();
        self.send(job(answer))?;
        answered.await.map_err(|_| io::Error::other("the log is closed"))?
    }
}

/// Entries, each with its length on the disk.
type Measured = Vec<(Entry, usize)>;

/// Entries follow one another, and terms never fall: a hole must not be applied as if it were none.
fn whole(entries: Measured) -> io::Result<Measured> {
    for pair in entries.windows(2) {
        let (one, next) = (pair[0].0.log_id, pair[1].0.log_id);
        if next.index() != one.index() + 1 || next.committed_leader_id() < one.committed_leader_id() {
            let damage = format!("the log is damaged: entry {next} comes after {one}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, damage));
        }
    }
    Ok(entries)
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(index) => index + 1,
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl Log {
    /// The entries from `start` to before `end`, as far as there are.
    async fn read(&self, start: u64, end: u64) -> Result<Measured, io::Error> {
        if start >= end {
            return Ok(Vec::new());
        }
        // What is in memory, and with it where the disk's part ends. Entries below that are flushed, and stay where they are: only a
        // purge removes them, and nobody reads what is being purged.
        let (kept, start, until) = {
            let memory = self.shared.memory();
            // What was removed may still be in redb.
            let start = start.max(memory.purged.map_or(0, |id| id.index() + 1));
            let end = end.min(memory.last.map_or(0, |id| id.index() + 1));
            if start >= end {
                return Ok(Vec::new());
            }
            let kept: Measured = memory.tail.range(start..end).map(|(_, entry)| entry.clone()).collect();
            let until = memory.tail.keys().next().copied().unwrap_or(u64::MAX).min(end);
            (kept, start, until)
        };
        if start >= until {
            return Ok(kept);
        }
        let shared = self.shared.clone();
        let read = move || -> Result<Measured, StoreError> {
            let table = shared.database.begin_read()?.open_table(ENTRIES)?;
            let mut entries = Vec::new();
            for item in table.range(start..until)? {
                let (index, bytes) = item?;
                let entry = entry_from(bytes.value(), shared.known).map_err(|error| error.of_entry(index.value()))?;
                entries.push((entry, bytes.value().len()));
            }
            Ok(entries)
        };
        let mut entries = tokio::task::spawn_blocking(read).await?.map_err(io::Error::other)?;
        entries.extend(kept);
        Ok(entries)
    }

    /// The same, without holes.
    async fn read_whole(&self, start: u64, end: u64) -> Result<Measured, io::Error> {
        match whole(self.read(start, end).await?) {
            // The end of the log may have been cut off between what was read from memory and from the disk: a second look tells that
            // from damage.
            Err(_) => whole(self.read(start, end).await?),
            entries => entries,
        }
    }
}

impl RaftLogReader<Raft> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = bounds(&range);
        Ok(self.read_whole(start, end).await?.into_iter().map(|(entry, _)| entry).collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.memory().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        // A follower far behind gets them in pieces.
        let entries = self.read_whole(start, end.min(start.saturating_add(KEPT as u64))).await?;
        // Some that were asked for may have been removed meanwhile: who gets the others would say that he has all.
        if entries.first().is_some_and(|(first, _)| first.log_id.index() != start) {
            return Ok(Vec::new());
        }
        let mut bytes = 0;
        let piece = entries.into_iter().enumerate().take_while(|(at, (_, length))| {
            bytes += length;
            *at == 0 || bytes <= PIECE
        });
        Ok(piece.map(|(_, (entry, _))| entry).collect())
    }
}

impl RaftLogStorage<Raft> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Raft>, io::Error> {
        let memory = self.shared.memory();
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: memory.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.wait(|answer| Job::Vote(vote, answer)).await?;
        self.shared.memory().vote = Some(vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.shared.memory().committed = committed;
        self.send(Job::Committed(committed))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.shared.memory().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Raft>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut written = Vec::new();
        {
            let mut memory = self.shared.memory();
            for entry in entries {
                let bytes = entry_bytes(&entry).map_err(io::Error::other)?;
                let index = entry.log_id.index();
                memory.last = Some(entry.log_id);
                memory.bytes += bytes.len();
                memory.tail.insert(index, (entry, bytes.len()));
                written.push((index, bytes));
            }
        }
        self.send(Job::Append(written, callback))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let last = last_log_id.map(|id| id.index());
        {
            let mut memory = self.shared.memory();
            memory.cut(|index| last.is_none_or(|last| index > last));
            memory.last = memory.last.min(last_log_id);
        }
        self.wait(|answer| Job::Truncate(last, answer)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        {
            let mut memory = self.shared.memory();
            memory.cut(|index| index <= log_id.index());
            memory.purged = Some(log_id);
            memory.last = memory.last.max(Some(log_id));
        }
        self.wait(|answer| Job::Purge(log_id, answer)).await
    }
}
