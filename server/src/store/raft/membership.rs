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
    Demote(u64),
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
            Self::Demote(number) => write!(f, "member {number} votes no more"),
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
    // A voter that goes votes no more first, so that a step changes either voters or members.
    for (number, (peer, votes)) in &standing.members {
        match present(number) {
            None if *votes => return Some(Change::Demote(*number)),
            None => return Some(Change::Remove(*number)),
            Some(record) if record.peer() != *peer => return Some(Change::Rename(*number, record.peer())),
            Some(record) if *votes && !record.voter => return Some(Change::Demote(*number)),
            Some(record) if !*votes && record.voter => {
                // Not before it has nearly all: a voter that is far behind stops every change.
                let at = standing.followers.get(number).copied().unwrap_or(0);
                if at > 0 && at + 200 >= standing.last {
                    return Some(Change::Promote(*number));
                }
            }
            Some(_) => {}
        }
    }
    records
        .iter()
        .find(|(number, record)| !record.removed && !standing.members.contains_key(number))
        .map(|(number, record)| Change::Add(*number, record.peer()))
}
