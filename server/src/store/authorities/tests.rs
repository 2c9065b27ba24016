//! Rotations, step by step, over tables in memory.

use super::AuthorityChange as Change;
use super::*;
use crate::store::apply;
use crate::store::late::Late;
use crate::store::members::JUMP;
use crate::store::records::{Identity, InviteRecord, KeysRecord};
use moor_api::ids::CollectiveId;
use moor_api::trust::Incarnation;
use redb::Database;
use redb::backends::InMemoryBackend;
use uuid::Uuid;

pub(super) fn member(name: &str) -> MemberRecord {
    MemberRecord {
        level: Level::NEWEST,
        ..MemberRecord::only(vec![1].into(), vec![1].into(), name.into(), vec!["https://10.0.0.1".into()])
    }
}

pub(super) struct Site<'a, 'w> {
    pub(super) write: &'a Write<'w>,
    pub(super) members: Vec<MemberRecord>,
    pub(super) node: NodeId,
}

impl Site<'_, '_> {
    pub(super) fn apply(&self, command: impl Into<Command>) -> Outcome {
        apply::apply(self.write, command.into()).unwrap()
    }

    pub(super) fn refused(&self, command: impl Into<Command>, why: &str) {
        let before = (get(self.write).unwrap(), site(self.write).unwrap().map(|site| site.bundle_version));
        match self.apply(command) {
            Outcome::Refused(problem) => assert!(problem.detail.contains(why), "{problem}"),
            other => panic!("not refused ({why}): {other}"),
        }
        let after = (get(self.write).unwrap(), site(self.write).unwrap().map(|site| site.bundle_version));
        assert_eq!(before, after, "{why}");
    }

    fn authority(&self, number: u32, members: usize) -> AuthorityRecord {
        let key = WrappedKey { encapsulated: vec![1].into(), ciphertext: vec![2].into() };
        let wrapped = self.members[..members].iter().map(|member| (member.id, key.clone())).collect();
        AuthorityRecord { number, root: format!("PEM {number}"), made: 1, since: 1, wrapped, retiring: false }
    }

    fn rotate(&self, number: u32) -> Change {
        Change::Rotate { first: Some(self.authority(1, 0)), new: self.authority(number, 2) }
    }

    fn numbers(&self) -> Vec<u32> {
        get(self.write).unwrap().unwrap().list.iter().map(|one| one.number).collect()
    }

    /// As the third member, alone: what it makes then.
    fn begins_anew(&self) -> Change {
        let only = member("m3");
        let anew = Command::Anew { number: 3, member: only.clone(), keys: KeysRecord::default() };
        assert_eq!(self.apply(anew), Outcome::Number(3));
        let given = self.write.get(tables::COUNTERS, GIVEN).unwrap();
        let number = next_number(get(self.write).unwrap().as_ref(), given).unwrap();
        let mut new = self.authority(number, 1);
        new.wrapped = new.wrapped.into_values().map(|wrapped| (only.id, wrapped)).collect();
        Change::Rotate { first: Some(self.authority(1, 0)), new }
    }

    fn takes_up(&self, number: u64, trust: u64, shows: u32) {
        assert_eq!(self.apply(Change::TakeUp { number, trust, shows }), Outcome::Done);
    }

    fn says(&self, boot: u8, version: u64) {
        let trust = NodeTrust { boot: BootId::from_bytes([boot; 16]), began: version, now: version, ssh: 0 };
        assert_eq!(self.apply(Change::Said { nodes: vec![Said { node: self.node, trust }] }), Outcome::Done);
    }

    fn trust(&self) -> Option<(u64, u64)> {
        apply::node(self.write, self.node).unwrap().unwrap().trust.map(|trust| (trust.began, trust.now))
    }
}

pub(super) fn with_site(level: Level, then: impl FnOnce(&Site<'_, '_>)) {
    let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
    let transaction = database.begin_write().unwrap();
    tables::create(&transaction).unwrap();
    let write = Write::new(&transaction);
    let of = Site { write: &write, members: vec![member("m1"), member("m2")], node: NodeId::random() };
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: "x".into(),
        bundle_version: 1,
        created: 1,
        incarnation: Incarnation::FIRST,
    };
    of.apply(Command::Found { site, founder: of.members[0].clone(), keys: KeysRecord::default() });
    members::found(&write, &of.members[1]).unwrap();
    if level > Level::FIRST {
        assert_eq!(of.apply(Command::RaiseLevel { level }), Outcome::Done);
    }
    for (id, name, identity) in [
        (of.node, "n1", Some(Identity::Soft { public_key: vec![1].into(), unproven: false })),
        (NodeId::random(), "n2", None),
    ] {
        of.apply(Command::DefineNode { id, name: name.parse().unwrap(), attributes: BTreeMap::new() });
        let mut node = apply::node(&write, id).unwrap().unwrap();
        node.identity = identity;
        apply::put_node(&write, &node).unwrap();
    }
    then(&of);
}

fn retire(version: u64, left: &[NodeId]) -> Change {
    Change::Retire { number: 1, version, left: left.iter().copied().collect() }
}

#[test]
fn one_takes_the_place_of_another_once_all_have_acknowledged_it() {
    with_site(Level::NEWEST, |site| {
        site.refused(retire(1, &[]), "changed meanwhile");
        site.refused(site.rotate(3), "changed meanwhile");
        let for_one = Change::Rotate { first: Some(site.authority(1, 0)), new: site.authority(2, 1) };
        site.refused(for_one, "members came or went");
        assert_eq!(site.apply(site.rotate(2)), Outcome::Number(2));
        site.refused(site.rotate(3), "authority 2 is beside authority 1 already");
        let issuing = || get(site.write).unwrap().unwrap().issuing().unwrap().number;
        assert_eq!(issuing(), 1);

        site.refused(retire(2, &[]), "these members have not taken up trust bundle 2, and would be cut off: m1, m2:");
        site.takes_up(1, 2, 1);
        site.refused(retire(2, &[site.node]), "cut off: m2:");
        site.takes_up(2, 2, 1);
        // A node that was never bound does not count.
        site.refused(retire(2, &[]), "these nodes have not acknowledged trust bundle 2");
        site.says(1, 1);
        site.refused(retire(2, &[]), "trust no member any more: n1:");
        site.refused(retire(1, &[site.node]), "changed meanwhile");
        site.says(1, 2);
        site.refused(Change::Drop { number: 1 }, "changed meanwhile");
        assert_eq!(site.apply(retire(2, &[])), Outcome::Done);
        assert_eq!(issuing(), 2);
        site.refused(retire(2, &[]), "changed meanwhile");

        site.takes_up(1, 2, 2);
        site.refused(Change::Drop { number: 1 }, "show certificates from authority 1 still: m2");
        site.takes_up(2, 2, 2);
        assert_eq!(site.apply(Change::Drop { number: 1 }), Outcome::Number(3));
        assert_eq!(site.numbers(), [2]);
        assert_eq!(get(site.write).unwrap().unwrap().list[0].since, 2);
        // And so on.
        assert_eq!(site.apply(site.rotate(3)), Outcome::Number(4));
    });
}

#[test]
fn nodes_that_are_left_behind_are_named_and_members_never_are() {
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        site.takes_up(1, 2, 1);
        site.refused(retire(2, &[site.node]), "cut off: m2");
        assert_eq!(site.apply(Command::RemoveMember { number: 2 }), Outcome::Done);
        assert_eq!(site.apply(retire(2, &[site.node])), Outcome::Done);
    });
}

#[test]
fn what_a_node_says_counts_for_its_boot_in_whatever_order_it_comes() {
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        site.says(1, 2);
        site.says(1, 1);
        assert_eq!(site.trust(), Some((1, 2)));
        // It has booted anew, out of boot files of before.
        site.says(2, 1);
        assert_eq!(site.trust(), Some((1, 1)));
        // There is no version 9.
        site.says(3, 9);
        assert_eq!(site.trust().map(|(_, now)| now), Some(2));
        let trust = NodeTrust { boot: BootId::from_bytes([1; 16]), began: 1, now: 1, ssh: 0 };
        let many = vec![Said { node: site.node, trust }; MAX_SAID + 1];
        site.refused(Change::Said { nodes: many }, "more than 256 nodes");
        // Another machine in its place has said nothing.
        site.apply(Command::Rearm { id: site.node });
        assert_eq!(site.trust(), None);
    });
}

#[test]
fn what_a_node_said_in_an_earlier_boot_does_not_count() {
    with_site(Level::NEWEST, |site| {
        let id = site.node;
        let boot = |boot: u8| BootId::from_bytes([boot; 16]);
        let begins = |number| Command::Boot { id, boot: boot(number), evidence: None };
        let begins_late = |count, number, after| {
            let after = Some(boot(after));
            let what = Late::Boot { id, boot: boot(number), plan: None, evidence: None, after };
            Command::Late { member: 2, number: count, what }
        };
        site.apply(site.rotate(2));
        site.takes_up(1, 2, 1);
        site.takes_up(2, 2, 1);
        site.apply(begins(1));
        site.says(1, 2);
        site.apply(begins(1));
        assert_eq!(site.trust(), Some((2, 2)), "the same boot goes on");
        site.apply(begins(2));
        assert_eq!(site.trust(), None);
        // It was said before, and is written down only now.
        site.says(1, 2);
        assert_eq!(site.trust(), None);
        site.refused(retire(2, &[]), "these nodes have not acknowledged trust bundle 2");
        site.says(2, 1);
        site.says(2, 2);
        assert_eq!(site.trust(), Some((1, 2)));
        // Boots that a member let begin alone: one before the newest, and one after it.
        site.apply(begins_late(1, 8, 1));
        assert_eq!(site.trust(), Some((1, 2)));
        site.apply(begins_late(2, 9, 2));
        assert_eq!(site.trust(), None);
    });
}

/// Members that are lost, or of which a backup does not know, may have made an authority, and nodes have acknowledged it.
#[test]
fn a_collective_that_begins_anew_gives_no_number_and_no_version_again() {
    let jump = u32::try_from(JUMP).unwrap();
    // Before a rotation.
    with_site(Level::NEWEST, |site| {
        assert_eq!(version(site.write).unwrap(), 1);
        let rotate = site.begins_anew();
        assert_eq!(version(site.write).unwrap(), JUMP + 1, "nodes have to hear of the incarnation");
        site.refused(site.rotate(2), "changed meanwhile");
        assert_eq!(site.apply(rotate), Outcome::Number(JUMP + 2));
        assert_eq!(site.numbers(), [1, jump + 2]);
        site.takes_up(3, JUMP + 2, 1);
        site.says(1, 2);
        site.refused(retire(JUMP + 2, &[]), "would trust no member any more: n1:");
        site.says(1, JUMP + 2);
        assert_eq!(site.apply(retire(JUMP + 2, &[])), Outcome::Done);
    });
    // While there are two: who has acknowledged these, has acknowledged nothing that was made of them elsewhere.
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        site.says(1, 2);
        let rotate = site.begins_anew();
        site.refused(rotate, "is beside authority 1 already");
        site.takes_up(3, JUMP + 2, 1);
        site.refused(retire(JUMP + 2, &[]), "would trust no member any more: n1:");
    });
    // While one goes: nobody waits for members that are none any more.
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        site.takes_up(1, 2, 1);
        site.takes_up(2, 2, 1);
        assert_eq!(site.apply(retire(2, &[site.node])), Outcome::Done);
        let rotate = site.begins_anew();
        assert_eq!((site.numbers(), version(site.write).unwrap()), (vec![2], JUMP + 2));
        assert_eq!(site.apply(rotate), Outcome::Number(JUMP + 3));
        assert_eq!(site.numbers(), [2, jump + 3]);
    });
}

/// Tables of a member that was killed are those of an earlier moment, and what it had dropped it has no keys of.
#[test]
fn a_backup_of_the_middle_of_a_rotation_keeps_the_authorities_that_it_has_keys_of() {
    let keyed = |x509: &[u32]| Keyed { x509: x509.to_vec(), host: vec![1], user: vec![1] };
    let left =
        |site: &Site<'_, '_>, x509: &[u32]| leave_keyed(site.write, &keyed(x509)).map_err(|error| error.to_string());
    // The new one has taken over, and the tables are of before that.
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        left(site, &[2]).unwrap();
        assert_eq!(site.numbers(), [2]);
        site.begins_anew();
        assert_eq!(site.numbers(), [2]);
    });
    // Cancelled: its number is not given again.
    with_site(Level::NEWEST, |site| {
        site.apply(site.rotate(2));
        left(site, &[1]).unwrap();
        assert_eq!(site.numbers(), [1]);
        site.refused(site.rotate(2), "changed meanwhile");
        assert_eq!(site.apply(site.rotate(3)), Outcome::Number(3));
    });
    // All is there; there is more than is known of, and that is not wanted.
    with_site(Level::NEWEST, |site| {
        left(site, &[1, 2]).unwrap();
        site.apply(site.rotate(2));
        left(site, &[1, 2]).unwrap();
        assert_eq!(site.numbers(), [1, 2]);
    });
    // Nothing is known of the only one that there is.
    with_site(Level::NEWEST, |site| {
        let error = left(site, &[2]).unwrap_err();
        assert!(error.contains("the middle of a rotation"), "{error}");
        site.apply(site.rotate(2));
        assert!(left(site, &[3]).is_err());
        assert_eq!(site.numbers(), [1, 2]);
    });
}

/// A release that does not count incarnations is no member of it.
#[test]
fn a_collective_that_begins_anew_is_of_the_next_incarnation_and_of_the_level_that_knows_it() {
    with_site(Level::FIRST, |of| {
        let incarnation = || site(of.write).unwrap().unwrap().incarnation;
        assert_eq!((incarnation(), level::of(of.write).unwrap()), (Incarnation::FIRST, Level::FIRST));
        of.begins_anew();
        assert_eq!((incarnation(), level::of(of.write).unwrap()), (Incarnation::FIRST.next(), Level::INCARNATIONS));
        let only = members::present(of.write).unwrap().remove(0);
        assert_eq!(
            of.apply(Command::Anew { number: 4, member: only, keys: KeysRecord::default() }),
            Outcome::Number(4)
        );
        assert_eq!(incarnation(), Incarnation::FIRST.next().next());
    });
}

#[test]
fn a_rotation_is_cancelled_as_long_as_nothing_is_from_the_new_authority() {
    let cancel = |number| Change::Cancel { number };
    with_site(Level::NEWEST, |site| {
        site.refused(cancel(1), "changed meanwhile");
        site.apply(site.rotate(2));
        site.refused(cancel(1), "changed meanwhile");
        site.takes_up(1, 2, 1);
        site.says(1, 2);
        assert_eq!(site.apply(cancel(2)), Outcome::Number(3));
        assert_eq!(site.numbers(), [1]);
        site.refused(cancel(2), "changed meanwhile");
        site.refused(retire(3, &[]), "changed meanwhile");
        // The next one is another: members and nodes may have the cancelled one still.
        site.refused(site.rotate(2), "changed meanwhile");
        assert_eq!(site.apply(site.rotate(3)), Outcome::Number(4));
        assert_eq!(site.numbers(), [1, 3]);
        // Who has acknowledged the cancelled one has acknowledged nothing of this.
        site.refused(retire(4, &[]), "cut off: m1, m2:");
        for number in [1, 2] {
            site.takes_up(number, 4, 1);
        }
        site.refused(retire(4, &[]), "would trust no member any more: n1:");
        assert_eq!(site.apply(retire(4, &[site.node])), Outcome::Done);
        site.refused(cancel(3), "changed meanwhile");
    });
    with_site(Level::AUTHORITIES, |site| {
        site.apply(site.rotate(2));
        site.refused(cancel(2), "needs feature level 5, and the collective is at 3");
    });
}

#[test]
fn who_joins_has_the_authorities_of_now() {
    with_site(Level::NEWEST, |site| {
        let secret = serde_json::json!({ "key_version": 1, "nonce": "00", "ciphertext": "aa" });
        let secret = serde_json::from_value(secret).unwrap();
        let invite = InviteRecord { name: "m3".into(), voter: false, expires: 9, replaces: None, secret };
        members::invite(site.write, Uuid::nil(), &invite, 1).unwrap();
        let join = |trust| Command::Join {
            invite: Uuid::nil(),
            member: MemberId::from_bytes([7; 16]),
            key: vec![7].into(),
            unwrap: vec![7].into(),
            keys: Vec::new(),
            urls: Vec::new(),
            now: 1,
            level: Level::NEWEST,
            trust,
            ssh: 1,
        };
        site.apply(site.rotate(2));
        for number in [1, 2] {
            site.takes_up(number, 2, 1);
        }
        assert_eq!(site.apply(retire(2, &[site.node])), Outcome::Done);
        for number in [1, 2] {
            site.takes_up(number, 2, 2);
        }
        assert_eq!(site.apply(Change::Drop { number: 1 }), Outcome::Number(3));
        // It was given the keys a moment before that: the newest authority is the same.
        for older in [1, 2] {
            site.refused(join(older), "authorities were rotated meanwhile");
        }
        assert_eq!(site.apply(join(3)), Outcome::Number(3));
    });
}

#[test]
fn a_collective_with_a_member_of_an_older_release_keeps_its_authority() {
    with_site(Level::NEAR, |site| {
        site.refused(site.rotate(2), "needs feature level 3, and the collective is at 2");
    });
}

#[test]
fn a_long_list_of_names_is_cut() {
    let names: Vec<String> = (1..=25).map(|number| format!("n{number}")).collect();
    assert!(named(&names).ends_with("n19, n20 and 5 more"));
    assert_eq!(named(&names[..2]), "n1, n2");
}

/// Inside of a command that is audited, as they are in the log.
#[test]
fn a_change_reads_back_and_says_what_it_needs() {
    let key = WrappedKey { encapsulated: vec![1].into(), ciphertext: vec![2].into() };
    let wrapped = [(MemberId::random(), key)].into();
    let new = AuthorityRecord { number: 2, root: "PEM".into(), made: 1, since: 0, wrapped, retiring: false };
    let node = NodeId::random();
    let trust = NodeTrust { boot: BootId::random(), began: 1, now: 2, ssh: 0 };
    for (change, level) in [
        (Change::Rotate { first: None, new }, Level::AUTHORITIES),
        (Change::Retire { number: 1, version: 2, left: [node].into() }, Level::AUTHORITIES),
        (Change::Drop { number: 1 }, Level::AUTHORITIES),
        (Change::Cancel { number: 2 }, Level::INCARNATIONS),
        (Change::TakeUp { number: 1, trust: 2, shows: 1 }, Level::AUTHORITIES),
        (Change::Said { nodes: vec![Said { node, trust }] }, Level::AUTHORITIES),
    ] {
        let kind = change.kind();
        let command = Command::Audited { entry: serde_json::json!({ "what": "x" }), change: Box::new(change.into()) };
        assert_eq!((command.kind(), command.level()), (kind, level));
        let text = serde_json::to_string(&command).unwrap();
        let back: Command = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
