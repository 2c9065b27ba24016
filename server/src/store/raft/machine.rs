//! The state machine: [`apply`](crate::store::apply) over the tables of `member.redb`, and with them which entry was applied last.
//!
//! The log is what is durable. A transaction here is synced only now and then: after a crash the tables are those of an earlier moment,
//! whole and consistent, and what is committed in the log since is applied again before anybody reads.

use super::snapshot::{self, SnapshotFile};
use super::wire::{WireLogId, WireStored};
use super::{Entry, LogId, Membership, Raft, SnapshotMeta, StoredMembership};
use crate::store::kept::KeptRecords;
use crate::store::records::{KeysRecord, MemberRecord};
use crate::store::syncs::Syncs;
use crate::store::tables::{self, Snapshot, Write};
use crate::store::{Command, Event, Level, Outcome, StoreError, apply, database, keys, level};
use futures_util::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use redb::{Database, Durability, WriteTransaction};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{broadcast, watch};

/// Entries that one transaction applies at most.
const BATCH: usize = 256;
/// Entries that are applied by Raft's own thread, if they are [little](Command::is_little).
const AT_ONCE: usize = 4;
/// After so many entries a transaction is synced: the most that is applied again after a crash.
const UNSYNCED: usize = 4096;
/// Events a slow watcher may be behind before it has to begin anew.
const EVENTS: usize = 4096;

/// What all handles share.
pub(super) struct State {
    database: Database,
    /// How long it takes to become durable.
    syncs: Arc<Syncs>,
    kept: Arc<KeptRecords>,
    /// Where snapshots are kept.
    directory: PathBuf,
    /// The newest level that this release knows.
    known: Level,
    events: broadcast::Sender<Event>,
    /// The level of what came, where this release does not know it.
    outgrown: watch::Sender<Option<Level>>,
    unsynced: AtomicUsize,
    newest: Mutex<Option<(SnapshotMeta, PathBuf)>>,
}

/// A handle.
#[derive(Clone)]
pub(super) struct Machine(Arc<State>);

impl std::ops::Deref for Machine {
    type Target = State;
    fn deref(&self) -> &State {
        &self.0
    }
}

impl Machine {
    /// Opens the tables, for a release that knows levels up to `known`; snapshots that an interrupted member left in `directory` are
    /// removed.
    ///
    /// # Errors
    /// The database or the directory cannot be opened; the collective is of a newer level.
    pub(super) fn open(path: &Path, directory: PathBuf, known: Level) -> Result<Self, StoreError> {
        Self::over(database::open(path, database::TABLES)?, path, directory, known)
    }

    /// The same over a database that is open: the one in `file`.
    ///
    /// # Errors
    /// The directory cannot be opened; the collective is of a newer level.
    pub(super) fn over(database: Database, file: &Path, directory: PathBuf, known: Level) -> Result<Self, StoreError> {
        // Elections do not wait for it: the log is what is durable.
        let syncs = Arc::new(Syncs::new(file.to_owned(), "changes"));
        let transaction = database.begin_write()?;
        tables::create(&transaction)?;
        syncs.time(|| transaction.commit())?;
        let kept = Arc::<KeptRecords>::default();
        level::check(Snapshot::new(&database, kept.clone())?.level()?, known)?;
        snapshot::clear(&directory).map_err(|error| StoreError::Snapshot(error.to_string()))?;
        let (events, _) = broadcast::channel(EVENTS);
        Ok(Self(Arc::new(State {
            database,
            syncs,
            kept,
            directory,
            known,
            events,
            outgrown: watch::Sender::default(),
            unsynced: AtomicUsize::new(0),
            newest: Mutex::new(None),
        })))
    }
}

impl State {
    pub(super) fn view(&self) -> Result<Snapshot, StoreError> {
        Snapshot::new(&self.database, self.kept.clone())
    }

    /// How long the tables take to become durable.
    pub(super) fn syncs(&self) -> Arc<Syncs> {
        self.syncs.clone()
    }

    /// The newest level that this release knows.
    pub(super) fn known(&self) -> Level {
        self.known
    }

    pub(super) fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The level of what came, once it is one that this release does not know.
    pub(super) fn outgrown(&self) -> watch::Receiver<Option<Level>> {
        self.outgrown.subscribe()
    }

    /// Why it failed: because the collective has outgrown this release, or as `error` says.
    pub(super) fn why(&self, error: StoreError) -> StoreError {
        match *self.outgrown.borrow() {
            Some(level) => StoreError::TooOld { level, known: self.known },
            None => error,
        }
    }

    /// Keeps in mind that the collective has outgrown this release, if that is why.
    pub(super) fn note<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::TooOld { level, .. }) = &answer {
            self.outgrown.send_replace(Some(*level));
        }
        answer
    }

    /// Where a snapshot that is received may be put.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Which entry was applied last, and the membership that was.
    pub(super) fn applied(view: &Snapshot) -> Result<(Option<LogId>, StoredMembership), StoreError> {
        let applied: Option<WireLogId> = view.get(tables::RAFT, "applied")?;
        let membership: Option<WireStored> = view.get(tables::RAFT, "membership")?;
        let membership = membership.map(StoredMembership::try_from).transpose().map_err(|error| {
            StoreError::Record { table: "raft".into(), key: "membership".into(), cause: error.to_string() }
        })?;
        Ok((applied.map(Into::into), membership.unwrap_or_default()))
    }

    /// Makes all that was applied durable.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.unsynced.store(0, Ordering::Relaxed);
        let transaction = self.database.begin_write()?;
        Ok(self.syncs.time(|| transaction.commit())?)
    }

    /// Whether what is applied is to be synced with so many more entries.
    fn is_to_sync(&self, more: usize) -> bool {
        self.unsynced.load(Ordering::Relaxed) + more >= UNSYNCED
    }

    pub(super) fn apply(&self, chunk: Vec<EntryResponder<Raft>>) -> Result<(), StoreError> {
        self.note(
            self.database.begin_write().map_err(Into::into).and_then(|transaction| self.apply_in(transaction, chunk)),
        )
    }

    /// A transaction in which `chunk` is applied in no time; none where it waits for the disk or another transaction, or has more to do.
    fn at_once(&self, chunk: &[EntryResponder<Raft>]) -> Option<WriteTransaction> {
        let is_little = |(entry, _): &EntryResponder<Raft>| match &entry.payload {
            EntryPayload::Blank => true,
            EntryPayload::Normal(command) => command.is_little(),
            EntryPayload::Membership(_) => false,
        };
        let is_quick = chunk.len() <= AT_ONCE && !self.is_to_sync(chunk.len()) && chunk.iter().all(is_little);
        // Why there is none, who waits for one will learn.
        if is_quick { self.database.try_begin_write().ok() } else { None }
    }

    fn apply_in(&self, mut transaction: WriteTransaction, chunk: Vec<EntryResponder<Raft>>) -> Result<(), StoreError> {
        let is_to_sync = self.is_to_sync(chunk.len());
        self.unsynced.fetch_add(chunk.len(), Ordering::Relaxed);
        if is_to_sync {
            self.unsynced.store(0, Ordering::Relaxed);
        } else {
            transaction
                .set_durability(Durability::None)
                .map_err(|error| StoreError::Database(Box::new(error.into())))?;
        }
        let write = Write::new(&transaction);
        let mut answers = Vec::with_capacity(chunk.len());
        let mut last = None;
        for (entry, responder) in chunk {
            last = Some(entry.log_id);
            let outcome = self.take(&write, entry)?;
            answers.extend(responder.map(|responder| (responder, outcome)));
        }
        if let Some(last) = last {
            write.put(tables::RAFT, "applied", &WireLogId::from(last))?;
        }
        // Only now it is known whether the level has risen: who was to raise it may have been refused. Nothing is committed if it has.
        level::check(level::of(&write)?, self.known)?;
        let events = write.into_events();
        if is_to_sync {
            self.syncs.time(|| transaction.commit())?;
        } else {
            transaction.commit()?;
        }
        for (responder, outcome) in answers {
            responder.send(outcome);
        }
        for event in events {
            // No watcher is no error.
            let _ = self.events.send(event);
        }
        Ok(())
    }

    /// Applies one entry. What is above the level that this release knows is not read without what is new in it.
    pub(super) fn take(&self, write: &Write<'_>, entry: Entry) -> Result<Outcome, StoreError> {
        match entry.payload {
            EntryPayload::Blank => Ok(Outcome::Done),
            EntryPayload::Normal(command) => {
                level::check(command.level(), self.known)?;
                apply::apply(write, command)
            }
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(entry.log_id), membership);
                write.put(tables::RAFT, "membership", &WireStored::from(&stored))?;
                Ok(Outcome::Done)
            }
        }
    }

    /// Writes a snapshot of `view` to `out`, for a backup.
    ///
    /// # Errors
    /// The database is damaged; `out` failed.
    pub(super) fn export<W: io::Write>(view: &Snapshot, out: W) -> Result<W, StoreError> {
        let (applied, membership) = Self::applied(view)?;
        let meta = SnapshotMeta { last_log_id: applied, last_membership: membership };
        snapshot::write_to(out, view, &meta).map_err(|error| StoreError::Snapshot(error.to_string()))
    }

    /// Makes `member` the only one, by an entry that stands behind the newest that `fill` puts into the tables, in the term `least` or a later one.
    /// `keys` makes its keys of those that there are. Returns its number, and the term.
    ///
    /// All of it is one transaction: who is interrupted finds everything as it was, or all of it.
    ///
    /// # Errors
    /// Those of `fill` and `keys`; the database is damaged, or failed; the tables are of a level that this release does not know. Then nothing
    /// was changed.
    pub(super) fn begin_anew(
        &self,
        fill: impl FnOnce(&Write<'_>) -> Result<Option<LogId>, StoreError>,
        least: u64,
        member: MemberRecord,
        keys: impl FnOnce(&KeysRecord) -> anyhow::Result<KeysRecord>,
    ) -> Result<(u64, u64), StoreError> {
        let transaction = self.database.begin_write()?;
        let write = Write::new(&transaction);
        let newest = fill(&write)?;
        let number = write.get::<u64>(tables::COUNTERS, "member")?.unwrap_or(0) + 1;
        let term = least.max(newest.map_or(0, |id| **id.committed_leader_id()) + 1);
        let at = LogId::new(term.into(), newest.map_or(0, |id| id.index()) + 1);
        let membership = Membership::new(vec![BTreeSet::from([number])], BTreeMap::from([(number, member.peer())]))
            .map_err(super::consensus)?;
        write.put(tables::RAFT, "applied", &WireLogId::from(at))?;
        write.put(tables::RAFT, "membership", &WireStored::from(&StoredMembership::new(Some(at), membership)))?;
        let before = keys::of(&write)?;
        let keys = keys(&before).map_err(|error| StoreError::Keys(format!("{error:#}")))?;
        if let Outcome::Refused(problem) = apply::apply(&write, Command::Anew { number, member, keys })? {
            return Err(super::consensus(problem));
        }
        level::check(level::of(&write)?, self.known)?;
        drop(write);
        self.syncs.time(|| transaction.commit())?;
        self.unsynced.store(0, Ordering::Relaxed);
        Ok((number, term))
    }

    fn build(&self) -> Result<(SnapshotMeta, PathBuf), StoreError> {
        // The log will be cut up to here: what a crash goes back to must not be older.
        self.sync()?;
        let view = self.view()?;
        let (applied, membership) = Self::applied(&view)?;
        let meta = SnapshotMeta { last_log_id: applied, last_membership: membership };
        let path =
            snapshot::write(&self.directory, &view, &meta).map_err(|error| StoreError::Snapshot(error.to_string()))?;
        self.keep(meta.clone(), &path);
        // It comes after many changes, and took memory of its own.
        crate::heap::give_back();
        Ok((meta, path))
    }

    /// The newest snapshot replaces the one before; who still sends that has it open.
    fn keep(&self, meta: SnapshotMeta, path: &Path) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let old = if newest.as_ref().is_some_and(|(kept, _)| kept.last_log_id > meta.last_log_id) {
            // One that was received meanwhile is newer than the one that was being built.
            Some(path.to_owned())
        } else {
            newest.replace((meta, path.to_owned())).map(|(_, old)| old).filter(|old| old != path)
        };
        drop(newest);
        if let Some(old) = old {
            // One that stays is removed at the next start.
            let _ = std::fs::remove_file(old);
        }
    }

    pub(super) fn install(&self, meta: &SnapshotMeta, snapshot: SnapshotFile) -> Result<(), StoreError> {
        let path = snapshot.path().to_owned();
        let transaction = self.database.begin_write()?;
        let write = Write::new(&transaction);
        // Nothing of it is committed if a byte of it is wrong.
        let read = snapshot::read(snapshot.into_file(), &write, self.known).map_err(snapshot::unread)?;
        if read.last_log_id != meta.last_log_id {
            return Err(StoreError::Snapshot("it is of another moment than was said".into()));
        }
        write.put(tables::RAFT, "applied", &meta.last_log_id.map(WireLogId::from))?;
        write.put(tables::RAFT, "membership", &WireStored::from(&meta.last_membership))?;
        drop(write);
        self.syncs.time(|| transaction.commit())?;
        self.unsynced.store(0, Ordering::Relaxed);
        self.keep(meta.clone(), &path);
        crate::heap::give_back();
        // No watcher is no error.
        let _ = self.events.send(Event::Reset);
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    state: &Arc<State>,
    work: impl FnOnce(&State) -> Result<T, StoreError> + Send + 'static,
) -> io::Result<T> {
    let state = state.clone();
    done(tokio::task::spawn_blocking(move || work(&state)).await?)
}

fn done<T>(answer: Result<T, StoreError>) -> io::Result<T> {
    answer.map_err(|error| {
        tracing::error!("the state machine: {error}");
        io::Error::other(error)
    })
}

impl RaftSnapshotBuilder<Raft> for Machine {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<super::RaftSnapshot, io::Error> {
        let (meta, path) = blocking(&self.0, State::build).await?;
        Ok(super::RaftSnapshot { meta, snapshot: SnapshotFile::open(&path)? })
    }
}

impl RaftStateMachine<Raft> for Machine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        blocking(&self.0, |state| State::applied(&state.view()?)).await
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Raft>, io::Error>> + Unpin + OptionalSend,
    {
        let mut chunks = entries.ready_chunks(BATCH);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.into_iter().collect::<Result<Vec<_>, _>>()?;
            if let Some(transaction) = self.at_once(&chunk) {
                // In memory, a tenth of a millisecond: to hand it to another thread takes longer.
                done(self.note(self.apply_in(transaction, chunk)))?;
            } else {
                blocking(&self.0, move |state| state.apply(chunk)).await?;
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotFile) -> Result<(), io::Error> {
        let meta = meta.clone();
        blocking(&self.0, move |state| state.install(&meta, snapshot)).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<super::RaftSnapshot>, io::Error> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((meta, path)) = newest else { return Ok(None) };
        Ok(Some(super::RaftSnapshot { meta, snapshot: SnapshotFile::open(&path)? }))
    }
}
