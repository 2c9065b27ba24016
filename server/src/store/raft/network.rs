//! Calls between members: `/member/v1`, each a POST over TLS on which both sides show a member's certificate.

#[cfg(test)]
pub(super) mod tests;

use super::pool::Pool;
use super::stream::{Coming, Sending, Session};
use super::wire::{WireAppend, WireAppended, WireInstalled, WireVote, WireVoteRequest, WireVoted};
use super::{Command, Outcome, Peer, Raft, RaftSnapshot, SnapshotFile, StoreError, Vote, consensus};
use bytes::Bytes;
use futures_util::Stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use moor_api::client::member::MemberConnection;
use moor_api::client::{Body, ClientError};
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::problem::Code;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, VoteRequest, VoteResponse,
};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::SetOnce;
use tokio_stream::StreamExt as _;
use tokio_util::io::ReaderStream;

/// A connection comes about in this time, or not at all.
const CONNECT: Duration = Duration::from_secs(2);
/// A change is answered within this time.
const ANSWER: Duration = Duration::from_secs(20);
/// The slowest link that members are joined by, in bytes per millisecond: 1 Mbit/s.
const SLOWEST: u64 = 125;
/// Longest answer.
const MAX_ANSWER: usize = 1 << 20;
/// The call that a connection begins with.
pub(crate) const INTRODUCE: &str = "/member/v1/introduce";

/// What a member asks another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Take entries of the log.
    Append,
    /// Vote.
    Vote,
    /// Would you vote?
    PreVote,
}

impl Call {
    /// The path's last part.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Vote => "vote",
            Self::PreVote => "pre-vote",
        }
    }

    pub(crate) fn path(self) -> String {
        format!("/member/v1/{}", self.name())
    }
}

/// A change, as it is passed on to the leader.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Proposed {
    /// What it did; none: this member does not lead, and nothing was proposed.
    pub(crate) outcome: Option<(Outcome, u64)>,
}

/// How other members are reached.
pub struct Calls {
    collective: CollectiveId,
    tls: RwLock<Arc<ClientConfig>>,
    /// The body of the call that begins each connection: who this member is, for those that have not heard of it.
    introduction: Option<Bytes>,
    /// For all calls but those of Raft.
    pool: Pool,
    /// Members that were not reached when they were last called.
    lost: Mutex<HashSet<MemberId>>,
    /// When each member asked this one for something last, as the leader.
    asked: Mutex<HashMap<MemberId, Instant>>,
    /// That this member was removed, in words, once it has heard of it.
    removed: SetOnce<String>,
    /// Says for how long this member has not heard of a majority, while it leads: it tells its followers, who hear of nobody else.
    unheard: OnceLock<Unheard>,
}

/// Says for how long a leader has not heard of a majority.
type Unheard = Box<dyn Fn() -> Option<Duration> + Send + Sync>;

/// A member that has asked the leader for something waits, for so long, to be told of it.
const WAITS: Duration = Duration::from_secs(1);

impl Calls {
    /// `tls` shows this member's certificate; `introduction` is what it begins each connection with, where it has to.
    #[must_use]
    pub fn new(collective: CollectiveId, tls: Arc<ClientConfig>, introduction: Option<Bytes>) -> Self {
        let (tls, pool, lost) = (RwLock::new(tls), Pool::default(), Mutex::default());
        Self {
            collective,
            tls,
            introduction,
            pool,
            lost,
            asked: Mutex::default(),
            removed: SetOnce::new(),
            unheard: OnceLock::new(),
        }
    }

    /// Why this member is none any more; none: it is one, as far as it has heard.
    #[must_use]
    pub fn removed(&self) -> Option<&str> {
        self.removed.get().map(String::as_str)
    }

    /// Returns once [`Self::removed`] is known.
    pub(crate) async fn hears_of_removal(&self) {
        self.removed.wait().await;
    }

    /// This member is none any more, as `who` says; there is no way back.
    pub(crate) fn set_removed(&self, who: &str, why: &str) {
        if self.removed.set(why.to_owned()).is_ok() {
            tracing::error!("{who}: {why}. Nodes are not answered any more");
        }
    }

    /// Others are the first to know that this member was removed while it was away.
    fn looks_for_removal<T>(&self, peer: &Peer, answer: &Result<T, ClientError>) {
        if let Err(ClientError::Problem(problem)) = answer
            && problem.code == Code::Removed
        {
            self.set_removed(&format!("member {}", peer.name), &problem.detail);
        }
    }

    /// From now on followers are told for how long this member has not heard of a majority.
    pub(super) fn tell_unheard(&self, unheard: impl Fn() -> Option<Duration> + Send + Sync + 'static) {
        // A store is opened once with its calls.
        let _ = self.unheard.set(Box::new(unheard));
    }

    /// For how long this member, which leads, has not heard of a majority; none: that is not known.
    pub(super) fn unheard(&self) -> Option<Duration> {
        self.unheard.get().and_then(|unheard| unheard())
    }

    /// A member asks this one, as the leader, for a change, or for what is newest.
    pub(crate) fn asks(&self, member: MemberId) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(member, Instant::now());
    }

    /// Whether it did lately.
    pub(super) fn has_asked(&self, member: MemberId) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.get(&member).is_some_and(|then| then.elapsed() < WAITS)
    }

    /// New connections are made with this from now on. Those that stand were good when they were made, and stay.
    pub(crate) fn set_tls(&self, tls: Arc<ClientConfig>) {
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
    }

    /// For a member that is alone: it calls nobody, and believes nobody.
    ///
    /// # Errors
    /// The provider has no TLS 1.3.
    pub fn to_nobody() -> Result<Arc<Self>, StoreError> {
        let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(consensus)?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        Ok(Arc::new(Self::new(CollectiveId::from_bytes([0; 16]), Arc::new(tls), None)))
    }

    /// Members that were not reached when they were last called.
    #[must_use]
    pub fn lost(&self) -> HashSet<MemberId> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether that is news.
    fn set_lost(&self, member: MemberId, is_lost: bool) -> bool {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if is_lost { lost.insert(member) } else { lost.remove(&member) }
    }

    fn reached(&self, peer: &Peer) {
        if self.set_lost(peer.id, false) {
            tracing::info!("member {} is reached again", peer.name);
        }
    }

    /// A new connection, at the first of its addresses where it answers and is itself.
    ///
    /// # Errors
    /// It is not reached, or another member answers there.
    pub async fn connect(&self, peer: &Peer) -> Result<MemberConnection, ClientError> {
        let mut last = ClientError::Config(format!("member {} has no address", peer.name));
        let tls = self.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        for url in &peer.urls {
            match MemberConnection::connect(url, self.collective, tls.clone(), CONNECT).await {
                Ok(mut connection) if connection.member() == peer.id && connection.key() == peer.key.0 => {
                    self.reached(peer);
                    if let Some(introduction) = &self.introduction {
                        // Who does not believe it says so again with the call that follows.
                        let _ = connection.post(INTRODUCE, introduction.clone(), MAX_ANSWER).await;
                    }
                    return Ok(connection);
                }
                Ok(connection) if connection.member() == peer.id => {
                    last = ClientError::Config(format!(
                        "{url} calls itself member {}, and has another key than that has: it is somebody else",
                        peer.name
                    ));
                }
                Ok(connection) => {
                    last = ClientError::Config(format!(
                        "{url} is member {} and not {} ({})",
                        connection.member(),
                        peer.id,
                        peer.name
                    ));
                }
                Err(error) => last = error,
            }
        }
        // Said once, however often it is tried.
        if self.set_lost(peer.id, true) {
            tracing::warn!("member {} is not reached: {last}", peer.name);
        }
        Err(last)
    }

    /// A POST with a JSON body, answered within `limit`.
    ///
    /// # Errors
    /// No connection, no answer in time, a refusal.
    pub async fn post<A: DeserializeOwned>(
        &self,
        peer: &Peer,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<A, ClientError> {
        self.post_by(&self.pool, peer, path, body, limit).await
    }

    /// The same over a connection of this pool, or over a new one that comes into it.
    async fn post_by<A: DeserializeOwned>(
        &self,
        pool: &Pool,
        peer: &Peer,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<A, ClientError> {
        let call = async {
            let mut connection = match pool.take(peer.id) {
                Some(connection) => connection,
                None => self.connect(peer).await?,
            };
            connection.patience(limit);
            connection.set_request_id(crate::observe::request_id().as_deref());
            let answer = connection.post(path, body.into(), MAX_ANSWER).await;
            let is_good = match &answer {
                Err(ClientError::Broken { .. }) => false,
                // Who this member is to the other one was found when they connected: its clock, or the other's, may have been wrong then.
                Err(ClientError::Problem(problem)) => !matches!(problem.code, Code::Forbidden | Code::Removed),
                _ => true,
            };
            self.looks_for_removal(peer, &answer);
            if is_good {
                // Also over a connection that stood all the while: one that could not be made, when much was to be done, says little.
                self.reached(peer);
                pool.put_back(connection);
            }
            answer
        };
        let answer = tokio::time::timeout(limit, call).await.map_err(|_| ClientError::Broken {
            call: path.to_owned(),
            cause: format!("no answer within {} ms", limit.as_millis()),
        })??;
        serde_json::from_slice(&answer)
            .map_err(|error| ClientError::Answer { call: path.to_owned(), cause: error.to_string() })
    }

    /// Passes a change on to the leader. `None`: nothing was proposed.
    pub(super) async fn propose(&self, leader: &Peer, command: &Command) -> Result<Option<(Outcome, u64)>, StoreError> {
        let body = serde_json::to_vec(command).map_err(|error| StoreError::Encode(error.to_string()))?;
        match self.post::<Proposed>(leader, "/member/v1/propose", body, ANSWER).await {
            Ok(proposed) => Ok(proposed.outcome),
            Err(ClientError::Connect { .. } | ClientError::Config(_)) => Ok(None),
            Err(ClientError::Problem(problem)) => Err(StoreError::Leader(problem)),
            // It may have been proposed.
            Err(_) => Err(StoreError::Unknown),
        }
    }

    pub(super) async fn read_index(&self, leader: &Peer) -> Result<u64, ClientError> {
        self.post(leader, "/member/v1/read-index", Vec::new(), ANSWER).await
    }
}

/// Connections for openraft. Its tasks make them, so that [its thread](super::own) drives them, and nobody else takes one: no sign of life and no vote
/// waits for what other threads are busy with here.
#[derive(Clone)]
pub(super) struct Network {
    calls: Arc<Calls>,
    pool: Arc<Pool>,
}

impl Network {
    pub(super) fn new(calls: Arc<Calls>) -> Self {
        Self { calls, pool: Arc::default() }
    }

    pub(super) fn link(&self, peer: Peer, is_for_signs: bool) -> Link {
        let (calls, pool) = (self.calls.clone(), self.pool.clone());
        Link { calls, pool, peer, sending: Mutex::default(), alone_until: None, is_for_signs, coming: None }
    }
}

impl RaftNetworkFactory<Raft> for Network {
    type Network = Link;

    async fn new_client(&mut self, _: u64, node: &Peer) -> Link {
        self.link(node.clone(), false)
    }

    async fn new_heartbeat_client(&mut self, _: u64, node: &Peer) -> Link {
        self.link(node.clone(), true)
    }
}

/// Calls to one member.
pub(super) struct Link {
    pub(super) calls: Arc<Calls>,
    pool: Arc<Pool>,
    pub(super) peer: Peer,
    /// The connection for entries, as long as there is one. The lock is never waited for: it makes a link one that may be shared.
    sending: Mutex<Option<Box<Sending>>>,
    /// Until then the follower, which takes no streams, is not asked whether it does.
    pub(super) alone_until: Option<Instant>,
    /// Whether only signs of life go by it.
    pub(super) is_for_signs: bool,
    /// For those, the connection that is being made.
    pub(super) coming: Option<Coming>,
}

pub(super) fn failure(error: &ClientError) -> RPCError<Raft> {
    match error {
        // A member that cannot be reached is asked again after a pause, the others at once.
        ClientError::Connect { .. } | ClientError::Config(_) | ClientError::Problem(_) => {
            RPCError::Unreachable(Unreachable::from_string(error))
        }
        _ => RPCError::Network(NetworkError::from_string(error)),
    }
}

/// What openraft makes of calls that are sent one after the other: their answers.
type Answers<'s> = Pin<Box<dyn Stream<Item = Result<StreamAppendResult<Raft>, RPCError<Raft>>> + Send + 's>>;
type Opening<'s> = Pin<Box<dyn Future<Output = Result<Answers<'s>, RPCError<Raft>>> + Send + 's>>;

/// How long so many bytes may be on their way.
pub(super) fn on_the_way(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / SLOWEST)
}

impl Link {
    pub(super) fn sending(&mut self) -> &mut Option<Box<Sending>> {
        self.sending.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// By when entries have to be answered, besides the time that they are on their way. They have to reach the disk there; a sign of life has not.
    pub(super) fn limit(call: &AppendEntriesRequest<Raft>, option: &RPCOption) -> Duration {
        if call.entries.is_empty() { option.hard_ttl() } else { option.hard_ttl().max(CONNECT) }
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        call: Call,
        request: &Q,
        limit: Duration,
    ) -> Result<A, RPCError<Raft>> {
        let body = serde_json::to_vec(request).map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        let limit = limit + on_the_way(body.len());
        let answer = self.calls.post_by(&self.pool, &self.peer, &call.path(), body, limit).await;
        answer.map_err(|error| failure(&error))
    }
}

impl RaftNetworkV2<Raft> for Link {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Raft>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Raft>, RPCError<Raft>> {
        let limit = Self::limit(&rpc, &option);
        self.call::<_, WireAppended>(Call::Append, &WireAppend::new(&rpc, self.calls.unheard()), limit)
            .await
            .map(Into::into)
    }

    fn stream_append<'s, S>(&'s mut self, calls: S, option: RPCOption) -> Opening<'s>
    where
        S: Stream<Item = AppendEntriesRequest<Raft>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            let answers: Answers<'s> = Box::pin(Session::new(self, calls, option).answers());
            Ok(answers)
        })
    }

    async fn vote(&mut self, rpc: VoteRequest<Raft>, option: RPCOption) -> Result<VoteResponse<Raft>, RPCError<Raft>> {
        self.call::<_, WireVoted>(Call::Vote, &WireVoteRequest::from(&rpc), option.hard_ttl()).await.map(Into::into)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Raft>,
        option: RPCOption,
    ) -> Result<VoteResponse<Raft>, RPCError<Raft>> {
        self.call::<_, WireVoted>(Call::PreVote, &WireVoteRequest::from(&rpc), option.hard_ttl()).await.map(Into::into)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Raft>, StreamingError<Raft>> {
        let lost = |error: &ClientError| StreamingError::Unreachable(Unreachable::from_string(error));
        let send = async {
            let vote = serde_json::to_string(&WireVote::from(&vote))
                .map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
            let mut connection = self.calls.connect(&self.peer).await.map_err(|error| lost(&error))?;
            connection.patience(option.hard_ttl());
            let file = tokio::fs::File::from_std(snapshot.snapshot.into_file());
            let frames = ReaderStream::with_capacity(file, 1 << 18).map(|part| {
                part.map(Frame::data).map_err(|error| -> Box<dyn std::error::Error + Send + Sync> { Box::new(error) })
            });
            let body: Body = StreamBody::new(frames).boxed();
            let path = format!("/member/v1/snapshot?vote={}", hex::encode(vote));
            let answer = connection.post_body(&path, body, MAX_ANSWER).await.map_err(|error| lost(&error))?;
            let installed: WireInstalled =
                serde_json::from_slice(&answer).map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
            Ok(installed.into())
        };
        tokio::select! {
            closed = cancel => Err(closed.into()),
            sent = send => sent,
        }
    }
}
