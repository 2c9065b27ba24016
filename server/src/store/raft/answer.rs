//! What a member answers to the [calls](super::network) of another.

use super::follow::without_holes;
use super::network::{Call, Proposed};
use super::wire::{self, WireAppended, WireInstalled, WireVote, WireVoteRequest, WireVoted};
use super::{Level, Machine, Outcome, Raft, RaftSnapshot, SnapshotFile, StoreError, Vote, consensus};
use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use openraft::raft::{AppendEntriesResponse, VoteRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(body).map_err(|error| StoreError::Message(error.to_string()))
}

fn answered<T: Serialize>(answer: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(answer).map_err(|error| StoreError::Encode(error.to_string()))
}

/// Terms that a vote may be ahead of this member's: more than elections come to in the life of a collective. Terms only grow, so that one near the
/// end of the numbers would leave none for an election, on every member that hears of it.
const MAX_TERMS_AHEAD: u64 = 1 << 32;

pub(super) fn within_reach(raft: &openraft::Raft<Raft, Machine>, vote: &Vote) -> Result<(), StoreError> {
    let (term, own) = (vote.leader_id.term, raft.metrics().borrow_watched().current_term);
    if term > own.saturating_add(MAX_TERMS_AHEAD) {
        return Err(StoreError::Message(format!("term {term} is impossible: this member is at {own}")));
    }
    Ok(())
}

/// An answer, and what the call has shown.
pub(super) struct Answered {
    pub(super) answer: Vec<u8>,
    /// This member follows the one that called, who has not heard of a majority for so long.
    pub(super) heard: Option<Duration>,
}

/// Answers a call, in a release that knows levels up to `known`. `speaks` refuses numbers that are not the caller's.
pub(super) async fn answer(
    raft: &openraft::Raft<Raft, Machine>,
    call: Call,
    body: &[u8],
    known: Level,
    speaks: impl Fn(u64) -> Result<(), StoreError>,
) -> Result<Answered, StoreError> {
    let answer = match call {
        Call::Append => {
            let (request, unheard) = wire::append_from(body, known)?;
            speaks(request.vote.leader_id.voted_for)?;
            within_reach(raft, &request.vote)?;
            without_holes(&request)?;
            let response = raft.append_entries(request).await.map_err(consensus)?;
            let is_followed = !matches!(response, AppendEntriesResponse::HigherVote(_));
            let answer = answered(&WireAppended::from(response))?;
            return Ok(Answered { answer, heard: is_followed.then_some(unheard) });
        }
        Call::Vote | Call::PreVote => {
            let request = VoteRequest::<Raft>::from(parsed::<WireVoteRequest>(body)?);
            speaks(request.vote.leader_id.voted_for)?;
            within_reach(raft, &request.vote)?;
            let response = match call {
                Call::Vote => raft.vote(request).await,
                _ => raft.pre_vote(request).await,
            };
            answered(&WireVoted::from(response.map_err(consensus)?))?
        }
    };
    Ok(Answered { answer, heard: None })
}

/// The vote of a leader that sends a snapshot.
pub struct Leading(Vote);

impl Leading {
    /// `text` is JSON in hexadecimal digits. `speaks` refuses numbers that are not the caller's.
    pub(super) fn read(
        raft: &openraft::Raft<Raft, Machine>,
        text: &str,
        speaks: impl Fn(u64) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let text = hex::decode(text).map_err(|error| StoreError::Message(error.to_string()))?;
        let vote: Vote = parsed::<WireVote>(&text)?.into();
        speaks(vote.leader_id.voted_for)?;
        within_reach(raft, &vote)?;
        Ok(Self(vote))
    }
}

/// Takes a snapshot, in a release that knows levels up to `known`.
pub(super) async fn install(
    raft: &openraft::Raft<Raft, Machine>,
    Leading(vote): Leading,
    file: SnapshotFile,
    known: Level,
) -> Result<Vec<u8>, StoreError> {
    let path = file.path().to_owned();
    let meta = tokio::task::spawn_blocking(move || super::snapshot::meta(&std::fs::File::open(path)?, known))
        .await
        .map_err(consensus)?
        .map_err(super::snapshot::unread)?;
    let snapshot = RaftSnapshot { meta, snapshot: file };
    let response = raft.install_full_snapshot(vote, snapshot).await.map_err(consensus)?;
    answered(&WireInstalled::from(response))
}

/// Answers of a leader are JSON of this.
pub(crate) fn proposed(outcome: Option<(Outcome, u64)>) -> Result<Bytes, StoreError> {
    answered(&Proposed { outcome }).map(Into::into)
}
