//! How log entries, votes, memberships and the calls between members are written: an encoding of our own, in JSON, with a version.
//! Never openraft's serde, so that a new release of it changes neither a disk nor a wire.
//!
//! Fields and kinds are only ever added, each with a new [`Level`], which stands beside what is written: what is of a level that is not known
//! is refused, neither skipped nor read without what is new in it. A member that cannot apply a command must not go on as if it had.

#[cfg(test)]
mod tests;

use super::{Entry, LogId, Membership, Peer, Raft, StoredMembership, Vote};
use crate::store::{Command, Level, StoreError, level};
use openraft::EntryPayload;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult, VoteRequest,
    VoteResponse,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What a text is not.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// No such JSON.
    #[error("it does not parse: {0}")]
    Json(#[from] serde_json::Error),
    /// A later version's.
    #[error("it is of version {0}, and this member knows version 1 only: a newer release wrote it")]
    Version(u32),
    /// Members in it that it does not name.
    #[error("its membership is not possible: {0}")]
    Membership(String),
    /// A newer release's.
    #[error(transparent)]
    TooOld(Box<StoreError>),
}

impl From<WireError> for StoreError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::TooOld(error) => *error,
            error => Self::Message(error.to_string()),
        }
    }
}

impl WireError {
    /// Why an entry of the log cannot be read.
    pub(super) fn of_entry(self, index: u64) -> StoreError {
        match self {
            Self::TooOld(error) => *error,
            error => StoreError::Record { table: "entries".into(), key: index.to_string(), cause: error.to_string() },
        }
    }
}

/// Refuses what is above the level that this release knows.
fn check(found: Level, known: Level) -> Result<(), WireError> {
    level::check(found, known).map_err(|error| WireError::TooOld(Box::new(error)))
}

/// Version of everything here.
const VERSION: u32 = 1;

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct WireLogId {
    term: u64,
    index: u64,
}

impl From<LogId> for WireLogId {
    fn from(id: LogId) -> Self {
        Self { term: **id.committed_leader_id(), index: id.index() }
    }
}

impl From<WireLogId> for LogId {
    fn from(wire: WireLogId) -> Self {
        Self::new(wire.term.into(), wire.index)
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct WireVote {
    term: u64,
    candidate: u64,
    committed: bool,
}

impl From<&Vote> for WireVote {
    fn from(vote: &Vote) -> Self {
        Self { term: vote.leader_id.term, candidate: vote.leader_id.voted_for, committed: vote.committed }
    }
}

impl From<WireVote> for Vote {
    fn from(wire: WireVote) -> Self {
        if wire.committed {
            Self::new_committed(wire.term, wire.candidate)
        } else {
            Self::new(wire.term, wire.candidate)
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireMembership {
    /// Voters: one set, or two while it changes.
    voters: Vec<BTreeSet<u64>>,
    members: BTreeMap<u64, Peer>,
}

impl From<&Membership> for WireMembership {
    fn from(membership: &Membership) -> Self {
        Self {
            voters: membership.get_joint_config().clone(),
            members: membership.nodes().map(|(number, peer)| (*number, peer.clone())).collect(),
        }
    }
}

impl TryFrom<WireMembership> for Membership {
    type Error = WireError;
    fn try_from(wire: WireMembership) -> Result<Self, WireError> {
        if wire.voters.is_empty() && wire.members.is_empty() {
            return Ok(Self::default());
        }
        Self::new(wire.voters, wire.members).map_err(|error| WireError::Membership(error.to_string()))
    }
}

/// A membership, and which entry made it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireStored {
    at: Option<WireLogId>,
    membership: WireMembership,
}

impl From<&StoredMembership> for WireStored {
    fn from(stored: &StoredMembership) -> Self {
        Self { at: stored.log_id().map(Into::into), membership: stored.membership().into() }
    }
}

impl TryFrom<WireStored> for StoredMembership {
    type Error = WireError;
    fn try_from(wire: WireStored) -> Result<Self, WireError> {
        Ok(Self::new(wire.at.map(Into::into), wire.membership.try_into()?))
    }
}

/// `C` is a command: one that is read, or borrowed to be written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WirePayload<C> {
    Blank,
    Command(C),
    Membership(WireMembership),
}

/// An entry of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireEntry<C> {
    version: u32,
    /// What a release has to know to apply it.
    #[serde(default)]
    level: Level,
    id: WireLogId,
    payload: WirePayload<C>,
}

impl<'a> From<&'a Entry> for WireEntry<&'a Command> {
    fn from(entry: &'a Entry) -> Self {
        let payload = match &entry.payload {
            EntryPayload::Blank => WirePayload::Blank,
            EntryPayload::Normal(command) => WirePayload::Command(command),
            EntryPayload::Membership(membership) => WirePayload::Membership(membership.into()),
        };
        let level = if let EntryPayload::Normal(command) = &entry.payload { command.level() } else { Level::FIRST };
        Self { version: VERSION, level, id: entry.log_id.into(), payload }
    }
}

impl WireEntry<Command> {
    fn into_entry(self, known: Level) -> Result<Entry, WireError> {
        if self.version != VERSION {
            return Err(WireError::Version(self.version));
        }
        check(self.level, known)?;
        let payload = match self.payload {
            WirePayload::Blank => EntryPayload::Blank,
            WirePayload::Command(command) => EntryPayload::Normal(command),
            WirePayload::Membership(membership) => EntryPayload::Membership(membership.try_into()?),
        };
        Ok(Entry { log_id: self.id.into(), payload })
    }
}

/// `POST /member/v1/append`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireAppend<C> {
    vote: WireVote,
    previous: Option<WireLogId>,
    commit: Option<WireLogId>,
    entries: Vec<WireEntry<C>>,
    /// For so many milliseconds the leader has not heard of a majority; none: it is of a release that does not say. Nothing of the log depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unheard: Option<u64>,
}

impl<'a> WireAppend<&'a Command> {
    /// `unheard`: for how long the leader has not heard of a majority, if that is known.
    pub(super) fn new(request: &'a AppendEntriesRequest<Raft>, unheard: Option<Duration>) -> Self {
        Self {
            vote: (&request.vote).into(),
            previous: request.prev_log_id.map(Into::into),
            commit: request.leader_commit.map(Into::into),
            entries: request.entries.iter().map(Into::into).collect(),
            unheard: unheard.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// Of a release that knows levels up to `known`; and for how long the leader has not heard of a majority.
pub(super) fn append_from(bytes: &[u8], known: Level) -> Result<(AppendEntriesRequest<Raft>, Duration), WireError> {
    let wire: WireAppend<Command> = read::<_, LevelsOnly>(bytes, known)?;
    let unheard = Duration::from_millis(wire.unheard.unwrap_or(0));
    let request = AppendEntriesRequest {
        vote: wire.vote.into(),
        prev_log_id: wire.previous.map(Into::into),
        leader_commit: wire.commit.map(Into::into),
        entries: wire.entries.into_iter().map(|entry| entry.into_entry(known)).collect::<Result<_, _>>()?,
    };
    Ok((request, unheard))
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WireAppended {
    Success,
    Partial(Option<WireLogId>),
    Conflict,
    HigherVote(WireVote),
}

impl From<AppendEntriesResponse<Raft>> for WireAppended {
    fn from(response: AppendEntriesResponse<Raft>) -> Self {
        match response {
            AppendEntriesResponse::Success => Self::Success,
            AppendEntriesResponse::PartialSuccess(id) => Self::Partial(id.map(Into::into)),
            AppendEntriesResponse::Conflict => Self::Conflict,
            AppendEntriesResponse::HigherVote(vote) => Self::HigherVote((&vote).into()),
        }
    }
}

impl From<WireAppended> for AppendEntriesResponse<Raft> {
    fn from(wire: WireAppended) -> Self {
        match wire {
            WireAppended::Success => Self::Success,
            WireAppended::Partial(id) => Self::PartialSuccess(id.map(Into::into)),
            WireAppended::Conflict => Self::Conflict,
            WireAppended::HigherVote(vote) => Self::HigherVote(vote.into()),
        }
    }
}

/// An answer on a [stream](super::stream): every one that is no `matched` is the last.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Streamed {
    /// All up to this entry is on the follower's disk.
    Matched(Option<WireLogId>),
    Conflict(WireLogId),
    HigherVote(WireVote),
    /// In words.
    Refused(String),
}

impl Streamed {
    pub(super) fn refused(error: &impl std::fmt::Display) -> Self {
        Self::Refused(error.to_string())
    }

    /// As openraft has it; a refusal is the error.
    pub(super) fn into_result(self) -> Result<StreamAppendResult<Raft>, String> {
        Ok(match self {
            Self::Matched(id) => Ok(id.map(Into::into)),
            Self::Conflict(id) => Err(StreamAppendError::Conflict(id.into())),
            Self::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote.into())),
            Self::Refused(why) => return Err(why),
        })
    }
}

impl From<&StreamAppendResult<Raft>> for Streamed {
    fn from(result: &StreamAppendResult<Raft>) -> Self {
        match result {
            Ok(id) => Self::Matched(id.map(Into::into)),
            Err(StreamAppendError::Conflict(id)) => Self::Conflict((*id).into()),
            Err(StreamAppendError::HigherVote(vote)) => Self::HigherVote(vote.into()),
        }
    }
}

/// `POST /member/v1/vote` and `pre-vote`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireVoteRequest {
    vote: WireVote,
    last: Option<WireLogId>,
    #[serde(default)]
    transfer: bool,
}

impl From<&VoteRequest<Raft>> for WireVoteRequest {
    fn from(request: &VoteRequest<Raft>) -> Self {
        Self {
            vote: (&request.vote).into(),
            last: request.last_log_id.map(Into::into),
            transfer: request.leadership_transfer,
        }
    }
}

impl From<WireVoteRequest> for VoteRequest<Raft> {
    fn from(wire: WireVoteRequest) -> Self {
        let mut request = Self::new(wire.vote.into(), wire.last.map(Into::into));
        request.leadership_transfer = wire.transfer;
        request
    }
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireVoted {
    vote: WireVote,
    granted: bool,
    last: Option<WireLogId>,
}

impl From<VoteResponse<Raft>> for WireVoted {
    fn from(response: VoteResponse<Raft>) -> Self {
        Self {
            vote: (&response.vote).into(),
            granted: response.vote_granted,
            last: response.last_log_id.map(Into::into),
        }
    }
}

impl From<WireVoted> for VoteResponse<Raft> {
    fn from(wire: WireVoted) -> Self {
        Self::new(Vote::from(wire.vote), wire.last.map(Into::into), wire.granted)
    }
}

/// What a snapshot is of: the first line of its file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WireSnapshotHead {
    pub(super) version: u32,
    /// The collective's.
    #[serde(default)]
    pub(super) level: Level,
    pub(super) applied: Option<WireLogId>,
    pub(super) membership: WireStored,
}

impl WireSnapshotHead {
    pub(super) fn new(level: Level, applied: Option<LogId>, membership: &StoredMembership) -> Self {
        Self { version: VERSION, level, applied: applied.map(Into::into), membership: membership.into() }
    }

    pub(super) fn into_meta(self, known: Level) -> Result<super::SnapshotMeta, WireError> {
        if self.version != VERSION {
            return Err(WireError::Version(self.version));
        }
        check(self.level, known)?;
        Ok(super::SnapshotMeta {
            last_log_id: self.applied.map(Into::into),
            last_membership: self.membership.try_into()?,
        })
    }
}

/// The answer to `POST /member/v1/snapshot`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireInstalled {
    vote: WireVote,
}

impl From<SnapshotResponse<Raft>> for WireInstalled {
    fn from(response: SnapshotResponse<Raft>) -> Self {
        Self { vote: (&response.vote).into() }
    }
}

impl From<WireInstalled> for SnapshotResponse<Raft> {
    fn from(wire: WireInstalled) -> Self {
        Self::new(wire.vote.into())
    }
}

pub(super) fn entry_bytes(entry: &Entry) -> Result<Vec<u8>, WireError> {
    Ok(serde_json::to_vec(&WireEntry::from(entry))?)
}

/// Of a release that knows levels up to `known`.
pub(super) fn entry_from(bytes: &[u8], known: Level) -> Result<Entry, WireError> {
    read::<WireEntry<Command>, LevelOnly>(bytes, known)?.into_entry(known)
}

/// What is left of an entry, or of several, for who does not understand the rest.
trait Levelled: DeserializeOwned {
    fn newest(&self) -> Level;
}

#[derive(Deserialize)]
struct LevelOnly {
    #[serde(default)]
    level: Level,
}

impl Levelled for LevelOnly {
    fn newest(&self) -> Level {
        self.level
    }
}

#[derive(Deserialize)]
struct LevelsOnly {
    entries: Vec<LevelOnly>,
}

impl Levelled for LevelsOnly {
    fn newest(&self) -> Level {
        self.entries.iter().map(|entry| entry.level).max().unwrap_or_default()
    }
}

/// Where it does not parse because it is a newer release's, that is the reason.
fn read<T: DeserializeOwned, L: Levelled>(bytes: &[u8], known: Level) -> Result<T, WireError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let newest = serde_json::from_slice::<L>(bytes).map(|only| only.newest()).unwrap_or_default();
        check(newest, known).err().unwrap_or(WireError::Json(error))
    })
}
