//! What commands do to the records of the X.509 authorities, and who has acknowledged them. Those of SSH are in [`ssh`].
//!
//! One takes the place of another in three steps. *Rotated*: the new one is beside the old one, and the trust bundle has both; members' certificates
//! are from the old one, so that whoever trusts only that is not cut off. *Retiring*: all have acknowledged that bundle, and members change to
//! certificates from the new one. *Dropped*: no member shows one from the old one any more, and the trust bundle has the new one alone.

pub mod ssh;

use super::StoreError;
use super::apply::refused;
use super::command::{Command, Outcome};
use super::level::{self, Level};
use super::members;
use super::records::{MemberRecord, NodeRecord, SiteRecord, WrappedKey};
use super::tables::{self, Snapshot, Write};
use moor_api::ids::{BootId, MemberId, NodeId};
use moor_api::problem::Code;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The record, in the table of the collective. It is made by the first rotation: before it there is the authority that the collective began with.
const RECORD: &str = "authorities";
/// The counter of numbers that authorities had which are in no record: those that members of before may have given when the collective began
/// anew, and those that were cancelled.
const GIVEN: &str = "authority";
/// What nodes say that one command writes down.
pub(crate) const MAX_SAID: usize = 256;
/// Names that a refusal has in it.
const MAX_NAMES: usize = 20;

/// An X.509 authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRecord {
    /// Counts from 1 on; never given twice.
    pub number: u32,
    /// Root certificate, PEM.
    pub root: String,
    /// When it was made, Unix seconds.
    pub made: u64,
    /// The first version of the trust bundle that has it; set when it is added.
    pub since: u64,
    /// Its files, encrypted to each member of then. Empty for the first: who joins gets it from the one that lets it in.
    #[serde(default)]
    pub wrapped: BTreeMap<MemberId, WrappedKey>,
    /// Members' certificates are not to be from it any more.
    #[serde(default)]
    pub retiring: bool,
}

/// All that are trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthoritiesRecord {
    /// Oldest first.
    pub list: Vec<AuthorityRecord>,
}

impl AuthoritiesRecord {
    /// The one that members' certificates are to be from.
    #[must_use]
    pub fn issuing(&self) -> Option<&AuthorityRecord> {
        self.list.iter().find(|authority| !authority.retiring)
    }
}

/// Which version of the trust bundle a node has, and which of the SSH authorities, as it said itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTrust {
    /// In which boot.
    pub boot: BootId,
    /// The oldest that it said in this boot: what its boot payload has.
    pub began: u64,
    /// The newest.
    pub now: u64,
    /// The newest version of the SSH authorities; 0: it said none. From [`Level::SSH_AUTHORITIES`] on.
    #[serde(default, skip_serializing_if = "is_none")]
    pub ssh: u64,
}

/// Nothing is written then, as before there was such a version.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_none(version: &u64) -> bool {
    *version == 0
}

impl NodeTrust {
    /// With what it said besides, in whatever order that came. A later boot is another matter.
    #[must_use]
    pub fn and(self, said: Self) -> Self {
        if self.boot != said.boot {
            return said;
        }
        Self {
            boot: self.boot,
            began: self.began.min(said.began),
            now: self.now.max(said.now),
            ssh: self.ssh.max(said.ssh),
        }
    }
}

/// What a node said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Which node.
    pub node: NodeId,
    /// What.
    pub trust: NodeTrust,
}

impl NodeRecord {
    /// Whether it may have to be told of version `version` of the trust bundle still. A machine that was never bound has nothing to be told.
    #[must_use]
    pub fn is_behind(&self, version: u64) -> bool {
        version > 1 && self.identity.is_some() && self.trust.is_none_or(|trust| trust.now < version)
    }

    /// A boot begins. What was said in another one is over: this one may have begun with older boot files.
    pub(super) fn forget_trust(&mut self, boot: BootId) {
        self.trust = self.trust.filter(|trust| trust.boot == boot);
    }
}

/// A change of the authorities. Variants and fields are only ever added.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "authority")]
pub enum AuthorityChange {
    /// A new one beside the one in use; the outcome is the version of the trust bundle.
    Rotate {
        /// The one that the collective began with, where no record has it yet.
        first: Option<AuthorityRecord>,
        /// The new one, for those who are members.
        new: AuthorityRecord,
    },
    /// Members' certificates are from the next one from now on.
    Retire {
        /// The one that they were from.
        number: u32,
        /// The version of the trust bundle that all have acknowledged.
        version: u64,
        /// Nodes that have not, and are left behind.
        left: BTreeSet<NodeId>,
    },
    /// One that was retired is trusted no more: no member shows a certificate from it. The outcome is the version of the trust bundle.
    Drop {
        /// Which.
        number: u32,
    },
    /// One that nothing is from yet is not wanted. The outcome is the version of the trust bundle. From [`Level::INCARNATIONS`] on.
    Cancel {
        /// Which.
        number: u32,
    },
    /// A member has taken up a version of the trust bundle.
    TakeUp {
        /// Which member.
        number: u64,
        /// The version.
        trust: u64,
        /// The authority that its certificate is from.
        shows: u32,
    },
    /// Nodes say which version of the trust bundle they have.
    Said {
        /// A bounded number of them.
        nodes: Vec<Said>,
    },
    /// What becomes of those of SSH.
    Ssh {
        /// What.
        change: ssh::SshChange,
    },
}

impl AuthorityChange {
    /// Its kind, for logs.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Rotate { .. } => "rotate-authority",
            Self::Retire { .. } => "retire-authority",
            Self::Drop { .. } => "drop-authority",
            Self::Cancel { .. } => "cancel-authority",
            Self::TakeUp { .. } => "take-up-authority",
            Self::Said { .. } => "authority-acknowledged",
            Self::Ssh { change } => change.kind(),
        }
    }

    /// What a release has to know to apply it.
    #[must_use]
    pub fn level(&self) -> Level {
        match self {
            Self::Cancel { .. } => Level::INCARNATIONS,
            Self::Ssh { .. } => Level::SSH_AUTHORITIES,
            Self::Said { nodes } if nodes.iter().any(|said| said.trust.ssh != 0) => Level::SSH_AUTHORITIES,
            _ => Level::AUTHORITIES,
        }
    }
}

impl From<AuthorityChange> for Command {
    fn from(change: AuthorityChange) -> Self {
        Self::Authorities { change }
    }
}

/// Applies one.
pub(super) fn apply(write: &Write<'_>, change: AuthorityChange) -> Result<Outcome, StoreError> {
    match change {
        AuthorityChange::Rotate { first, new } => rotate(write, first, new),
        AuthorityChange::Retire { number, version, left } => retire(write, number, version, &left),
        AuthorityChange::Drop { number } => drop_retired(write, number),
        AuthorityChange::Cancel { number } => cancel(write, number),
        AuthorityChange::TakeUp { number, trust, shows } => members::change(write, number, |member| {
            member.trust = trust;
            member.shows = shows;
        }),
        AuthorityChange::Said { nodes } => said(write, &nodes),
        AuthorityChange::Ssh { change } => ssh::apply(write, change),
    }
}

/// At most so many of these names that a line can be read, and how many there are.
#[must_use]
pub fn named(names: &[String]) -> String {
    let shown = names.iter().take(MAX_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > MAX_NAMES { format!("{shown} and {} more", names.len() - MAX_NAMES) } else { shown }
}

impl Snapshot {
    /// The authorities and the version of the trust bundle, once one was rotated.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn authorities(&self) -> Result<Option<(u64, AuthoritiesRecord)>, StoreError> {
        let record = self.get::<AuthoritiesRecord>(tables::SITE, RECORD)?;
        Ok(record.zip(self.site()?).map(|(record, site)| (site.bundle_version, record)))
    }

    /// The number of the next authority, which none has or had. `None`: there are no more.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn next_authority(&self) -> Result<Option<u32>, StoreError> {
        let record = self.get::<AuthoritiesRecord>(tables::SITE, RECORD)?;
        Ok(next_number(record.as_ref(), self.get(tables::COUNTERS, GIVEN)?))
    }
}

fn get(write: &Write<'_>) -> Result<Option<AuthoritiesRecord>, StoreError> {
    write.get(tables::SITE, RECORD)
}

fn site(write: &Write<'_>) -> Result<Option<SiteRecord>, StoreError> {
    write.get(tables::SITE, "site")
}

/// Writes the record, and the collective with a new version of the trust bundle; returns that.
fn renew(write: &Write<'_>, mut site: SiteRecord, record: &AuthoritiesRecord) -> Result<Outcome, StoreError> {
    site.bundle_version += 1;
    write.put(tables::SITE, RECORD, record)?;
    write.put(tables::SITE, "site", &site)?;
    Ok(Outcome::Number(site.bundle_version))
}

fn none() -> Outcome {
    refused(Code::Conflict, "the authorities were changed meanwhile: `moor authority show`")
}

/// The version of the trust bundle that members take up: before the first rotation there is one in each incarnation.
pub(super) fn version(write: &Write<'_>) -> Result<u64, StoreError> {
    let is_rotated = get(write)?.is_some();
    let site = site(write)?.filter(|site| is_rotated || !site.incarnation.is_first());
    Ok(site.map_or(1, |site| site.bundle_version))
}

/// The highest number that an authority may have or have had.
fn highest(record: Option<&AuthoritiesRecord>, given: Option<u64>) -> u64 {
    let newest = record.and_then(|record| record.list.last()).map_or(1, |authority| authority.number);
    given.unwrap_or(0).max(newest.into())
}

fn next_number(record: Option<&AuthoritiesRecord>, given: Option<u64>) -> Option<u32> {
    highest(record, given).checked_add(1)?.try_into().ok()
}

/// A collective of one begins anew. After the backup, or by members that are lost, authorities may have been made that nothing is known of here, and
/// nodes have acknowledged their trust bundles: what comes now has a number and a version that are `jump` beyond. What was retired goes: no
/// other member shows a certificate from it any more, and this one may have removed its keys. Who trusts the new bundle believes no member of
/// before, although those have the same authorities: it is of another incarnation.
pub(super) fn begin_anew(write: &Write<'_>, jump: u64) -> Result<(), StoreError> {
    let record = get(write)?;
    let given = highest(record.as_ref(), write.get(tables::COUNTERS, GIVEN)?) + jump;
    write.put(tables::COUNTERS, GIVEN, &given)?;
    if let Some(mut site) = site(write)? {
        site.bundle_version += jump;
        site.incarnation = site.incarnation.next();
        write.put(tables::SITE, "site", &site)?;
        level::lift(write, Level::INCARNATIONS)?;
    }
    if let Some(mut record) = record {
        record.list.retain(|authority| !authority.retiring);
        write.put(tables::SITE, RECORD, &record)?;
    }
    ssh::begin_anew(write, jump)
}

/// Authorities, by their numbers, whose keys there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyed {
    /// Those of certificates.
    pub x509: Vec<u32>,
    /// Those of hosts.
    pub host: Vec<u32>,
    /// Those of users.
    pub user: Vec<u32>,
}

/// The records without the authorities whose keys are not there, which nobody can take up: a member that is killed may have dropped one, and removed
/// its keys, and have tables of before that. Without a record there is the first.
///
/// # Errors
/// [`StoreError::NoAuthority`].
fn with_keys(mut record: Option<AuthoritiesRecord>, numbers: &[u32]) -> Result<Option<AuthoritiesRecord>, StoreError> {
    let has_any = match &mut record {
        Some(record) => {
            record.list.retain(|authority| numbers.contains(&authority.number));
            record.issuing().is_some()
        }
        None => numbers.contains(&1),
    };
    if has_any { Ok(record) } else { Err(StoreError::NoAuthority) }
}

/// Leaves the authorities in the records whose keys there are, in tables that come from elsewhere.
///
/// # Errors
/// Certificates could be from none of them; the database is damaged.
pub(super) fn leave_keyed(write: &Write<'_>, keyed: &Keyed) -> Result<(), StoreError> {
    let before = get(write)?;
    let after = with_keys(before.clone(), &keyed.x509)?;
    if let Some(record) = after.filter(|record| before.as_ref() != Some(record)) {
        // Members and nodes may have it still: no other one is to have its number.
        let given = highest(before.as_ref(), write.get(tables::COUNTERS, GIVEN)?);
        write.put(tables::COUNTERS, GIVEN, &given)?;
        write.put(tables::SITE, RECORD, &record)?;
    }
    ssh::leave_keyed(write, keyed)
}

impl Snapshot {
    /// Whether these tables can be restored with the keys of these authorities.
    ///
    /// # Errors
    /// They cannot; the database is damaged.
    pub fn check_keyed(&self, keyed: &Keyed) -> Result<(), StoreError> {
        let record = self.get::<AuthoritiesRecord>(tables::SITE, RECORD)?;
        with_keys(record, &keyed.x509)?;
        ssh::with_keys(self.ssh_authorities()?.1, keyed).map(drop)
    }
}

/// Adds one. `first` is the one that the collective began with, where there is no record yet.
fn rotate(write: &Write<'_>, first: Option<AuthorityRecord>, mut new: AuthorityRecord) -> Result<Outcome, StoreError> {
    let Some(site) = site(write)? else { return Ok(none()) };
    let record = get(write)?;
    let number = next_number(record.as_ref(), write.get(tables::COUNTERS, GIVEN)?);
    let list = match (record, first) {
        (Some(record), _) => record.list,
        (None, Some(first)) if first.number == 1 => vec![first],
        (None, _) => return Ok(none()),
    };
    if let [old, new] = &list[..] {
        return Ok(refused(
            Code::Conflict,
            format!(
                "authority {} is beside authority {} already: `moor authority retire` lets it take over, `moor authority cancel` takes it back",
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
    new.since = site.bundle_version + 1;
    renew(write, site, &AuthoritiesRecord { list: [list, vec![new]].concat() })
}

/// Members that have not taken up this version of the trust bundle.
#[must_use]
pub fn members_behind<'a>(members: impl IntoIterator<Item = &'a MemberRecord>, version: u64) -> Vec<String> {
    let behind = members.into_iter().filter(|member| !member.removed && member.trust < version);
    behind.map(|member| member.name.clone()).collect()
}

/// Members' certificates are from the next authority from now on. All have to have acknowledged `version` of the trust bundle, which has
/// both, except for the nodes `left`.
fn retire(write: &Write<'_>, number: u32, version: u64, left: &BTreeSet<NodeId>) -> Result<Outcome, StoreError> {
    let (Some(mut record), Some(site)) = (get(write)?, site(write)?) else { return Ok(none()) };
    let is_so = matches!(&record.list[..], [old, _] if old.number == number && !old.retiring);
    if !is_so || site.bundle_version != version {
        return Ok(none());
    }
    let members = members_behind(&members::present(write)?, version);
    if !members.is_empty() {
        return Ok(refused(
            Code::Conflict,
            format!(
                "these members have not taken up trust bundle {version}, and would be cut off: {}: start them, or take out who is gone for \
                 good (`moor collective remove`)",
                named(&members)
            ),
        ));
    }
    let nodes = write.all::<NodeRecord>(tables::NODES)?;
    let behind: Vec<String> = nodes
        .iter()
        .filter(|node| node.is_behind(version) && !left.contains(&node.id))
        .map(|node| node.name.to_string())
        .collect();
    if !behind.is_empty() {
        return Ok(refused(
            Code::Conflict,
            format!(
                "these nodes have not acknowledged trust bundle {version}, and would trust no member any more: {}: they do within a minute \
                 once they run; `--force` leaves them behind",
                named(&behind)
            ),
        ));
    }
    record.list[0].retiring = true;
    write.put(tables::SITE, RECORD, &record)?;
    Ok(Outcome::Done)
}

/// Members that do not show a certificate from authority `number` or a later one.
#[must_use]
pub fn showing_older<'a>(members: impl IntoIterator<Item = &'a MemberRecord>, number: u32) -> Vec<String> {
    let older = members.into_iter().filter(|member| !member.removed && member.shows < number);
    older.map(|member| member.name.clone()).collect()
}

/// Trusts an authority no more that no member shows a certificate from.
fn drop_retired(write: &Write<'_>, number: u32) -> Result<Outcome, StoreError> {
    let (Some(mut record), Some(site)) = (get(write)?, site(write)?) else { return Ok(none()) };
    let next = match &record.list[..] {
        [old, next] if old.number == number && old.retiring => next.number,
        _ => return Ok(none()),
    };
    let older = showing_older(&members::present(write)?, next);
    if !older.is_empty() {
        return Ok(refused(
            Code::Conflict,
            format!("these members show certificates from authority {number} still: {}", named(&older)),
        ));
    }
    record.list.remove(0);
    renew(write, site, &record)
}

/// Takes back a rotation. As long as nothing is from the new authority, nobody needs to trust it.
fn cancel(write: &Write<'_>, number: u32) -> Result<Outcome, StoreError> {
    let (Some(mut record), Some(site)) = (get(write)?, site(write)?) else { return Ok(none()) };
    if !matches!(&record.list[..], [old, new] if new.number == number && !old.retiring) {
        return Ok(none());
    }
    // Members and nodes may have it still: no other one is to have its number.
    let given = highest(Some(&record), write.get(tables::COUNTERS, GIVEN)?);
    write.put(tables::COUNTERS, GIVEN, &given)?;
    record.list.truncate(1);
    renew(write, site, &record)
}

/// Writes down what nodes said; those that are gone say nothing any more.
fn said(write: &Write<'_>, nodes: &[Said]) -> Result<Outcome, StoreError> {
    if nodes.len() > MAX_SAID {
        return Ok(refused(Code::BadRequest, format!("more than {MAX_SAID} nodes at a time")));
    }
    let newest = site(write)?.map_or(1, |site| site.bundle_version);
    for Said { node, trust } in nodes {
        let Some(mut record) = super::apply::node(write, *node)? else { continue };
        // It may come after the node has begun another boot.
        if record.boots.last().is_some_and(|newest| newest.boot != trust.boot) {
            continue;
        }
        // Nobody has a version that there is not.
        let trust = ssh::bounded(write, NodeTrust { now: trust.now.min(newest), ..*trust })?;
        record.trust = Some(record.trust.map_or(trust, |before| before.and(trust)));
        super::apply::put_node(write, &record)?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests;
