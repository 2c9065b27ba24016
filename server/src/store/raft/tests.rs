//! The log and the machine under openraft's own suite; what is written reads back; and which step the membership takes next.

use super::log::Log;
use super::machine::Machine;
use super::propose::bound;
use super::*;
use crate::store::records::{KeysRecord, MemberRecord};
use crate::store::tables::{self, Snapshot};
use crate::store::{Event, Store as _};
use moor_api::ids::NodeId;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

impl Default for Peer {
    fn default() -> Self {
        Self { id: MemberId::from_bytes([0; 16]), key: Base64::default(), name: String::new(), urls: Vec::new() }
    }
}

struct Builder;

impl StoreBuilder<Raft, Log, Machine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, Log, Machine), StorageError<Raft>> {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::in_dir(dir.path());
        places.make().unwrap();
        let known = Level::NEWEST;
        let machine = Machine::open(&places.state, places.snapshots, known).unwrap();
        Ok((dir, Log::open(&places.log, known).unwrap(), machine))
    }
}

#[tokio::test]
async fn openraft_s_suite_finds_nothing() {
    Suite::test_all(Builder).await.unwrap();
}

fn peer(number: u8) -> Peer {
    Peer {
        id: MemberId::from_bytes([number; 16]),
        key: vec![number].into(),
        name: format!("m{number}"),
        urls: vec![format!("https://10.0.0.{number}")],
    }
}

fn record(number: u8, voter: bool) -> MemberRecord {
    let Peer { id, key, name, urls } = peer(number);
    MemberRecord { id, voter, ..MemberRecord::only(key, Base64::default(), name, urls) }
}

/// A leader, number 1, whose log has 1000 entries; members vote or not; followers are as far as is said.
fn standing(members: &[(u8, bool)], followers: &[(u8, u64)]) -> Standing {
    Standing {
        number: 1,
        leader: Some(1),
        term: 1,
        members: members.iter().map(|(number, votes)| (u64::from(*number), (peer(*number), *votes))).collect(),
        last: 1000,
        applied: 1000,
        followers: followers.iter().map(|(number, at)| (u64::from(*number), *at)).collect(),
        unheard: None,
        is_changing: false,
    }
}

fn records(list: &[(u8, bool)]) -> BTreeMap<u64, MemberRecord> {
    list.iter().map(|(number, voter)| (u64::from(*number), record(*number, *voter))).collect()
}

#[test]
fn the_membership_follows_the_records_one_step_at_a_time() {
    let both = records(&[(1, true), (2, true)]);
    assert_eq!(next_change(&standing(&[(1, true)], &[]), &records(&[(1, true)])), None);
    assert_eq!(next_change(&standing(&[(1, true)], &[]), &both), Some(Change::Add(2, peer(2))));
    // Who is far behind does not vote yet.
    let behind = standing(&[(1, true), (2, false)], &[(2, 500)]);
    assert_eq!(next_change(&behind, &both), None);
    let near = standing(&[(1, true), (2, false)], &[(2, 950)]);
    assert_eq!(next_change(&near, &both), Some(Change::Promote(2)));
    assert_eq!(next_change(&near, &records(&[(1, true), (2, false)])), None, "it is not to vote");
    let voting = standing(&[(1, true), (2, true)], &[(2, 1000)]);
    assert_eq!(next_change(&voting, &records(&[(1, true), (2, false)])), Some(Change::Demote([2].into())));
    let mut moved = both.clone();
    moved.get_mut(&2).unwrap().urls = vec!["https://10.9.9.9".into()];
    let there = Peer { urls: vec!["https://10.9.9.9".into()], ..peer(2) };
    assert_eq!(next_change(&voting, &moved), Some(Change::Rename(2, there)));
    // Removal: first the vote, then the member; a removed member that was never added stays out.
    let mut removed = both;
    removed.get_mut(&2).unwrap().removed = true;
    assert_eq!(next_change(&voting, &removed), Some(Change::Demote([2].into())));
    assert_eq!(next_change(&near, &removed), Some(Change::Remove(2)));
    assert_eq!(next_change(&standing(&[(1, true)], &[]), &removed), None);
    // Two that go at once go in one step: between the two, the other and a dead one would have to agree.
    let three = standing(&[(1, true), (2, true), (3, true)], &[(2, 1000), (3, 7)]);
    let mut last = records(&[(1, true), (2, false), (3, true)]);
    last.get_mut(&3).unwrap().removed = true;
    assert_eq!(next_change(&three, &last), Some(Change::Demote([2, 3].into())));
    // The only one that is to vote comes before the other goes, however far behind it is.
    let swapped = records(&[(1, false), (2, true)]);
    assert_eq!(next_change(&near, &swapped), Some(Change::Promote(2)));
    assert_eq!(next_change(&behind, &swapped), None);
    // What another leader began is finished first: with who was to vote, and without who was to vote no more.
    let half = Standing { is_changing: true, ..standing(&[(1, true), (2, true)], &[(2, 1000)]) };
    assert_eq!(next_change(&half, &records(&[(1, true), (2, true)])), Some(Change::Finish([1, 2].into())));
    assert_eq!(next_change(&half, &removed), Some(Change::Finish([1].into())));
}

async fn open(dir: &Path) -> Replicated {
    Replicated::open(&Places::in_dir(dir), FOUNDER, Calls::to_nobody().unwrap()).await.unwrap()
}

/// A new collective of one.
async fn alone(dir: &Path) -> Replicated {
    Places::in_dir(dir).make().unwrap();
    let store = open(dir).await;
    store.found(peer(1)).await.unwrap();
    store
}

fn define(number: u64) -> Command {
    Command::DefineNode {
        id: NodeId::random(),
        name: format!("n{number}").parse().unwrap(),
        attributes: BTreeMap::new(),
    }
}

/// What was read in one term is not changed in another: who led then may have missed what was acknowledged since.
#[tokio::test]
async fn a_change_that_is_bound_to_a_term_is_made_in_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = alone(dir.path()).await;
    let before = store.standing().term;
    assert_eq!(in_term(before, store.propose(define(1))).await.unwrap(), Outcome::Done);
    close(store, &Places::in_dir(dir.path())).await;
    let store = open(dir.path()).await;
    let after = store.standing().term;
    assert!(after > before, "{after} comes after {before}");
    for term in [before, after + 1] {
        let refused = in_term(term, store.propose(define(2))).await.unwrap_err();
        assert!(matches!(&refused, StoreError::NoLeader(why) if why.contains("try again")), "{refused}");
    }
    assert_eq!(in_term(after, store.propose(define(2))).await.unwrap(), Outcome::Done);
    let rest = async {
        let first = store.propose(define(4)).await.unwrap();
        (first, bound())
    };
    assert_eq!(in_term(after, rest).await, (Outcome::Done, None), "the rest is no more bound than elsewhere");
    assert!(store.leads_in().is_none_or(|term| term == after));
    assert_eq!(store.propose(define(3)).await.unwrap(), Outcome::Done, "without a term it is as before");
}

#[tokio::test]
async fn a_snapshot_has_everything_and_a_damaged_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = alone(dir.path()).await;
    for number in 0..50 {
        assert_eq!(store.propose(define(number)).await.unwrap(), Outcome::Done);
    }
    let view = store.snapshot().unwrap();
    let (applied, membership) = machine::State::applied(&view).unwrap();
    let meta = SnapshotMeta { last_log_id: applied, last_membership: membership };
    let path = snapshot::write(dir.path(), &view, &meta).unwrap();
    assert_eq!(snapshot::meta(&std::fs::File::open(&path).unwrap(), Level::NEWEST).unwrap(), meta);

    let other = tempfile::tempdir().unwrap();
    let tables = other.path().join("m.redb");
    database::make(&tables).unwrap();
    let machine = Machine::open(&tables, other.path().join("s"), Level::NEWEST).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let damaged = other.path().join("damaged");
    let mut watcher = machine.watch();
    for at in (0..bytes.len()).step_by(bytes.len() / 40 + 1) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        std::fs::write(&damaged, if at % 2 == 0 { &changed } else { &bytes[..at] }).unwrap();
        assert!(machine.install(&meta, SnapshotFile::open(&damaged).unwrap()).is_err(), "byte {at}");
        assert!(machine.view().unwrap().nodes().unwrap().is_empty());
    }
    assert!(watcher.try_recv().is_err());
    machine.install(&meta, SnapshotFile::open(&path).unwrap()).unwrap();
    assert!(matches!(watcher.try_recv(), Ok(Event::Reset)), "who watches was not told that all is another");
    let (mine, theirs) = (machine.view().unwrap(), store.snapshot().unwrap());
    for table in tables::REPLICATED {
        let dump = |view: &Snapshot| {
            let mut out = Vec::new();
            view.each(table, |key, value| {
                out.push((key.to_owned(), value.to_owned()));
                Ok::<_, std::convert::Infallible>(())
            })
            .unwrap()
            .unwrap();
            out
        };
        assert_eq!(dump(&mine), dump(&theirs));
    }
    assert_eq!(mine.nodes().unwrap().len(), 50);
    store.close().await;
}

#[tokio::test]
async fn a_store_that_lost_what_was_not_synced_has_it_again_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    let store = alone(dir.path()).await;
    let before = std::fs::read(&places.state).unwrap();
    for number in 0..100 {
        assert_eq!(store.propose(define(number)).await.unwrap(), Outcome::Done);
    }
    store.close().await;
    drop(store);
    database::released(&places.log).await;
    database::released(&places.state).await;
    // As if the machine had lost its power: the tables of long ago, the log of now.
    std::fs::write(&places.state, before).unwrap();
    let store = open(dir.path()).await;
    assert_eq!(store.snapshot().unwrap().nodes().unwrap().len(), 100);
    store.close().await;
}

/// The call of another member that holds these changes, as the leader of term 9: all of them are agreed.
fn append(commands: Vec<Command>) -> Vec<u8> {
    let entry = |(index, command)| Entry {
        log_id: LogId::new(9_u64.into(), index),
        payload: openraft::EntryPayload::Normal(command),
    };
    let entries: Vec<Entry> = (0..).zip(commands).map(entry).collect();
    let request = openraft::raft::AppendEntriesRequest::<Raft> {
        vote: Vote::new_committed(9, 2),
        prev_log_id: None,
        leader_commit: entries.last().map(|entry| entry.log_id),
        entries,
    };
    serde_json::to_vec(&wire::WireAppend::new(&request, None)).unwrap()
}

fn leader() -> MemberId {
    peer(2).id
}

fn founder(level: Level) -> MemberRecord {
    let record = MemberRecord::only(vec![1].into(), vec![1].into(), "m1".into(), vec!["https://10.0.0.1".into()]);
    MemberRecord { level, ..record }
}

/// A collective of this member alone.
fn anew(member: MemberRecord) -> Command {
    Command::Anew { number: 1, member, keys: KeysRecord::default() }
}

/// Of level 2.
fn near() -> Command {
    Command::MoveMember { number: 1, urls: vec!["https://10.0.0.1".into()], near: vec!["10.0.0.0/8".parse().unwrap()] }
}

async fn close(store: Replicated, places: &Places) {
    store.close().await;
    drop(store);
    database::released(&places.log).await;
    database::released(&places.state).await;
}

#[tokio::test]
async fn what_is_above_the_level_is_not_proposed() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    let store = alone(dir.path()).await;
    assert_eq!(store.propose(anew(founder(Level::NEAR))).await.unwrap(), Outcome::Number(1));
    let before = store.standing().last;
    assert!(matches!(store.propose(near()).await.unwrap(), Outcome::Refused(_)));
    assert_eq!(store.standing().last, before, "it is in the log");
    let audited = Command::Audited { entry: serde_json::json!({ "what": "near" }), change: Box::new(near()) };
    assert!(matches!(store.propose(audited.clone()).await.unwrap(), Outcome::Refused(_)));
    assert_eq!(store.snapshot().unwrap().keys(tables::AUDIT).unwrap().len(), 1, "that it was asked for");
    assert_eq!(store.standing().last, before + 1);
    // So that a release opens the log that does not know what was asked for.
    close(store, &places).await;
    drop(Log::open(&places.log, Level::FIRST).unwrap());
    database::released(&places.log).await;
    let store = open(dir.path()).await;
    assert_eq!(store.propose(Command::RaiseLevel { level: Level::NEAR }).await.unwrap(), Outcome::Done);
    assert_eq!(store.propose(audited).await.unwrap(), Outcome::Done);
    store.close().await;
}

#[tokio::test]
async fn a_release_that_is_too_old_does_not_open_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    let store = alone(dir.path()).await;
    let before = std::fs::read(&places.state).unwrap();
    assert_eq!(store.propose(Command::RaiseLevel { level: Level::NEAR }).await.unwrap(), Outcome::Done);
    let path = {
        let view = store.snapshot().unwrap();
        let (applied, membership) = machine::State::applied(&view).unwrap();
        let meta = SnapshotMeta { last_log_id: applied, last_membership: membership };
        snapshot::write(dir.path(), &view, &meta).unwrap()
    };
    // It is of that level, whatever came of it.
    assert!(matches!(store.propose(near()).await.unwrap(), Outcome::Refused(_)));
    close(store, &places).await;
    let too_old = |error: &StoreError| {
        assert!(!error.is_damage(), "{error}");
        let text = error.to_string();
        assert!(text.contains("has reached feature level 2, and this release of moord knows 1 at most"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    };
    let old = async || {
        let opened = Replicated::open_up_to(Level::FIRST, &places, FOUNDER, Calls::to_nobody().unwrap()).await;
        database::released(&places.log).await;
        database::released(&places.state).await;
        opened.err().expect("it opens")
    };
    // By its tables, by the newest entry of its log, and by an entry that is to be applied again.
    too_old(&Machine::open(&places.state, places.snapshots.clone(), Level::FIRST).err().unwrap());
    too_old(&Log::open(&places.log, Level::FIRST).err().unwrap());
    too_old(&snapshot::unread(snapshot::meta(&std::fs::File::open(&path).unwrap(), Level::FIRST).unwrap_err()));
    too_old(&old().await);
    let store = open(dir.path()).await;
    assert_eq!(store.propose(define(1)).await.unwrap(), Outcome::Done);
    close(store, &places).await;
    std::fs::write(&places.state, before).unwrap();
    too_old(&old().await);
    // And nothing was lost by trying.
    let store = open(dir.path()).await;
    assert_eq!(store.snapshot().unwrap().level().unwrap(), Level::NEAR);
    assert_eq!(store.snapshot().unwrap().nodes().unwrap().len(), 1);
    store.close().await;
}

#[tokio::test]
async fn a_release_that_is_too_old_takes_no_newer_entry_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    places.make().unwrap();
    let store = Replicated::open_up_to(Level::FIRST, &places, FOUNDER, Calls::to_nobody().unwrap()).await.unwrap();
    let newer = append(vec![near()]);
    let never = tokio::time::timeout(Duration::from_millis(50), store.failed());
    assert!(never.await.is_err(), "it ends although nothing has come");
    let error = store.answer(Call::Append, &newer, leader()).await.unwrap_err();
    assert!(matches!(error, StoreError::TooOld { level: Level::NEAR, known: Level::FIRST }), "{error}");
    assert_eq!(store.standing().last, 0);
    assert!(matches!(store.failed().await, StoreError::TooOld { .. }));
    // Had it come in another way, it would not be applied.
    let entry = Entry { log_id: LogId::new(9_u64.into(), 0), payload: openraft::EntryPayload::Normal(near()) };
    assert!(matches!(store.machine.apply(vec![(entry, None)]), Err(StoreError::TooOld { .. })));
    assert_eq!(store.snapshot().unwrap().level().unwrap(), Level::FIRST);
    // What it knows it takes.
    store.answer(Call::Append, &append(vec![define(1)]), leader()).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn only_a_level_that_has_risen_locks_a_release_out() {
    for (told, risen) in [(Level::FIRST, false), (Level::NEAR, true)] {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::in_dir(dir.path());
        places.make().unwrap();
        let old = async || Replicated::open_up_to(Level::FIRST, &places, FOUNDER, Calls::to_nobody().unwrap()).await;
        let store = old().await.unwrap();
        let raise = Command::RaiseLevel { level: Level::NEAR };
        let raised =
            Command::Audited { entry: serde_json::json!({ "what": "raise" }), change: Box::new(raise.clone()) };
        let call = append(vec![anew(founder(told)), raise, raised, define(1)]);
        let answered = store.answer(Call::Append, &call, leader()).await;
        if risen {
            // It is on the disk before it is applied, or not: the answer may come in between.
            assert!(matches!(answered, Ok(_) | Err(StoreError::TooOld { .. })), "{answered:?}");
            let why = store.failed().await;
            assert!(matches!(why, StoreError::TooOld { level: Level::NEAR, known: Level::FIRST }), "{why}");
            assert_eq!(store.snapshot().unwrap().level().unwrap(), Level::FIRST, "it was applied");
            close(store, &places).await;
            continue;
        }
        answered.unwrap();
        // Refused by all: one has gone back to an older release, and goes on with it.
        store.applied(3).await.unwrap();
        let never = tokio::time::timeout(Duration::from_millis(50), store.failed());
        assert!(never.await.is_err(), "it ends");
        close(store, &places).await;
        let store = old().await.unwrap();
        assert_eq!(store.snapshot().unwrap().nodes().unwrap().len(), 1);
        assert_eq!(store.snapshot().unwrap().level().unwrap(), Level::FIRST);
        close(store, &places).await;
    }
}

#[tokio::test]
async fn nobody_speaks_for_another_member() {
    let dir = tempfile::tempdir().unwrap();
    let store = alone(dir.path()).await;
    assert_eq!(store.propose(anew(founder(Level::FIRST))).await.unwrap(), Outcome::Number(1));
    let (one, known) = (store.snapshot().unwrap().member(1).unwrap().unwrap().id, peer(2).id);
    // What the membership says of number 1 is another id than the record's here.
    let membership = peer(1).id;
    for (number, by, may) in [
        (1, one, true),
        (1, known, false),
        (2, one, false),
        (2, membership, false),
        // This member is behind.
        (2, known, true),
        (3, known, true),
    ] {
        let spoken = store.speaks(number, by);
        assert_eq!(spoken.is_ok(), may, "{number} by {by}");
        assert!(may || matches!(spoken, Err(StoreError::Speaker { .. })));
    }
    store.close().await;
}

#[tokio::test]
async fn who_begins_anew_changes_all_at_once_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::in_dir(dir.path());
    let store = alone(dir.path()).await;
    let tables = std::fs::read(&places.state).unwrap();
    for number in 0..10 {
        assert_eq!(store.propose(define(number)).await.unwrap(), Outcome::Done);
    }
    close(store, &places).await;
    // As after a crash: tables of long ago, and a log that has more.
    std::fs::write(&places.state, &tables).unwrap();
    let mut survivor = Survivor::open(&places).unwrap();
    let before = survivor.view().unwrap().digests().unwrap();
    let none = |_: &KeysRecord| -> anyhow::Result<KeysRecord> { anyhow::bail!("there are none") };
    let error = survivor.begin_anew(FOUNDER, founder(Level::FIRST), vec![1], none).await.unwrap_err().to_string();
    assert!(error.contains("there are none"), "{error}");
    assert!(survivor.view().unwrap().digests().unwrap() == before, "what was not agreed was applied");
    // The members of before may have come back meanwhile: it is one of them still.
    drop(survivor);
    database::released(&places.log).await;
    let store = open(dir.path()).await;
    assert_eq!(store.propose(define(10)).await.unwrap(), Outcome::Done);
    close(store, &places).await;

    std::fs::write(&places.state, &tables).unwrap();
    let mut survivor = Survivor::open(&places).unwrap();
    let (member, (term, last)) = (founder(Level::FIRST), survivor.newest().await.unwrap());
    let number = survivor.begin_anew(FOUNDER, member.clone(), vec![1], |before| Ok(before.clone())).await.unwrap();
    drop(survivor);
    database::released(&places.log).await;
    let (site, records) = members_in(&places).unwrap();
    assert_eq!((site.is_none(), records.len(), records[&number].id), (true, 1, member.id));
    let store = Replicated::open(&places, number, Calls::to_nobody().unwrap()).await.unwrap();
    assert_eq!(store.snapshot().unwrap().nodes().unwrap().len(), 11);
    assert_eq!(store.propose(define(11)).await.unwrap(), Outcome::Done);
    let standing = store.standing();
    assert!(standing.term > term && standing.last > last, "{standing:?}, after {last} of term {term}");
    let members: Vec<_> =
        standing.members.into_iter().map(|(number, (peer, votes))| (number, peer.id, votes)).collect();
    assert_eq!(members, [(number, member.id, true)]);
    store.close().await;
}
