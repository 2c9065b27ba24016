//! Rotation of the collective's keys: by an administrator, and by whoever leads once a member has a part in them that is none any more. What is
//! under an older version is then sealed anew, in bounded changes that leave alone what was changed meanwhile, and the older version goes.
//! A secret that does not open keeps the version that it is under, and no other: an administrator is told of it.

use super::gate::check_present;
use crate::secrets::{Place, Ring, SealedSecret, Version};
use crate::state::{Member, audit_entry};
use crate::store::command::{Resealed, SealedIn};
use crate::store::keys::MAX_RESEALED;
use crate::store::records::{InviteRecord, KeyVersion, ProfileRecord};
use crate::store::tables;
use crate::store::{Command, Outcome, Snapshot};
use anyhow::{Context as _, ensure};
use moor_api::admin::{MAX_UNREADABLE, UnreadableSecret};
use moor_api::ids::MemberId;
use moor_api::problem::{Code, Problem};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The keys are looked at this often: so late a member may be to refuse tokens of before.
const LOOK: Duration = Duration::from_millis(500);
/// What failed is tried again after this time, and what does not open is looked at.
const AGAIN: Duration = Duration::from_secs(10);
/// Members may come and go while a version is made: so often it is made anew.
const TRIES: u32 = 5;
/// Secrets that are looked for at a time, and characters of those that one change seals anew.
const PASS: usize = 10_000;
const BATCH: usize = 256 << 10;

/// Makes a new version of the keys, for those who are members; returns its number.
///
/// # Errors
/// No majority answers; so many versions are in use that first something has to be sealed anew; this member was removed.
pub(crate) async fn rotate(member: &Member) -> Result<u32, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        member.store.linearize().await?;
        check_present(member)?;
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
    let (mut said, mut not_before, mut held) = (String::new(), Instant::now(), None);
    loop {
        let mut done = member.ring().map(drop);
        let standing = member.store.standing();
        if done.is_ok() && standing.leader == Some(standing.number) && Instant::now() >= not_before {
            done = step(member, &mut held).await;
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

/// What did not open when it was looked at last.
struct Held {
    /// All versions that there were then.
    versions: Vec<u32>,
    until: Instant,
    unreadable: Vec<UnreadableSecret>,
}

async fn step(member: &Arc<Member>, held: &mut Option<Held>) -> anyhow::Result<()> {
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
        *held = None;
        return Ok(());
    }
    let versions = record.versions.iter().map(|version| version.version);
    if held
        .as_ref()
        .is_some_and(|held| versions.clone().eq(held.versions.iter().copied()) && Instant::now() < held.until)
    {
        return Ok(());
    }
    let (count, Pass { kept, unreadable, .. }) = seal_anew(member).await?;
    for version in older.iter().filter(|version| !kept.contains(&version.version)) {
        member.propose(Command::DropKeys { version: version.version }).await?;
    }
    let current = current.version;
    if kept.is_empty() {
        tracing::info!("{count} secrets were sealed anew: nothing is under an older version than {current}");
        *held = None;
        return Ok(());
    }
    let is_known = |secret: &UnreadableSecret| held.as_ref().is_some_and(|held| held.unreadable.contains(secret));
    for secret in unreadable.iter().filter(|secret| !is_known(secret)) {
        let UnreadableSecret { of, version, remedy } = secret;
        tracing::error!("{of} does not open, and version {version} of the keys is kept for it: {remedy}");
    }
    let versions = versions.filter(|version| kept.contains(version) || *version == current).collect();
    *held = Some(Held { versions, until: Instant::now() + AGAIN, unreadable });
    Ok(())
}

/// Seals anew what is under an older version: how many there were, and what is left.
async fn seal_anew(member: &Arc<Member>) -> anyhow::Result<(u64, Pass)> {
    let (mut count, mut before) = (0, None);
    loop {
        let reader = member.clone();
        let pass = tokio::task::spawn_blocking(move || look(&reader)).await??;
        if pass.batches.is_empty() {
            return Ok((count, pass));
        }
        // What is left alone was changed meanwhile, and is under the current version: it does not come again.
        ensure!(before != Some(count), "secrets are left under an older version");
        before = Some(count);
        for secrets in pass.batches {
            if let Outcome::Number(sealed) = member.propose(Command::Reseal { secrets }).await? {
                count += sealed;
            }
        }
    }
}

/// A secret, where it is, and what it is bound to.
struct Secret {
    within: SealedIn,
    key: String,
    field: String,
    /// Table and record of its place.
    place: (&'static str, String),
    sealed: SealedSecret,
    /// What it belongs to, for people.
    of: String,
}

impl Secret {
    fn place(&self) -> Place<'_> {
        Place { table: self.place.0, id: &self.place.1, field: &self.field }
    }

    fn unreadable(&self) -> UnreadableSecret {
        let Self { field, of, .. } = self;
        let (of, remedy) = match self.within {
            SealedIn::Nodes => (
                format!("attribute '{field}' of node {of}"),
                format!("set it anew (`moor node set {of} --file {field}=FILE`), or clear it (`moor node set {of} --clear {field}`)"),
            ),
            SealedIn::Images => (
                format!("the key of image {of}"),
                "import the image again, with its key (`moor image import`)".to_owned(),
            ),
            SealedIn::Profiles => (
                format!("'{field}' of profile {of}"),
                "publish the profile again (`moor profile publish`), from a working directory that has the file or has it no more".to_owned(),
            ),
            SealedIn::Generations => (
                format!("'{field}' of a generation that is kept, {of}"),
                "publish the profile again, and boot its nodes: a generation goes at a publish when no node remembers a boot of it".to_owned(),
            ),
            SealedIn::Invites => (
                format!("the invitation of {of}"),
                "make another (`moor collective invite`): it goes by one that is made after it has expired".to_owned(),
            ),
        };
        UnreadableSecret { of, version: self.sealed.key_version(), remedy }
    }
}

/// Gives all secrets whose version of the keys is `wanted` to `take`, until it fails.
fn each(
    view: &Snapshot,
    wanted: impl Fn(u32) -> bool,
    mut take: impl FnMut(Secret) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut give = |within, key: &str, field: &str, place: (&'static str, &str), sealed: &SealedSecret, of: String| {
        let (key, field, place) = (key.to_owned(), field.to_owned(), (place.0, place.1.to_owned()));
        take(Secret { within, key, field, place, sealed: sealed.clone(), of })
    };
    let is_wanted = |sealed: &SealedSecret| wanted(sealed.key_version());
    for node in view.nodes()? {
        let id = node.id.to_string();
        for (field, secret) in node.secrets.iter().filter(|(_, secret)| is_wanted(secret)) {
            give(SealedIn::Nodes, &id, field, ("nodes", &id), secret, node.name.to_string())?;
        }
    }
    for image in view.images()? {
        let digest = image.digest.to_string();
        if let Some(secret) = image.key.as_ref().filter(|secret| is_wanted(secret)) {
            let of = format!("'{}' @{}", image.name, image.serial);
            give(SealedIn::Images, &digest, "dek", ("images", &digest), secret, of)?;
        }
    }
    for (within, table) in [(SealedIn::Profiles, tables::PROFILES), (SealedIn::Generations, tables::GENERATIONS)] {
        for profile in view.all::<ProfileRecord>(table)? {
            let name = profile.name.to_string();
            let key = if within == SealedIn::Profiles { name.clone() } else { profile.generation.to_string() };
            for (path, secret) in profile.manifest.private.iter().filter(|(_, secret)| is_wanted(secret)) {
                let of = format!("'{name}' @{}", profile.serial);
                give(within, &key, path, ("profiles", &name), secret, of)?;
            }
        }
    }
    for id in view.keys(tables::INVITES)? {
        if let Some(invite) = view.get::<InviteRecord>(tables::INVITES, &id)?.filter(|invite| is_wanted(&invite.secret))
        {
            give(SealedIn::Invites, &id, "secret", ("invites", &id), &invite.secret, invite.name)?;
        }
    }
    Ok(())
}

/// What one look at the secrets under older versions has found.
#[derive(Default)]
struct Pass {
    /// Changes of a bounded size that seal it anew.
    batches: Vec<Vec<Resealed>>,
    /// Versions of what does not open.
    kept: BTreeSet<u32>,
    /// The first [`MAX_UNREADABLE`] of it.
    unreadable: Vec<UnreadableSecret>,
}

impl Pass {
    fn keep(&mut self, secret: &Secret) {
        self.kept.insert(secret.sealed.key_version());
        if self.unreadable.len() < MAX_UNREADABLE {
            self.unreadable.push(secret.unreadable());
        }
    }
}

fn look(member: &Member) -> anyhow::Result<Pass> {
    let view = member.view()?;
    let keys = view.key_versions()?;
    let ring = member.secrets.refresh(&keys)?;
    let current = keys.current().context("there are no keys")?;
    let (mut pass, mut count, mut size) = (Pass::default(), 0, 0);
    let older = |version| version != current;
    each(&view, older, |secret| {
        let Ok(plain) = ring.open_secret(secret.place(), &secret.sealed) else {
            pass.keep(&secret);
            return Ok(());
        };
        // There may be more than fit into one pass.
        if count == PASS {
            return Ok(());
        }
        let after = ring.seal(secret.place(), &plain).context("sealing it anew")?;
        count += 1;
        size += after.size();
        let Secret { within, key, field, sealed: before, .. } = secret;
        let secret = Resealed { within, key, field, before, after };
        match pass.batches.last_mut() {
            Some(batch) if batch.len() < MAX_RESEALED && size <= BATCH => batch.push(secret),
            _ => {
                size = secret.after.size();
                pass.batches.push(vec![secret]);
            }
        }
        Ok(())
    })?;
    Ok(pass)
}

/// Secrets whose version is `wanted` and that `ring` does not open, [`MAX_UNREADABLE`] at most.
///
/// # Errors
/// The database is damaged.
pub(super) fn unreadable(
    view: &Snapshot,
    ring: &Ring,
    wanted: impl Fn(u32) -> bool,
) -> anyhow::Result<Vec<UnreadableSecret>> {
    let mut found = Vec::new();
    each(view, wanted, |secret| {
        if found.len() < MAX_UNREADABLE && ring.open_secret(secret.place(), &secret.sealed).is_err() {
            found.push(secret.unreadable());
        }
        Ok(())
    })?;
    Ok(found)
}

/// Secrets that an older version of the keys is kept for, as this member finds them now.
///
/// # Errors
/// The database is damaged; a version of the keys that is for this member does not open.
pub(crate) fn kept(member: &Member) -> anyhow::Result<Vec<UnreadableSecret>> {
    let view = member.view()?;
    let keys = view.key_versions()?;
    let ring = member.secrets.refresh(&keys)?;
    match (keys.current(), &keys.versions[..]) {
        (Some(current), [_, _, ..]) => unreadable(&view, &ring, |version| version != current),
        _ => Ok(Vec::new()),
    }
}
