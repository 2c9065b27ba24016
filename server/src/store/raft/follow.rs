//! A follower's end of a [stream](super::stream): it takes what the leader sends, and answers in order.

use super::answer::within_reach;
use super::stream::framed;
use super::wire::{self, Streamed};
use super::{Raft, Replicated, StoreError};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use moor_api::ids::MemberId;
use openraft::raft::AppendEntriesRequest;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_io_timeout::TimeoutStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// A follower that hears nothing for so long ends the connection.
const SILENCE: Duration = Duration::from_mins(1);
/// A follower that takes no answers for so long is not waited for.
const TAKES_NOTHING: Duration = Duration::from_secs(10);
/// Who may append is looked at again this often.
const LOOK: Duration = Duration::from_secs(1);

/// Refuses entries that do not follow each other, and the one that is said to be before them. openraft would take them, and acknowledge those that are
/// missing as well.
pub(super) fn without_holes(request: &AppendEntriesRequest<Raft>) -> Result<(), StoreError> {
    let mut before = request.prev_log_id;
    for id in request.entries.iter().map(|entry| entry.log_id) {
        let next = before.map_or(Some(0), |before| before.index().checked_add(1));
        let term = before.map_or(0, |before| **before.committed_leader_id());
        if Some(id.index()) != next || **id.committed_leader_id() < term {
            let before = before.map_or_else(|| "nothing".into(), |before| format!("entry {before}"));
            return Err(StoreError::Message(format!("entry {id} does not follow {before}")));
        }
        before = Some(id);
    }
    Ok(())
}

/// What a follower reads, until it is told to end or a frame is not what it has to be; that is left in `failed`.
struct Reading<S, H, G> {
    frames: futures_util::stream::SplitStream<Framed<S, LengthDelimitedCodec>>,
    end: oneshot::Receiver<()>,
    store: H,
    by: MemberId,
    may: G,
    looked: Instant,
    /// Whom it was found to speak for since.
    speaks_for: Option<u64>,
    /// For so many milliseconds the leader had not heard of a majority when it called last.
    unheard: Arc<AtomicU64>,
    failed: Arc<Mutex<Option<StoreError>>>,
}

impl<S, H, G> Reading<S, H, G>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Deref<Target = Replicated>,
    G: Fn() -> Result<(), StoreError>,
{
    async fn next(&mut self) -> Option<AppendEntriesRequest<Raft>> {
        loop {
            let frame = tokio::select! {
                _ = &mut self.end => return None,
                frame = self.frames.next() => frame?.ok()?,
            };
            match self.look().and_then(|()| if frame.is_empty() { Ok(None) } else { self.call(&frame).map(Some) }) {
                Ok(Some(call)) => return Some(call),
                Ok(None) => {}
                Err(error) => {
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return None;
                }
            }
        }
    }

    fn look(&mut self) -> Result<(), StoreError> {
        if self.looked.elapsed() >= LOOK {
            (self.may)()?;
            (self.looked, self.speaks_for) = (Instant::now(), None);
        }
        Ok(())
    }

    fn call(&mut self, frame: &[u8]) -> Result<AppendEntriesRequest<Raft>, StoreError> {
        let store = &self.store;
        let call = store.machine.note(wire::append_from(frame, store.machine.known()).map_err(StoreError::from));
        let (call, unheard) = call.map_err(|error| store.machine.why(error))?;
        let number = call.vote.leader_id.voted_for;
        if self.speaks_for != Some(number) {
            store.speaks(number, self.by)?;
        }
        within_reach(&store.raft, &call.vote)?;
        without_holes(&call)?;
        self.speaks_for = Some(number);
        self.unheard.store(u64::try_from(unheard.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(call)
    }
}

/// Takes what the member `by` appends over `stream`, until it ends the connection, something is refused, or this store is closed. `may` says
/// whether it still may: it was asked before.
pub(crate) async fn follow<S, H, G>(stream: S, store: H, by: MemberId, may: G)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Deref<Target = Replicated> + Clone + Send + 'static,
    G: Fn() -> Result<(), StoreError> + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_read_timeout(Some(SILENCE));
    let (mut answers, frames) = framed(Box::pin(stream)).split();
    let (_stop, end) = oneshot::channel();
    let failed = Arc::<Mutex<Option<StoreError>>>::default();
    let unheard = Arc::<AtomicU64>::default();
    let reading = Reading {
        frames,
        end,
        store: store.clone(),
        by,
        may,
        looked: Instant::now(),
        speaks_for: None,
        unheard: unheard.clone(),
        failed: failed.clone(),
    };
    let calls = futures_util::stream::unfold(reading, |mut reading| async move {
        let call = reading.next().await?;
        Some((call, reading))
    });
    let mut taken = pin!(store.raft.stream_append(calls));
    let mut metrics = store.raft.server_metrics();
    let refused = loop {
        let next = tokio::select! {
            next = taken.next() => next,
            changed = openraft::async_runtime::WatchReceiver::changed(&mut metrics) => match changed {
                Ok(()) => continue,
                // The store was closed.
                Err(_) => break None,
            },
        };
        let Some(next) = next else {
            break failed.lock().unwrap_or_else(PoisonError::into_inner).take().map(|error| Streamed::refused(&error));
        };
        let (streamed, goes_on) = match next {
            Ok(result) => (Streamed::from(&result), result.is_ok()),
            Err(error) => (Streamed::refused(&error), false),
        };
        if goes_on {
            // What a later call said is as true.
            store.hear(Duration::from_millis(unheard.load(Ordering::Relaxed)));
        } else {
            break Some(streamed);
        }
        if !matches!(tokio::time::timeout(TAKES_NOTHING, answers.send(encoded(&streamed))).await, Ok(Ok(()))) {
            return;
        }
    };
    let end = async {
        if let Some(refused) = refused {
            answers.send(encoded(&refused)).await?;
        }
        answers.close().await
    };
    // Who is gone does not hear it.
    let _ = tokio::time::timeout(TAKES_NOTHING, end).await;
}

fn encoded(streamed: &Streamed) -> Bytes {
    // Nothing in it can fail to be written; an empty answer is not understood, and ends the connection.
    serde_json::to_vec(streamed).unwrap_or_default().into()
}
