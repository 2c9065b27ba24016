//! The thread that writes: what waits goes into one record of the journal, or with all that is in there into redb.

use super::Shared;
use super::changes::{Change, ENTRIES, JOURNAL, Taken, json, record_of, unwritten};
use crate::files::free_space;
use crate::store::StoreError;
use crate::store::raft::journal::Journal;
use crate::store::raft::wire::{WireLogId, WireVote};
use crate::store::raft::{LogId, Raft, Vote};
use openraft::storage::IOFlushed;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Jobs that one transaction takes.
const BATCH: usize = 256;
/// The mark of what is committed is written this often: it costs every transaction that it goes with a page more.
const MARK: Duration = Duration::from_secs(1);
/// Below this many bytes of free space nothing is written: a database that meets the end of the disk has to be opened anew.
const RESERVE: u64 = 8 << 20;

pub(super) enum Job {
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

pub(super) struct Writer {
    pub(super) journal: Journal,
    pub(super) shared: Arc<Shared>,
    pub(super) disk: PathBuf,
    /// What is in the journal, and not in redb.
    pub(super) waiting: Vec<Change>,
}

impl Writer {
    pub(super) fn run(&mut self, queue: &mpsc::Receiver<Job>) {
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
                let appended = self.shared.journaled.time(|| self.journal.append(&record));
                appended.map_err(|error| unwritten(error, &self.disk))?;
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
        self.shared.stored.time(|| transaction.commit())?;
        let begun = self.shared.journaled.time(|| self.journal.begin_anew());
        begun.map_err(|error| unwritten(error, &self.disk))?;
        self.waiting.clear();
        let mut memory = self.shared.memory();
        memory.stored = stored;
        memory.trim();
        Ok(())
    }
}
