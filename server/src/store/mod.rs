//! The store: typed commands in, durable before they are acknowledged; consistent snapshots out; a stream of what changed.
//!
//! [`Store`] is the interface, [`Replicated`] what stands behind it, also for a member that is alone.

mod apply;
mod audit;
pub mod authorities;
pub mod command;
pub(crate) mod database;
pub mod index;
mod kept;
pub(crate) mod keys;
pub mod late;
pub mod level;
mod members;
pub mod raft;
pub mod records;
pub(crate) mod syncs;
pub mod tables;
#[cfg(test)]
pub(crate) mod tests;

pub use command::{Command, Outcome};
pub use level::Level;
pub use raft::Replicated;
pub use tables::Snapshot;

use moor_api::admin::{Refusal, StatusEvent};
use moor_api::ids::{NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use records::{
    Identity, ImageRecord, InviteRecord, KeysRecord, MemberRecord, NodeRecord, ProfileRecord, Refusals, SiteRecord,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::broadcast;

/// The store failed, as opposed to refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// redb said so.
    #[error(transparent)]
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
    /// The disk is as good as full; nothing was changed.
    #[error("the disk of the member's store is full ({0} MiB left): free some space there, and start the member again")]
    Full(u64),
    /// The release is too old for the collective: what it does not know it would apply otherwise than the others.
    #[error(
        "the collective has reached feature level {level}, and this release of moord knows {known} at most: install the release that its \
         other members run"
    )]
    TooOld {
        /// The collective's.
        level: Level,
        /// What this release knows.
        known: Level,
    },
    /// The log is of another release.
    #[error("it has format {found}, and this release of moord knows {known}: a newer one wrote it, install that")]
    Format {
        /// Which it has.
        found: u64,
        /// Which this release knows.
        known: u64,
    },
    /// It has failed.
    #[error("the database failed, and only opening it anew mends that: start the member again when its disk is well")]
    Failed,
    /// The store was closed, or is overloaded.
    #[error("the store is not taking changes")]
    Closed,
    /// The system gave it no thread.
    #[error("cannot begin a thread: {0}")]
    Thread(String),
    /// A snapshot is not usable or cannot be written.
    #[error("a snapshot of the store: {0}")]
    Snapshot(String),
    /// The collective's keys cannot be made.
    #[error("the collective's keys: {0}")]
    Keys(String),
    /// Records and keys are of two moments that do not fit together.
    #[error(
        "it is of the middle of a rotation of the authorities: its records name none whose keys are in it: take a backup of before or after that, or one that was made with a majority"
    )]
    NoAuthority,
    /// A message of another member is not understood.
    #[error("a message of another member is not understood: {0}")]
    Message(String),
    /// A member speaks for another one.
    #[error(
        "member {number} has another id than the one that this connection has proven: nobody speaks for another member"
    )]
    Speaker {
        /// The number that it gives itself.
        number: u64,
    },
    /// openraft said so.
    #[error("consensus: {0}")]
    Consensus(String),
    /// The leader refused.
    #[error("{}", .0.detail)]
    Leader(Problem),
    /// No member leads.
    #[error("{0}")]
    NoLeader(String),
    /// The leader was lost on the way.
    #[error("the leader was lost while it made the change: look whether it was made, and try again if not")]
    Unknown,
    /// It happened to this file.
    #[error("'{}': {cause}", file.display())]
    File {
        /// Which.
        file: std::path::PathBuf,
        /// What.
        cause: Box<StoreError>,
    },
}

impl StoreError {
    pub(crate) fn within(self, file: &std::path::Path) -> Self {
        // The innermost file is the one to look at.
        if matches!(self, Self::File { .. }) {
            self
        } else {
            Self::File { file: file.to_owned(), cause: Box::new(self) }
        }
    }

    /// Whether a file that was opened is not the one that was closed: it is gone, or something in it is another.
    pub(crate) fn is_damage(&self) -> bool {
        use redb::Error;
        use std::io::ErrorKind;
        match self {
            Self::Record { .. } => true,
            Self::File { cause, .. } => cause.is_damage(),
            Self::Database(error) => match &**error {
                // What is empty or begins with something else, redb calls invalid data.
                Error::Io(error) => {
                    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
                }
                Error::Corrupted(_)
                | Error::UpgradeRequired(_)
                | Error::TableTypeMismatch { .. }
                | Error::TypeDefinitionChanged { .. }
                | Error::TableIsMultimap(_) => true,
                _ => false,
            },
            _ => false,
        }
    }
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
pub enum Event {
    /// Something happened on a node.
    Status {
        /// The node.
        node: NodeId,
        /// What happened.
        status: StatusEvent,
    },
    /// A snapshot replaced all records: what happened until then is not told one by one.
    Reset,
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
    /// What happens from now on.
    fn watch(&self) -> broadcast::Receiver<Event>;
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

    /// The versions of the collective's keys; none before this member has heard of any.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn key_versions(&self) -> Result<KeysRecord, StoreError> {
        Ok(self.get(tables::SITE, keys::RECORD)?.unwrap_or_default())
    }

    /// Members by number, also those that were removed.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn members(&self) -> Result<BTreeMap<u64, MemberRecord>, StoreError> {
        Ok((1..).zip(self.all::<MemberRecord>(tables::MEMBERS)?).collect())
    }

    /// A member by number, also one that was removed.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn member(&self, number: u64) -> Result<Option<MemberRecord>, StoreError> {
        self.get(tables::MEMBERS, &apply::ordered_key(number))
    }

    /// An invitation that was not used.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn invite(&self, id: uuid::Uuid) -> Result<Option<InviteRecord>, StoreError> {
        self.get(tables::INVITES, &id.to_string())
    }

    /// A node by id.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn node(&self, id: NodeId) -> Result<Option<NodeRecord>, StoreError> {
        self.get(tables::NODES, &id.to_string())
    }

    /// A node by id, decoded once for all who read it.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn kept_node(&self, id: NodeId) -> Result<Option<Arc<NodeRecord>>, StoreError> {
        self.kept().node(self, &id.to_string())
    }

    /// As [`Self::generation`], decoded once for all who read it.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn kept_generation(&self, digest: &str) -> Result<Option<Arc<ProfileRecord>>, StoreError> {
        self.kept().generation(self, digest)
    }

    /// The records of [`Self::members`], decoded once for all who read them.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn kept_members(&self) -> Result<Vec<Arc<MemberRecord>>, StoreError> {
        self.kept().members(self)
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
        match error {
            StoreError::Full(_) | StoreError::Unknown => Self::new(Code::Internal, error.to_string()),
            StoreError::TooOld { .. } => Self::new(Code::Conflict, error.to_string()),
            StoreError::NoLeader(_) => Self::new(Code::NoMajority, error.to_string()),
            // For whoever asks this member, another one has the answer.
            StoreError::Leader(problem) if problem.code == Code::Removed => Self { status: 503, ..problem },
            StoreError::Leader(problem) => problem,
            _ => Self::new(Code::Internal, "the member's store failed: its log says more"),
        }
    }
}
