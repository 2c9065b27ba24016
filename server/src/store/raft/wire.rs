//! How log entries, votes, memberships and the calls between members are written: an encoding of our own, in JSON, with a version.
//! Never openraft's serde, so that a new release of it changes neither a disk nor a wire.
//!
//! Fields and kinds are only ever added. A kind that is not known is refused, not skipped: a member that cannot apply a command must
//! not go on as if it had.

use super::{Entry, LogId, Membership, Peer, Raft, StoredMembership, Vote};
use crate::store::Command;
use openraft::EntryPayload;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

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
        Self { version: VERSION, id: entry.log_id.into(), payload }
    }
}

impl WireEntry<Command> {
    fn into_entry(self) -> Result<Entry, WireError> {
        if self.version != VERSION {
            return Err(WireError::Version(self.version));
        }
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
}

impl<'a> From<&'a AppendEntriesRequest<Raft>> for WireAppend<&'a Command> {
    fn from(request: &'a AppendEntriesRequest<Raft>) -> Self {
        Self {
            vote: (&request.vote).into(),
            previous: request.prev_log_id.map(Into::into),
            commit: request.leader_commit.map(Into::into),
            entries: request.entries.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<WireAppend<Command>> for AppendEntriesRequest<Raft> {
    type Error = WireError;
    fn try_from(wire: WireAppend<Command>) -> Result<Self, WireError> {
        Ok(Self {
            vote: wire.vote.into(),
            prev_log_id: wire.previous.map(Into::into),
            leader_commit: wire.commit.map(Into::into),
            entries: wire.entries.into_iter().map(WireEntry::into_entry).collect::<Result<_, _>>()?,
        })
    }
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
    pub(super) applied: Option<WireLogId>,
    pub(super) membership: WireStored,
}

impl WireSnapshotHead {
    pub(super) fn new(applied: Option<LogId>, membership: &StoredMembership) -> Self {
        Self { version: VERSION, applied: applied.map(Into::into), membership: membership.into() }
    }

    pub(super) fn into_meta(self) -> Result<super::SnapshotMeta, WireError> {
        if self.version != VERSION {
            return Err(WireError::Version(self.version));
        }
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

pub(super) fn entry_from(bytes: &[u8]) -> Result<Entry, WireError> {
    serde_json::from_slice::<WireEntry<Command>>(bytes)?.into_entry()
}
