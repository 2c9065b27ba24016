//! Rotations of the SSH authorities, step by step, over tables in memory.

use super::super::tests::{Site, member, with_site};
use super::super::{AuthorityChange, Said};
use super::*;
use crate::store::apply;
use crate::store::command::Command;
use crate::store::members::JUMP;
use crate::store::records::KeysRecord;
use moor_api::ids::BootId;
use moor_api::problem::Problem;

const HOST: SshRole = SshRole::Host;
const USER: SshRole = SshRole::User;

fn ssh(change: SshChange) -> AuthorityChange {
    AuthorityChange::Ssh { change }
}

fn record(number: u32, members: &[MemberId]) -> SshAuthorityRecord {
    let key = WrappedKey { encapsulated: vec![1].into(), ciphertext: vec![2].into() };
    let wrapped = members.iter().map(|id| (*id, key.clone())).collect();
    let public = format!("ssh-ed25519 {number}");
    SshAuthorityRecord { number, public, made: 1, since: 0, wrapped, retired: None, left: BTreeSet::new() }
}

fn first() -> SshAuthoritiesRecord {
    SshAuthoritiesRecord { version: 1, host: vec![record(1, &[])], user: vec![record(1, &[])] }
}

fn rotation(site: &Site<'_, '_>, role: SshRole, number: u32) -> AuthorityChange {
    let members: Vec<_> = site.members.iter().map(|member| member.id).collect();
    ssh(SshChange::Rotate { role, first: Some(first()), new: record(number, &members) })
}

fn retirement(role: SshRole, number: u32, left: &[NodeId]) -> AuthorityChange {
    ssh(SshChange::Retire { role, number, left: left.iter().copied().collect() })
}

fn says(site: &Site<'_, '_>, boot: u8, version: u64) {
    let trust = NodeTrust { boot: BootId::from_bytes([boot; 16]), began: 1, now: 1, ssh: version };
    assert_eq!(site.apply(AuthorityChange::Said { nodes: vec![Said { node: site.node, trust }] }), Outcome::Done);
}

fn numbers(site: &Site<'_, '_>) -> (Vec<u32>, Vec<u32>) {
    let record = get(site.write).unwrap().unwrap();
    let of = |role| record.of(role).iter().map(|one| one.number).collect();
    (of(HOST), of(USER))
}

/// It is refused, and nothing has changed.
fn refused(site: &Site<'_, '_>, change: AuthorityChange, why: &str) {
    let before = get(site.write).unwrap();
    match site.apply(change) {
        Outcome::Refused(Problem { detail, .. }) => assert!(detail.contains(why), "{detail}"),
        other => panic!("not refused ({why}): {other}"),
    }
    assert_eq!(get(site.write).unwrap(), before, "{why}");
}

#[test]
fn of_users_one_takes_the_place_of_another_in_one_step() {
    with_site(Level::NEWEST, |site| {
        refused(site, retirement(USER, 1, &[]), "changed meanwhile");
        refused(site, rotation(site, USER, 3), "changed meanwhile");
        let for_one = SshChange::Rotate { role: USER, first: Some(first()), new: record(2, &[site.members[0].id]) };
        refused(site, ssh(for_one), "members came or went");
        assert_eq!(site.apply(rotation(site, USER, 2)), Outcome::Number(2));
        assert_eq!(numbers(site), (vec![1], vec![1, 2]));
        let again = "SSH user authority 2 is beside SSH user authority 1 already: `moor authority retire ssh-user`";
        refused(site, rotation(site, USER, 3), again);
        refused(site, retirement(HOST, 1, &[]), "changed meanwhile");

        // A node that was never bound does not count.
        let not_yet = "these nodes have not acknowledged version 2 of the SSH authorities";
        refused(site, retirement(USER, 1, &[]), not_yet);
        says(site, 1, 1);
        refused(site, retirement(USER, 1, &[]), ": n1: ");
        says(site, 1, 2);
        refused(site, retirement(USER, 2, &[]), "changed meanwhile");
        assert_eq!(site.apply(retirement(USER, 1, &[])), Outcome::Number(3));
        assert_eq!(numbers(site), (vec![1], vec![2]));
        // And so on, and the other role has numbers of its own.
        assert_eq!(site.apply(rotation(site, USER, 3)), Outcome::Number(4));
        assert_eq!(site.apply(rotation(site, HOST, 2)), Outcome::Number(5));
        assert_eq!(numbers(site), (vec![1, 2], vec![2, 3]));
    });
}

#[test]
fn of_hosts_the_old_one_is_trusted_until_nodes_have_certificates_from_the_new_one() {
    with_site(Level::NEWEST, |site| {
        let signing = || get(site.write).unwrap().unwrap().signing().unwrap().number;
        assert_eq!(site.apply(rotation(site, HOST, 2)), Outcome::Number(2));
        says(site, 1, 2);
        refused(site, ssh(SshChange::Drop { number: 1 }), "changed meanwhile");
        assert_eq!(signing(), 1);
        assert_eq!(site.apply(retirement(HOST, 1, &[])), Outcome::Number(3));
        assert_eq!((signing(), numbers(site).0), (2, vec![1, 2]));
        refused(site, ssh(SshChange::Drop { number: 1 }), "have certificates from SSH host authority 1 still: n1");
        says(site, 1, 3);
        refused(site, ssh(SshChange::Drop { number: 2 }), "changed meanwhile");
        assert_eq!(site.apply(ssh(SshChange::Drop { number: 1 })), Outcome::Number(4));
        assert_eq!((signing(), numbers(site).0), (2, vec![2]));
    });
}

#[test]
fn nobody_waits_for_nodes_that_are_left_behind() {
    with_site(Level::NEWEST, |site| {
        site.apply(rotation(site, USER, 2));
        assert_eq!(site.apply(retirement(USER, 1, &[site.node])), Outcome::Number(3));
        site.apply(rotation(site, HOST, 2));
        assert_eq!(site.apply(retirement(HOST, 1, &[site.node])), Outcome::Number(5));
        assert_eq!(site.apply(ssh(SshChange::Drop { number: 1 })), Outcome::Number(6));
        // One that dies between the two steps.
        site.apply(rotation(site, HOST, 3));
        says(site, 1, 7);
        assert_eq!(site.apply(retirement(HOST, 2, &[])), Outcome::Number(8));
        refused(site, ssh(SshChange::Drop { number: 2 }), ": n1");
        assert_eq!(site.apply(retirement(HOST, 2, &[site.node])), Outcome::Number(8));
        assert_eq!(site.apply(ssh(SshChange::Drop { number: 2 })), Outcome::Number(9));
    });
}

#[test]
fn what_a_node_says_is_bounded_and_counts_for_its_boot() {
    with_site(Level::NEWEST, |site| {
        let said = || apply::node(site.write, site.node).unwrap().unwrap().trust.map(|trust| trust.ssh);
        site.apply(rotation(site, USER, 2));
        says(site, 1, 9);
        assert_eq!(said(), Some(2), "there is no version 9");
        says(site, 1, 1);
        assert_eq!(said(), Some(2), "an older one that comes later");
        says(site, 2, 1);
        assert_eq!(said(), Some(1));
        // What is said of the trust bundle takes nothing away.
        says(site, 2, 0);
        assert_eq!(said(), Some(1));
    });
}

/// Members that are lost, or of which a backup does not know, may have made authorities, and nodes have taken them up.
#[test]
fn a_collective_that_begins_anew_gives_no_number_and_no_version_again() {
    let jump = u32::try_from(JUMP).unwrap();
    let anew = |site: &Site<'_, '_>| {
        let only = member("m3");
        let id = only.id;
        let anew = Command::Anew { number: 3, member: only, keys: KeysRecord::default() };
        assert_eq!(site.apply(anew), Outcome::Number(3));
        move |role, number| ssh(SshChange::Rotate { role, first: Some(first()), new: record(number, &[id]) })
    };
    // Before a rotation.
    with_site(Level::NEWEST, |site| {
        let rotate = anew(site);
        assert_eq!(version(site.write).unwrap(), 1, "of who joins nothing is asked");
        refused(site, rotate(USER, 2), "changed meanwhile");
        assert_eq!(site.apply(rotate(USER, jump + 2)), Outcome::Number(JUMP + 2));
        says(site, 1, JUMP + 1);
        refused(site, retirement(USER, 1, &[]), ": n1: ");
        says(site, 1, JUMP + 2);
        assert_eq!(site.apply(retirement(USER, 1, &[])), Outcome::Number(JUMP + 3));
    });
    // While there are two: who has acknowledged these, has acknowledged nothing that was made of them elsewhere. While one of hosts goes: users go on
    // to believe it until no node shows it.
    with_site(Level::NEWEST, |site| {
        site.apply(rotation(site, USER, 2));
        site.apply(rotation(site, HOST, 2));
        says(site, 1, 3);
        assert_eq!(site.apply(retirement(HOST, 1, &[])), Outcome::Number(4));
        let _ = anew(site);
        assert_eq!((numbers(site), version(site.write).unwrap()), ((vec![1, 2], vec![1, 2]), JUMP + 4));
        assert_eq!(get(site.write).unwrap().unwrap().signing().unwrap().number, 2);
        refused(site, retirement(USER, 1, &[]), ": n1: ");
        refused(site, ssh(SshChange::Drop { number: 1 }), "have certificates from SSH host authority 1 still: n1");
        says(site, 1, JUMP + 4);
        assert_eq!(site.apply(ssh(SshChange::Drop { number: 1 })), Outcome::Number(JUMP + 5));
        assert_eq!(site.apply(retirement(USER, 1, &[])), Outcome::Number(JUMP + 6));
        assert_eq!(numbers(site), (vec![2], vec![2]));
    });
}

#[test]
fn what_there_are_no_keys_of_is_left_out() {
    let rotated = |then: &dyn Fn(&Site<'_, '_>)| {
        with_site(Level::NEWEST, |site| {
            site.apply(rotation(site, USER, 2));
            site.apply(rotation(site, HOST, 2));
            says(site, 1, 3);
            then(site);
        });
    };
    let keyed = |host: &[u32], user: &[u32]| Keyed { x509: vec![1], host: host.to_vec(), user: user.to_vec() };
    rotated(&|site| {
        leave_keyed(site.write, &keyed(&[2], &[2])).unwrap();
        assert_eq!(numbers(site), (vec![2], vec![2]));
        // None of hosts is left, or none of users.
        for (host, user) in [(&[1_u32][..], &[2_u32][..]), (&[2][..], &[1][..]), (&[2][..], &[][..])] {
            let error = leave_keyed(site.write, &keyed(host, user)).unwrap_err().to_string();
            assert!(error.contains("the middle of a rotation"), "{error}");
        }
    });
    // A survivor that joined without the one that went. What it has not taken up yet comes with the records.
    rotated(&|site| {
        leave_retired(site.write, &[1]).unwrap();
        assert_eq!(numbers(site).0, [1, 2]);
        site.apply(retirement(HOST, 1, &[]));
        leave_retired(site.write, &[1]).unwrap();
        assert_eq!(numbers(site).0, [1, 2]);
        leave_retired(site.write, &[2]).unwrap();
        assert_eq!(numbers(site), (vec![2], vec![1, 2]));
    });
    // Before a rotation there is the first.
    with_site(Level::NEWEST, |site| {
        leave_keyed(site.write, &keyed(&[1], &[1])).unwrap();
        assert!(leave_keyed(site.write, &keyed(&[2], &[1])).is_err());
    });
}

#[test]
fn a_collective_with_a_member_of_an_older_release_keeps_its_authorities() {
    with_site(Level::AUTHORITIES, |site| {
        site.refused(rotation(site, USER, 2), "needs feature level 4, and the collective is at 3");
        let trust = NodeTrust { boot: BootId::from_bytes([1; 16]), began: 1, now: 1, ssh: 0 };
        let said = |trust| AuthorityChange::Said { nodes: vec![Said { node: site.node, trust }] };
        assert_eq!(site.apply(said(trust)), Outcome::Done);
        site.refused(said(NodeTrust { ssh: 1, ..trust }), "needs feature level 4");
    });
}

/// Inside of a command that is audited, as they are in the log.
#[test]
fn a_change_reads_back_and_says_what_it_needs() {
    let members = [MemberId::random()];
    for change in [
        SshChange::Rotate { role: HOST, first: Some(first()), new: record(2, &members) },
        SshChange::Retire { role: USER, number: 1, left: [NodeId::random()].into() },
        SshChange::Drop { number: 1 },
    ] {
        let kind = change.kind();
        let change = Box::new(ssh(change).into());
        let command = Command::Audited { entry: serde_json::json!({ "what": "x" }), change };
        assert_eq!((command.kind(), command.level()), (kind, Level::SSH_AUTHORITIES));
        let text = serde_json::to_string(&command).unwrap();
        let back: Command = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
