//! `moord recover`: the majority is lost for ever, and one that survives goes on as a collective of one. What only the lost ones had is lost
//! with them, so this is never done by itself, and not while another member answers.

use super::identity::Identity;
use crate::authority;
use crate::config::Config;
use crate::secrets::{Keyring, Ring};
use crate::state::{self, Connections, connections};
use crate::store::raft::{Calls, Peer, Survivor};
use crate::store::records::MemberRecord;
use crate::store::{Command, Outcome, Replicated, Store as _};
use anyhow::{Context as _, bail, ensure};
use moor_api::ids::Sha256Digest;
use std::collections::BTreeMap;

/// What there is to go on with, and what is not.
pub struct Prospect {
    /// Term and place of the newest entry of this member's log.
    pub newest: (u64, u64),
    /// The other members, of which none answers.
    pub others: Vec<String>,
    /// Content that this member does not have: blob, and what it is.
    pub missing: BTreeMap<Sha256Digest, String>,
}

/// A member that does not run, and the others that it has heard of.
pub struct Recovery {
    survivor: Survivor,
    identity: Identity,
    others: Vec<Peer>,
}

impl Recovery {
    /// Opens the member's store, and calls the others.
    ///
    /// # Errors
    /// There is no member; it runs, or is damaged; it was removed, or needs nobody; another one answers.
    pub async fn open(config: &Config) -> anyhow::Result<(Self, Prospect)> {
        ensure!(config.identity().exists(), "'{}' holds no member", config.state_dir.display());
        let identity = Identity::read(&config.identity())?;
        let Connections { calls, .. } = connections(config, &config.keys(), &identity)?;
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
        for peer in &others {
            if calls.connect(peer).await.is_ok() {
                bail!(
                    "member {} answers at {}: nothing was changed. A collective is recovered when the majority is lost for ever; stop the \
                     members that still run, or bring one back, or take out those that are dead (`moor collective remove`)",
                    peer.name,
                    peer.urls.join(", ")
                );
            }
        }
        let mut missing = state::described(&view)?;
        let gone = state::missing(&view, &config.blobs())?;
        missing.retain(|blob, _| gone.contains(blob));
        let names = others.iter().map(|peer| peer.name.clone()).collect();
        let prospect = Prospect { newest: survivor.newest().await?, others: names, missing };
        Ok((Self { survivor, identity, others }, prospect))
    }

    /// Goes on alone: as a member with another number and id, because those of before are known to members that may come back.
    ///
    /// # Errors
    /// The store is damaged, or failed.
    pub async fn go_on(self, config: &Config) -> anyhow::Result<Identity> {
        let Self { survivor, mut identity, others } = self;
        let key = authority::member_public(&config.keys())?;
        let keyring = Keyring::open(&config.keys(), identity.site.collective, identity.id)?;
        let member = MemberRecord::only(key.into(), keyring.public()?, identity.name.clone(), config.urls.clone());
        identity.id = member.id;
        let (store, number) = survivor.begin_anew(member.peer(), Calls::to_nobody()?).await?;
        let begun = begin(&store, &keyring, number, member).await;
        store.close().await;
        if let Outcome::Refused(problem) = begun? {
            return Err(problem.into());
        }
        identity.number = number;
        // It is a founder now: nobody of before vouches for it, or is believed.
        identity.introduction.clear();
        identity.met.clear();
        identity.removed.clear();
        identity.write(&config.identity())?;
        tracing::warn!(
            "member {} goes on alone as number {number}; {} others were removed",
            identity.name,
            others.len()
        );
        Ok(identity)
    }
}

/// Makes `member` the only one, with a new version of the keys: the lost ones have the others.
async fn begin(store: &Replicated, keyring: &Keyring, number: u64, member: MemberRecord) -> anyhow::Result<Outcome> {
    let mut ring: Ring = keyring.refresh(&store.snapshot()?.key_versions()?)?.as_ref().clone();
    ring.draw()?;
    let keys = ring.record_for(&member)?;
    Ok(store.propose(Command::Anew { number, member, keys }).await?)
}
