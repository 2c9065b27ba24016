//! The log on disk: a redb of its own and a [`journal`](super::journal) in front of it, with one thread that writes. Whatever waits goes into
//! one record, so that a storm shares its fsyncs; an entry counts as flushed once its record is durable, and never before. What is
//! in the journal goes into redb when that is full, and when entries are removed: in one transaction, with the mark that says which
//! [generation](Taken) of the journal is in it, so that none is taken twice.
//!
//! Entries can be read as soon as `append` returns, because the newest are in memory as well.

use super::journal::{self, Journal, JournalError, LogName};
use super::wire::{WireLogId, WireVote, entry_bytes, entry_from};
use super::{Entry, LogId, Raft, Vote};
use crate::files::free_space;
use crate::store::{Level, StoreError, database};
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase as _, StorageBackend, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::OpenOptions;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const ENTRIES: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("entries");
/// What is one of a kind: `vote`, `committed`, `purged`, `journal`.
const MARKS: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("marks");

/// The mark of the [`Taken`], and what errors call the journal.
const JOURNAL: &str = "journal";

/// Flushed entries that are kept in memory: what followers that keep up ask for.
const KEPT: usize = 1024;
/// And at most this many bytes of them.
const KEPT_BYTES: usize = 8 << 20;
/// What a follower gets at a time, in bytes, or one entry.
const PIECE: usize = 512 << 10;
/// Jobs that one transaction takes.
const BATCH: usize = 256;
/// The mark of what is committed is written this often: it costs every transaction that it goes with a page more.
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
    /// What it does to redb, behind `changes`. Its entries are in there afterwards, and not in the job.
    fn take_changes(&mut self, changes: &mut Vec<Change>) -> Result<(), StoreError> {
        let mark = |name: &str, bytes| Change::Mark(name.to_owned(), bytes);
        match self {
            Self::Append(entries, _) => {
                changes.extend(std::mem::take(entries).into_iter().map(|(index, bytes)| Change::Entry(index, bytes)));
            }
            Self::Vote(vote, _) => changes.push(mark("vote", json(&WireVote::from(&*vote))?)),
            Self::Committed(Some(id)) => changes.push(mark("committed", json(&WireLogId::from(*id))?)),
            Self::Committed(None) => {}
            Self::Truncate(after, _) => changes.push(Change::From(after.map_or(0, |index| index + 1))),
            Self::Purge(id, _) => {
                changes.push(Change::UpTo(id.index()));
                changes.push(mark("purged", json(&WireLogId::from(*id))?));
            }
        }
        Ok(())
    }

    /// Who waits for it.
    fn answer(self) -> Answer {
        match self {
            Self::Append(_, callback) => Answer::Flushed(callback),
            Self::Vote(_, answer) | Self::Truncate(_, answer) | Self::Purge(_, answer) => Answer::Done(answer),
            Self::Committed(_) => Answer::None,
        }
    }
}

enum Answer {
    Flushed(IOFlushed<Raft>),
    Done(oneshot::Sender<io::Result<()>>),
    None,
}

/// Which journal the log has, and up to which generation of it all is in redb.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Taken {
    log: LogName,
    generation: u64,
}

/// What a job does to redb, sooner or later.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Entry(u64, Vec<u8>),
    Mark(String, Vec<u8>),
    /// Removes the entries from this one on.
    From(u64),
    /// Removes the entries up to this one.
    UpTo(u64),
}

impl Change {
    /// Whether it goes into the journal: what is removed there is still there.
    fn is_journaled(&self) -> bool {
        matches!(self, Self::Entry(..) | Self::Mark(..))
    }

    fn make(&self, transaction: &WriteTransaction) -> Result<(), StoreError> {
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
fn record_of(changes: &[Change]) -> Vec<u8> {
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
        let (mut journal, is_to_begin) = journal_of(&transaction, journal, size)?;
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
        transaction.commit()?;
        if is_to_begin {
            journal.begin_anew().map_err(failed)?;
        }
        let shared = Arc::new(Shared { database, memory: Mutex::new(memory), known });
        let (jobs, queue) = mpsc::channel();
        let mut writer = Writer { journal, shared: shared.clone(), disk, waiting: Vec::new() };
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
    journal: Journal,
    shared: Arc<Shared>,
    disk: PathBuf,
    /// What is in the journal, and not in redb.
    waiting: Vec<Change>,
}

impl Writer {
    fn run(&mut self, queue: &mpsc::Receiver<Job>) {
        let (mut committed, mut failed) = (None, None);
        let mut marked = Instant::now();
        loop {
            // The newest mark goes with a job that is worth a sync once it is time, and alone when none comes.
            let first = match committed {
                Some(_) => queue.recv_timeout(MARK),
                None => queue.recv().map_err(RecvTimeoutError::from),
            };
            let mut batch = match first {
                Ok(job) => vec![job],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => {
                    // All is durable; but who opens it finds less to do.
                    if failed.is_none() && !self.waiting.is_empty() {
                        let _ = self.store(&[]);
                    }
                    return;
                }
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
            if marked.elapsed() >= MARK {
                batch.extend(committed.take().map(|id| Job::Committed(Some(id))));
                marked = Instant::now();
            }
            if !batch.is_empty() {
                self.write(batch, &mut failed);
            }
        }
    }

    /// After a failure nothing is written any more: what came next would leave a hole where the failed entries are missing.
    fn write(&mut self, batch: Vec<Job>, failed: &mut Option<String>) {
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
                Answer::Flushed(callback) => callback.io_completed(result),
                Answer::Done(sender) => {
                    // Nobody waits any more: it is done all the same.
                    let _ = sender.send(result);
                }
                Answer::None => {}
            }
        }
    }

    fn commit(&mut self, batch: Vec<Job>, answers: &mut Vec<Answer>) -> Result<(), StoreError> {
        let mut changes = Ok(Vec::new());
        // Every job is answered, whatever becomes of it.
        for mut job in batch {
            changes = changes.and_then(|mut changes| job.take_changes(&mut changes).map(|()| changes));
            answers.push(job.answer());
        }
        let changes = changes?;
        self.check_space()?;
        if changes.iter().all(Change::is_journaled) {
            let record = record_of(&changes);
            if self.journal.has_room(record.len()) {
                self.journal.append(&record).map_err(failed)?;
                self.waiting.extend(changes);
                return Ok(());
            }
        }
        self.store(&changes)
    }

    fn check_space(&self) -> Result<(), StoreError> {
        match free_space(&self.disk).ok().filter(|free| *free < RESERVE) {
            Some(free) => Err(StoreError::Full(free >> 20)),
            None => Ok(()),
        }
    }

    /// Puts all that waits into redb, and `changes` behind it; the journal begins anew.
    fn store(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let transaction = self.shared.database.begin_write()?;
        for change in self.waiting.iter().chain(changes) {
            change.make(&transaction)?;
        }
        let taken = Taken { generation: self.journal.generation(), log: self.journal.log() };
        Change::Mark(JOURNAL.to_owned(), json(&taken)?).make(&transaction)?;
        let stored = redb::ReadableTable::last(&transaction.open_table(ENTRIES)?)?.map(|(index, _)| index.value());
        transaction.commit()?;
        self.journal.begin_anew().map_err(failed)?;
        self.waiting.clear();
        let mut memory = self.shared.memory();
        memory.stored = stored;
        memory.trim();
        Ok(())
    }
}

/// The journal of the log that is being opened, with all that is in it put into redb, and whether it is to begin anew once that is durable.
fn journal_of(
    transaction: &WriteTransaction,
    open: impl FnOnce(bool) -> Result<Box<dyn StorageBackend>, StoreError>,
    size: u64,
) -> Result<(Journal, bool), StoreError> {
    let taken: Option<Taken> = mark(&transaction.open_table(MARKS)?, JOURNAL)?;
    let Some(taken) = taken else {
        // A new log, or one of a release that had no journal.
        let journal = Journal::make(open(true)?, *uuid::Uuid::new_v4().as_bytes(), size).map_err(failed)?;
        let taken = Taken { log: journal.log(), generation: 0 };
        Change::Mark(JOURNAL.to_owned(), json(&taken)?).make(transaction)?;
        return Ok((journal, false));
    };
    let (journal, records) = Journal::open(open(false)?, taken.log).map_err(|error| match error {
        JournalError::Io(error) => failed(error),
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

fn failed(error: io::Error) -> StoreError {
    StoreError::Database(Box::new(redb::Error::Io(error)))
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
