//! Content of the collective: each member fetches what the records name and it does not have from the others, checks the SHA-256, and
//! has it. Nothing is believed: what another member sends is the blob, or it is thrown away.

use crate::content::{self, Incoming};
use crate::http::Failure;
use crate::public;
use crate::state::{self, Member};
use anyhow::Context as _;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body_util::BodyExt as _;
use moor_api::client::member::MemberConnection;
use moor_api::ids::{MemberId, Sha256Digest};
use moor_api::problem::{Code, Problem};
use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A part of a blob comes within this time.
const STALL: Duration = Duration::from_secs(20);

/// A member that was not reached is not asked for content for so long: each blob would wait for it.
const SILENT: Duration = Duration::from_secs(15);

/// A blob, or the rest of one, for another member.
pub(super) async fn send(member: &Arc<Member>, digest: &str, headers: &HeaderMap) -> Result<Response, Failure> {
    let blob: Sha256Digest =
        digest.parse().map_err(|error: moor_api::ids::InvalidId| Problem::new(Code::BadRequest, error.to_string()))?;
    let path = content::path_of(&member.config.blobs(), blob);
    let opened = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        Ok::<_, std::io::Error>((file, size))
    });
    match opened.await.map_err(anyhow::Error::from)? {
        Ok((file, size)) => Ok(public::ranges(file, size, &format!("\"{blob}\""), &Method::GET, headers)),
        Err(_) => Err(Problem::new(Code::NotFound, format!("this member does not have the blob {blob} either")).into()),
    }
}

/// Keeps to so many bytes in a second, on average.
struct Pace {
    rate: Option<f64>,
    /// When what was taken so far is paid for.
    paid: Instant,
}

impl Pace {
    fn new(mib_per_second: Option<NonZeroU32>) -> Self {
        Self { rate: mib_per_second.map(|mib| f64::from(mib.get()) * f64::from(1 << 20)), paid: Instant::now() }
    }

    /// When this many bytes more are within the pace.
    fn due(&mut self, bytes: usize, now: Instant) -> Instant {
        let Some(rate) = self.rate else { return now };
        let seconds = f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / rate;
        self.paid = self.paid.max(now) + Duration::from_secs_f64(seconds);
        self.paid
    }

    /// Waits until then. Meanwhile nobody reads, and the sender waits too.
    async fn take(&mut self, bytes: usize) {
        tokio::time::sleep_until(self.due(bytes, Instant::now())).await;
    }
}

/// What comes cannot be kept here, whoever sends it.
#[derive(Debug, thiserror::Error)]
#[error("content that comes from other members cannot be kept in '{}': {cause}", dir.display())]
struct CannotKeep {
    dir: PathBuf,
    cause: io::Error,
}

/// Fetches what a member lacks.
pub(super) struct Fetcher {
    /// Members that were not reached, and until when they are left out.
    silent: BTreeMap<MemberId, Instant>,
    pace: Pace,
    /// It was said that this member cannot keep what comes.
    is_stuck: bool,
}

impl Fetcher {
    pub(super) fn new(member: &Member) -> Self {
        Self { silent: BTreeMap::new(), pace: Pace::new(member.config.content_mib_per_second), is_stuck: false }
    }

    /// Fetches what is missing; returns how many blobs came, and how many are still missing.
    ///
    /// # Errors
    /// The store or the disk failed.
    pub(super) async fn fill(&mut self, member: &Arc<Member>) -> anyhow::Result<(usize, usize)> {
        let looker = member.clone();
        let missing =
            tokio::task::spawn_blocking(move || state::missing(&looker.view()?, &looker.config.blobs())).await??;
        let (mut came, mut left, mut failed) = (0, 0, None);
        for blob in missing {
            match self.fetch_from_any(member, blob).await {
                Ok(true) => came += 1,
                Ok(false) => left += 1,
                Err(error) => {
                    left += 1;
                    failed.get_or_insert(error);
                }
            }
        }
        match failed {
            // It is tried again every few seconds, and said once.
            Some(error) if !self.is_stuck => {
                tracing::warn!("{error}: it is tried again until that is mended");
                self.is_stuck = true;
            }
            None if self.is_stuck && left == 0 => {
                tracing::info!("content is kept again: all of it is here");
                self.is_stuck = false;
            }
            _ => {}
        }
        Ok((came, left))
    }

    /// Whether it came.
    async fn fetch_from_any(&mut self, member: &Arc<Member>, blob: Sha256Digest) -> Result<bool, CannotKeep> {
        for peer in member.others() {
            if self.silent.get(&peer.id).is_some_and(|until| Instant::now() < *until) {
                continue;
            }
            let connection = match member.calls.connect(&peer).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!("blob {blob} from {}: {error}", peer.name);
                    self.silent.insert(peer.id, Instant::now() + SILENT);
                    continue;
                }
            };
            match self.fetch(member, connection, blob).await {
                Ok(from) => {
                    tracing::debug!("blob {blob} came from {}, from byte {from} on", peer.name);
                    return Ok(true);
                }
                Err(error) => {
                    tracing::debug!("blob {blob} from {}: {error:#}", peer.name);
                    if let Ok(here) = error.downcast::<CannotKeep>() {
                        return Err(here);
                    }
                }
            }
        }
        Ok(false)
    }

    /// The whole blob, or what is missing of it; returns where it went on.
    async fn fetch(
        &mut self,
        member: &Member,
        mut connection: MemberConnection,
        blob: Sha256Digest,
    ) -> anyhow::Result<u64> {
        let dir = member.config.blobs();
        let cannot_keep = |cause| CannotKeep { dir: member.config.blobs(), cause };
        let begun = tokio::task::spawn_blocking(move || Incoming::resume(&dir, blob));
        let mut file = begun.await?.map_err(cannot_keep)?;
        let (from, mut body) = connection.get_from(&format!("/member/v1/blobs/{blob}"), file.size()).await?;
        if from != file.size() {
            file.restart().map_err(cannot_keep)?;
        }
        let mut incoming = Some(file);
        while let Some(frame) = tokio::time::timeout(STALL, body.frame()).await.context("the answer stalled")? {
            let Ok(data): Result<Bytes, _> = frame?.into_data() else { continue };
            self.pace.take(data.len()).await;
            let mut file = incoming.take().context("a blob that was given up")?;
            let written = tokio::task::spawn_blocking(move || file.write(&data).map(|()| file));
            incoming = Some(written.await?.map_err(cannot_keep)?);
        }
        let incoming = incoming.context("a blob that was given up")?;
        match tokio::task::spawn_blocking(move || incoming.finish_as(blob)).await? {
            Ok(()) => Ok(from),
            // It is not what was asked for: another member may send that.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.into()),
            Err(error) => Err(cannot_keep(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_on_average_and_none_is_none() {
        let began = Instant::now();
        let mut pace = Pace::new(NonZeroU32::new(2));
        let mut due = began;
        for _ in 0..64 {
            due = pace.due(64 << 10, due);
        }
        let took = due - began;
        assert!((Duration::from_millis(1990)..Duration::from_millis(2100)).contains(&took), "{took:?}");
        // A pause is not made up for afterwards.
        let later = due + Duration::from_mins(1);
        assert!(pace.due(1 << 20, later) >= later + Duration::from_millis(499));
        assert_eq!(Pace::new(None).due(usize::MAX, later), later);
    }
}
