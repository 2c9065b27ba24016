//! Which member has which content: each is asked, and nothing of it is kept but that an image was once on enough members to be offered to
//! nodes. So a member that dies takes no image from the nodes that boot it.

use crate::content;
use crate::state::{self, Member};
use crate::store::raft::Peer;
use crate::store::{Command, Outcome, Snapshot, Store as _, StoreError};
use moor_api::admin::{ContentBlob, ContentView};
use moor_api::client::ClientError;
use moor_api::ids::{ImageDigest, Sha256Digest};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The path of the call.
pub(super) const PATH: &str = "/member/v1/lacking";
/// A member says what it has within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// Images that are not offered yet are looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// Whether other members are reached is looked at this often.
const AROUND: Duration = Duration::from_secs(5);

/// Holders of an image that are enough.
pub(crate) fn wanted(member: &Member) -> u64 {
    let members = member.view().and_then(|view| view.members()).unwrap_or_default();
    let present: Vec<_> = members.values().filter(|record| !record.removed).collect();
    let majority = present.iter().filter(|record| record.voter).count() / 2 + 1;
    let set = member.config.image_copies.map(|copies| u64::from(copies.get()));
    set.unwrap_or(majority as u64).min(present.len().max(1) as u64)
}

/// Which of these blobs another member does not have.
async fn ask(member: &Member, peer: &Peer, blobs: &[Sha256Digest]) -> Result<BTreeSet<Sha256Digest>, ClientError> {
    let body = serde_json::to_vec(blobs).map_err(|error| ClientError::Config(error.to_string()))?;
    let lacking: Vec<Sha256Digest> = member.calls.post(peer, PATH, body, ANSWER).await?;
    Ok(lacking.into_iter().collect())
}

/// Which of these members do not answer.
pub(crate) async fn silent<'a>(member: &Member, peers: &'a [Peer]) -> Vec<&'a Peer> {
    let answers = futures_util::future::join_all(peers.iter().map(|peer| ask(member, peer, &[]))).await;
    peers.iter().zip(answers).filter(|(_, answer)| answer.is_err()).map(|(peer, _)| peer).collect()
}

/// Calls the other members now and then: nodes are not sent to those that are not reached. Goes on for ever.
pub(super) async fn look_around(member: &Member) {
    loop {
        let others = member.others();
        // Whether it is reached is noted where connections are made.
        futures_util::future::join_all(others.iter().map(|peer| ask(member, peer, &[]))).await;
        tokio::time::sleep(AROUND).await;
    }
}

/// What all members say.
pub(crate) async fn view(member: &Arc<Member>) -> anyhow::Result<ContentView> {
    let looker = member.clone();
    let own = tokio::task::spawn_blocking(move || {
        let view = looker.view()?;
        let described = state::described(&view)?;
        let lacking = content::lacking(&looker.config.blobs(), described.keys().copied().collect());
        let images = view.images()?;
        Ok::<_, StoreError>((described, lacking, images))
    });
    let (described, lacking, images) = own.await??;
    let blobs: Vec<Sha256Digest> = described.keys().copied().collect();
    let mut known = vec![(member.identity.name.clone(), lacking.into_iter().collect::<BTreeSet<_>>())];
    let (mut members, mut silent) = (vec![member.identity.name.clone()], Vec::new());
    for peer in member.others() {
        members.push(peer.name.clone());
        match ask(member, &peer, &blobs).await {
            Ok(lacking) => known.push((peer.name, lacking)),
            Err(_) => silent.push(peer.name),
        }
    }
    let blobs = described.into_iter().map(|(blob, of)| ContentBlob {
        blob,
        of,
        members: known.iter().filter(|(_, lacking)| !lacking.contains(&blob)).map(|(name, _)| name.clone()).collect(),
        offered: images.iter().find(|image| image.blob == blob).map(|image| image.offered),
    });
    let mut blobs: Vec<ContentBlob> = blobs.collect();
    blobs.sort_by(|a, b| a.of.cmp(&b.of));
    Ok(ContentView { copies: wanted(member), members, silent, blobs })
}

/// Images that nodes are not offered yet, and the blobs that belong to each.
fn waiting(view: &Snapshot) -> Result<Vec<(ImageDigest, Vec<Sha256Digest>)>, StoreError> {
    let images = view.images()?.into_iter().filter(|image| !image.offered);
    let blobs = images.map(|image| {
        let mut blobs = vec![image.blob, image.kernel, image.initramfs];
        blobs.extend(image.boot_loaders.into_values());
        (image.digest, blobs)
    });
    Ok(blobs.collect())
}

/// Where this member leads: offers images that enough members hold. Goes on for ever.
pub(super) async fn offer(member: &Arc<Member>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let standing = member.store.standing();
        if standing.leader != Some(standing.number) {
            continue;
        }
        if let Err(error) = offer_held(member).await {
            tracing::warn!("offering images: {error:#}");
        }
    }
}

async fn offer_held(member: &Arc<Member>) -> anyhow::Result<()> {
    let looker = member.clone();
    let own = tokio::task::spawn_blocking(move || {
        let waiting = waiting(&looker.view()?)?;
        let blobs: Vec<Sha256Digest> = waiting.iter().flat_map(|(_, blobs)| blobs).copied().collect();
        let lacking = content::lacking(&looker.config.blobs(), blobs.clone());
        Ok::<_, StoreError>((waiting, blobs, lacking))
    });
    let (waiting, blobs, lacking) = own.await??;
    if waiting.is_empty() {
        return Ok(());
    }
    let mut answers: Vec<BTreeSet<Sha256Digest>> = vec![lacking.into_iter().collect()];
    for peer in member.others() {
        // Who does not answer holds nothing that anybody could count on.
        answers.extend(ask(member, &peer, &blobs).await.ok());
    }
    for (digest, blobs) in waiting {
        let holders = answers.iter().filter(|lacking| blobs.iter().all(|blob| !lacking.contains(blob))).count() as u64;
        if holders < wanted(member) {
            continue;
        }
        if let Outcome::Refused(problem) = member.store.propose(Command::OfferImage { digest }).await? {
            tracing::warn!("offering image {digest}: {problem}");
        } else {
            tracing::info!("image {digest} is on {holders} members: nodes are offered it");
        }
    }
    Ok(())
}
