//! What a member does again and again: the membership follows the records (where it leads), content that is missing is fetched, and a
//! member that is reached elsewhere than the records say says so.

use super::blobs;
use crate::state::Member;
use crate::store::{Command, Outcome, Store as _};
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
        tokio::join!(membership(&member), content(&member), announce(&member));
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
            Ok(records) => member.store.reconcile(&records).await,
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

async fn content(member: &Arc<Member>) {
    let mut missing = 0;
    loop {
        match blobs::fill(member).await {
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
                tracing::error!("this member was removed from the collective: set its state aside and join anew");
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
