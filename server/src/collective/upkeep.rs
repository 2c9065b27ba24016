//! What a member does again and again: the membership follows the records (where it leads), content that is missing is fetched, a
//! member that is reached elsewhere than the records say says so, and the keys are kept to those who are members.

use super::blobs::Fetcher;
use super::{holders, rotation};
use crate::late;
use crate::state::Member;
use crate::store::records::MemberRecord;
use crate::store::{Command, Outcome, Store as _, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The membership is looked at this often.
const MEMBERSHIP: Duration = Duration::from_millis(300);
/// Content is looked at this often.
const CONTENT: Duration = Duration::from_secs(2);

/// Goes on until `stop`.
pub async fn run(member: Arc<Member>, stop: CancellationToken) {
    let work = async {
        tokio::join!(
            membership(&member),
            content(&member),
            announce(&member),
            holders::offer(&member),
            rotation::keep(&member),
            late::deliver(&member)
        );
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

async fn membership(member: &Arc<Member>) {
    let mut said = String::new();
    loop {
        let records = member.view().and_then(|view| view.members());
        let done = match records {
            Ok(records) => match member.store.reconcile(&records).await {
                Ok(()) => replace(member, &records).await,
                error => error,
            },
            Err(error) => Err(error),
        };
        // A failure that lasts is said once.
        let text = done.err().map(|error| error.to_string()).unwrap_or_default();
        if !text.is_empty() && text != said {
            tracing::error!("the membership: {text}");
        }
        said = text;
        tokio::time::sleep(MEMBERSHIP).await;
    }
}

/// Removes who was replaced: once the new one votes, or, where no vote is at stake, once it is one of the members. Before, the old one
/// counts, so that the collective never needs a vote that it has not.
async fn replace(member: &Arc<Member>, records: &BTreeMap<u64, MemberRecord>) -> Result<(), StoreError> {
    let standing = member.store.standing();
    if standing.leader != Some(standing.number) {
        return Ok(());
    }
    let holds = |number: &u64, record: &MemberRecord| {
        let place = standing.members.get(number);
        !record.removed && place.is_some_and(|(_, votes)| *votes || !record.voter)
    };
    let mut replaced = Vec::new();
    for (number, record) in records {
        let old = record.replaces.and_then(|old| Some((old, records.get(&old)?)));
        // Who votes is replaced by one that votes.
        if let Some((old, before)) = old
            && holds(number, record)
            && !before.removed
            && (record.voter || !before.voter)
        {
            replaced.push((old, record.name.clone()));
        }
    }
    for (number, name) in replaced {
        if let Outcome::Refused(problem) = member.store.propose(Command::RemoveMember { number }).await? {
            return Err(StoreError::Leader(problem));
        }
        tracing::info!("member {number} was removed: {name} has its place");
    }
    Ok(())
}

async fn content(member: &Arc<Member>) {
    let (mut fetcher, mut missing) = (Fetcher::new(member), 0);
    loop {
        match fetcher.fill(member).await {
            Ok((came, left)) => {
                if came > 0 || left != missing {
                    tracing::info!("content: {came} blobs came, {left} are missing");
                }
                missing = left;
            }
            Err(error) => tracing::error!("content: {error:#}"),
        }
        tokio::time::sleep(CONTENT).await;
    }
}

/// Says where this member is reached, when its configuration is not what the records say.
async fn announce(member: &Arc<Member>) {
    let number = member.identity.number;
    loop {
        let record = member.view().and_then(|view| view.members()).ok().and_then(|mut all| all.remove(&number));
        match record {
            // It has not heard of itself yet.
            None => {}
            Some(record) if record.removed => {
                tracing::error!("{}", super::gate::REMOVED);
                return;
            }
            Some(record) if record.urls == member.config.urls => return,
            Some(_) => {
                let command = Command::MoveMember { number, urls: member.config.urls.clone() };
                match member.store.propose(command).await {
                    Ok(Outcome::Refused(problem)) => tracing::warn!("saying where this member is: {problem}"),
                    Ok(_) => return,
                    Err(error) => tracing::warn!("saying where this member is: {error}"),
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}
