//! The tables, and JSON records in them. A thin layer over redb, so that only this module and `mod.rs` know it.

use super::kept::KeptRecords;
use super::{Event, StoreError};
use aws_lc_rs::digest::{Context, SHA256};
use redb::{
    ReadTransaction, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
    WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A table: text to JSON.
pub type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// The collective.
pub const SITE: Table = TableDefinition::new("site");
/// Nodes by id.
pub const NODES: Table = TableDefinition::new("nodes");
/// Node ids by name.
pub const NAMES: Table = TableDefinition::new("names");
/// Status events by node id.
pub const EVENTS: Table = TableDefinition::new("events");
/// Log events by node id.
pub const LOGS: Table = TableDefinition::new("logs");
/// Node ids by what machines are known by, and by their keys.
pub const INDEX: Table = TableDefinition::new("index");
/// Generations of profiles by digest: a boot keeps the one it began with.
pub const GENERATIONS: Table = TableDefinition::new("generations");
/// Refusals by node id, UUID, MAC or address.
pub const REFUSALS: Table = TableDefinition::new("refusals");
/// Subjects of refusals that are no nodes, by the order they came in: the oldest make room.
pub const STRANGERS: Table = TableDefinition::new("strangers");
/// Images by digest.
pub const IMAGES: Table = TableDefinition::new("images");
/// Profiles by name.
pub const PROFILES: Table = TableDefinition::new("profiles");
/// Administrators' tokens by hash.
pub const TOKENS: Table = TableDefinition::new("tokens");
/// Counters by name.
pub const COUNTERS: Table = TableDefinition::new("counters");
/// The audit chain by number.
pub const AUDIT: Table = TableDefinition::new("audit");
/// Members by number: who is here, and who was removed.
pub const MEMBERS: Table = TableDefinition::new("members");
/// Invitations that were not used, by id.
pub const INVITES: Table = TableDefinition::new("invites");
/// Which entry of the log was applied last, and the membership.
pub(super) const RAFT: Table = TableDefinition::new("raft");

/// All that is the same on every member.
pub(super) const REPLICATED: [Table; 16] = [
    SITE,
    NODES,
    NAMES,
    INDEX,
    EVENTS,
    LOGS,
    REFUSALS,
    STRANGERS,
    IMAGES,
    PROFILES,
    GENERATIONS,
    TOKENS,
    COUNTERS,
    AUDIT,
    MEMBERS,
    INVITES,
];

/// What a table is called.
pub(crate) fn name_of(table: Table) -> String {
    redb::TableHandle::name(&table).to_owned()
}

/// Makes every table, so that readers find them.
pub(super) fn create(transaction: &WriteTransaction) -> Result<(), StoreError> {
    for table in REPLICATED {
        transaction.open_table(table)?;
    }
    transaction.open_table(RAFT)?;
    Ok(())
}

pub(super) fn decode<T: DeserializeOwned>(table: Table, key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    use redb::TableHandle as _;
    serde_json::from_slice(bytes).map_err(|error| StoreError::Record {
        table: table.name().to_owned(),
        key: key.to_owned(),
        cause: error.to_string(),
    })
}

/// A table while it changes.
type Open<'a> = redb::Table<'a, &'static str, &'static [u8]>;

/// A write transaction, and what watchers are told once it is durable.
///
/// Tables stay open until it ends: a command goes through several, and opening one takes longer than writing a record.
pub(super) struct Write<'a> {
    transaction: &'a WriteTransaction,
    open: RefCell<Vec<(String, Open<'a>)>>,
    events: RefCell<Vec<Event>>,
}

impl<'a> Write<'a> {
    pub(super) fn new(transaction: &'a WriteTransaction) -> Self {
        Self { transaction, open: RefCell::default(), events: RefCell::default() }
    }

    pub(super) fn tell(&self, event: Event) {
        self.events.borrow_mut().push(event);
    }

    pub(super) fn into_events(self) -> Vec<Event> {
        self.events.into_inner()
    }

    /// What `take` makes of a table. It uses no other.
    fn with<T>(
        &self,
        table: Table,
        take: impl FnOnce(&mut Open<'a>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        use redb::TableHandle as _;
        let mut open = self.open.borrow_mut();
        let at = open.iter().position(|(name, _)| name == table.name()).unwrap_or(open.len());
        if at == open.len() {
            open.push((name_of(table), self.transaction.open_table(table)?));
        }
        take(&mut open[at].1)
    }

    pub(super) fn get<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        self.with(table, |open| open.get(key)?.map(|value| decode(table, key, value.value())).transpose())
    }

    pub(super) fn put<T: Serialize>(&self, table: Table, key: &str, value: &T) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value).map_err(|error| StoreError::Encode(error.to_string()))?;
        self.put_raw(table, key, &bytes)
    }

    /// A record as its bytes.
    pub(super) fn put_raw(&self, table: Table, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.with(table, |open| {
            open.insert(key, value)?;
            Ok(())
        })
    }

    /// Removes all records.
    pub(super) fn clear(&self, table: Table) -> Result<(), StoreError> {
        use redb::TableHandle as _;
        self.open.borrow_mut().retain(|(name, _)| name != table.name());
        self.transaction.delete_table(table)?;
        self.with(table, |_| Ok(()))
    }

    pub(super) fn remove(&self, table: Table, key: &str) -> Result<(), StoreError> {
        self.with(table, |open| {
            open.remove(key)?;
            Ok(())
        })
    }

    /// Takes out the first record.
    pub(super) fn pop_first<T: DeserializeOwned>(&self, table: Table) -> Result<Option<T>, StoreError> {
        self.with(table, |open| {
            let first = open.pop_first()?;
            first.map(|(key, value)| decode(table, key.value(), value.value())).transpose()
        })
    }

    pub(super) fn count(&self, table: Table) -> Result<u64, StoreError> {
        self.with(table, |open| Ok(open.len()?))
    }

    pub(super) fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>, StoreError> {
        Ok(self.pairs(table)?.into_iter().map(|(_, value)| value).collect())
    }

    /// Keys and records, by key.
    pub(super) fn pairs<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        self.with(table, |open| {
            let mut out = Vec::new();
            for item in open.iter()? {
                let (key, value) = item?;
                out.push((key.value().to_owned(), decode(table, key.value(), value.value())?));
            }
            Ok(out)
        })
    }
}

/// A consistent view of the store at one moment.
pub struct Snapshot {
    transaction: ReadTransaction,
    /// What all views of this store have decoded.
    kept: Arc<KeptRecords>,
}

impl Snapshot {
    pub(super) fn new(database: &redb::Database, kept: Arc<KeptRecords>) -> Result<Self, StoreError> {
        Ok(Self { transaction: database.begin_read()?, kept })
    }

    pub(super) fn kept(&self) -> &KeptRecords {
        &self.kept
    }

    /// What `take` makes of one record's bytes.
    pub(super) fn raw<T>(
        &self,
        table: Table,
        key: &str,
        take: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        let open = self.transaction.open_table(table)?;
        Ok(open.get(key)?.map(|value| take(value.value())))
    }

    /// One record.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        let open = self.transaction.open_table(table)?;
        let value = open.get(key)?;
        value.map(|value| decode(table, key, value.value())).transpose()
    }

    /// All records of a table, by key.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>, StoreError> {
        let open = self.transaction.open_table(table)?;
        let mut out = Vec::new();
        for item in open.iter()? {
            let (key, value) = item?;
            out.push(decode(table, key.value(), value.value())?);
        }
        Ok(out)
    }
}

impl Snapshot {
    /// Gives each record of a table to `take`, in order, until it returns something: one at a time, so that those of ten thousand nodes are never in
    /// memory together. `T` may be a part of the record, which is read faster.
    ///
    /// # Errors
    /// The database is damaged.
    pub(crate) fn find_map<T: DeserializeOwned, R>(
        &self,
        table: Table,
        mut take: impl FnMut(T) -> Option<R>,
    ) -> Result<Option<R>, StoreError> {
        let open = self.transaction.open_table(table)?;
        for item in open.iter()? {
            let (key, value) = item?;
            if let Some(found) = take(decode(table, key.value(), value.value())?) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Gives each record's key and bytes to `take`, in order, until it fails.
    pub(crate) fn each<E>(
        &self,
        table: Table,
        mut take: impl FnMut(&str, &[u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, StoreError> {
        let open = self.transaction.open_table(table)?;
        for item in open.iter()? {
            let (key, value) = item?;
            if let Err(error) = take(key.value(), value.value()) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// SHA-256 over the records of each table that is replicated, by its name: members that have applied the same entries agree in them.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn digests(&self) -> Result<BTreeMap<String, [u8; 32]>, StoreError> {
        let mut out = BTreeMap::new();
        for table in REPLICATED {
            let mut digest = Context::new(&SHA256);
            let mut put = |bytes: &[u8]| {
                digest.update(&(bytes.len() as u64).to_le_bytes());
                digest.update(bytes);
            };
            let Ok(()) = self.each(table, |key, value| {
                put(key.as_bytes());
                put(value);
                Ok::<(), std::convert::Infallible>(())
            })?;
            let mut bytes = [0; 32];
            bytes.copy_from_slice(digest.finish().as_ref());
            out.insert(name_of(table), bytes);
        }
        Ok(out)
    }

    /// All keys of a table, in order.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn keys(&self, table: Table) -> Result<Vec<String>, StoreError> {
        let open = self.transaction.open_table(table)?;
        let mut out = Vec::new();
        for item in open.iter()? {
            out.push(item?.0.value().to_owned());
        }
        Ok(out)
    }
}
