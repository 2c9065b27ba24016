//! The log on disk: a redb of its own, with one thread that writes. Whatever waits goes into one transaction, so that a storm shares its
//! fsyncs; an entry counts as flushed once its transaction is durable, and never before.
//!
//! Entries can be read as soon as `append` returns, because the newest are in memory as well.

use super::wire::{WireLogId, WireVote, entry_bytes, entry_from};
use super::{Entry, LogId, Raft, Vote};
use crate::files::free_space;
use crate::store::{Level, StoreError, database};
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use redb::{Database, ReadableDatabase as _, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

const ENTRIES: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("entries");
/// What is one of a kind: `vote`, `committed`, `purged`.
const MARKS: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("marks");

/// Flushed entries that are kept in memory: what followers that keep up ask for.
const KEPT: usize = 1024;
/// And at most this many bytes of them.
const KEPT_BYTES: usize = 8 << 20;
/// What a follower gets at a time, in bytes, or one entry.
const PIECE: usize = 512 << 10;
/// Jobs that one transaction takes.
const BATCH: usize = 256;
/// So long the mark of what is committed waits for something to go with.
const MARK: Duration = Duration::from_secs(1);
/// Below this many bytes of free space nothing is written: a database that meets the end of the disk has to be opened anew.
const RESERVE: u64 = 8 << 20;

enum Job {
    Append(Vec<(u64, Vec<u8>)>, IOFlushed<Raft>),
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    /// Not worth an fsync of its own.
    Committed(Option<LogId>),
    /// Removes all after it.
    Truncate(Option<u64>, oneshot::Sender<io::Result<()>>),
    /// Removes all up to it.
    Purge(LogId, oneshot::Sender<io::Result<()>>),
}

impl Job {
    /// Who waits for it.
    fn answer(self) -> Answer {
        match self {
            Self::Append(entries, callback) => Answer::Flushed(callback, entries.last().map_or(0, |(index, _)| *index)),
            Self::Vote(_, answer) | Self::Truncate(_, answer) | Self::Purge(_, answer) => Answer::Done(answer),
            Self::Committed(_) => Answer::None,
        }
    }
}

enum Answer {
    Flushed(IOFlushed<Raft>, u64),
    Done(oneshot::Sender<io::Result<()>>),
    None,
}

/// What is known without the disk.
#[derive(Default)]
struct Memory {
    /// The newest entries: all that are not flushed, and some that are.
    tail: BTreeMap<u64, (Entry, usize)>,
    bytes: usize,
    /// The newest flushed entry.
    flushed: Option<u64>,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

impl Memory {
    /// Lets go of the oldest entries that are on disk.
    fn trim(&mut self) {
        while self.tail.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some(first) = self.tail.first_entry() else { return };
            if self.flushed.is_none_or(|flushed| *first.key() > flushed) {
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

/// A mark as it lies on the disk.
fn mark<T: DeserializeOwned>(
    table: &impl redb::ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<T>, StoreError> {
    let Some(value) = table.get(key)? else { return Ok(None) };
    serde_json::from_slice(value.value()).map(Some).map_err(|error| damaged("marks", key, &error))
}

fn damaged(table: &str, key: &str, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError::Record { table: table.to_owned(), key: key.to_owned(), cause: cause.to_string() }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| StoreError::Encode(error.to_string()))
}

impl Log {
    /// Opens it, for a release that knows levels up to `known`. Its thread ends with the last handle.
    ///
    /// # Errors
    /// It cannot be opened, or is damaged; the newest entry is of a newer level.
    pub(super) fn open(path: &Path, known: Level) -> Result<Self, StoreError> {
        Self::over(database::open(path, database::LOG)?, path.parent().unwrap_or(path).to_owned(), known)
    }

    /// The same over a database that is open; whether space is left is asked of the file system of `disk`.
    ///
    /// # Errors
    /// It is damaged; the newest entry is of a newer level.
    pub(super) fn over(database: Database, disk: PathBuf, known: Level) -> Result<Self, StoreError> {
        let transaction = database.begin_write()?;
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
                flushed: last.map(|id| id.index()),
                last,
                purged,
                vote: mark::<WireVote>(&marks, "vote")?.map(Into::into),
                committed: mark::<WireLogId>(&marks, "committed")?.map(Into::into),
                ..Memory::default()
            }
        };
        transaction.commit()?;
        let shared = Arc::new(Shared { database, memory: Mutex::new(memory), known });
        let (jobs, queue) = mpsc::channel();
        let writer = Writer { shared: shared.clone(), disk };
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(&queue))
            .map_err(|_| StoreError::Closed)?;
        Ok(Self { shared, jobs })
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

struct Writer {
    shared: Arc<Shared>,
    disk: PathBuf,
}

impl Writer {
    fn run(&self, queue: &mpsc::Receiver<Job>) {
        let (mut committed, mut failed) = (None, None);
        loop {
            // The newest mark goes with the next job that is worth a sync, and alone when none comes.
            let first = match committed {
                Some(_) => queue.recv_timeout(MARK),
                None => queue.recv().map_err(RecvTimeoutError::from),
            };
            let is_late = matches!(first, Err(RecvTimeoutError::Timeout));
            let mut batch = match first {
                Ok(job) => vec![job],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while batch.len() < BATCH {
                let Ok(job) = queue.try_recv() else { break };
                batch.push(job);
            }
            batch.retain(|job| {
                if let Job::Committed(id) = job {
                    committed = *id;
                }
                !matches!(job, Job::Committed(_))
            });
            if batch.is_empty() && !is_late {
                continue;
            }
            batch.extend(committed.take().map(|id| Job::Committed(Some(id))));
            self.write(batch, &mut failed);
        }
    }

    /// After a failure nothing is written any more: what came next would leave a hole where the failed entries are missing.
    fn write(&self, batch: Vec<Job>, failed: &mut Option<String>) {
        let mut answers = Vec::with_capacity(batch.len());
        let written = match failed {
            Some(before) => {
                answers.extend(batch.into_iter().map(Job::answer));
                Err(before.clone())
            }
            None => self.commit(batch, &mut answers).map_err(|error| {
                tracing::error!("writing the log: {error}");
                failed.insert(error.to_string()).clone()
            }),
        };
        for answer in answers {
            let result = written.clone().map_err(io::Error::other);
            match answer {
                Answer::Flushed(callback, last) => {
                    if result.is_ok() {
                        let mut memory = self.shared.memory();
                        memory.flushed = memory.flushed.max(Some(last));
                        memory.trim();
                    }
                    callback.io_completed(result);
                }
                Answer::Done(sender) => {
                    // Nobody waits any more: it is done all the same.
                    let _ = sender.send(result);
                }
                Answer::None => {}
            }
        }
    }

    fn commit(&self, batch: Vec<Job>, answers: &mut Vec<Answer>) -> Result<(), StoreError> {
        let full = free_space(&self.disk).ok().filter(|free| *free < RESERVE);
        let mut opened = Ok(None);
        if full.is_none() {
            opened = self.shared.database.begin_write().map(Some);
        }
        // Every job is answered, whatever becomes of the transaction.
        let mut result = Ok(());
        for job in batch {
            let done = match &opened {
                Ok(Some(transaction)) if result.is_ok() => put(transaction, &job),
                _ => Ok(()),
            };
            result = result.and(done);
            answers.push(job.answer());
        }
        if let Some(free) = full {
            return Err(StoreError::Full(free >> 20));
        }
        result?;
        if let Some(transaction) = opened? {
            transaction.commit()?;
        }
        Ok(())
    }
}

fn put(transaction: &redb::WriteTransaction, job: &Job) -> Result<(), StoreError> {
    match job {
        Job::Append(entries, _) => {
            let mut table = transaction.open_table(ENTRIES)?;
            for (index, bytes) in entries {
                table.insert(index, bytes.as_slice())?;
            }
        }
        Job::Vote(vote, _) => {
            transaction.open_table(MARKS)?.insert("vote", json(&WireVote::from(vote))?.as_slice())?;
        }
        Job::Committed(committed) => {
            if let Some(id) = committed {
                transaction.open_table(MARKS)?.insert("committed", json(&WireLogId::from(*id))?.as_slice())?;
            }
        }
        Job::Truncate(after, _) => {
            let first = after.map_or(0, |index| index + 1);
            transaction.open_table(ENTRIES)?.retain_in(first.., |_, _| false)?;
        }
        Job::Purge(id, _) => {
            transaction.open_table(ENTRIES)?.retain_in(..=id.index(), |_, _| false)?;
            transaction.open_table(MARKS)?.insert("purged", json(&WireLogId::from(*id))?.as_slice())?;
        }
    }
    Ok(())
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
        let (kept, until) = {
            let memory = self.shared.memory();
            let kept: Measured = memory.tail.range(start..end).map(|(_, entry)| entry.clone()).collect();
            let until = memory.tail.keys().next().copied().unwrap_or(u64::MAX).min(end);
            (kept, until)
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
            memory.flushed = memory.flushed.min(last);
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
