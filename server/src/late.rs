//! A member without a majority goes on with the nodes that it knows: what they need is kept in a file of its own, synced before it counts,
//! and agreed once a majority is back. How long it may go on is bounded, because it does not hear of what was revoked meanwhile; the time
//! counts from when it last knew of a majority, which lies on the disk too.

use crate::files::free_space;
use crate::state::{Member, audit_entry, now};
use crate::store::late::Late;
use crate::store::records::NodeRecord;
use crate::store::{Command, Outcome, Snapshot, Store as _, StoreError, database};
use moor_api::ids::NodeId;
use moor_api::problem::{Code, Problem};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What waits, by number.
const WAITING: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("waiting");
/// `number`: the last that was given; `confirmed`: when a majority answered, Unix seconds; `removed`: this member is none any more, and has heard of it.
const MARKS: TableDefinition<'static, &'static str, u64> = TableDefinition::new("marks");

/// Whether a majority answers is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// When that was is written down this often: a member that is started anew counts from then.
const CONFIRM: u64 = 30;
/// A majority is waited for so long before a member goes on alone: an election is over by then.
const PATIENCE: Duration = Duration::from_secs(8);
/// Most bytes that wait.
const MOST: usize = 64 << 20;
/// Free space that is left to the store.
const RESERVE: u64 = 16 << 20;
/// A clock that was set back by more than this says nothing about how long ago something was.
const SKEW: u64 = 300;

/// What is known without the disk.
#[derive(Default)]
struct Memory {
    waiting: BTreeMap<u64, Late>,
    /// How many of them change the record of each node: every call of a node asks.
    nodes: HashMap<NodeId, usize>,
    bytes: usize,
    confirmed: u64,
    written: u64,
    is_removed: bool,
}

impl Memory {
    fn add(&mut self, number: u64, late: Late, bytes: usize) {
        if let Some(node) = late.node() {
            *self.nodes.entry(node).or_default() += 1;
        }
        self.bytes += bytes;
        self.waiting.insert(number, late);
    }

    fn remove(&mut self, number: u64, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        let Some(node) = self.waiting.remove(&number).and_then(|late| late.node()) else { return };
        if let Entry::Occupied(mut count) = self.nodes.entry(node) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// The file, and what is in it.
pub struct Waiting {
    database: Database,
    disk: PathBuf,
    memory: Mutex<Memory>,
    started: Instant,
}

impl Waiting {
    /// Opens it.
    ///
    /// # Errors
    /// It cannot be opened, is not there, or is damaged.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = database::open(path, database::LATE)?;
        let transaction = database.begin_write()?;
        transaction.open_table(WAITING)?;
        transaction.open_table(MARKS)?;
        transaction.commit()?;
        let mut memory = Memory::default();
        {
            let reading = database.begin_read()?;
            for item in reading.open_table(WAITING)?.iter()? {
                let (number, bytes) = item?;
                let damaged = |error: serde_json::Error| StoreError::Record {
                    table: "waiting".into(),
                    key: number.value().to_string(),
                    cause: error.to_string(),
                };
                let late = serde_json::from_slice(bytes.value()).map_err(damaged)?;
                memory.add(number.value(), late, bytes.value().len());
            }
            memory.confirmed = reading.open_table(MARKS)?.get("confirmed")?.map_or(0, |at| at.value());
            memory.written = memory.confirmed;
            memory.is_removed = reading.open_table(MARKS)?.get("removed")?.is_some();
        }
        let disk = path.parent().unwrap_or(path).to_owned();
        Ok(Self { database, disk, memory: Mutex::new(memory), started: Instant::now() })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Every change is made whole before anything could panic.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something waits that changes this node's record.
    fn holds(&self, node: NodeId) -> bool {
        self.memory().nodes.contains_key(&node)
    }

    /// When a majority was last known to answer, Unix seconds; `None`: nobody knows.
    pub(crate) fn confirmed(&self) -> Option<u64> {
        let confirmed = self.memory().confirmed;
        (confirmed > 0 && confirmed <= now() + SKEW).then_some(confirmed)
    }

    /// Seconds since then.
    fn age(&self) -> Option<u64> {
        self.confirmed().map(|confirmed| now().saturating_sub(confirmed))
    }

    /// Whether this member had heard that it was removed, when it ran before or now.
    pub(crate) fn is_removed(&self) -> bool {
        self.memory().is_removed
    }

    /// It has: a member that is started anew, and reaches nobody, must not go on as one.
    fn set_removed(&self) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(MARKS)?.insert("removed", 1)?;
        transaction.commit()?;
        self.memory().is_removed = true;
        Ok(())
    }

    /// A majority answers now.
    fn confirm(&self) -> Result<(), StoreError> {
        let now = now();
        let is_due = {
            let mut memory = self.memory();
            memory.confirmed = now;
            memory.written + CONFIRM <= now || memory.written > now
        };
        if is_due {
            let transaction = self.database.begin_write()?;
            transaction.open_table(MARKS)?.insert("confirmed", now)?;
            transaction.commit()?;
            self.memory().written = now;
        }
        Ok(())
    }

    /// Keeps it; durable when this returns.
    fn push(&self, late: Late) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(&late).map_err(|error| StoreError::Encode(error.to_string()))?;
        let free = free_space(&self.disk).unwrap_or(u64::MAX);
        if free < RESERVE || self.memory().bytes + bytes.len() > MOST {
            return Err(StoreError::Full(free >> 20));
        }
        let transaction = self.database.begin_write()?;
        let number = {
            let mut marks = transaction.open_table(MARKS)?;
            let number = marks.get("number")?.map_or(0, |last| last.value()) + 1;
            marks.insert("number", number)?;
            transaction.open_table(WAITING)?.insert(number, bytes.as_slice())?;
            // Writers come one after the other: what is in memory is in the same order.
            number
        };
        transaction.commit()?;
        self.memory().add(number, late, bytes.len());
        Ok(())
    }

    fn first(&self) -> Option<(u64, Late)> {
        self.memory().waiting.first_key_value().map(|(number, late)| (*number, late.clone()))
    }

    fn remove(&self, number: u64) -> Result<(), StoreError> {
        let transaction = self.database.begin_write()?;
        let length = transaction.open_table(WAITING)?.remove(number)?.map_or(0, |bytes| bytes.value().len());
        transaction.commit()?;
        self.memory().remove(number, length);
        Ok(())
    }

    /// Brings a record to where it will be once all that waits is agreed.
    fn edit(&self, node: &mut Arc<NodeRecord>) {
        let id = node.id;
        let memory = self.memory();
        if !memory.nodes.contains_key(&id) {
            return;
        }
        for late in memory.waiting.values().filter(|late| late.node() == Some(id)) {
            late.edit(Arc::make_mut(node));
        }
    }
}

/// What a member without a majority may go on with for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// Answering a node at all.
    Nodes,
    /// Giving it the image key and other secrets.
    Secrets,
}

impl Member {
    fn limit(&self, bound: Bound) -> u64 {
        let nodes = self.config.stale_seconds;
        match bound {
            Bound::Nodes => nodes,
            Bound::Secrets => self.config.stale_secrets_seconds.min(nodes),
        }
    }

    /// Whether no majority has answered for longer than any election takes.
    fn is_lost(&self) -> bool {
        let standing = self.store.standing();
        let unheard = standing.unheard.unwrap_or_else(|| self.waiting.started.elapsed());
        !standing.has_majority() && unheard > PATIENCE
    }

    /// Whether a change failed because no majority answers, as far as this member can tell; or the leader, who sees that first.
    fn lacks_majority(&self, error: &StoreError) -> bool {
        match error {
            StoreError::NoLeader(_) | StoreError::Unknown => !self.store.standing().has_majority(),
            StoreError::Leader(problem) => problem.code == Code::NoMajority,
            _ => false,
        }
    }

    /// Refuses what this member may not do any more without a majority.
    pub(crate) fn fresh(&self, bound: Bound) -> Result<(), Problem> {
        let limit = self.limit(bound);
        // Each call of a node comes by here, and the time is known at once.
        if self.waiting.age().is_some_and(|age| age <= limit) || self.store.standing().has_majority() {
            return Ok(());
        }
        let what = match bound {
            Bound::Nodes => "it may answer nodes",
            Bound::Secrets => "it may give out secrets",
        };
        let age = self.waiting.age().map_or("an unknown time".to_owned(), |age| format!("{age} s"));
        let detail =
            format!("this member has known of no majority for {age}, and without one {what} for {limit} s only");
        Err(Problem::new(Code::NoMajority, detail))
    }

    /// Until when a token may be good at most that is given out now.
    pub(crate) fn token_end(&self) -> u64 {
        if self.store.standing().has_majority() {
            return u64::MAX;
        }
        let rest = self.waiting.age().map_or(0, |age| self.limit(Bound::Nodes).saturating_sub(age));
        now() + rest
    }

    /// A node as this member knows it, with what waits.
    ///
    /// # Errors
    /// The database is damaged.
    pub(crate) fn node(&self, view: &Snapshot, id: NodeId) -> Result<Option<Arc<NodeRecord>>, StoreError> {
        let mut node = view.kept_node(id)?;
        if let Some(node) = &mut node {
            self.waiting.edit(node);
        }
        Ok(node)
    }

    /// A change that a known node needs: agreed, or, where no majority answers, kept here and agreed later. What waits of that node is not overtaken; others
    /// do not wait for it, which is delivered one after the other.
    ///
    /// # Errors
    /// Refused; no majority has answered for too long; the store failed.
    pub(crate) async fn propose_for_node(self: &Arc<Self>, command: Command) -> Result<(), Problem> {
        if Late::node_of(&command).is_none_or(|node| !self.waiting.holds(node)) && !self.is_lost() {
            match self.store.propose(command.clone()).await {
                Ok(Outcome::Refused(problem)) => return Err(problem),
                Ok(_) => return Ok(()),
                Err(error) if self.lacks_majority(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.fresh(Bound::Nodes)?;
        let member = self.clone();
        let kept = tokio::task::spawn_blocking(move || {
            let view = member.view()?;
            let late = Late::of(command, &view, |id| Ok(member.node(&view, id)?.map(Arc::unwrap_or_clone)))?;
            let late = late.ok_or_else(|| StoreError::NoLeader("no majority of the members answers".into()))?;
            member.waiting.push(late)
        });
        kept.await.map_err(|error| Problem::new(Code::Internal, error.to_string()))??;
        Ok(())
    }

    /// Writes an audit line about a known node; durable when it returns, here or everywhere.
    ///
    /// # Errors
    /// The store failed, or no majority has answered for too long: then what was to be recorded must not happen.
    pub(crate) async fn audit_for_node(self: &Arc<Self>, what: &str, fields: serde_json::Value) -> Result<(), Problem> {
        self.fresh(Bound::Secrets)?;
        self.propose_for_node(Command::Audit { entry: audit_entry(what, &fields) }).await
    }

    /// Writes an audit line without a majority: durable here when it returns, and delivered once there is one, however long that takes.
    ///
    /// # Errors
    /// The store failed, or its disk is full: then what was to be recorded must not happen.
    pub(crate) async fn audit_alone(self: &Arc<Self>, what: &str, fields: &serde_json::Value) -> Result<(), Problem> {
        let (member, entry) = (self.clone(), audit_entry(what, fields));
        let kept = tokio::task::spawn_blocking(move || member.waiting.push(Late::Audit { entry }));
        kept.await.map_err(|error| Problem::new(Code::Internal, error.to_string()))??;
        Ok(())
    }

    /// The number of an SSH certificate; never given twice. Without a majority it is drawn from the upper half of all numbers, where a
    /// counter never comes.
    ///
    /// # Errors
    /// As [`Self::propose_for_node`].
    pub(crate) async fn certificate_serial(&self) -> Result<u64, Problem> {
        if !self.is_lost() {
            match self.store.propose(Command::NextCertificate).await {
                Ok(Outcome::Number(serial)) => return Ok(serial),
                Ok(Outcome::Refused(problem)) => return Err(problem),
                Ok(Outcome::Done) => return Err(Problem::new(Code::Internal, "a certificate got no serial number")),
                Err(error) if self.lacks_majority(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.fresh(Bound::Secrets)?;
        let mut bytes = [0; 8];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Problem::new(Code::Internal, "no randomness"))?;
        Ok(u64::from_le_bytes(bytes) | 1 << 63)
    }
}

/// Writes down that this member is none any more, once it has heard of it.
pub(crate) async fn note_removal(member: &Arc<Member>) {
    member.calls.hears_of_removal().await;
    while !member.waiting.is_removed() {
        if let Err(error) = blocking(member, Waiting::set_removed).await {
            tracing::warn!("writing down that this member was removed: {error}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Notes that a majority answers, and delivers what waits. Goes on for ever.
pub(crate) async fn deliver(member: &Arc<Member>) {
    loop {
        if member.store.standing().has_majority()
            && let Err(error) = deliver_now(member).await
        {
            tracing::warn!("delivering what was kept without a majority: {error}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn blocking(
    member: &Arc<Member>,
    work: impl FnOnce(&Waiting) -> Result<(), StoreError> + Send + 'static,
) -> Result<(), StoreError> {
    let member = member.clone();
    let done = tokio::task::spawn_blocking(move || work(&member.waiting)).await;
    done.map_err(|_| StoreError::Closed)?
}

async fn deliver_now(member: &Arc<Member>) -> Result<(), StoreError> {
    blocking(member, Waiting::confirm).await?;
    let mut count = 0_u64;
    while let Some((number, what)) = member.waiting.first() {
        let command = Command::Late { member: member.identity.number, number, what };
        if let Outcome::Refused(problem) = member.store.propose(command).await? {
            tracing::warn!("what was kept without a majority is not taken: {problem}");
        }
        blocking(member, move |waiting| waiting.remove(number)).await?;
        count += 1;
    }
    if count > 0 {
        tracing::info!("a majority is back: {count} reports and changes that were kept for it are delivered");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::{BootId, Sha256Digest};

    #[test]
    fn what_waits_is_there_after_a_restart_in_order_and_numbers_never_come_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late.redb");
        database::make(&path).unwrap();
        let id = NodeId::from_bytes([1; 16]);
        let waiting = Waiting::open(&path).unwrap();
        assert_eq!((waiting.first().is_none(), waiting.age()), (true, None));
        waiting.push(Late::CloseStage { id, boot: BootId::from_bytes([2; 16]) }).unwrap();
        waiting.push(Late::Pin { id, digest: Sha256Digest([3; 32]) }).unwrap();
        waiting.confirm().unwrap();
        drop(waiting);
        let waiting = Waiting::open(&path).unwrap();
        assert!(waiting.age().unwrap() < 60);
        for (number, is_pin) in [(1, false), (2, true)] {
            let (first, late) = waiting.first().unwrap();
            assert_eq!((first, matches!(late, Late::Pin { .. })), (number, is_pin));
            assert!(waiting.holds(id) && !waiting.holds(NodeId::from_bytes([2; 16])));
            waiting.remove(first).unwrap();
        }
        assert!(waiting.first().is_none() && !waiting.holds(id) && waiting.memory().bytes == 0);
        drop(waiting);
        let waiting = Waiting::open(&path).unwrap();
        waiting
            .push(Late::Log {
                id,
                event: moor_api::admin::LogEvent { time_ms: 1, phase: "a".into(), text: String::new() },
            })
            .unwrap();
        assert_eq!(waiting.first().unwrap().0, 3);
        // A clock that stands before the mark knows nothing.
        waiting.memory().confirmed = now() + SKEW + 10;
        assert_eq!(waiting.age(), None);
    }
}
