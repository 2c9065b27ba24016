//! What a member does again and again: the membership follows the records, and the feature level the releases that members run (where it
//! leads); content that is missing is fetched; a member that is another than the records say (it is reached elsewhere, or runs another
//! release) says so; authorities are taken up; the keys are kept to those who are members; and others hear which nodes are alive.

use super::blobs::Fetcher;
use super::{alive, authorities, holders, rotation};
use crate::config::Config;
use crate::late;
use crate::state::Member;
use crate::store::records::MemberRecord;
use crate::store::{Command, Level, Outcome, Store as _, StoreError, level};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The membership is looked at this often.
const MEMBERSHIP: Duration = Duration::from_millis(300);
/// What a member says of itself is compared with the records this often.
const ANNOUNCE: Duration = Duration::from_secs(2);
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
            authorities::keep(&member),
            holders::look_around(&member),
            alive::tell(&member),
            late::deliver(&member),
            late::note_removal(&member)
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
                Ok(()) => match replace(member, &records).await {
                    Ok(()) => raise_level(member, &records).await,
                    error => error,
                },
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

/// Raises the feature level once every member's release knows the next one, those that do not vote among them.
async fn raise_level(member: &Arc<Member>, records: &BTreeMap<u64, MemberRecord>) -> Result<(), StoreError> {
    let standing = member.store.standing();
    if standing.leader != Some(standing.number) {
        return Ok(());
    }
    let next = level::next(member.view()?.level()?, records.values());
    // Its own record may be of a release that it ran before.
    let Some(level) = next.filter(|level| *level <= member.config.level()) else { return Ok(()) };
    if let Outcome::Refused(problem) = member.store.propose(Command::RaiseLevel { level }).await? {
        // One has gone back to an older release meanwhile.
        tracing::info!("the feature level stays: {problem}");
    } else {
        tracing::info!("feature level {level} from now on: every member runs a release that knows it");
    }
    Ok(())
}

async fn content(member: &Arc<Member>) {
    let mut fetcher = loop {
        match Fetcher::new(member) {
            Ok(fetcher) => break fetcher,
            Err(error) => tracing::error!("content: no threads to fetch it: {error}: it is tried again"),
        }
        tokio::time::sleep(CONTENT).await;
    };
    let mut missing = 0;
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

/// What this member would say of itself that the records do not say yet, at this feature level.
fn unsaid(number: u64, record: &MemberRecord, config: &Config, level: Level) -> Option<Command> {
    if record.level != config.level() {
        return Some(Command::TellLevel { number, level: config.level() });
    }
    let near = if level >= Level::NEAR { config.near.clone() } else { Vec::new() };
    (record.urls != config.urls || record.near != near).then(|| Command::MoveMember {
        number,
        urls: config.urls.clone(),
        near,
    })
}

/// Says what this member is, when the records say something else.
async fn announce(member: &Arc<Member>) {
    let number = member.identity.number;
    let mut said = String::new();
    loop {
        let known = member.view().and_then(|view| Ok((view.members()?.remove(&number), view.level()?)));
        match known {
            // It has not heard of itself yet.
            Err(_) | Ok((None, _)) => {}
            Ok((Some(record), _)) if record.removed => {
                member.calls.set_removed("this member's own records", super::gate::REMOVED);
                return;
            }
            Ok((Some(record), level)) => {
                if let Some(command) = unsaid(number, &record, &member.config, level) {
                    let failed = match member.store.propose(command).await {
                        Ok(Outcome::Refused(problem)) => problem.to_string(),
                        Ok(_) => String::new(),
                        Err(error) => error.to_string(),
                    };
                    // A failure that lasts is said once.
                    if !failed.is_empty() && failed != said {
                        tracing::warn!("saying what this member is: {failed}");
                    }
                    said = failed;
                }
            }
        }
        tokio::time::sleep(ANNOUNCE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        toml::from_str(&format!("urls = [\"https://10.0.0.1\"]\nnear = [\"10.0.0.0/24\"]\n{more}")).unwrap()
    }

    #[test]
    fn a_member_says_what_it_is_as_far_as_the_level_lets_it() {
        let (new, old) = (config(""), config("max_feature_level = 1\n"));
        let mut record = MemberRecord::only(vec![1].into(), vec![1].into(), "m1".into(), new.urls.clone());
        assert!(unsaid(1, &record, &old, Level::FIRST).is_none());
        let said =
            |record: &MemberRecord, config, level| unsaid(1, record, config, level).map(|command| command.level());
        assert!(matches!(
            unsaid(1, &record, &new, Level::FIRST),
            Some(Command::TellLevel { number: 1, level: Level::NEWEST })
        ));
        record.level = Level::NEWEST;
        assert_eq!(said(&record, &new, Level::FIRST), None, "what is near is of a newer level");
        assert_eq!(said(&record, &new, Level::NEAR), Some(Level::NEAR));
        record.near.clone_from(&new.near);
        assert_eq!(said(&record, &new, Level::NEAR), None);
        // It went back before the level rose, and moved.
        record.near.clear();
        assert!(matches!(unsaid(1, &record, &old, Level::FIRST), Some(Command::TellLevel { level: Level::FIRST, .. })));
        record.level = Level::FIRST;
        record.urls = vec!["https://10.0.0.2".into()];
        assert_eq!(said(&record, &old, Level::FIRST), Some(Level::FIRST));
    }
}
