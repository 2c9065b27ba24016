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
