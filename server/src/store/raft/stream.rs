//! Entries on their way to a follower: one connection for many calls, each sent without waiting for the answers of those before it. A change
//! would wait for its followers' answer to the mark of the change before, and each call would cost a request of HTTP on both sides.
//!
//! The connection begins as `GET /member/v1/stream` and is [switched](https://www.rfc-editor.org/rfc/rfc9110#section-7.8) to frames: four
//! bytes with the length, big-endian, then JSON; a frame of no bytes says that somebody is there. The leader sends what it would send to
//! `POST /member/v1/append`; each is answered with a [`Streamed`], in order. After one that is no success the follower ends the connection, and
//! the leader begins a new one. What is still on its way on an old connection may be taken after something newer: Raft bears that.
//!
//! A call without entries waits for no connection, but goes by itself (`POST`): a sign of life has to be there in time, and connecting takes longer.
//! For signs of life one is made meanwhile, apart from that for entries, which a large one may fill: on both sides they are Raft's alone from then
//! on, while a `POST` is answered where nodes are. A member of an earlier release has no such route, and gets all calls so.
//!
//! What is committed is told once in a while, [not with each change](TELL): a follower applies several changes at a time, which costs it hardly more than
//! one. Raft bears that a call says less than the leader knows, and takes the answer to a later call for one to all before it.

#[cfg(test)]
mod tests;

use super::network::{Calls, Link, failure, on_the_way};
use super::wire::{Streamed, WireAppend};
use super::{LogId, Peer, Raft};
use bytes::Bytes;
use futures_util::{SinkExt as _, Stream, StreamExt as _};
use moor_api::client::ClientError;
use openraft::errors::{NetworkError, RPCError, Unreachable};
use openraft::network::RPCOption;
use openraft::network::RaftNetworkV2 as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::Instant;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// What the connection is switched to.
pub(crate) const PROTOCOL: &str = "moor-append/1";
/// Where it begins.
pub(crate) const PATH: &str = "/member/v1/stream";
/// Longest frame; a batch of entries, of which one may be large.
const MAX_FRAME: usize = 128 << 20;
/// Longest answer.
const MAX_ANSWER: usize = 1 << 20;
/// Calls on their way at a time, and bytes, unless it is one.
const AT_A_TIME: usize = 32;
const BYTES: usize = 2 << 20;
/// A leader that has nothing to send says so often that it is there.
const PING: Duration = Duration::from_secs(15);
/// So long a follower of an earlier release is not asked again whether it takes streams.
const AGAIN: Duration = Duration::from_mins(1);
/// And one that was not reached for signs of life, which go on by themselves.
const SOON: Duration = Duration::from_secs(1);
/// A follower is told so often what is committed; one that has changes of its own on their way at once, because he waits for it.
const TELL: Duration = Duration::from_millis(3);
/// So long after a call was sent, its answer is believed to be of now: less than a follower listens to a leader after he was heard. One that was started
/// anew listens to nobody yet; that he does, and another leader is elected, within this time and before the answer is there, is not looked after.
const OLD: Duration = Duration::from_millis(500);
pub(super) fn framed<S: AsyncRead + AsyncWrite>(stream: S) -> Framed<S, LengthDelimitedCodec> {
    // One bound for what is read and what is written.
    Framed::new(stream, LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME).new_codec())
}

/// A leader's end of a connection to one follower.
pub(super) struct Sending {
    frames: Framed<moor_api::client::member::Switched, LengthDelimitedCodec>,
}

/// Makes one; none: the follower takes no streams.
async fn begin(calls: &Calls, peer: &Peer) -> Result<Option<Sending>, ClientError> {
    match calls.connect(peer).await?.switch(PATH, PROTOCOL).await {
        Ok(stream) => Ok(Some(Sending { frames: framed(stream) })),
        Err(ClientError::Problem(problem)) if problem.status == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// One that is being made.
pub(super) type Coming = oneshot::Receiver<Result<Option<Sending>, ClientError>>;

impl Link {
    /// Keeps to calls by themselves for so long.
    fn alone_for(&mut self, time: Duration) {
        self.alone_until = Some(std::time::Instant::now() + time);
    }

    fn is_alone(&self) -> bool {
        self.alone_until.is_some_and(|then| std::time::Instant::now() < then)
    }

    /// Takes the connection for signs of life once it is made, and begins one where there is none.
    fn prepare(&mut self) {
        if !self.is_for_signs || self.sending().is_some() {
            return;
        }
        match self.coming.as_mut().map(Coming::try_recv) {
            Some(Err(TryRecvError::Empty)) => return,
            Some(Ok(Ok(Some(sending)))) => {
                self.coming = None;
                *self.sending() = Some(Box::new(sending));
                return;
            }
            Some(Ok(Ok(None))) => self.alone_for(AGAIN),
            Some(Ok(Err(_)) | Err(TryRecvError::Closed)) => self.alone_for(SOON),
            None => {}
        }
        self.coming = None;
        if !self.is_alone() {
            let (calls, peer) = (self.calls.clone(), self.peer.clone());
            let (tell, coming) = oneshot::channel();
            tokio::spawn(async move {
                // Who leads no more does not want it.
                let _ = tell.send(begin(&calls, &peer).await);
            });
            self.coming = Some(coming);
        }
    }

    /// Makes sure that there is a connection; `false`: the follower takes none.
    async fn ready(&mut self) -> Result<bool, RPCError<Raft>> {
        if self.sending().is_some() {
            return Ok(true);
        }
        if self.is_alone() {
            return Ok(false);
        }
        let begun = begin(&self.calls, &self.peer).await.map_err(|error| failure(&error))?;
        if begun.is_none() {
            self.alone_for(AGAIN);
        }
        *self.sending() = begun.map(Box::new);
        Ok(self.sending().is_some())
    }

    /// One call by itself.
    async fn post(
        &mut self,
        call: AppendEntriesRequest<Raft>,
        option: RPCOption,
    ) -> Result<StreamAppendResult<Raft>, RPCError<Raft>> {
        let (before, last) = (call.prev_log_id, call.entries.last().map(|entry| entry.log_id));
        Ok(match self.append_entries(call, option).await? {
            AppendEntriesResponse::Success => Ok(last.or(before)),
            AppendEntriesResponse::PartialSuccess(id) => Ok(id),
            AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
            AppendEntriesResponse::Conflict => match before {
                Some(before) => Err(StreamAppendError::Conflict(before)),
                None => return Err(broken("the follower has another beginning of the log, of which there is one")),
            },
        })
    }
}

fn broken(cause: impl std::fmt::Display) -> RPCError<Raft> {
    RPCError::Network(NetworkError::from_string(cause))
}

/// A call that is on its way.
struct Sent {
    /// By when it has to be answered.
    until: Instant,
    bytes: usize,
    at: Instant,
    /// Whether another one came after it that ends with the same entry. openraft takes the answer to this one for one to that as well, and with it that
    /// the follower listened to this leader when that one was made.
    is_repeated: bool,
}

impl Sent {
    /// Whether its answer would be taken for a newer one at a time when the follower may listen to another leader by now: then a read would be taken for
    /// the newest that is not. The answer to a later call says as much of entries.
    fn says_too_much(&self, now: Instant) -> bool {
        self.is_repeated && now.saturating_duration_since(self.at) >= OLD
    }
}

/// Calls that are sent, and their answers as they come.
pub(super) struct Session<'s, S> {
    link: &'s mut Link,
    calls: S,
    option: RPCOption,
    /// Nothing more is to be sent.
    is_over: bool,
    waiting: VecDeque<Sent>,
    /// What the follower was told is committed, and when.
    told: Option<(Option<LogId>, Instant)>,
    /// A call that tells him more, and when it goes, unless another one says as much before.
    held: Option<(AppendEntriesRequest<Raft>, Instant)>,
}

impl<S> Drop for Session<'_, S> {
    fn drop(&mut self) {
        // The next session would take the answers for its own.
        if !self.waiting.is_empty() {
            *self.link.sending() = None;
        }
    }
}

/// What comes next on a connection.
enum Next {
    Frame(Option<std::io::Result<bytes::BytesMut>>),
    Call(Option<AppendEntriesRequest<Raft>>),
    Held,
    Late,
    Quiet,
}

impl<'s, S: Stream<Item = AppendEntriesRequest<Raft>> + Send + Unpin + 'static> Session<'s, S> {
    pub(super) fn new(link: &'s mut Link, calls: S, option: RPCOption) -> Self {
        Self { link, calls, option, is_over: false, waiting: VecDeque::new(), told: None, held: None }
    }

    /// The answers, until the calls are at their end or one is no success.
    pub(super) fn answers(self) -> impl Stream<Item = Result<StreamAppendResult<Raft>, RPCError<Raft>>> + Send + 's {
        futures_util::stream::unfold(Some(self), |session| async move {
            let mut session = session?;
            match session.answer().await {
                Ok(Some(answer)) => {
                    let goes_on = answer.is_ok();
                    if !goes_on {
                        *session.link.sending() = None;
                    }
                    Some((Ok(answer), goes_on.then_some(session)))
                }
                Ok(None) => None,
                Err(error) => {
                    *session.link.sending() = None;
                    Some((Err(error), None))
                }
            }
        })
    }

    /// The next answer; none: the calls are at their end, and all were answered.
    async fn answer(&mut self) -> Result<Option<StreamAppendResult<Raft>>, RPCError<Raft>> {
        loop {
            if self.is_over && self.waiting.is_empty() && self.held.is_none() {
                return Ok(None);
            }
            let call = match self.next().await {
                Next::Frame(Some(Ok(frame))) => {
                    let Some(sent) = self.waiting.pop_front() else {
                        return Err(broken("an answer came to nothing"));
                    };
                    if frame.len() > MAX_ANSWER {
                        return Err(broken("the answer is too long"));
                    }
                    let streamed = serde_json::from_slice::<Streamed>(&frame)
                        .map_err(|error| broken(format!("the answer is not understood: {error}")))?;
                    let answer = streamed
                        .into_result()
                        .map_err(|refusal| RPCError::Unreachable(Unreachable::from_string(refusal)))?;
                    if answer.is_err() || !sent.says_too_much(Instant::now()) {
                        return Ok(Some(answer));
                    }
                    if self.waiting.is_empty() && self.held.is_none() {
                        return Err(broken("the last answer came late"));
                    }
                    continue;
                }
                // Nothing is lost by it as long as nothing was on its way: the next call makes a new one.
                Next::Frame(_) if self.waiting.is_empty() => {
                    *self.link.sending() = None;
                    continue;
                }
                Next::Frame(Some(Err(error))) => return Err(broken(format!("the stream broke: {error}"))),
                Next::Frame(None) => return Err(broken("the follower ended the stream")),
                Next::Late => return Err(broken("no answer in time")),
                Next::Quiet => {
                    self.send(Bytes::new(), PING).await?;
                    continue;
                }
                Next::Call(None) => {
                    self.is_over = true;
                    continue;
                }
                Next::Call(Some(call)) => {
                    if let Some(before) = self.waiting.back_mut().filter(|_| call.entries.is_empty()) {
                        before.is_repeated = true;
                    }
                    self.link.prepare();
                    match self.sooner_or_later(call) {
                        Some(call) => call,
                        None => continue,
                    }
                }
                Next::Held => match self.held.take() {
                    Some((call, _)) => {
                        // It ends with the same entry as the last one, and openraft may go on to make another that does.
                        if let Some(before) = self.waiting.back_mut() {
                            before.is_repeated = true;
                        }
                        call
                    }
                    None => continue,
                },
            };
            let goes_alone = call.entries.is_empty() && self.link.sending().is_none();
            if goes_alone || !self.link.ready().await? {
                return self.link.post(call, self.option.clone()).await.map(Some);
            }
            if self.told.is_none_or(|(told, _)| call.leader_commit > told) {
                self.told = Some((call.leader_commit, Instant::now()));
            }
            let frame =
                Bytes::from(serde_json::to_vec(&WireAppend::new(&call, self.link.calls.unheard())).map_err(broken)?);
            let limit = Link::limit(&call, &self.option) + on_the_way(frame.len());
            // Answers come in order: it waits for those before it, their way and their disk.
            let at = Instant::now();
            let begun = self.waiting.back().map_or(at, |before| before.until.max(at));
            self.waiting.push_back(Sent { until: begun + limit, bytes: frame.len(), at, is_repeated: false });
            self.send(frame, limit).await?;
        }
    }

    /// What of a call goes now. What it tells of commits may go later.
    fn sooner_or_later(&mut self, mut call: AppendEntriesRequest<Raft>) -> Option<AppendEntriesRequest<Raft>> {
        // This one tells as much. The first of several says when: they are not put off for ever.
        let then = self.held.take().map(|(_, then)| then);
        let may_wait =
            !self.link.is_for_signs && self.link.sending().is_some() && !self.link.calls.has_asked(self.link.peer.id);
        let Some((told, at)) = self.told.filter(|(told, _)| may_wait && call.leader_commit > *told) else {
            return Some(call);
        };
        let now = Instant::now();
        let Some(last) = call.entries.last().map(|entry| entry.log_id) else {
            self.held = Some((call, then.unwrap_or(now + TELL)));
            return None;
        };
        if now >= at + TELL {
            return Some(call);
        }
        let leader_commit = std::mem::replace(&mut call.leader_commit, told);
        let more =
            AppendEntriesRequest { vote: call.vote, prev_log_id: Some(last), entries: Vec::new(), leader_commit };
        self.held = Some((more, then.unwrap_or(at + TELL)));
        Some(call)
    }

    async fn next(&mut self) -> Next {
        let late = self.waiting.front().map(|sent| sent.until);
        let is_waiting = late.is_some();
        let bytes: usize = self.waiting.iter().map(|sent| sent.bytes).sum();
        let takes_calls = !self.is_over && self.waiting.len() < AT_A_TIME && bytes < BYTES;
        let held = self.held.as_ref().map(|(_, until)| *until);
        let calls = &mut self.calls;
        let sending = match self.link.sending() {
            // Nothing comes to take its place, or the connection is gone on which it was to be.
            sending if held.is_some() && (self.is_over || sending.is_none()) => return Next::Held,
            Some(sending) => sending,
            None => return Next::Call(calls.next().await),
        };
        tokio::select! {
            biased;
            frame = sending.frames.next() => Next::Frame(frame),
            call = calls.next(), if takes_calls => Next::Call(call),
            () = tokio::time::sleep_until(held.unwrap_or_else(Instant::now)), if held.is_some() => Next::Held,
            () = tokio::time::sleep_until(late.unwrap_or_else(|| Instant::now() + PING)) => {
                if is_waiting { Next::Late } else { Next::Quiet }
            }
        }
    }

    async fn send(&mut self, frame: Bytes, limit: Duration) -> Result<(), RPCError<Raft>> {
        let Some(sending) = self.link.sending() else { return Ok(()) };
        let cause = match tokio::time::timeout(limit, sending.frames.send(frame)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the follower takes nothing".into(),
        };
        Err(RPCError::Network(NetworkError::from_string(format!("the stream broke: {cause}"))))
    }
}
