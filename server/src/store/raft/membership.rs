//! From the members' records to the membership that Raft knows: which step comes next.

use super::{Peer, Standing};
use crate::store::records::MemberRecord;
use std::collections::{BTreeMap, BTreeSet};

/// One step of the membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Add(u64, Peer),
    Rename(u64, Peer),
    Promote(u64),
    /// All that go at once: between one and the next those that are left might have no majority.
    Demote(BTreeSet<u64>),
    Remove(u64),
    /// A change of who votes was begun by a leader that is none any more.
    Finish(BTreeSet<u64>),
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Add(number, peer) => write!(f, "member {} ({number}) joins as a non-voting one", peer.name),
            Self::Rename(number, peer) => write!(f, "member {} ({number}) is at {}", peer.name, peer.urls.join(", ")),
            Self::Promote(number) => write!(f, "member {number} votes from now on"),
            Self::Demote(numbers) => {
                let numbers: Vec<_> = numbers.iter().map(u64::to_string).collect();
                write!(f, "member {} votes no more", numbers.join(", "))
            }
            Self::Remove(number) => write!(f, "member {number} is removed"),
            Self::Finish(voters) => {
                write!(f, "{} members vote from now on: an earlier change is finished", voters.len())
            }
        }
    }
}

/// What to do next so that the membership becomes that of the records.
pub(super) fn next_change(standing: &Standing, records: &BTreeMap<u64, MemberRecord>) -> Option<Change> {
    let present = |number: &u64| records.get(number).filter(|record| !record.removed);
    if standing.is_changing {
        let stays = |number: &u64| standing.members[number].1 && present(number).is_some_and(|record| record.voter);
        let voters: BTreeSet<u64> = standing.members.keys().copied().filter(stays).collect();
        return (!voters.is_empty()).then_some(Change::Finish(voters));
    }
    for (number, (peer, votes)) in &standing.members {
        match present(number) {
            Some(record) if record.peer() != *peer => return Some(Change::Rename(*number, record.peer())),
            Some(record) if !*votes && record.voter => {
                // Not before it has nearly all: a voter that is far behind stops every change.
                let at = standing.followers.get(number).copied().unwrap_or(0);
                if at > 0 && at + 200 >= standing.last {
                    return Some(Change::Promote(*number));
                }
            }
            _ => {}
        }
    }
    // After those that come, one of which may be the only one that is to vote. A step changes either voters or members.
    let stays = |number: &u64| present(number).is_some_and(|record| record.voter);
    let voters = standing.members.iter().filter(|(_, (_, votes))| *votes).map(|(number, _)| *number);
    let (stay, leave): (BTreeSet<u64>, BTreeSet<u64>) = voters.partition(stays);
    if !leave.is_empty() && !stay.is_empty() {
        return Some(Change::Demote(leave));
    }
    let is_gone = |(number, (_, votes)): &(&u64, &(Peer, bool))| !*votes && present(number).is_none();
    if let Some((number, _)) = standing.members.iter().find(is_gone) {
        return Some(Change::Remove(*number));
    }
    records
        .iter()
        .find(|(number, record)| !record.removed && !standing.members.contains_key(number))
        .map(|(number, record)| Change::Add(*number, record.peer()))
}
