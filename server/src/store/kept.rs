//! Records that were read lately, decoded. A node asks some twenty times during a boot, and most of what a call costs is to decode the same
//! record once more. What is kept counts only while the record's bytes are still the same: nothing has to be told when something changes.

use super::StoreError;
use super::records::{MemberRecord, NodeRecord, ProfileRecord};
use super::tables::{self, Snapshot, Table};
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Nodes that are kept: those that boot at a time. With its attributes one takes some 10 KiB, encoded and decoded.
const NODES: usize = 2048;
/// Generations of profiles.
const GENERATIONS: usize = 64;
/// Members.
const MEMBERS: usize = 64;

/// A record's bytes, and what they say.
type Decoded<T> = (Vec<u8>, Arc<T>);

/// Records of one table.
struct Kept<T> {
    table: Table,
    /// How many at most. When one more comes, all are dropped: those that are in use come again.
    most: usize,
    records: Mutex<HashMap<String, Decoded<T>>>,
}

impl<T: DeserializeOwned> Kept<T> {
    fn new(table: Table, most: usize) -> Self {
        Self { table, most, records: Mutex::default() }
    }

    /// The record whose bytes are `bytes`, decoded before or now.
    fn decoded(&self, key: &str, bytes: &[u8]) -> Result<Arc<T>, StoreError> {
        // What is there is replaced in one step.
        let records = || self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((encoded, record)) = records().get(key)
            && encoded == bytes
        {
            return Ok(record.clone());
        }
        let record: Arc<T> = Arc::new(tables::decode(self.table, key, bytes)?);
        let mut records = records();
        if records.len() >= self.most && !records.contains_key(key) {
            records.clear();
        }
        records.insert(key.to_owned(), (bytes.to_vec(), record.clone()));
        Ok(record)
    }

    fn get(&self, view: &Snapshot, key: &str) -> Result<Option<Arc<T>>, StoreError> {
        view.raw(self.table, key, |bytes| self.decoded(key, bytes))?.transpose()
    }
}

/// What nodes' calls need.
pub(super) struct KeptRecords {
    nodes: Kept<NodeRecord>,
    generations: Kept<ProfileRecord>,
    members: Kept<MemberRecord>,
}

impl Default for KeptRecords {
    fn default() -> Self {
        Self {
            nodes: Kept::new(tables::NODES, NODES),
            generations: Kept::new(tables::GENERATIONS, GENERATIONS),
            members: Kept::new(tables::MEMBERS, MEMBERS),
        }
    }
}

impl KeptRecords {
    pub(super) fn node(&self, view: &Snapshot, id: &str) -> Result<Option<Arc<NodeRecord>>, StoreError> {
        self.nodes.get(view, id)
    }

    pub(super) fn generation(&self, view: &Snapshot, digest: &str) -> Result<Option<Arc<ProfileRecord>>, StoreError> {
        self.generations.get(view, digest)
    }

    /// All members, by number, also those that were removed.
    pub(super) fn members(&self, view: &Snapshot) -> Result<Vec<Arc<MemberRecord>>, StoreError> {
        let mut members = Vec::new();
        view.each(tables::MEMBERS, |number, bytes| {
            members.push(self.members.decoded(number, bytes)?);
            Ok::<(), StoreError>(())
        })??;
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_decoded_once_as_long_as_its_bytes_are_the_same() {
        let kept: Kept<u64> = Kept::new(tables::COUNTERS, 2);
        let first = kept.decoded("a", b"1").unwrap();
        assert!(Arc::ptr_eq(&first, &kept.decoded("a", b"1").unwrap()));
        // Another view may still have the older bytes: each gets what is in its own.
        assert_eq!(*kept.decoded("a", b"2").unwrap(), 2);
        assert_eq!(*kept.decoded("a", b"1").unwrap(), 1);
        assert_eq!((*kept.decoded("b", b"1").unwrap(), *first), (1, 1));
        assert!(kept.decoded("a", b"x").is_err());
        assert_eq!(*kept.decoded("a", b"1").unwrap(), 1, "what cannot be decoded takes no place");
    }

    #[test]
    fn no_more_are_kept_than_there_is_room_for() {
        let kept: Kept<u64> = Kept::new(tables::COUNTERS, 2);
        for number in 0..100_u64 {
            assert_eq!(*kept.decoded(&number.to_string(), number.to_string().as_bytes()).unwrap(), number);
            assert!(kept.records.lock().unwrap().len() <= 2);
        }
    }
}
