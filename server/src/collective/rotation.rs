//! Rotation of the collective's keys: by an administrator, and by whoever leads once a member has a part in them that is none any more. What is
//! under an older version is then sealed anew, in bounded changes that leave alone what was changed meanwhile, and the older version goes.

use crate::secrets::{Place, Ring, SealedSecret, Version};
use crate::state::{Member, audit_entry};
use crate::store::command::{Resealed, SealedIn};
use crate::store::keys::MAX_RESEALED;
use crate::store::records::{InviteRecord, KeyVersion, ProfileRecord};
use crate::store::tables;
use crate::store::{Command, Outcome, Snapshot};
use anyhow::{Context as _, ensure};
use moor_api::ids::MemberId;
use moor_api::problem::{Code, Problem};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The keys are looked at this often: so late a member may be to refuse tokens of before.
const LOOK: Duration = Duration::from_millis(500);
/// What failed is tried again after this time.
const AGAIN: Duration = Duration::from_secs(10);
/// Members may come and go while a version is made: so often it is made anew.
const TRIES: u32 = 5;
/// Secrets that are looked for at a time, and characters of those that one change seals anew.
const PASS: usize = 10_000;
const BATCH: usize = 256 << 10;

/// Makes a new version of the keys, for those who are members; returns its number.
///
/// # Errors
/// No majority answers; so many versions are in use that first something has to be sealed anew.
pub(crate) async fn rotate(member: &Member) -> Result<u32, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        member.store.linearize().await?;
        let new =
            next(member).map_err(|error| Problem::new(Code::Internal, format!("rotating the keys: {error:#}")))?;
        let version = new.version;
        let entry = audit_entry("keys-rotated", &serde_json::json!({ "version": version }));
        let change = Box::new(Command::RotateKeys { new });
        match member.propose(Command::Audited { entry, change }).await {
            Ok(_) => {
                tracing::info!("the keys have version {version} from now on");
                return Ok(version);
            }
            Err(problem) if problem.code == Code::Conflict && tries < TRIES => {}
            Err(problem) => return Err(problem),
        }
    }
}

fn next(member: &Member) -> anyhow::Result<KeyVersion> {
    let view = member.view()?;
    let version = view.key_versions()?.current().unwrap_or(0) + 1;
    let members = view.members()?;
    let present = members.values().filter(|record| !record.removed);
    Version::draw()?.wrap_for(version, member.site.collective, present)
}

/// Keeps the keys at hand, and where this member leads, rotates and seals anew. Goes on for ever.
pub(super) async fn keep(member: &Arc<Member>) {
    let (mut said, mut not_before) = (String::new(), Instant::now());
    loop {
        let mut done = member.ring().map(drop);
        let standing = member.store.standing();
        if done.is_ok() && standing.leader == Some(standing.number) && Instant::now() >= not_before {
            done = step(member).await;
            if done.is_err() {
                not_before = Instant::now() + AGAIN;
            }
        }
        // A failure that lasts is said once.
        if let Err(error) = done {
            let text = format!("{error:#}");
            if text != said {
                tracing::error!("the collective's keys: {text}");
                said = text;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn step(member: &Arc<Member>) -> anyhow::Result<()> {
    let (record, members) = {
        let view = member.view()?;
        (view.key_versions()?, view.members()?)
    };
    let Some((current, older)) = record.versions.split_last() else { return Ok(()) };
    // Who is being removed may lead for a moment still, and would know the new keys: its successor draws them.
    if members.get(&member.identity.number).is_none_or(|own| own.removed) {
        return Ok(());
    }
    let is_member = |id: &MemberId| members.values().any(|member| member.id == *id && !member.removed);
    if !current.wrapped.keys().all(is_member) {
        rotate(member).await?;
        return Ok(());
    }
    if older.is_empty() {
        return Ok(());
    }
    let mut count = 0;
    loop {
        let reader = member.clone();
        let batches = tokio::task::spawn_blocking(move || sealed_anew(&reader)).await??;
        if batches.is_empty() {
            break;
        }
        let before = count;
        for secrets in batches {
            if let Outcome::Number(sealed) = member.propose(Command::Reseal { secrets }).await? {
                count += sealed;
            }
        }
        // What is left alone was changed, and is under the current version.
        ensure!(count > before || sealed_anew_is_done(member)?, "secrets are left under an older version");
    }
    for version in older {
        member.propose(Command::DropKeys { version: version.version }).await?;
    }
    tracing::info!("{count} secrets were sealed anew: nothing is under an older version than {}", current.version);
    Ok(())
}

fn sealed_anew_is_done(member: &Member) -> anyhow::Result<bool> {
    let view = member.view()?;
    let current = view.key_versions()?.current().unwrap_or(0);
    Ok(older_than(&view, current)?.is_empty())
}

/// A secret, where it is, and what it is bound to.
struct Old {
    within: SealedIn,
    key: String,
    field: String,
    /// Table and record of its place.
    place: (&'static str, String),
    secret: SealedSecret,
}

/// Secrets under an older version, at most so many as one pass takes.
fn older_than(view: &Snapshot, current: u32) -> anyhow::Result<Vec<Old>> {
    let mut found = Vec::new();
    let mut take = |within, key: &str, field: &str, place: (&'static str, &str), secret: &SealedSecret| {
        if secret.key_version() != current && found.len() < PASS {
            let place = (place.0, place.1.to_owned());
            found.push(Old { within, key: key.to_owned(), field: field.to_owned(), place, secret: secret.clone() });
        }
    };
    for node in view.nodes()? {
        let id = node.id.to_string();
        for (field, secret) in &node.secrets {
            take(SealedIn::Nodes, &id, field, ("nodes", &id), secret);
        }
    }
    for image in view.images()? {
        let digest = image.digest.to_string();
        if let Some(secret) = &image.key {
            take(SealedIn::Images, &digest, "dek", ("images", &digest), secret);
        }
    }
    for (within, table) in [(SealedIn::Profiles, tables::PROFILES), (SealedIn::Generations, tables::GENERATIONS)] {
        for profile in view.all::<ProfileRecord>(table)? {
            let name = profile.name.to_string();
            let key = if within == SealedIn::Profiles { name.clone() } else { profile.generation.to_string() };
            for (path, secret) in &profile.manifest.private {
                take(within, &key, path, ("profiles", &name), secret);
            }
        }
    }
    for id in view.keys(tables::INVITES)? {
        if let Some(invite) = view.get::<InviteRecord>(tables::INVITES, &id)? {
            take(SealedIn::Invites, &id, "secret", ("invites", &id), &invite.secret);
        }
    }
    Ok(found)
}

fn anew(ring: &Ring, old: Old) -> anyhow::Result<Resealed> {
    let Old { within, key, field, place: (table, id), secret: before } = old;
    let after = ring.seal_anew(Place { table, id: &id, field: &field }, &before).context("sealing it anew")?;
    Ok(Resealed { within, key, field, before, after })
}

/// What is under an older version, sealed under the current one: in changes of a bounded size.
fn sealed_anew(member: &Member) -> anyhow::Result<Vec<Vec<Resealed>>> {
    let view = member.view()?;
    let ring = member.secrets.refresh(&view.key_versions()?)?;
    let current = view.key_versions()?.current().context("there are no keys")?;
    let (mut batches, mut size) = (Vec::<Vec<Resealed>>::new(), 0);
    for old in older_than(&view, current)? {
        let secret = anew(&ring, old)?;
        size += secret.after.size();
        match batches.last_mut() {
            Some(batch) if batch.len() < MAX_RESEALED && size <= BATCH => batch.push(secret),
            _ => {
                size = secret.after.size();
                batches.push(vec![secret]);
            }
        }
    }
    Ok(batches)
}
