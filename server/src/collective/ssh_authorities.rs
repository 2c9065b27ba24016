//! Rotation of the SSH authorities: what an administrator asks for, and what the member that leads does by itself: it drops a host authority that is
//! retired once no node that is waited for has a certificate from it. What each member takes up is in [`trust`](crate::trust).

use super::authorities::{LOOK, SOON, TRIES};
use super::gate::check_present;
use crate::authority;
use crate::secrets::wrap_authority;
use crate::state::{Member, audit_entry, now};
use crate::store::authorities::AuthorityChange;
use crate::store::authorities::named;
use crate::store::authorities::ssh::{SshAuthoritiesRecord, SshAuthorityRecord, SshChange, nodes_behind};
use crate::store::records::NodeRecord;
use crate::store::{Command, Level, Outcome, tables};
use anyhow::Context as _;
use moor_api::admin::{AuthorityKind, AuthorityRetired, AuthorityRotated, SshRole};
use moor_api::ids::{NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// Proposes a change with its line of the audit log; the outcome is the version.
async fn change(member: &Member, what: &str, fields: serde_json::Value, change: SshChange) -> Result<u64, Problem> {
    let entry = audit_entry(what, &fields);
    let change = Box::new(AuthorityChange::Ssh { change }.into());
    match member.propose(Command::Audited { entry, change }).await? {
        Outcome::Number(version) => Ok(version),
        _ => Err(Problem::new(Code::Internal, "a change of the SSH authorities has no number")),
    }
}

/// Makes an authority beside the one in use.
///
/// # Errors
/// No majority answers; there are two already; this member was removed.
pub(crate) async fn rotate(member: &Member, role: SshRole) -> Result<AuthorityRotated, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        member.store.linearize().await?;
        check_present(member)?;
        let made = next(member, role);
        let (first, new) =
            made.map_err(|error| Problem::new(Code::Internal, format!("making an SSH authority: {error:#}")))?;
        let number = new.number;
        let fields = serde_json::json!({ "kind": AuthorityKind::Ssh(role).to_string(), "number": number });
        match change(member, "authority-rotated", fields, SshChange::Rotate { role, first, new }).await {
            Ok(version) => {
                tracing::info!("SSH {role} authority {number} is there; version {version} of them has it");
                return Ok(AuthorityRotated { number, version });
            }
            Err(problem) if problem.code == Code::Conflict && tries < TRIES && is_passing(member, role)? => {}
            Err(problem) => return Err(problem),
        }
    }
}

/// Whether a refusal may have been for what others did at the same moment: there is no second authority.
fn is_passing(member: &Member, role: SshRole) -> Result<bool, Problem> {
    let view = member.view()?;
    let is_one = view.ssh_authorities()?.1.is_none_or(|record| record.of(role).len() < 2);
    Ok(is_one && view.level()? >= Level::SSH_AUTHORITIES)
}

/// The next authority for those who are members, and the first ones where no record has them yet.
fn next(member: &Member, role: SshRole) -> anyhow::Result<(Option<SshAuthoritiesRecord>, SshAuthorityRecord)> {
    let view = member.view()?;
    let first = match view.ssh_authorities()? {
        (_, Some(_)) => None,
        (version, None) => {
            let held = member.trust.ssh();
            let of = |role| {
                let first = held.lines(role).iter().take(1).map(|line| SshAuthorityRecord {
                    number: 1,
                    public: line.clone(),
                    made: member.site.created,
                    since: 1,
                    wrapped: BTreeMap::new(),
                    retired: None,
                    left: BTreeSet::new(),
                });
                first.collect()
            };
            Some(SshAuthoritiesRecord { version, host: of(SshRole::Host), user: of(SshRole::User) })
        }
    };
    let number = view.next_ssh_authority(role)?.context("there are no more numbers")?;
    let site = &member.site;
    let (private, public) = authority::make_ssh(&site.name, role, number)?;
    let members = view.members()?;
    let present = members.values().filter(|member| !member.removed);
    let wrapped = wrap_authority(private.as_bytes(), AuthorityKind::Ssh(role), number, site.collective, present)?;
    let (retired, left) = (None, BTreeSet::new());
    Ok((first, SshAuthorityRecord { number, public, made: now(), since: 0, wrapped, retired, left }))
}

/// Lets the new authority take over: of users, the old one is trusted no more; of hosts, it is until nodes have certificates from the new one. With
/// `force`, nodes that have not acknowledged are not waited for.
///
/// # Errors
/// There is nothing to retire; nodes that are not to be left behind have not acknowledged; no majority answers.
pub(crate) async fn retire(member: &Member, role: SshRole, force: bool) -> Result<AuthorityRetired, Problem> {
    let (number, left) = {
        let view = member.view()?;
        let nothing = || {
            let detail = format!(
                "there is one SSH {role} authority, and nothing to retire: `moor authority rotate ssh-{role}` makes another first"
            );
            Problem::new(Code::Conflict, detail)
        };
        let record = view.ssh_authorities()?.1.ok_or_else(nothing)?;
        let [old, next] = record.of(role) else { return Err(nothing()) };
        if old.retired.is_some() && !force {
            let waits = named(&waits_for(member, old.number)?);
            let detail = format!(
                "SSH {role} authority {} is retired already, and goes once these have taken up the new one: {waits}; `--force` does not \
                 wait for nodes",
                old.number
            );
            return Err(Problem::new(Code::Conflict, detail));
        }
        let version = old.retired.unwrap_or(next.since);
        let behind = view.nodes()?.into_iter().filter(|node| force && node.is_behind_ssh(version));
        (old.number, behind.map(|node| (node.id, node.name)).collect::<BTreeMap<_, _>>())
    };
    let left_behind: Vec<NodeName> = left.values().cloned().collect();
    let kind = AuthorityKind::Ssh(role).to_string();
    let fields = serde_json::json!({ "kind": kind, "number": number, "left_behind": left_behind });
    let left = left.into_keys().collect();
    change(member, "authority-retired", fields, SshChange::Retire { role, number, left }).await?;
    tracing::info!("SSH {role} authority {number} is retired");
    let end = Instant::now() + SOON;
    loop {
        let waits_for = if role == SshRole::Host { waits_for(member, number)? } else { Vec::new() };
        if waits_for.is_empty() || Instant::now() >= end {
            return Ok(AuthorityRetired { number, left_behind, waits_for, old_boot_files: Vec::new() });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Nodes that keep a host authority that is retired from being dropped.
fn waits_for(member: &Member, number: u32) -> Result<Vec<String>, Problem> {
    let view = member.view()?;
    let record = view.ssh_authorities()?.1;
    let old = record.as_ref().and_then(|record| record.host.iter().find(|authority| authority.number == number));
    let Some((old, retired)) = old.and_then(|old| Some((old, old.retired?))) else { return Ok(Vec::new()) };
    let mut names = nodes_behind(&view.nodes()?, retired, &old.left);
    if names.is_empty() {
        // All have changed; the one that leads has not dropped it yet.
        names.push("the leader".into());
    }
    Ok(names)
}

/// As the leader. `waits`: a node that was behind when it was looked last. As long as it is, the others need not be looked through.
pub(super) async fn drop_retired(member: &Arc<Member>, waits: &mut Option<NodeId>) -> anyhow::Result<()> {
    let (number, retired, left) = {
        let view = member.view()?;
        let Some(record) = view.ssh_authorities()?.1 else { return Ok(()) };
        let [old, _] = &record.host[..] else { return Ok(()) };
        let Some(retired) = old.retired else { return Ok(()) };
        if let Some(id) = waits.filter(|id| !old.left.contains(id))
            && view.node(id)?.is_some_and(|node| node.is_behind_ssh(retired))
        {
            return Ok(());
        }
        (old.number, retired, old.left.clone())
    };
    let looker = member.clone();
    let look = move || {
        looker.view()?.find_map(tables::NODES, |node: NodeRecord| {
            (node.is_behind_ssh(retired) && !left.contains(&node.id)).then_some(node.id)
        })
    };
    *waits = tokio::task::spawn_blocking(look).await??;
    if waits.is_some() {
        return Ok(());
    }
    let change = AuthorityChange::Ssh { change: SshChange::Drop { number } };
    member.propose(change.into()).await.context("dropping an SSH host authority")?;
    tracing::info!("SSH host authority {number} is trusted no more");
    Ok(())
}
