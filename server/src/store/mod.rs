//! The store: typed commands in, durable before they are acknowledged; consistent snapshots out; a stream of what changed.
//!
//! [`Store`] is the interface that the replicated store will implement; [`Local`] is the member that stands alone. One thread
//! applies commands in order and commits as many as wait in one transaction, so that a storm shares its fsyncs.

mod apply;
pub mod command;
pub mod index;
pub mod records;
pub mod tables;
#[cfg(test)]
mod tests;

pub use command::{Command, Outcome};
pub use tables::Snapshot;

use moor_api::admin::{Refusal, StatusEvent};
use moor_api::ids::{NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use records::{Identity, ImageRecord, NodeRecord, ProfileRecord, Refusals, SiteRecord};
use redb::Database;
use std::path::Path;
use std::sync::{Arc, mpsc};
use tokio::sync::{broadcast, oneshot};

/// Commands that one transaction commits at most.
const BATCH: usize = 256;

/// Commands that may wait.
const QUEUE: usize = 4096;

/// Events a slow watcher may be behind before it has to begin anew.
const EVENTS: usize = 4096;

/// The store failed, as opposed to refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// redb said so.
    #[error("the database: {0}")]
    Database(#[from] Box<redb::Error>),
    /// A record does not parse.
    #[error("the record '{key}' of table '{table}' is damaged: {cause}")]
    Record {
        /// Table.
        table: String,
        /// Key.
        key: String,
        /// Why.
        cause: String,
    },
    /// A record does not serialise.
    #[error("a record cannot be written: {0}")]
    Encode(String),
    /// The store was closed, or is overloaded.
    #[error("the store is not taking changes")]
    Closed,
}

macro_rules! from_redb {
    ($($kind:ty),*) => {
        $(impl From<$kind> for StoreError {
            fn from(error: $kind) -> Self {
                Self::Database(Box::new(error.into()))
            }
        })*
    };
}
from_redb!(redb::DatabaseError, redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// What a watcher is told.
#[derive(Debug, Clone)]
pub struct Event {
    /// The node.
    pub node: NodeId,
    /// What happened.
    pub status: StatusEvent,
}

/// The interface of the store.
pub trait Store: Send + Sync {
    /// Applies a command; returns once it is durable.
    fn propose(&self, command: Command) -> impl Future<Output = Result<Outcome, StoreError>> + Send;
    /// A consistent view.
    ///
    /// # Errors
    /// The database is damaged.
    fn snapshot(&self) -> Result<Snapshot, StoreError>;
    /// Status events from now on.
    fn watch(&self) -> broadcast::Receiver<Event>;
}

type Job = (Command, oneshot::Sender<Result<Outcome, StoreError>>);

/// A store on one disk.
pub struct Local {
    database: Arc<Database>,
    queue: mpsc::SyncSender<Job>,
    events: broadcast::Sender<Event>,
}

impl Local {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// It cannot be opened; another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Arc::new(Database::create(path)?);
        let transaction = database.begin_write()?;
        tables::create(&transaction)?;
        transaction.commit()?;
        let (queue, jobs) = mpsc::sync_channel(QUEUE);
        let (events, _) = broadcast::channel(EVENTS);
        let (writer, told) = (database.clone(), events.clone());
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || write_loop(&writer, &jobs, &told))
            .map_err(|_| StoreError::Closed)?;
        Ok(Self { database, queue, events })
    }
}

impl Store for Local {
    async fn propose(&self, command: Command) -> Result<Outcome, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.queue.try_send((command, answer)).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        Snapshot::new(&self.database)
    }

    fn watch(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}

fn write_loop(database: &Database, jobs: &mpsc::Receiver<Job>, events: &broadcast::Sender<Event>) {
    while let Ok(first) = jobs.recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH {
            let Ok(job) = jobs.try_recv() else { break };
            batch.push(job);
        }
        let (commands, answers): (Vec<Command>, Vec<_>) = batch.into_iter().unzip();
        let changed: Vec<Event> = commands.iter().filter_map(event_of).collect();
        match commit(database, commands) {
            Ok(outcomes) => {
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    // Nobody waits any more: the change is durable all the same.
                    let _ = answer.send(Ok(outcome));
                }
                for event in changed {
                    // No watcher is no error.
                    let _ = events.send(event);
                }
            }
            Err(error) => {
                tracing::error!("a transaction failed: {error}");
                for answer in answers {
                    let _ = answer.send(Err(StoreError::Closed));
                }
            }
        }
    }
}

fn event_of(command: &Command) -> Option<Event> {
    match command {
        Command::Status { id, event, .. } => Some(Event { node: *id, status: event.clone() }),
        _ => None,
    }
}

/// Applies commands in one transaction. redb syncs the file before `commit` returns.
fn commit(database: &Database, commands: Vec<Command>) -> Result<Vec<Outcome>, StoreError> {
    let transaction = database.begin_write()?;
    let write = tables::Write(&transaction);
    let outcomes = commands.into_iter().map(|command| apply::apply(&write, command)).collect::<Result<Vec<_>, _>>()?;
    transaction.commit()?;
    Ok(outcomes)
}

/// What a node that may not enrol is told.
#[must_use]
pub fn not_armed(name: &NodeName) -> String {
    format!("node {name} is not armed and has no identity yet: open its window with `moor arm {name}`")
}

/// What a node is told whose boot stage is over.
#[must_use]
pub fn closed(name: &NodeName) -> String {
    format!("the boot stage of this boot of {name} is over: a cold reboot begins a new one")
}

/// What a machine with another identity is told.
#[must_use]
pub fn mismatch(name: &NodeName, bound: &Identity, offered: &Identity) -> String {
    let what = match (bound, offered) {
        (Identity::Tpm { .. }, Identity::Tpm { .. }) => "this machine has another TPM than the node",
        (Identity::Tpm { .. }, Identity::Soft { .. }) => "this machine shows no TPM, and the node is known by its TPM",
        (Identity::Soft { .. }, Identity::Tpm { .. }) => {
            "this machine shows a TPM, and the node is known by a key in a file"
        }
        (Identity::Soft { .. }, Identity::Soft { .. }) => "this machine has another key than the node",
    };
    format!("{what} {name}: if the hardware was replaced, `moor node trust rearm {name}`")
}

/// Typed reads.
impl Snapshot {
    /// The collective.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn site(&self) -> Result<Option<SiteRecord>, StoreError> {
        self.get(tables::SITE, "site")
    }

    /// A node by id.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn node(&self, id: NodeId) -> Result<Option<NodeRecord>, StoreError> {
        self.get(tables::NODES, &id.to_string())
    }

    /// A node by name.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn node_named(&self, name: &str) -> Result<Option<NodeRecord>, StoreError> {
        match self.get::<NodeId>(tables::NAMES, name)? {
            Some(id) => self.node(id),
            None => Ok(None),
        }
    }

    /// All nodes.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        self.all(tables::NODES)
    }

    /// Status events of a node, oldest first.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn events(&self, id: NodeId) -> Result<Vec<StatusEvent>, StoreError> {
        Ok(self.get(tables::EVENTS, &id.to_string())?.unwrap_or_default())
    }

    /// Log events of a node, oldest first.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn logs(&self, id: NodeId) -> Result<Vec<moor_api::admin::LogEvent>, StoreError> {
        Ok(self.get(tables::LOGS, &id.to_string())?.unwrap_or_default())
    }

    /// Refusals of a subject, oldest first.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn refusals(&self, subject: &str) -> Result<Vec<Refusal>, StoreError> {
        Ok(self.get::<Refusals>(tables::REFUSALS, subject)?.unwrap_or_default().list)
    }

    /// An image by digest.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn image(&self, digest: &str) -> Result<Option<ImageRecord>, StoreError> {
        self.get(tables::IMAGES, digest)
    }

    /// All images.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.all(tables::IMAGES)
    }

    /// A profile.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn profile(&self, name: &str) -> Result<Option<ProfileRecord>, StoreError> {
        self.get(tables::PROFILES, name)
    }

    /// A generation of a profile, the current one or an older one.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn generation(&self, digest: &str) -> Result<Option<ProfileRecord>, StoreError> {
        self.get(tables::GENERATIONS, digest)
    }

    /// Names of all nodes, in order.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn names(&self) -> Result<Vec<String>, StoreError> {
        self.keys(tables::NAMES)
    }

    /// Nodes that are indexed under `key` ([`index`]).
    ///
    /// # Errors
    /// The database is damaged.
    pub fn indexed(&self, key: &str) -> Result<Vec<NodeId>, StoreError> {
        Ok(self.get(tables::INDEX, key)?.unwrap_or_default())
    }

    /// All profiles.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn profiles(&self) -> Result<Vec<ProfileRecord>, StoreError> {
        self.all(tables::PROFILES)
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::error!("store: {error}");
        Self::new(Code::Internal, "the member's store failed: its log says more")
    }
}
