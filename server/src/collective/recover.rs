//! `moord recover`: the majority is lost for ever, and one that survives goes on as a collective of one. What only the lost ones had is lost
//! with them, so this is never done by itself, and not while another member answers.
//!
//! Who is interrupted goes on: what the member is to be is written down first ([`Intention`]), then its tables change in one transaction, and
//! then `member.json` says what they say. Whichever of `moord run` and `moord recover` comes next finds by the tables how far it came.

use super::answer::{Caller, Heard};
use super::identity::Identity;
use super::rotation::unreadable;
use crate::authority::{self, SshHeld};
use crate::config::Config;
use crate::files;
use crate::secrets::Keyring;
use crate::state;
use crate::store::raft::{Peer, Survivor, members_in};
use crate::store::records::{KeysRecord, MemberRecord, SiteRecord};
use crate::trust::Trust;
use anyhow::{Context as _, bail, ensure};
use moor_api::admin::UnreadableSecret;
use moor_api::ids::{MemberId, Sha256Digest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What there is to go on with, and what is not.
pub struct Prospect {
    /// Term and place of the newest entry of this member's log.
    pub newest: (u64, u64),
    /// The other members, of which none answers.
    pub others: Vec<String>,
    /// What answers at an address of theirs, and is no member: a line for each.
    pub strangers: Vec<String>,
    /// Content that this member does not have: blob, and what it is.
    pub missing: BTreeMap<Sha256Digest, String>,
    /// Secrets that this member does not open.
    pub unreadable: Vec<UnreadableSecret>,
}

/// What became of it.
pub struct Recovered {
    /// The member that goes on.
    pub identity: Identity,
    /// Secrets that it does not open, with all that its log had.
    pub unreadable: Vec<UnreadableSecret>,
}

/// A member that does not run, and the others that it has heard of.
pub struct Recovery {
    survivor: Survivor,
    identity: Identity,
    keyring: Keyring,
    others: Vec<Peer>,
}

/// What a recovery is about to make of this member: in `recovering.json` from before the tables change until `member.json` says it.
#[derive(Serialize, Deserialize)]
struct Intention {
    /// The id that the member is to have, which none has.
    id: MemberId,
}

impl Intention {
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec(self)?;
        files::write(path, &text, 0o600).with_context(|| format!("writing '{}'", path.display()))
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("reading '{}'", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("'{}' is damaged", path.display()))
    }
}

/// Makes `member.json` say what the tables say, where a recovery has come so far; `None`: it has changed nothing, and is forgotten.
fn settle(
    config: &Config,
    identity: Identity,
    (site, records): (Option<SiteRecord>, BTreeMap<u64, MemberRecord>),
) -> anyhow::Result<Option<Identity>> {
    let path = config.recovering();
    let Intention { id } = Intention::read(&path)?;
    let number = records.iter().find(|(_, record)| record.id == id).map(|(number, _)| *number);
    let settled = number.map(|number| {
        // It is a founder now: nobody of before vouches for it, or is believed.
        let (met, removed, introduction) = (Vec::new(), Vec::new(), Vec::new());
        let site = site.unwrap_or_else(|| identity.site.clone());
        Identity { number, id, site, met, removed, introduction, ..identity }
    });
    if let Some(identity) = &settled {
        identity.write(&config.identity())?;
    }
    files::remove(&path).with_context(|| format!("removing '{}'", path.display()))?;
    Ok(settled)
}

/// Finishes a recovery that was interrupted, if it has changed the member's tables. The member does not run.
///
/// # Errors
/// The tables cannot be opened, or are damaged; the directory is not writable.
pub fn finish(config: &Config) -> anyhow::Result<Option<Identity>> {
    if !config.recovering().exists() {
        return Ok(None);
    }
    let identity = Identity::read(&config.identity())?;
    let tables = members_in(&config.store())
        .map_err(|error| state::not_opened(error, &identity))
        .context("opening the store (a member that runs has to be stopped first)")?;
    let settled = settle(config, identity, tables)?;
    if let Some(identity) = &settled {
        tracing::warn!(
            "a recovery was interrupted, and is finished: member {} is the only one, as number {}",
            identity.name,
            identity.number
        );
    } else {
        tracing::info!("a recovery was interrupted before it changed anything: the member is as it was");
    }
    Ok(settled)
}

impl Recovery {
    /// Opens the member's store, and calls the others.
    ///
    /// # Errors
    /// There is no member; it runs, or is damaged; it was removed, or needs nobody; another one answers, or somebody who calls himself one.
    pub async fn open(config: &Config) -> anyhow::Result<(Self, Prospect)> {
        ensure!(config.identity().exists(), "'{}' holds no member", config.state_dir.display());
        let identity = Identity::read(&config.identity())?;
        let trust = Trust::open(&config.keys(), &identity.site)?;
        let survivor = Survivor::open(&config.store())
            .map_err(|error| state::not_opened(error, &identity))
            .context("opening the store (a member that runs has to be stopped first)")?;
        let view = survivor.view()?;
        let records = view.members()?;
        if records.get(&identity.number).is_some_and(|record| record.removed) {
            bail!(
                "this member was removed from the collective: what it holds is of an earlier time, and nothing to go on with"
            );
        }
        let mut others: BTreeMap<u64, Peer> = records
            .into_iter()
            .filter(|(_, record)| !record.removed)
            .map(|(number, record)| (number, record.peer()))
            .collect();
        others.extend(survivor.peers().await?);
        others.remove(&identity.number);
        let others: Vec<Peer> = others.into_values().filter(|peer| peer.id != identity.id).collect();
        ensure!(!others.is_empty(), "this is the only member: it is its own majority, and nothing has to be recovered");
        let caller = Caller::new(&identity.site, trust.taken())?;
        let mut strangers = Vec::new();
        for (peer, url) in others.iter().flat_map(|peer| peer.urls.iter().map(move |url| (peer, url))) {
            match caller.call(peer, url).await? {
                Heard::Nobody => {}
                Heard::Stranger(line) => strangers.push(line),
                Heard::Member(line) => bail!("{line}"),
            }
        }
        let mut missing = state::described(&view)?;
        let gone = state::missing(&view, &config.blobs())?;
        missing.retain(|blob, _| gone.contains(blob));
        let names = others.iter().map(|peer| peer.name.clone()).collect();
        // Without its own key nothing is begun.
        let keyring = Keyring::open(&config.keys(), identity.site.collective, identity.id)?;
        let unreadable = unreadable(&view, &keyring.openable(&view.key_versions()?), |_| true)?;
        let prospect = Prospect { newest: survivor.newest().await?, others: names, strangers, missing, unreadable };
        Ok((Self { survivor, identity, keyring, others }, prospect))
    }

    /// Goes on alone: as a member with another number and id, because those of before are known to members that may come back.
    ///
    /// # Errors
    /// The store is damaged, or failed; the directory is not writable.
    pub async fn go_on(self, config: &Config) -> anyhow::Result<Recovered> {
        let Self { mut survivor, identity, keyring, others } = self;
        let (key, unwrap) = (authority::member_public(&config.keys())?, keyring.public()?);
        let member = MemberRecord::only(key.into(), unwrap, identity.name.clone(), config.urls.clone());
        let only = member.clone();
        Intention { id: member.id }.write(&config.recovering())?;
        // The lost ones have the keys of before.
        let keys = move |before: &KeysRecord| keyring.openable(before).begin_anew(&only, before);
        let hosts = SshHeld::read(&config.keys())?.host;
        survivor.begin_anew(identity.number, member, hosts, keys).await?;
        let view = survivor.view()?;
        let tables = (view.site()?, view.members()?);
        let identity = settle(config, identity, tables)?.context("the tables did not change")?;
        let keyring = Keyring::open(&config.keys(), identity.site.collective, identity.id)?;
        let ring = keyring.refresh(&view.key_versions()?)?;
        let unreadable = unreadable(&view, &ring, |_| true)?;
        tracing::warn!(
            "member {} goes on alone as number {}; {} others were removed",
            identity.name,
            identity.number,
            others.len()
        );
        Ok(Recovered { identity, unreadable })
    }
}
