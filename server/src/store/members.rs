//! What commands do to the records of members.

use super::apply::{next, ordered_key, refused};
use super::command::Outcome;
use super::level::{self, Level};
use super::records::{InviteRecord, KeysRecord, MemberRecord, WrappedKey};
use super::tables::{self, Write};
use super::{StoreError, authorities, keys};
use moor_api::ids::MemberId;
use moor_api::node::Base64;
use moor_api::problem::Code;
use uuid::Uuid;

/// Invitations that may wait at a time.
const MAX_INVITES: u64 = 64;

fn get(write: &Write<'_>, number: u64) -> Result<Option<MemberRecord>, StoreError> {
    write.get(tables::MEMBERS, &ordered_key(number))
}

fn put(write: &Write<'_>, number: u64, member: &MemberRecord) -> Result<(), StoreError> {
    write.put(tables::MEMBERS, &ordered_key(number), member)
}

fn none(number: u64) -> Outcome {
    refused(Code::NotFound, format!("there is no member {number}: `moor collective show` lists them"))
}

/// Numbers and records of the members that are present.
pub(super) fn present(write: &Write<'_>) -> Result<Vec<MemberRecord>, StoreError> {
    Ok(write.all::<MemberRecord>(tables::MEMBERS)?.into_iter().filter(|member| !member.removed).collect())
}

/// The id of a member that is to be replaced: its name may be the new one's.
fn named_as(write: &Write<'_>, number: Option<u64>) -> Result<Option<MemberId>, StoreError> {
    Ok(number.map(|number| get(write, number)).transpose()?.flatten().map(|record| record.id))
}

pub(super) fn found(write: &Write<'_>, founder: &MemberRecord) -> Result<Outcome, StoreError> {
    let number = next(write, "member")?;
    put(write, number, founder)?;
    Ok(Outcome::Number(number))
}

/// How far counters jump whose numbers may have been given out after a backup, or by members that are lost. They are never given twice.
pub(super) const JUMP: u64 = 1 << 20;

pub(super) fn anew(
    write: &Write<'_>,
    number: u64,
    member: &MemberRecord,
    keys: &KeysRecord,
) -> Result<Outcome, StoreError> {
    let last = write.get::<u64>(tables::COUNTERS, "member")?.unwrap_or(0);
    if number != last + 1 {
        return Ok(refused(Code::Conflict, format!("the next member is number {}, not {number}", last + 1)));
    }
    for (key, mut record) in write.pairs::<MemberRecord>(tables::MEMBERS)? {
        record.removed = true;
        write.put(tables::MEMBERS, &key, &record)?;
    }
    withdraw_invitations(write)?;
    for counter in ["epoch", "ssh-certificate"] {
        let value = write.get::<u64>(tables::COUNTERS, counter)?.unwrap_or(0);
        write.put(tables::COUNTERS, counter, &(value + JUMP))?;
    }
    authorities::begin_anew(write, JUMP)?;
    keys::put(write, keys)?;
    found(write, member)
}

/// Who was a member knows the secrets of those that wait, and could come by one.
fn withdraw_invitations(write: &Write<'_>) -> Result<(), StoreError> {
    for (key, _) in write.pairs::<InviteRecord>(tables::INVITES)? {
        write.remove(tables::INVITES, &key)?;
    }
    Ok(())
}

pub(super) fn invite(write: &Write<'_>, id: Uuid, invite: &InviteRecord, now: u64) -> Result<Outcome, StoreError> {
    for (key, old) in write.pairs::<InviteRecord>(tables::INVITES)? {
        if old.expires <= now {
            write.remove(tables::INVITES, &key)?;
        }
    }
    let replaced = named_as(write, invite.replaces)?;
    if present(write)?.iter().any(|member| member.name == invite.name && Some(member.id) != replaced) {
        return Ok(refused(
            Code::Conflict,
            format!("there is a member '{}' already: choose another name, or remove that one first", invite.name),
        ));
    }
    if write.count(tables::INVITES)? >= MAX_INVITES {
        return Ok(refused(
            Code::Conflict,
            format!("{MAX_INVITES} invitations wait already: wait until some expire, or use them"),
        ));
    }
    write.put(tables::INVITES, &id.to_string(), invite)?;
    Ok(Outcome::Done)
}

/// What a member that joins says of itself.
pub(super) struct Guest {
    pub(super) id: MemberId,
    pub(super) key: Base64,
    pub(super) unwrap: Base64,
    pub(super) keys: Vec<(u32, WrappedKey)>,
    pub(super) urls: Vec<String>,
    pub(super) level: Level,
    /// The version of the trust bundle that it was given.
    pub(super) trust: u64,
    /// The version of the SSH authorities.
    pub(super) ssh: u64,
}

/// Why a member of this level is none for the collective, if it is not.
fn too_old(write: &Write<'_>, known: Level) -> Result<Option<Outcome>, StoreError> {
    let refusal = level::check(level::of(write)?, known).err();
    Ok(refusal.map(|error| refused(Code::Conflict, error.to_string())))
}

/// A member runs another release.
pub(super) fn tell_level(write: &Write<'_>, number: u64, known: Level) -> Result<Outcome, StoreError> {
    match too_old(write, known)? {
        Some(refused) => Ok(refused),
        None => change(write, number, |member| member.level = known),
    }
}

pub(super) fn join(write: &Write<'_>, invite: Uuid, guest: Guest, now: u64) -> Result<Outcome, StoreError> {
    let Guest { id, key, unwrap, keys, urls, level, trust, ssh } = guest;
    // First: an invitation is not used up by it.
    if let Some(refused) = too_old(write, level)? {
        return Ok(refused);
    }
    if write.all::<MemberRecord>(tables::MEMBERS)?.iter().any(|record| record.invite == Some(invite)) {
        return Ok(refused(Code::Forbidden, "the invitation was used already: `moor collective invite` makes another"));
    }
    // Members are known by id and key: nobody comes under those that another one has or had.
    if write.all::<MemberRecord>(tables::MEMBERS)?.iter().any(|record| record.id == id || record.key == key) {
        return Ok(refused(Code::Conflict, "there is or was a member of this id or key: try again with new ones"));
    }
    let Some(found) = write.get::<InviteRecord>(tables::INVITES, &invite.to_string())? else {
        return Ok(refused(Code::Forbidden, "there is no such invitation: `moor collective invite` makes one"));
    };
    if found.expires <= now {
        write.remove(tables::INVITES, &invite.to_string())?;
        return Ok(refused(Code::Forbidden, "the invitation has expired: `moor collective invite` makes another"));
    }
    let replaced = named_as(write, found.replaces)?;
    if present(write)?.iter().any(|other| other.name == found.name && Some(other.id) != replaced) {
        return Ok(refused(Code::Conflict, format!("there is a member '{}' already", found.name)));
    }
    if !keys::are_all(write, &keys)? {
        return Ok(refused(Code::Conflict, "the collective's keys were rotated meanwhile: try again"));
    }
    // It would show a certificate, or trust one, from an authority that was dropped; and what is new is not encrypted to it.
    if authorities::version(write)? != trust || authorities::ssh::version(write)? != ssh {
        return Ok(refused(Code::Conflict, "the collective's authorities were rotated meanwhile: try again"));
    }
    write.remove(tables::INVITES, &invite.to_string())?;
    keys::admit(write, id, keys)?;
    let number = next(write, "member")?;
    let record = MemberRecord {
        id,
        key,
        unwrap,
        name: found.name,
        urls,
        voter: found.voter,
        invite: Some(invite),
        removed: false,
        replaces: found.replaces,
        level,
        near: Vec::new(),
        trust: 1,
        shows: 1,
    };
    put(write, number, &record)?;
    Ok(Outcome::Number(number))
}

pub(super) fn change(
    write: &Write<'_>,
    number: u64,
    edit: impl FnOnce(&mut MemberRecord),
) -> Result<Outcome, StoreError> {
    match get(write, number)? {
        Some(mut member) if !member.removed => {
            edit(&mut member);
            put(write, number, &member)?;
            Ok(Outcome::Done)
        }
        _ => Ok(none(number)),
    }
}

/// Somebody has to vote.
fn last_voter(write: &Write<'_>, number: u64) -> Result<bool, StoreError> {
    let voters = present(write)?.iter().filter(|member| member.voter).count();
    Ok(voters == 1 && get(write, number)?.is_some_and(|member| member.voter && !member.removed))
}

pub(super) fn set_voter(write: &Write<'_>, number: u64, voter: bool) -> Result<Outcome, StoreError> {
    if !voter && last_voter(write, number)? {
        return Ok(refused(Code::Conflict, "it is the only member that votes: promote another one first"));
    }
    change(write, number, |member| member.voter = voter)
}

pub(super) fn remove(write: &Write<'_>, number: u64) -> Result<Outcome, StoreError> {
    if last_voter(write, number)? {
        return Ok(refused(Code::Conflict, "it is the only member that votes: promote another one first"));
    }
    let removed = change(write, number, |member| member.removed = true)?;
    if removed == Outcome::Done {
        withdraw_invitations(write)?;
    }
    Ok(removed)
}
