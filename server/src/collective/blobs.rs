//! Content of the collective: each member fetches what the records name and it does not have from the others, checks the SHA-256, and
//! has it. Nothing is believed: what another member sends is the blob, or it is thrown away.

use crate::content::{self, Incoming};
use crate::http::Failure;
use crate::public;
use crate::state::{self, Member};
use crate::store::raft::Peer;
use anyhow::Context as _;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body_util::BodyExt as _;
use moor_api::ids::Sha256Digest;
use moor_api::problem::{Code, Problem};
use std::sync::Arc;
use std::time::Duration;

/// A part of a blob comes within this time.
const STALL: Duration = Duration::from_secs(20);

/// A blob, for another member.
pub(super) async fn send(member: &Arc<Member>, digest: &str) -> Result<Response, Failure> {
    let blob: Sha256Digest =
        digest.parse().map_err(|error: moor_api::ids::InvalidId| Problem::new(Code::BadRequest, error.to_string()))?;
    let path = content::path_of(&member.config.blobs(), blob);
    let opened = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        Ok::<_, std::io::Error>((file, size))
    });
    match opened.await.map_err(anyhow::Error::from)? {
        Ok((file, size)) => Ok(public::ranges(file, size, &format!("\"{blob}\""), &Method::GET, &HeaderMap::new())),
        Err(_) => Err(Problem::new(Code::NotFound, format!("this member does not have the blob {blob} either")).into()),
    }
}

/// Fetches what is missing; returns how many blobs came, and how many are still missing.
///
/// # Errors
/// The store or the disk failed.
pub async fn fill(member: &Arc<Member>) -> anyhow::Result<(usize, usize)> {
    let looker = member.clone();
    let missing = tokio::task::spawn_blocking(move || state::missing(&looker.view()?, &looker.config.blobs()));
    let missing = missing.await??;
    let (mut came, mut left) = (0, 0);
    for blob in missing {
        let mut got = false;
        for peer in member.others() {
            match fetch(member, &peer, blob).await {
                Ok(()) => {
                    got = true;
                    break;
                }
                Err(error) => tracing::debug!("blob {blob} from {}: {error:#}", peer.name),
            }
        }
        if got {
            came += 1;
        } else {
            left += 1;
        }
    }
    Ok((came, left))
}

async fn fetch(member: &Member, peer: &Peer, blob: Sha256Digest) -> anyhow::Result<()> {
    let mut connection = member.calls.connect(peer).await?;
    let mut body = connection.get(&format!("/member/v1/blobs/{blob}")).await?;
    let mut incoming = Some(Incoming::new(&member.config.blobs()).context("making a file for a blob")?);
    while let Some(frame) = tokio::time::timeout(STALL, body.frame()).await.context("the answer stalled")? {
        let Ok(data): Result<Bytes, _> = frame?.into_data() else { continue };
        let mut file = incoming.take().context("a blob that was given up")?;
        let written = tokio::task::spawn_blocking(move || file.write(&data).map(|()| file));
        incoming = Some(written.await?.context("writing a blob")?);
    }
    let incoming = incoming.context("a blob that was given up")?;
    tokio::task::spawn_blocking(move || incoming.finish_as(blob)).await?.context("keeping a blob")
}
