//! The authorities: show, rotate, cancel, retire.

use crate::authority::describe;
use crate::collective::{authorities, ssh_authorities};
use crate::http::{Failure, parse};
use crate::state::Member;
use crate::store::authorities::AuthorityRecord;
use crate::store::authorities::ssh::{SshAuthoritiesRecord, SshAuthorityRecord};
use axum::Json;
use axum::extract::{Path, State};
use bytes::Bytes;
use moor_api::admin::{
    AuthorityCancelled, AuthorityInfo, AuthorityKind, AuthorityRetired, AuthorityRotated, AuthorityState,
    AuthorityView, MemberTrust, RetireRequest, SshAuthorityInfo, SshRole, UnknownKind,
};
use moor_api::problem::{Code, Problem};
use ssh_key::{HashAlg, PublicKey};
use std::sync::Arc;

pub(super) async fn show(State(member): State<Arc<Member>>) -> Result<Json<AuthorityView>, Failure> {
    // What it is to describe has to be here.
    member.take_up()?;
    let view = member.view()?;
    let (version, list) = match view.authorities()? {
        Some((version, record)) => {
            let issuing = record.issuing().map(|authority| authority.number);
            let state = |one: &AuthorityRecord| {
                if one.retiring {
                    AuthorityState::Retiring
                } else if issuing == Some(one.number) {
                    AuthorityState::InUse
                } else {
                    AuthorityState::Next
                }
            };
            (version, record.list.iter().map(|one| (one.number, one.made, state(one))).collect())
        }
        None => (member.trust.version(), vec![(1, member.site.created, AuthorityState::InUse)]),
    };
    let mut authorities = Vec::new();
    for (number, made, state) in list {
        let (fingerprint, expires) = describe(&member.config.keys(), number)?;
        authorities.push(AuthorityInfo { number, state, fingerprint, made, expires });
    }
    let (ssh_version, record) = view.ssh_authorities()?;
    let mut ssh = Vec::new();
    for role in SshRole::ALL {
        match &record {
            Some(record) => {
                for one in record.of(role) {
                    let state = ssh_state(record, role, one);
                    ssh.push(ssh_info(role, one.number, state, &one.public, one.made)?);
                }
            }
            None => {
                for line in member.trust.ssh().lines(role) {
                    ssh.push(ssh_info(role, 1, AuthorityState::InUse, line, member.site.created)?);
                }
            }
        }
    }
    let members = view.members()?.into_values().filter(|member| !member.removed);
    let nodes: Vec<_> = view.nodes()?.into_iter().filter(|node| node.identity.is_some()).collect();
    Ok(Json(AuthorityView {
        version,
        authorities,
        ssh,
        ssh_version,
        ssh_behind: nodes.iter().filter(|node| node.is_behind_ssh(ssh_version)).map(|node| node.name.clone()).collect(),
        members: members
            .map(|member| MemberTrust { name: member.name, version: member.trust, shows: member.shows })
            .collect(),
        nodes: nodes.len(),
        nodes_behind: nodes.into_iter().filter(|node| node.is_behind(version)).map(|node| node.name).collect(),
        old_boot_files: authorities::old_boot_files(&member)?,
    }))
}

pub(super) async fn rotate(State(member): State<Arc<Member>>) -> Result<Json<AuthorityRotated>, Failure> {
    Ok(Json(authorities::rotate(&member).await?))
}

pub(super) async fn cancel(State(member): State<Arc<Member>>) -> Result<Json<AuthorityCancelled>, Failure> {
    Ok(Json(authorities::cancel(&member).await?))
}

pub(super) async fn retire(State(member): State<Arc<Member>>, body: Bytes) -> Result<Json<AuthorityRetired>, Failure> {
    let request: RetireRequest = parse(&body)?;
    Ok(Json(authorities::retire(&member, request.force).await?))
}

fn ssh_state(record: &SshAuthoritiesRecord, role: SshRole, one: &SshAuthorityRecord) -> AuthorityState {
    if one.retired.is_some() {
        return AuthorityState::Retiring;
    }
    let in_use = match role {
        SshRole::Host => record.signing(),
        SshRole::User => record.user.first(),
    };
    if in_use.is_some_and(|in_use| in_use.number == one.number) { AuthorityState::InUse } else { AuthorityState::Next }
}

fn ssh_info(
    role: SshRole,
    number: u32,
    state: AuthorityState,
    line: &str,
    made: u64,
) -> anyhow::Result<SshAuthorityInfo> {
    let fingerprint = PublicKey::from_openssh(line)?.fingerprint(HashAlg::Sha256).to_string();
    Ok(SshAuthorityInfo { role, number, state, fingerprint, made })
}

fn kind(text: &str) -> Result<AuthorityKind, Failure> {
    text.parse().map_err(|error: UnknownKind| Failure(Problem::new(Code::NotFound, error.to_string())))
}

pub(super) async fn rotate_kind(
    State(member): State<Arc<Member>>,
    Path(text): Path<String>,
) -> Result<Json<AuthorityRotated>, Failure> {
    Ok(Json(match kind(&text)? {
        AuthorityKind::X509 => authorities::rotate(&member).await?,
        AuthorityKind::Ssh(role) => ssh_authorities::rotate(&member, role).await?,
    }))
}

pub(super) async fn retire_kind(
    State(member): State<Arc<Member>>,
    Path(text): Path<String>,
    body: Bytes,
) -> Result<Json<AuthorityRetired>, Failure> {
    let kind = kind(&text)?;
    let request: RetireRequest = parse(&body)?;
    Ok(Json(match kind {
        AuthorityKind::X509 => authorities::retire(&member, request.force).await?,
        AuthorityKind::Ssh(role) => ssh_authorities::retire(&member, role, request.force).await?,
    }))
}
