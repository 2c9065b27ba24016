//! The store as its users see it: commands in, records out, also after it was opened again.

use super::command::{Resealed, SealedIn};
use super::members::JUMP;
use super::raft::{Calls, FOUNDER, Peer, Places};
use super::records::{
    Armed, Identity, ImageRecord, InviteRecord, KeyVersion, KeysRecord, MAX_BOOTS, MAX_LOG_BYTES, MAX_STRANGERS,
    MemberRecord, SiteRecord, WrappedKey,
};
use super::{Command, Level, Outcome, Replicated, Store as _, database, index};
use crate::secrets::SealedSecret;
use moor_api::admin::{LogEvent, Refusal, StatusEvent};
use moor_api::ids::{BootId, CollectiveId, MemberId, NodeId, Sha256Digest};
use moor_api::node::PcrBank;
use moor_api::problem::{Code, Problem};
use moor_api::trust::Incarnation;
use std::collections::BTreeMap;

fn define(id: NodeId, name: &str, attributes: &[(&str, &str)]) -> Command {
    let attributes = attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Command::DefineNode { id, name: name.parse().unwrap(), attributes }
}

fn soft(key: u8) -> Identity {
    Identity::Soft { public_key: vec![key].into(), unproven: false }
}

fn tpm(key: u8) -> Identity {
    Identity::Tpm {
        ek_public: vec![key].into(),
        ek_certificate: None,
        ak_public: vec![key].into(),
        bank: PcrBank::Sha256,
    }
}

fn refusal(detail: &str) -> Refusal {
    Refusal {
        time_ms: 1,
        peer: "10.0.0.1:1".into(),
        call: "POST hello".into(),
        uuid: None,
        macs: Vec::new(),
        problem: Problem::new(Code::NotArmed, detail),
        count: 1,
    }
}

pub(crate) fn event(state: &str) -> StatusEvent {
    StatusEvent {
        node: "a".parse().unwrap(),
        boot: None,
        state: state.into(),
        detail: String::new(),
        time_ms: 1,
        uptime_ms: 0,
        figures: BTreeMap::new(),
    }
}

fn sealed(version: u32, ciphertext: &str) -> SealedSecret {
    let json = serde_json::json!({ "key_version": version, "nonce": "00", "ciphertext": ciphertext });
    serde_json::from_value(json).unwrap()
}

/// A version of the keys for these members.
fn keys(version: u32, members: &[MemberId]) -> KeyVersion {
    let wrapped = WrappedKey { encapsulated: vec![1].into(), ciphertext: vec![2].into() };
    KeyVersion { version, wrapped: members.iter().map(|id| (*id, wrapped.clone())).collect() }
}

struct Fixture {
    dir: tempfile::TempDir,
    store: Replicated,
}

async fn open(dir: &std::path::Path) -> Result<Replicated, super::StoreError> {
    Replicated::open(&Places::in_dir(dir), FOUNDER, Calls::to_nobody()?).await
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Places::in_dir(dir.path()).make().unwrap();
        let store = open(dir.path()).await.unwrap();
        let peer = Peer { id: MemberId::random(), key: vec![1].into(), name: "m1".into(), urls: Vec::new() };
        store.found(peer).await.unwrap();
        Self { dir, store }
    }

    async fn done(&self, command: Command) -> Outcome {
        let outcome = self.store.propose(command).await.unwrap();
        assert!(!matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
        outcome
    }

    async fn refused(&self, command: Command) -> Code {
        match self.store.propose(command).await.unwrap() {
            Outcome::Refused(problem) => problem.code,
            other => panic!("{other:?}"),
        }
    }

    async fn bind(&self, id: NodeId, identity: Identity) -> Outcome {
        self.store.propose(Command::Bind { id, identity, boot: BootId::random(), now: 100 }).await.unwrap()
    }
}

#[tokio::test]
async fn an_identity_is_bound_once_and_never_by_mistake() {
    let f = Fixture::new().await;
    let (a, b) = (NodeId::random(), NodeId::random());
    f.done(define(a, "a", &[])).await;
    f.done(define(b, "b", &[])).await;
    let code = |outcome: Outcome| if let Outcome::Refused(problem) = outcome { Some(problem.code) } else { None };
    assert_eq!(code(f.bind(a, tpm(1)).await), Some(Code::NotArmed));
    f.done(Command::Arm { id: a, armed: Armed::Until(100) }).await;
    assert_eq!(code(f.bind(a, tpm(1)).await), Some(Code::NotArmed), "the window has just closed");
    f.done(Command::Arm { id: a, armed: Armed::Once }).await;
    let first = f.bind(a, tpm(1)).await;
    assert!(matches!(first, Outcome::Number(_)), "{first:?}");
    assert_eq!(f.bind(a, tpm(1)).await, first, "the same once more, without the window");
    assert_eq!(f.store.snapshot().unwrap().node(a).unwrap().unwrap().armed, Armed::No, "once is used up");
    // Also armed in any way, nobody takes the place of a TPM.
    for armed in [Armed::Once, Armed::Until(200), Armed::Continuous] {
        f.done(Command::Arm { id: a, armed }).await;
        assert_eq!(code(f.bind(a, tpm(2)).await), Some(Code::IdentityMismatch), "{armed:?}");
        assert_eq!(code(f.bind(a, soft(1)).await), Some(Code::IdentityMismatch), "{armed:?}");
    }
    // The TPM of one node is not another node.
    f.done(Command::Arm { id: b, armed: Armed::Once }).await;
    assert_eq!(code(f.bind(b, tpm(1)).await), Some(Code::IdentityMismatch));
    // Dropped by name, it is free again, and the epoch has grown.
    let Outcome::Number(dropped) = f.done(Command::Rearm { id: a }).await else { panic!("no epoch") };
    assert!(matches!(first, Outcome::Number(before) if before < dropped));
    assert!(matches!(f.bind(b, tpm(1)).await, Outcome::Number(epoch) if epoch > dropped));
}

#[tokio::test]
async fn only_unproven_soft_keys_change_under_continuous_arming() {
    let f = Fixture::new().await;
    let id = NodeId::random();
    f.done(define(id, "a", &[])).await;
    f.done(Command::Arm { id, armed: Armed::Once }).await;
    f.bind(id, soft(1)).await;
    let is_unproven = || f.store.snapshot().unwrap().node(id).unwrap().unwrap().identity.unwrap().is_unproven();
    assert!(!is_unproven());
    f.done(Command::Arm { id, armed: Armed::Continuous }).await;
    f.bind(id, soft(1)).await;
    assert!(!is_unproven(), "the key that was proven stays so");
    let other = f.bind(id, soft(2)).await;
    assert!(
        matches!(&other, Outcome::Refused(p) if p.code == Code::IdentityMismatch),
        "and none takes its place: {other:?}"
    );
    f.done(Command::Rearm { id }).await;
    f.done(Command::Arm { id, armed: Armed::Continuous }).await;
    f.bind(id, soft(2)).await;
    assert!(is_unproven());
    // What a proposer says of it does not count.
    f.bind(id, Identity::Soft { public_key: vec![3].into(), unproven: false }).await;
    assert!(is_unproven());
}

#[tokio::test]
async fn the_index_follows_attributes_and_identities() {
    let f = Fixture::new().await;
    let id = NodeId::random();
    let uuid = "5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c01";
    f.done(define(
        id,
        "a",
        &[("id.uuid", uuid), ("net.hwaddr", "52:54:00:00:00:01"), ("net.x.hwaddr", "52:54:00:00:00:02")],
    ))
    .await;
    let found = |key: String| f.store.snapshot().unwrap().indexed(&key).unwrap();
    assert_eq!(found(index::uuid(uuid)), [id]);
    assert_eq!(found(index::hwaddr("52:54:00:00:00:02")), [id]);
    let set = |set: &[(&str, &str)], clear: &[&str]| Command::SetAttributes {
        id,
        set: set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        secrets: BTreeMap::new(),
        clear: clear.iter().map(|name| (*name).to_owned()).collect(),
    };
    f.done(set(&[("net.hwaddr", "52:54:00:00:00:09"), ("id.uuid", "")], &["net.x.hwaddr"])).await;
    assert!(found(index::uuid(uuid)).is_empty());
    assert!(found(index::hwaddr("52:54:00:00:00:01")).is_empty());
    assert!(found(index::hwaddr("52:54:00:00:00:02")).is_empty());
    assert_eq!(found(index::hwaddr("52:54:00:00:00:09")), [id]);
    let other = NodeId::random();
    f.done(define(other, "b", &[("net.hwaddr", "52:54:00:00:00:09")])).await;
    assert_eq!(found(index::hwaddr("52:54:00:00:00:09")).len(), 2);
    f.done(Command::RemoveNode { id }).await;
    assert_eq!(found(index::hwaddr("52:54:00:00:00:09")), [other]);
}

#[tokio::test]
async fn what_is_kept_is_bounded() {
    let f = Fixture::new().await;
    let id = NodeId::random();
    f.done(define(id, "a", &[])).await;
    let log = |text: String| Command::Log { id, event: LogEvent { time_ms: 1, phase: "agent".into(), text } };
    for number in 0..40 {
        f.done(log(format!("{number}{}", "x".repeat(60_000)))).await;
    }
    let logs = f.store.snapshot().unwrap().logs(id).unwrap();
    assert!(logs.iter().map(|event| event.text.len()).sum::<usize>() <= MAX_LOG_BYTES);
    assert!(logs.last().unwrap().text.starts_with("39x"));

    // Strangers come and go; what a node was refused stays.
    f.done(Command::Refuse { nodes: vec![id], strangers: Vec::new(), refusal: refusal("node") }).await;
    for number in 0..MAX_STRANGERS + 50 {
        f.done(Command::Refuse { nodes: Vec::new(), strangers: vec![format!("s{number}")], refusal: refusal("no") })
            .await;
    }
    f.done(Command::Refuse { nodes: vec![id], strangers: Vec::new(), refusal: refusal("node") }).await;
    let view = f.store.snapshot().unwrap();
    assert!(view.refusals("s49").unwrap().is_empty() && view.refusals("s50").unwrap().len() == 1);
    let kept = view.refusals(&id.to_string()).unwrap();
    assert_eq!((kept.len(), kept[0].count), (1, 2), "equal ones are counted");
    for number in 0..100 {
        f.done(Command::Refuse { nodes: vec![id], strangers: Vec::new(), refusal: refusal(&number.to_string()) }).await;
    }
    assert_eq!(f.store.snapshot().unwrap().refusals(&id.to_string()).unwrap().len(), 50);
}

#[tokio::test]
async fn what_a_node_that_is_not_there_was_refused_is_not_kept() {
    let f = Fixture::new().await;
    let (id, nobody) = (NodeId::random(), NodeId::random());
    f.done(define(id, "a", &[])).await;
    f.done(Command::Refuse { nodes: vec![id, nobody], strangers: Vec::new(), refusal: refusal("no") }).await;
    f.done(Command::RemoveNode { id }).await;
    f.done(Command::Refuse { nodes: vec![id], strangers: Vec::new(), refusal: refusal("no") }).await;
    let view = f.store.snapshot().unwrap();
    assert!(view.keys(super::tables::REFUSALS).unwrap().is_empty());
}

#[tokio::test]
async fn a_boot_stage_ends_once_and_for_all() {
    let f = Fixture::new().await;
    let id = NodeId::random();
    f.done(define(id, "a", &[])).await;
    let (first, second) = (BootId::random(), BootId::random());
    let boot = |boot| Command::Boot { id, boot, evidence: None };
    f.done(boot(first)).await;
    f.done(boot(first)).await;
    f.done(boot(second)).await;
    assert_eq!(f.refused(boot(first)).await, Code::StageClosed, "another boot began");
    f.done(Command::CloseStage { id, boot: second }).await;
    assert_eq!(f.refused(boot(second)).await, Code::StageClosed);
    // Also when it was so long ago that it was forgotten: a late report opens nothing.
    for _ in 0..MAX_BOOTS {
        f.done(Command::CloseStage { id, boot: BootId::random() }).await;
    }
    let record = |boot| {
        let node = f.store.snapshot().unwrap().node(id).unwrap().unwrap();
        node.boots.iter().find(|record| record.boot == boot).map(|record| record.closed)
    };
    assert_eq!(record(second), None);
    let event = StatusEvent { boot: Some(second), ..event("late") };
    f.done(Command::Status { id, sequence: Some(9), event }).await;
    assert_eq!(record(second), Some(true));
}

#[tokio::test]
async fn it_opens_again_with_everything_and_the_audit_chain_holds() {
    let f = Fixture::new().await;
    let id = NodeId::random();
    f.done(define(id, "a", &[])).await;
    for number in 0..5 {
        f.done(Command::Audit { entry: serde_json::json!({ "number": number }) }).await;
    }
    f.done(Command::Status { id, sequence: None, event: event("x") }).await;
    assert_eq!(f.refused(define(NodeId::random(), "a", &[])).await, Code::Conflict);
    // A change takes its line along, also one that is refused.
    for (number, name) in [(5, "b"), (6, "b")] {
        let change = Box::new(define(NodeId::random(), name, &[]));
        let command = Command::Audited { entry: serde_json::json!({ "number": number }), change };
        assert_eq!(matches!(f.store.propose(command).await.unwrap(), Outcome::Refused(_)), number == 6);
    }
    let Fixture { dir, store } = f;
    assert!(open(dir.path()).await.is_err(), "one store has one process");
    store.close().await;
    drop(store);
    let places = Places::in_dir(dir.path());
    database::released(&places.log).await;
    database::released(&places.state).await;
    let store = open(dir.path()).await.unwrap();
    let view = store.snapshot().unwrap();
    assert_eq!(view.node_named("a").unwrap().unwrap().id, id);
    assert_eq!(view.events(id).unwrap().len(), 1);
    let lines: Vec<serde_json::Value> = view.all(super::tables::AUDIT).unwrap();
    let numbers: Vec<_> = lines.iter().map(|line| line["entry"]["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6]);
    assert!(view.node_named("b").unwrap().is_some());
    assert!(lines.windows(2).all(|pair| pair[1]["previous"] == pair[0]["hash"]));
}

#[tokio::test]
async fn keys_are_for_those_who_are_members_and_nothing_new_is_under_an_older_version() {
    let f = Fixture::new().await;
    let founder = MemberRecord::only(vec![1].into(), vec![1].into(), "m1".into(), Vec::new());
    let (one, two) = (founder.id, MemberId::random());
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: "site".into(),
        bundle_version: 1,
        created: 1,
        incarnation: Incarnation::FIRST,
    };
    f.done(Command::Found { site, founder, keys: KeysRecord { versions: vec![keys(1, &[one])] } }).await;
    let rotate = |version, members: &[MemberId]| Command::RotateKeys { new: keys(version, members) };
    for wrong in [rotate(1, &[one]), rotate(3, &[one]), rotate(2, &[]), rotate(2, &[one, two]), rotate(2, &[two])] {
        assert_eq!(f.refused(wrong).await, Code::Conflict);
    }
    // Who comes is given all there are.
    let invite = |id, version| Command::Invite {
        id,
        invite: InviteRecord {
            name: "m2".into(),
            voter: true,
            expires: 9,
            replaces: None,
            secret: sealed(version, "aa"),
        },
        now: 1,
    };
    let join = |invite, member, key: u8, versions: &[u32]| Command::Join {
        invite,
        member,
        key: vec![key].into(),
        unwrap: vec![key].into(),
        keys: versions.iter().map(|version| (*version, keys(1, &[two]).wrapped[&two].clone())).collect(),
        urls: Vec::new(),
        now: 1,
        level: Level::FIRST,
        trust: 1,
        ssh: 1,
    };
    let invitation = uuid::Uuid::new_v4();
    f.done(invite(invitation, 1)).await;
    for wrong in [join(invitation, two, 2, &[]), join(invitation, two, 2, &[2]), join(invitation, two, 2, &[1, 2])] {
        assert_eq!(f.refused(wrong).await, Code::Conflict);
    }
    // Nor does anybody come under the id or the key of another one.
    assert_eq!(f.refused(join(invitation, one, 2, &[1])).await, Code::Conflict);
    assert_eq!(f.refused(join(invitation, two, 1, &[1])).await, Code::Conflict);
    assert_eq!(f.done(join(invitation, two, 2, &[1])).await, Outcome::Number(2));
    let versions = || f.store.snapshot().unwrap().key_versions().unwrap().versions;
    assert_eq!(versions(), [keys(1, &[one, two])]);

    let id = NodeId::random();
    f.done(define(id, "a", &[])).await;
    let set = |name: &str, secret| Command::SetAttributes {
        id,
        set: BTreeMap::new(),
        secrets: [(name.to_owned(), secret)].into(),
        clear: Vec::new(),
    };
    for name in ["x", "y", "z"] {
        f.done(set(name, sealed(1, "01"))).await;
    }
    assert_eq!(f.done(rotate(2, &[one, two])).await, Outcome::Number(2));
    assert_eq!(f.refused(set("x", sealed(1, "02"))).await, Code::Conflict, "under the older one");
    let late = uuid::Uuid::new_v4();
    assert_eq!(f.refused(invite(late, 1)).await, Code::Conflict);
    f.done(set("y", sealed(2, "03"))).await;
    let anew = |field: &str, version, key: String| Resealed {
        within: SealedIn::Nodes,
        key,
        field: field.into(),
        before: sealed(1, "01"),
        after: sealed(version, "04"),
    };
    let secrets = vec![
        anew("x", 2, id.to_string()),
        anew("y", 2, id.to_string()),
        anew("gone", 2, id.to_string()),
        anew("x", 2, NodeId::random().to_string()),
    ];
    assert_eq!(f.refused(Command::Reseal { secrets: vec![anew("x", 1, id.to_string())] }).await, Code::Conflict);
    assert_eq!(f.done(Command::Reseal { secrets }).await, Outcome::Number(1), "what was changed stays");
    let now = f.store.snapshot().unwrap().node(id).unwrap().unwrap().secrets;
    assert_eq!((&now["x"], &now["y"], &now["z"]), (&sealed(2, "04"), &sealed(2, "03"), &sealed(1, "01")));
    assert_eq!(now.len(), 3);
    assert_eq!(f.refused(Command::DropKeys { version: 2 }).await, Code::Conflict, "the current one");
    f.done(Command::DropKeys { version: 1 }).await;
    assert_eq!(versions(), [keys(2, &[one, two])]);
    // Who goes has no part in the next, and takes what waits along.
    let Command::Invite { id: late, mut invite, now } = invite(late, 2) else { unreachable!() };
    invite.name = "m3".into();
    f.done(Command::Invite { id: late, invite, now }).await;
    f.done(Command::RemoveMember { number: 2 }).await;
    assert_eq!(f.store.snapshot().unwrap().invite(late).unwrap(), None);
    assert_eq!(f.refused(rotate(3, &[one, two])).await, Code::Conflict);
    assert_eq!(f.done(rotate(3, &[one])).await, Outcome::Number(3));
}

#[tokio::test]
async fn who_comes_is_given_what_members_have_and_not_what_was_lost() {
    let f = Fixture::new().await;
    let record = |key: u8| MemberRecord::only(vec![key].into(), vec![key].into(), "m1".into(), Vec::new());
    let (founder, survivor, two) = (record(1), record(2), MemberId::random());
    let (lost, only) = (founder.id, survivor.id);
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: "site".into(),
        bundle_version: 1,
        created: 1,
        incarnation: Incarnation::FIRST,
    };
    f.done(Command::Found { site, founder, keys: KeysRecord { versions: vec![keys(1, &[lost])] } }).await;
    let anew = KeysRecord { versions: vec![keys(1, &[lost]), keys(2, &[only]), keys(3, &[only])] };
    f.done(Command::Anew { number: 2, member: survivor, keys: anew }).await;
    let invitation = uuid::Uuid::new_v4();
    let secret = sealed(3, "aa");
    let invite = InviteRecord { name: "m2".into(), voter: true, expires: 9, replaces: None, secret };
    f.done(Command::Invite { id: invitation, invite, now: 1 }).await;
    let join = |versions: &[u32]| Command::Join {
        invite: invitation,
        member: two,
        key: vec![3].into(),
        unwrap: vec![3].into(),
        keys: versions.iter().map(|version| (*version, keys(1, &[two]).wrapped[&two].clone())).collect(),
        urls: Vec::new(),
        now: 1,
        level: Level::INCARNATIONS,
        trust: 1 + JUMP,
        ssh: 1,
    };
    for wrong in [&[][..], &[3], &[1, 2, 3]] {
        assert_eq!(f.refused(join(wrong)).await, Code::Conflict, "{wrong:?}");
    }
    assert_eq!(f.done(join(&[2, 3])).await, Outcome::Number(3));
    let versions = f.store.snapshot().unwrap().key_versions().unwrap().versions;
    assert_eq!(versions, [keys(1, &[lost]), keys(2, &[only, two]), keys(3, &[only, two])]);
}

#[tokio::test]
async fn a_key_of_an_image_that_comes_again_takes_the_place_of_the_one_that_was() {
    let f = Fixture::new().await;
    let founder = MemberRecord::only(vec![1].into(), vec![1].into(), "m1".into(), Vec::new());
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: "site".into(),
        bundle_version: 1,
        created: 1,
        incarnation: Incarnation::FIRST,
    };
    let first = keys(1, &[founder.id]);
    f.done(Command::Found { site, founder, keys: KeysRecord { versions: vec![first] } }).await;
    let digest = Sha256Digest([1; 32]);
    let before = ImageRecord {
        name: "root".parse().unwrap(),
        digest,
        blob: Sha256Digest([2; 32]),
        size: 1,
        lineage: uuid::Uuid::nil(),
        serial: 1,
        created: 1,
        encrypted: true,
        key: Some(sealed(1, "01")),
        signatures: None,
        kernel: Sha256Digest([3; 32]),
        initramfs: Sha256Digest([4; 32]),
        boot_loaders: BTreeMap::new(),
        kernel_version: None,
        os: None,
        offered: false,
    };
    let kept = || f.store.snapshot().unwrap().image(&digest.to_string()).unwrap().unwrap();
    f.done(Command::PutImage { image: before.clone() }).await;
    f.done(Command::OfferImage { digest }).await;
    f.done(Command::PutImage { image: ImageRecord { key: None, ..before.clone() } }).await;
    assert_eq!(kept().key, Some(sealed(1, "01")));
    let stale = ImageRecord { key: Some(sealed(2, "02")), ..before.clone() };
    assert_eq!(
        f.refused(Command::PutImage { image: stale }).await,
        Code::Conflict,
        "under another version than the current one"
    );
    f.done(Command::PutImage { image: ImageRecord { key: Some(sealed(1, "03")), ..before } }).await;
    assert_eq!(kept().key, Some(sealed(1, "03")));
    assert!(kept().offered, "nodes boot it as before");
}
