//! Rotation of the X.509 authority (those of SSH: [`ssh_authorities`]): what an administrator asks for, and what each member does by itself. It takes up
//! what the records say, says so, and writes down what nodes have acknowledged; whoever leads drops an authority that is retired once no member
//! shows a certificate from it.

use super::gate::check_present;
use super::ssh_authorities;
use crate::authority;
use crate::secrets::wrap_authority;
use crate::state::{Member, audit_entry, now};
use crate::store::authorities::{AuthorityChange, AuthorityRecord, MAX_SAID, showing_older};
use crate::store::records::NodeRecord;
use crate::store::{Command, Level, Outcome};
use crate::trust::{first_root, text_of};
use anyhow::Context as _;
use moor_api::admin::{AuthorityCancelled, AuthorityKind, AuthorityRetired, AuthorityRotated};
use moor_api::ids::{NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The records are looked at this often.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// What failed is tried again after this time.
const AGAIN: Duration = Duration::from_secs(5);
/// Members may come and go while an authority is made: so often it is made anew.
pub(super) const TRIES: u32 = 5;
/// Who retires an authority is told how it ended, if that is so soon.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// Makes an authority beside the one in use.
///
/// # Errors
/// No majority answers; there are two already; this member was removed.
pub(crate) async fn rotate(member: &Member) -> Result<AuthorityRotated, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        member.store.linearize().await?;
        check_present(member)?;
        let made = next(member);
        let (first, new) =
            made.map_err(|error| Problem::new(Code::Internal, format!("making an authority: {error:#}")))?;
        let number = new.number;
        let entry = audit_entry("authority-rotated", &serde_json::json!({ "number": number }));
        let change = Box::new(AuthorityChange::Rotate { first, new }.into());
        match member.propose(Command::Audited { entry, change }).await {
            Ok(Outcome::Number(version)) => {
                tracing::info!("authority {number} is there; trust bundle {version} has it");
                return Ok(AuthorityRotated { number, version });
            }
            Ok(_) => return Err(Problem::new(Code::Internal, "a rotation has no number")),
            Err(problem) if problem.code == Code::Conflict && tries < TRIES && is_passing(member)? => {}
            Err(problem) => return Err(problem),
        }
    }
}

/// Whether a refusal may have been for what others did at the same moment: there is no second authority.
fn is_passing(member: &Member) -> Result<bool, Problem> {
    let view = member.view()?;
    let is_one = view.authorities()?.is_none_or(|(_, record)| record.list.len() < 2);
    Ok(is_one && view.level()? >= Level::AUTHORITIES)
}

/// The next authority for those who are members, and the first one where no record has it yet.
fn next(member: &Member) -> anyhow::Result<(Option<AuthorityRecord>, AuthorityRecord)> {
    let view = member.view()?;
    let first = if view.authorities()?.is_none() {
        let (root, made) = (first_root(member)?, member.site.created);
        Some(AuthorityRecord { number: 1, root, made, since: 1, wrapped: BTreeMap::new(), retiring: false })
    } else {
        None
    };
    let number = view.next_authority()?.context("there are no more numbers")?;
    let site = &member.site;
    let files = authority::make(site.collective, &site.name, number, site.created)?;
    let root = files.root().context("it has no root")?.to_owned();
    let members = view.members()?;
    let present = members.values().filter(|member| !member.removed);
    let wrapped = wrap_authority(&text_of(&files)?, AuthorityKind::X509, number, site.collective, present)?;
    Ok((first, AuthorityRecord { number, root, made: now(), since: 0, wrapped, retiring: false }))
}

/// Lets the new authority take over: members change to certificates from it, and then the old one is trusted no more. With `force`, nodes
/// that have not acknowledged the newest trust bundle are left behind.
///
/// # Errors
/// There is nothing to retire; members, or nodes that are not to be left behind, have not acknowledged; no majority answers.
pub(crate) async fn retire(member: &Member, force: bool) -> Result<AuthorityRetired, Problem> {
    let (number, version, left) = {
        let view = member.view()?;
        let nothing = || {
            let detail = "there is one authority, and nothing to retire: `moor authority rotate` makes another first";
            Problem::new(Code::Conflict, detail)
        };
        let (version, record) = view.authorities()?.ok_or_else(nothing)?;
        let old = record.list.first().filter(|_| record.list.len() > 1).ok_or_else(nothing)?;
        if old.retiring {
            let waits = waits_for(member, old.number)?.join(", ");
            let detail =
                format!("authority {} is retired already, and goes once {waits} shows the new one", old.number);
            return Err(Problem::new(Code::Conflict, detail));
        }
        let behind = view.nodes()?.into_iter().filter(|node| force && node.is_behind(version));
        (old.number, version, behind.map(|node| (node.id, node.name)).collect::<BTreeMap<_, _>>())
    };
    let names: Vec<NodeName> = left.values().cloned().collect();
    let ids: BTreeSet<_> = left.into_keys().collect();
    let entry = audit_entry("authority-retired", &serde_json::json!({ "number": number, "left_behind": names }));
    let change = Box::new(AuthorityChange::Retire { number, version, left: ids }.into());
    member.propose(Command::Audited { entry, change }).await?;
    tracing::info!("authority {number} is retired");
    let old_boot_files = old_boot_files(member)?;
    let end = Instant::now() + SOON;
    loop {
        let waits_for = waits_for(member, number)?;
        if waits_for.is_empty() || Instant::now() >= end {
            return Ok(AuthorityRetired { number, left_behind: names, waits_for, old_boot_files });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Takes a rotation back, as long as the new authority has not taken over.
///
/// # Errors
/// There is no such rotation; no majority answers; the collective's level is below [`Level::INCARNATIONS`].
pub(crate) async fn cancel(member: &Member) -> Result<AuthorityCancelled, Problem> {
    let number = {
        let record = member.view()?.authorities()?.map(|(_, record)| record);
        match record.as_ref().map(|record| &record.list[..]) {
            Some([old, new]) if !old.retiring => new.number,
            Some([old, new]) => {
                let detail = format!(
                    "authority {} has taken over from authority {} already: once that is through, `moor authority rotate` makes another",
                    new.number, old.number
                );
                return Err(Problem::new(Code::Conflict, detail));
            }
            _ => {
                let detail = "there is one authority, and nothing to cancel: `moor authority show`";
                return Err(Problem::new(Code::Conflict, detail));
            }
        }
    };
    let entry = audit_entry("authority-cancelled", &serde_json::json!({ "number": number }));
    let change = Box::new(AuthorityChange::Cancel { number }.into());
    match member.propose(Command::Audited { entry, change }).await? {
        Outcome::Number(version) => {
            tracing::info!("authority {number} is not wanted any more; trust bundle {version} is without it");
            Ok(AuthorityCancelled { number, version })
        }
        _ => Err(Problem::new(Code::Internal, "a change of the trust bundle has no number")),
    }
}

/// Members that keep an authority that is retired from being dropped.
fn waits_for(member: &Member, number: u32) -> Result<Vec<String>, Problem> {
    let view = member.view()?;
    let is_there = view.authorities()?.is_some_and(|(_, record)| record.list.iter().any(|one| one.number == number));
    if !is_there {
        return Ok(Vec::new());
    }
    let mut names = showing_older(view.members()?.values(), number.saturating_add(1));
    if names.is_empty() {
        // All have changed; the one that leads has not dropped it yet.
        names.push("the leader".into());
    }
    Ok(names)
}

/// Nodes that trust the newest authority, and began their boot with a bundle that does not have it.
pub(crate) fn old_boot_files(member: &Member) -> Result<Vec<NodeName>, Problem> {
    let view = member.view()?;
    let since = view.authorities()?.and_then(|(_, record)| record.list.last().map(|newest| newest.since)).unwrap_or(1);
    let is_old = |node: &NodeRecord| node.trust.is_some_and(|trust| trust.began < since && trust.now >= since);
    Ok(view.nodes()?.into_iter().filter(is_old).map(|node| node.name).collect())
}

/// Goes on for ever.
pub(super) async fn keep(member: &Arc<Member>) {
    let (mut said, mut waits) = (String::new(), None);
    loop {
        let failed = step(member, &mut waits).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        // A failure that lasts is said once.
        if !failed.is_empty() && failed != said {
            tracing::warn!("the authorities: {failed}");
        }
        tokio::time::sleep(if failed.is_empty() { LOOK } else { AGAIN }).await;
        said = failed;
    }
}

async fn step(member: &Arc<Member>, waits: &mut Option<NodeId>) -> anyhow::Result<()> {
    let taker = member.clone();
    tokio::task::spawn_blocking(move || taker.take_up()).await??;
    if member.trust.version() == 1 && member.trust.ssh().held.version == 1 {
        return Ok(());
    }
    tell(member).await?;
    write_down(member).await?;
    let standing = member.store.standing();
    if standing.leader == Some(standing.number) {
        drop_retired(member).await?;
        ssh_authorities::drop_retired(member, waits).await?;
    }
    Ok(())
}

/// Says what this member has taken up, where the records say something else.
async fn tell(member: &Member) -> anyhow::Result<()> {
    let number = member.identity.number;
    let held = member.trust.taken().held.clone();
    let Some(record) = member.view()?.members()?.remove(&number).filter(|record| !record.removed) else {
        return Ok(());
    };
    if (record.trust, record.shows) != (held.version, held.issuing) {
        let change = AuthorityChange::TakeUp { number, trust: held.version, shows: held.issuing };
        member.propose(change.into()).await.context("saying what this member trusts")?;
    }
    Ok(())
}

/// Writes down what nodes have said.
async fn write_down(member: &Member) -> anyhow::Result<()> {
    loop {
        let nodes = member.said.some(MAX_SAID);
        if nodes.is_empty() {
            return Ok(());
        }
        member
            .propose(AuthorityChange::Said { nodes: nodes.clone() }.into())
            .await
            .context("writing down what nodes trust")?;
        member.said.written(&nodes);
    }
}

/// As the leader.
async fn drop_retired(member: &Member) -> anyhow::Result<()> {
    let number = {
        let view = member.view()?;
        let Some((_, record)) = view.authorities()? else { return Ok(()) };
        let [old, next] = &record.list[..] else { return Ok(()) };
        if !old.retiring || !showing_older(view.members()?.values(), next.number).is_empty() {
            return Ok(());
        }
        old.number
    };
    member.propose(AuthorityChange::Drop { number }.into()).await.context("dropping an authority")?;
    tracing::info!("authority {number} is trusted no more");
    Ok(())
}
