//! What commands do to the records of the SSH authorities, and which nodes have taken them up.
//!
//! There is one of hosts and one of users, and one version, which grows with each change of either. A node has taken a version up once it trusts the
//! authorities of it and its host certificates are from the host authority of it. *Rotated*: the new one is beside the old one, nodes trust
//! both, and certificates of hosts are from the old one. *Retired*: all nodes have taken that up; of users, the old one is trusted no
//! more. Of hosts, certificates are from the new one now, and the old one is trusted until it is *dropped*: once all nodes have such certificates.

use super::refused;
use super::{Keyed, NodeTrust, named};
use crate::store::StoreError;
use crate::store::command::Outcome;
use crate::store::level::{self, Level};
use crate::store::members;
use crate::store::records::{NodeRecord, WrappedKey};
use crate::store::tables::{self, Snapshot, Write};
use moor_api::admin::SshRole;
use moor_api::ids::{MemberId, NodeId};
use moor_api::problem::Code;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The record, in the table of the collective. It is made by the first rotation: before it there are those that the collective began with.
const RECORD: &str = "ssh-authorities";
/// The counter of a collective that began anew: members of before may have given numbers and versions up to this one.
const GIVEN: &str = "ssh-authority";

/// An SSH authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAuthorityRecord {
    /// Counts from 1 on, for each role; never given twice.
    pub number: u32,
    /// `ssh-ed25519 …` line of the public half.
    pub public: String,
    /// When it was made, Unix seconds.
    pub made: u64,
    /// The first version that has it; set when it is added.
    pub since: u64,
    /// Its private half, encrypted to each member of then. Empty for the first: who joins gets it from the one that lets it in.
    #[serde(default)]
    pub wrapped: BTreeMap<MemberId, WrappedKey>,
    /// The first version from which on no host's certificate is from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<u64>,
    /// Nodes that nobody waits for before it is dropped.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left: BTreeSet<NodeId>,
}

/// All that are trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAuthoritiesRecord {
    /// Grows with each change.
    pub version: u64,
    /// Of hosts, oldest first.
    pub host: Vec<SshAuthorityRecord>,
    /// Of users, oldest first.
    pub user: Vec<SshAuthorityRecord>,
}

impl SshAuthoritiesRecord {
    /// Those of a role, oldest first.
    #[must_use]
    pub fn of(&self, role: SshRole) -> &[SshAuthorityRecord] {
        match role {
            SshRole::Host => &self.host,
            SshRole::User => &self.user,
        }
    }

    fn of_mut(&mut self, role: SshRole) -> &mut Vec<SshAuthorityRecord> {
        match role {
            SshRole::Host => &mut self.host,
            SshRole::User => &mut self.user,
        }
    }

    /// The one that certificates of hosts are to be from.
    #[must_use]
    pub fn signing(&self) -> Option<&SshAuthorityRecord> {
        self.host.iter().find(|authority| authority.retired.is_none())
    }

    fn highest(&self) -> u64 {
        let numbers = self.host.iter().chain(&self.user).map(|authority| authority.number.into());
        numbers.fold(self.version, u64::max)
    }
}

impl NodeRecord {
    /// Whether it may have to be told of version `version` of the SSH authorities still. A machine that was never bound has nothing to be told.
    #[must_use]
    pub fn is_behind_ssh(&self, version: u64) -> bool {
        version > 1 && self.identity.is_some() && self.trust.is_none_or(|trust| trust.ssh < version)
    }
}

/// A change of the SSH authorities. Variants and fields are only ever added.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ssh")]
pub enum SshChange {
    /// A new one beside the one in use; the outcome is the version.
    Rotate {
        /// Of what.
        role: SshRole,
        /// Those that the collective began with, where no record has them yet.
        first: Option<SshAuthoritiesRecord>,
        /// The new one, for those who are members.
        new: SshAuthorityRecord,
    },
    /// The next one takes over; the outcome is the version.
    Retire {
        /// Of what.
        role: SshRole,
        /// The one that is retired.
        number: u32,
        /// Nodes that have not acknowledged, and are left behind.
        left: BTreeSet<NodeId>,
    },
    /// The host authority that was retired is trusted no more: no node that is waited for has a certificate from it. The outcome is the version.
    Drop {
        /// Which.
        number: u32,
    },
}

impl SshChange {
    /// Its kind, for logs.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Rotate { .. } => "rotate-ssh-authority",
            Self::Retire { .. } => "retire-ssh-authority",
            Self::Drop { .. } => "drop-ssh-authority",
        }
    }
}

/// Applies one.
pub(super) fn apply(write: &Write<'_>, change: SshChange) -> Result<Outcome, StoreError> {
    match change {
        SshChange::Rotate { role, first, new } => rotate(write, role, first, new),
        SshChange::Retire { role, number, left } => retire(write, role, number, left),
        SshChange::Drop { number } => drop_retired(write, number),
    }
}

impl Snapshot {
    /// The SSH authorities, once one was rotated; and their version.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn ssh_authorities(&self) -> Result<(u64, Option<SshAuthoritiesRecord>), StoreError> {
        let record = self.get::<SshAuthoritiesRecord>(tables::SITE, RECORD)?;
        let version = match &record {
            Some(record) => record.version,
            // Nodes may have taken up what was made after a backup. Members of older releases do not know what they are told here.
            None if self.level()? >= Level::SSH_AUTHORITIES => self.get(tables::COUNTERS, GIVEN)?.unwrap_or(1),
            None => 1,
        };
        Ok((version, record))
    }

    /// The number of the next authority of this role, which none has or had. `None`: there are no more.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn next_ssh_authority(&self, role: SshRole) -> Result<Option<u32>, StoreError> {
        let record = self.get::<SshAuthoritiesRecord>(tables::SITE, RECORD)?;
        Ok(next_number(record.as_ref(), role, self.get(tables::COUNTERS, GIVEN)?))
    }
}

fn get(write: &Write<'_>) -> Result<Option<SshAuthoritiesRecord>, StoreError> {
    write.get(tables::SITE, RECORD)
}

fn none() -> Outcome {
    refused(Code::Conflict, "the SSH authorities were changed meanwhile: `moor authority show`")
}

/// Writes the record with the next version; returns that.
fn renew(write: &Write<'_>, mut record: SshAuthoritiesRecord) -> Result<Outcome, StoreError> {
    record.version += 1;
    write.put(tables::SITE, RECORD, &record)?;
    Ok(Outcome::Number(record.version))
}

fn next_number(record: Option<&SshAuthoritiesRecord>, role: SshRole, given: Option<u64>) -> Option<u32> {
    let newest = record.and_then(|record| record.of(role).last()).map_or(1, |authority| authority.number);
    given.unwrap_or(0).max(newest.into()).checked_add(1)?.try_into().ok()
}

/// What a member that joins has to have been given: 1 before the first rotation.
pub(in crate::store) fn version(write: &Write<'_>) -> Result<u64, StoreError> {
    Ok(get(write)?.map_or(1, |record| record.version))
}

/// As the X.509 authorities do: see [`super::begin_anew`]. All nodes have to acknowledge anew. A host authority that was retired stays until they
/// have, as ever: hosts show certificates from it, and users believe them.
pub(super) fn begin_anew(write: &Write<'_>, jump: u64) -> Result<(), StoreError> {
    let record = get(write)?;
    let before = write.get::<u64>(tables::COUNTERS, GIVEN)?.unwrap_or(0);
    let given = record.as_ref().map_or(1, SshAuthoritiesRecord::highest).max(before) + jump;
    write.put(tables::COUNTERS, GIVEN, &given)?;
    if let Some(mut record) = record {
        record.version = given;
        for authority in record.host.iter_mut().chain(&mut record.user) {
            authority.since = given;
            authority.retired = authority.retired.map(|_| given);
        }
        write.put(tables::SITE, RECORD, &record)?;
    }
    Ok(())
}

/// As for X.509: see [`super::with_keys`].
///
/// # Errors
/// [`StoreError::NoAuthority`].
pub(super) fn with_keys(
    mut record: Option<SshAuthoritiesRecord>,
    keyed: &Keyed,
) -> Result<Option<SshAuthoritiesRecord>, StoreError> {
    let has_any = match &mut record {
        Some(record) => {
            record.host.retain(|authority| keyed.host.contains(&authority.number));
            record.user.retain(|authority| keyed.user.contains(&authority.number));
            record.signing().is_some() && !record.user.is_empty()
        }
        None => keyed.host.contains(&1) && keyed.user.contains(&1),
    };
    if has_any { Ok(record) } else { Err(StoreError::NoAuthority) }
}

/// As for X.509: see [`super::leave_keyed`].
pub(super) fn leave_keyed(write: &Write<'_>, keyed: &Keyed) -> Result<(), StoreError> {
    let before = get(write)?;
    let after = with_keys(before.clone(), keyed)?;
    put_left(write, before, after)
}

/// Takes the retired host authorities out of the records, of a member that goes on alone, whose keys it does not have: one that joined when they
/// were dropped elsewhere already.
pub(in crate::store) fn leave_retired(write: &Write<'_>, hosts: &[u32]) -> Result<(), StoreError> {
    let before = get(write)?;
    let after = before.clone().map(|mut record| {
        record.host.retain(|authority| authority.retired.is_none() || hosts.contains(&authority.number));
        record
    });
    put_left(write, before, after)
}

/// Writes what is left of the record `before`, if that is less.
fn put_left(
    write: &Write<'_>,
    before: Option<SshAuthoritiesRecord>,
    after: Option<SshAuthoritiesRecord>,
) -> Result<(), StoreError> {
    if let (Some(before), Some(after)) = (before, after)
        && before != after
    {
        // No other one is to have their numbers.
        let given = write.get::<u64>(tables::COUNTERS, GIVEN)?.unwrap_or(0).max(before.highest());
        write.put(tables::COUNTERS, GIVEN, &given)?;
        write.put(tables::SITE, RECORD, &after)?;
    }
    Ok(())
}

/// Adds one. `first` are those that the collective began with, where there is no record yet.
fn rotate(
    write: &Write<'_>,
    role: SshRole,
    first: Option<SshAuthoritiesRecord>,
    mut new: SshAuthorityRecord,
) -> Result<Outcome, StoreError> {
    let record = get(write)?;
    let given = write.get(tables::COUNTERS, GIVEN)?;
    let number = next_number(record.as_ref(), role, given);
    let is_first = |list: &[SshAuthorityRecord]| matches!(list, [first] if first.number == 1);
    let mut record = match (record, first) {
        (Some(record), _) => record,
        (None, Some(first)) if is_first(&first.host) && is_first(&first.user) => {
            SshAuthoritiesRecord { version: given.unwrap_or(1), ..first }
        }
        (None, _) => return Ok(none()),
    };
    if let [old, new] = record.of(role) {
        return Ok(refused(
            Code::Conflict,
            format!(
                "SSH {role} authority {} is beside SSH {role} authority {} already: `moor authority retire ssh-{role}` lets it take over first",
                new.number, old.number
            ),
        ));
    }
    if number != Some(new.number) {
        return Ok(none());
    }
    // As with the collective's keys: for those who are members, and for nobody else.
    let members = members::present(write)?.into_iter().map(|member| member.id).collect::<BTreeSet<_>>();
    if !members.iter().eq(new.wrapped.keys()) {
        return Ok(refused(Code::Conflict, "members came or went while the authority was made: try again"));
    }
    new.since = record.version + 1;
    record.of_mut(role).push(new);
    renew(write, record)
}

/// Nodes, but for those `left`, that have not taken up version `version`.
#[must_use]
pub fn nodes_behind<'a>(
    nodes: impl IntoIterator<Item = &'a NodeRecord>,
    version: u64,
    left: &BTreeSet<NodeId>,
) -> Vec<String> {
    let behind = nodes.into_iter().filter(|node| node.is_behind_ssh(version) && !left.contains(&node.id));
    behind.map(|node| node.name.to_string()).collect()
}

/// Lets the next one take over. All nodes have to have acknowledged the version since which there is one, except for those `left`. For one
/// that is retired already, these nodes are not waited for either.
fn retire(write: &Write<'_>, role: SshRole, number: u32, left: BTreeSet<NodeId>) -> Result<Outcome, StoreError> {
    let Some(mut record) = get(write)? else { return Ok(none()) };
    let next = match record.of(role) {
        [old, next] if old.number == number => next.since,
        _ => return Ok(none()),
    };
    if role == SshRole::Host && record.host[0].retired.is_some() {
        record.host[0].left.extend(left);
        write.put(tables::SITE, RECORD, &record)?;
        return Ok(Outcome::Number(record.version));
    }
    let behind = nodes_behind(&write.all::<NodeRecord>(tables::NODES)?, next, &left);
    if !behind.is_empty() {
        return Ok(refused(
            Code::Conflict,
            format!(
                "these nodes have not acknowledged version {next} of the SSH authorities, and would not believe certificates from the new one: {}: \
                 they do within a minute once they run; `--force` leaves them behind",
                named(&behind)
            ),
        ));
    }
    match role {
        SshRole::User => {
            record.user.remove(0);
        }
        SshRole::Host => {
            record.host[0].retired = Some(record.version + 1);
            record.host[0].left = left;
        }
    }
    renew(write, record)
}

/// Trusts a host authority no more that no node which is waited for has a certificate from.
fn drop_retired(write: &Write<'_>, number: u32) -> Result<Outcome, StoreError> {
    let Some(mut record) = get(write)? else { return Ok(none()) };
    let (retired, left) = match &record.host[..] {
        [SshAuthorityRecord { number: old, retired: Some(retired), left, .. }, _] if *old == number => (*retired, left),
        _ => return Ok(none()),
    };
    let behind = nodes_behind(&write.all::<NodeRecord>(tables::NODES)?, retired, left);
    if !behind.is_empty() {
        return Ok(refused(
            Code::Conflict,
            format!("these nodes have certificates from SSH host authority {number} still: {}", named(&behind)),
        ));
    }
    record.host.remove(0);
    renew(write, record)
}

/// What a node said, as far as there is such a version.
pub(super) fn bounded(write: &Write<'_>, trust: NodeTrust) -> Result<NodeTrust, StoreError> {
    if trust.ssh <= 1 {
        return Ok(trust);
    }
    let newest = match get(write)? {
        Some(record) => record.version,
        None if level::of(write)? >= Level::SSH_AUTHORITIES => write.get(tables::COUNTERS, GIVEN)?.unwrap_or(1),
        None => 1,
    };
    Ok(NodeTrust { ssh: trust.ssh.min(newest), ..trust })
}

#[cfg(test)]
mod tests;
