//! What commands do to the versions of the collective's keys, and to what is sealed under them.
//!
//! Once there is a version, nothing is taken any more that is sealed under an older one. So an older one only loses, and can be dropped by
//! whoever has seen that nothing is left under it.

use super::StoreError;
use super::apply::refused;
use super::command::{Outcome, Resealed, SealedIn};
use super::records::{
    ImageRecord, InviteRecord, KeyVersion, KeysRecord, MemberRecord, NodeRecord, ProfileRecord, WrappedKey,
};
use super::tables::{self, Table, Write};
use crate::secrets::SealedSecret;
use moor_api::ids::MemberId;
use moor_api::problem::Code;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};

/// The record, in the table of the collective.
pub(super) const RECORD: &str = "keys";
/// Versions that something may be under at a time.
const MAX_VERSIONS: usize = 16;
/// Secrets that one command seals anew.
pub(crate) const MAX_RESEALED: usize = 64;

/// The versions, while they change.
pub(super) fn of(write: &Write<'_>) -> Result<KeysRecord, StoreError> {
    Ok(write.get(tables::SITE, RECORD)?.unwrap_or_default())
}

pub(super) fn put(write: &Write<'_>, keys: &KeysRecord) -> Result<(), StoreError> {
    write.put(tables::SITE, RECORD, keys)
}

/// Refuses what is sealed under another version than the current one.
pub(super) fn outdated<'a>(
    write: &Write<'_>,
    mut sealed: impl Iterator<Item = &'a SealedSecret>,
) -> Result<Option<Outcome>, StoreError> {
    let current = of(write)?.current();
    let is_other = |secret: &SealedSecret| current.is_some_and(|current| secret.key_version() != current);
    let detail = "the collective's keys were rotated meanwhile, and nothing was changed: try again";
    Ok(sealed.any(is_other).then(|| refused(Code::Conflict, detail)))
}

/// Adds a version. It has to be for those who are members, and for nobody else.
pub(super) fn rotate(write: &Write<'_>, new: KeyVersion) -> Result<Outcome, StoreError> {
    let mut keys = of(write)?;
    let next = keys.current().unwrap_or(0) + 1;
    if new.version != next {
        return Ok(refused(Code::Conflict, format!("the next version of the keys is {next}, not {}", new.version)));
    }
    let members = write.all::<MemberRecord>(tables::MEMBERS)?.into_iter().filter(|member| !member.removed);
    if !members.map(|member| member.id).collect::<BTreeSet<_>>().iter().eq(new.wrapped.keys()) {
        return Ok(refused(Code::Conflict, "members came or went while the keys were rotated: try again"));
    }
    if keys.versions.len() >= MAX_VERSIONS {
        let detail = format!(
            "secrets are under {MAX_VERSIONS} versions of the keys: wait until they are sealed anew, and see to those that do not open \
             (`moor collective show`)"
        );
        return Ok(refused(Code::Conflict, detail));
    }
    keys.versions.push(new);
    put(write, &keys)?;
    Ok(Outcome::Number(next.into()))
}

/// Drops a version that nothing is under any more.
pub(super) fn drop_version(write: &Write<'_>, version: u32) -> Result<Outcome, StoreError> {
    let mut keys = of(write)?;
    if keys.current() == Some(version) {
        return Ok(refused(Code::Conflict, format!("version {version} of the keys is the current one")));
    }
    keys.versions.retain(|kept| kept.version != version);
    put(write, &keys)?;
    Ok(Outcome::Done)
}

/// Whether these are all versions that a member has, for one that comes. Who went on alone may have left some that nobody has any more.
pub(super) fn are_all(write: &Write<'_>, wrapped: &[(u32, WrappedKey)]) -> Result<bool, StoreError> {
    let members = write.all::<MemberRecord>(tables::MEMBERS)?.into_iter().filter(|member| !member.removed);
    let members: BTreeSet<MemberId> = members.map(|member| member.id).collect();
    let (keys, given) = (of(write)?, wrapped.iter().map(|(version, _)| *version));
    let held = keys.versions.iter().filter(|version| version.wrapped.keys().any(|id| members.contains(id)));
    Ok(held.map(|version| version.version).eq(given))
}

/// Gives them to it.
pub(super) fn admit(write: &Write<'_>, member: MemberId, wrapped: Vec<(u32, WrappedKey)>) -> Result<(), StoreError> {
    let (mut keys, mut given) = (of(write)?, wrapped.into_iter().collect::<BTreeMap<_, _>>());
    for version in &mut keys.versions {
        if let Some(wrapped) = given.remove(&version.version) {
            version.wrapped.insert(member, wrapped);
        }
    }
    put(write, &keys)
}

/// Replaces secrets by the same under the current version; those that were changed meanwhile stay as they are.
pub(super) fn reseal(write: &Write<'_>, secrets: Vec<Resealed>) -> Result<Outcome, StoreError> {
    if secrets.len() > MAX_RESEALED {
        return Ok(refused(Code::BadRequest, format!("more than {MAX_RESEALED} secrets at a time")));
    }
    if let Some(refusal) = outdated(write, secrets.iter().map(|secret| &secret.after))? {
        return Ok(refusal);
    }
    let mut count = 0;
    for secret in secrets {
        let field = secret.field.clone();
        let is_done = match secret.within {
            SealedIn::Nodes => swap::<NodeRecord>(write, tables::NODES, secret, |node| node.secrets.get_mut(&field)),
            SealedIn::Images => swap::<ImageRecord>(write, tables::IMAGES, secret, |image| image.key.as_mut()),
            SealedIn::Profiles => swap::<ProfileRecord>(write, tables::PROFILES, secret, |profile| {
                profile.manifest.private.get_mut(&field)
            }),
            SealedIn::Generations => swap::<ProfileRecord>(write, tables::GENERATIONS, secret, |profile| {
                profile.manifest.private.get_mut(&field)
            }),
            SealedIn::Invites => {
                swap::<InviteRecord>(write, tables::INVITES, secret, |invite| Some(&mut invite.secret))
            }
        };
        count += u64::from(is_done?);
    }
    Ok(Outcome::Number(count))
}

fn swap<T: Serialize + DeserializeOwned>(
    write: &Write<'_>,
    table: Table,
    secret: Resealed,
    find: impl FnOnce(&mut T) -> Option<&mut SealedSecret>,
) -> Result<bool, StoreError> {
    let Some(mut record) = write.get::<T>(table, &secret.key)? else { return Ok(false) };
    let Some(found) = find(&mut record).filter(|found| **found == secret.before) else { return Ok(false) };
    *found = secret.after;
    write.put(table, &secret.key, &record)?;
    Ok(true)
}
