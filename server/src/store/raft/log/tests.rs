//! The log and its journal: what was written is there after every kind of end, once.

use super::*;
use crate::store::Command;
use crate::store::raft::Places;
use moor_api::ids::NodeId;
use openraft::storage::RaftLogStorageExt as _;

/// Entries of term 1, from one index on.
fn entries(indices: std::ops::RangeInclusive<u64>, name: &str) -> Vec<Entry> {
    let command = |index| Command::DefineNode {
        id: NodeId::from_bytes([1; 16]),
        name: format!("{name}{index}").parse().unwrap(),
        attributes: BTreeMap::new(),
    };
    let entry = |index| Entry {
        log_id: LogId::new(1_u64.into(), index),
        payload: openraft::EntryPayload::Normal(command(index)),
    };
    indices.map(entry).collect()
}

/// The names that the log's entries have, from the index on.
async fn names(log: &mut Log, from: u64) -> Vec<String> {
    let name = |entry: &Entry| match &entry.payload {
        openraft::EntryPayload::Normal(Command::DefineNode { name, .. }) => name.to_string(),
        other => panic!("{other:?}"),
    };
    log.try_get_log_entries(from..).await.unwrap().iter().map(name).collect()
}

/// What a log finds whose process was killed, or whose machine lost its power: the files as they are now.
fn copied(places: &Places) -> (tempfile::TempDir, Places) {
    let dir = tempfile::tempdir().unwrap();
    let copy = Places::in_dir(dir.path());
    std::fs::copy(&places.log, &copy.log).unwrap();
    std::fs::copy(places.log.with_extension("journal"), copy.log.with_extension("journal")).unwrap();
    (dir, copy)
}

#[tokio::test]
async fn what_was_written_is_in_the_journal_until_it_is_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    places.make().unwrap();
    let mut log = Log::open(&places.log, Level::NEWEST).unwrap();
    log.blocking_append(entries(0..=9, "a")).await.unwrap();
    log.save_vote(&Vote::new(7, 2)).await.unwrap();
    let (_killed, copy) = copied(&places);
    let mut again = Log::open(&copy.log, Level::NEWEST).unwrap();
    assert_eq!(names(&mut again, 8).await, ["a8", "a9"]);
    assert_eq!(again.read_vote().await.unwrap(), Some(Vote::new(7, 2)));
    // Larger than the journal: it goes past it.
    let large = "x".repeat(5 << 20);
    let mut entry = entries(10..=10, "a").remove(0);
    entry.payload = openraft::EntryPayload::Normal(Command::SetAttributes {
        id: NodeId::from_bytes([1; 16]),
        set: BTreeMap::from([("info.note".to_owned(), large)]),
        secrets: BTreeMap::new(),
        clear: Vec::new(),
    });
    again.blocking_append([entry]).await.unwrap();
    again.blocking_append(entries(11..=11, "a")).await.unwrap();
    let (_killed, copy) = copied(&copy);
    let mut third = Log::open(&copy.log, Level::NEWEST).unwrap();
    assert_eq!(third.get_log_state().await.unwrap().last_log_id.map(|id| id.index()), Some(11));
    assert_eq!(names(&mut third, 11).await, ["a11"]);
}

#[tokio::test]
async fn a_journal_that_was_taken_is_not_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    places.make().unwrap();
    let beside = places.log.with_extension("journal");
    let mut log = Log::open(&places.log, Level::NEWEST).unwrap();
    log.blocking_append(entries(0..=9, "a")).await.unwrap();
    let before = std::fs::read(&beside).unwrap();
    // Removing goes into redb at once, with all that was in the journal.
    log.truncate_after(Some(LogId::new(1_u64.into(), 5))).await.unwrap();
    assert_eq!(names(&mut log, 5).await, ["a5"], "what was removed is not read");
    // The power went before the journal could begin anew.
    let (_killed, copy) = copied(&places);
    std::fs::write(copy.log.with_extension("journal"), &before).unwrap();
    let mut again = Log::open(&copy.log, Level::NEWEST).unwrap();
    assert_eq!(names(&mut again, 5).await, ["a5"]);
    again.blocking_append(entries(6..=7, "b")).await.unwrap();
    let (_killed, copy) = copied(&copy);
    let mut third = Log::open(&copy.log, Level::NEWEST).unwrap();
    assert_eq!(names(&mut third, 5).await, ["a5", "b6", "b7"]);
    drop((log, again, third));
    database::released(&places.log).await;
    // A journal of long ago, of another log, or none: what it had may have been acknowledged.
    std::fs::write(&beside, &before).unwrap();
    drop(Log::open(&places.log, Level::NEWEST).unwrap());
    database::released(&places.log).await;
    let mut log = Log::open(&places.log, Level::NEWEST).unwrap();
    log.purge(LogId::new(1_u64.into(), 2)).await.unwrap();
    log.purge(LogId::new(1_u64.into(), 3)).await.unwrap();
    drop(log);
    database::released(&places.log).await;
    std::fs::write(&beside, &before).unwrap();
    let error = Log::open(&places.log, Level::NEWEST).err().unwrap();
    assert!(error.is_damage() && error.to_string().contains("it is of another time than the log"), "{error}");
    std::fs::remove_file(&beside).unwrap();
    let error = Log::open(&places.log, Level::NEWEST).err().unwrap();
    assert!(error.is_damage() && error.to_string().contains("log.journal"), "{error}");
    assert!(!beside.exists(), "an empty one was put in its place");
}

#[tokio::test]
async fn who_asks_for_entries_that_are_gone_gets_none_of_those_behind_them() {
    let mut log = over_failing(Path::new("/"), usize::MAX, std::time::Duration::ZERO).unwrap();
    log.blocking_append(entries(0..=9, "a")).await.unwrap();
    log.purge(LogId::new(1_u64.into(), 4)).await.unwrap();
    assert_eq!(log.limited_get_log_entries(5, 8).await.unwrap().len(), 3);
    assert!(log.limited_get_log_entries(4, 8).await.unwrap().is_empty(), "the first of them is missing");
}

/// A journal whose disk fails from the write or the sync of this number on, and takes its time for each sync before.
#[derive(Debug)]
struct Failing {
    storage: redb::backends::InMemoryBackend,
    left: std::sync::atomic::AtomicUsize,
    pause: std::time::Duration,
}

impl Failing {
    fn step(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        let left = self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| io::Error::from_raw_os_error(5))
    }
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.storage.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.storage.read(offset, out)
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.storage.set_len(length)
    }
    fn sync_data(&self) -> io::Result<()> {
        std::thread::sleep(self.pause);
        self.step()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.step()?;
        self.storage.write(offset, data)
    }
}

/// A new log with such a journal, in memory.
fn over_failing(disk: &Path, left: usize, pause: std::time::Duration) -> Result<Log, StoreError> {
    let backend = redb::backends::InMemoryBackend::new();
    let database = Database::builder().create_with_backend(backend).unwrap();
    let storage = Failing { storage: redb::backends::InMemoryBackend::new(), left: left.into(), pause };
    Log::over(database, |_| Ok(Box::new(storage)), 1 << 15, disk.to_owned(), Level::NEWEST)
}

#[tokio::test]
async fn a_sync_that_takes_long_is_counted_as_the_journal_s() {
    let (dir, pause) = (tempfile::tempdir().unwrap(), std::time::Duration::from_millis(300));
    let mut log = over_failing(dir.path(), usize::MAX, pause).unwrap();
    log.blocking_append(entries(0..=2, "a")).await.unwrap();
    log.save_vote(&Vote::new(7, 2)).await.unwrap();
    let [journaled, stored] = log.syncs().map(|syncs| syncs.figures());
    assert_eq!((journaled.file.as_str(), journaled.count), ("log.journal", 2), "{journaled:?}");
    assert!(journaled.longest >= 0.3 && journaled.within.contains(&("0.25", 0)), "{journaled:?}");
    // As it was made.
    assert_eq!((stored.file.as_str(), stored.count), ("log.redb", 1), "{stored:?}");
    // What is removed goes there, and the journal begins anew.
    log.purge(LogId::new(1_u64.into(), 0)).await.unwrap();
    let counts = log.syncs().map(|syncs| syncs.figures().count);
    assert_eq!(counts, [3, 2]);
}

#[tokio::test]
async fn a_journal_that_fails_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let log = |left| over_failing(dir.path(), left, std::time::Duration::ZERO);
    let name = dir.path().join("log.journal").display().to_string();
    // While it is made: zeros, its header and a sync.
    for left in 0..3 {
        let error = log(left).err().expect("it was made").to_string();
        assert!(error.contains(&name), "{error}");
    }
    // While an entry is written, or synced.
    for left in 3..5 {
        let error = log(left).unwrap().blocking_append(entries(0..=0, "a")).await.unwrap_err().to_string();
        assert!(error.contains(&name), "{error}");
    }
    log(5).unwrap().blocking_append(entries(0..=0, "a")).await.unwrap();
}

/// The tables of marks, as builds have and had them.
const MARKS_BEFORE: redb::TableDefinition<'static, &'static str, &'static [u8]> = redb::TableDefinition::new("marks");
const FORMATS: redb::TableDefinition<'static, &'static str, u64> = redb::TableDefinition::new("marks");

#[tokio::test]
async fn builds_of_another_format_open_no_log() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    places.make().unwrap();
    let mut log = Log::open(&places.log, Level::NEWEST).unwrap();
    log.blocking_append(entries(0..=3, "a")).await.unwrap();
    log.save_vote(&Vote::new(7, 2)).await.unwrap();
    drop(log);
    database::released(&places.log).await;
    // What a build without a journal does first.
    {
        let database = database::open(&places.log, database::LOG).unwrap();
        let transaction = database.begin_write().unwrap();
        let error = StoreError::from(transaction.open_table(MARKS_BEFORE).expect_err("it was opened"));
        assert!(error.is_damage(), "it does not start: {error}");
        transaction.abort().unwrap();
        // As a build that had a journal and no format left it.
        let transaction = database.begin_write().unwrap();
        transaction.delete_table(FORMATS).unwrap();
        {
            let marks = transaction.open_table(MARKS).unwrap();
            let mut before = transaction.open_table(MARKS_BEFORE).unwrap();
            for mark in redb::ReadableTable::iter(&marks).unwrap() {
                let (name, bytes) = mark.unwrap();
                before.insert(name.value(), bytes.value()).unwrap();
            }
        }
        transaction.delete_table(MARKS).unwrap();
        transaction.commit().unwrap();
    }
    for _ in 0..2 {
        let mut log = Log::open(&places.log, Level::NEWEST).unwrap();
        assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(7, 2)));
        assert_eq!(names(&mut log, 2).await, ["a2", "a3"]);
        drop(log);
        database::released(&places.log).await;
    }
    // A later one.
    {
        let database = database::open(&places.log, database::LOG).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(FORMATS).unwrap().insert("format", 3).unwrap();
        transaction.commit().unwrap();
    }
    let error = Log::open(&places.log, Level::NEWEST).err().expect("it was opened");
    assert!(!error.is_damage(), "{error}");
    assert_eq!(
        error.to_string(),
        "it has format 3, and this release of moord knows 2: a newer one wrote it, install that"
    );
}
