//! The authorities: show, rotate, cancel, retire.

use crate::authority::describe;
use crate::collective::authorities;
use crate::http::{Failure, parse};
use crate::state::Member;
use crate::store::authorities::AuthorityRecord;
use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use moor_api::admin::{
    AuthorityCancelled, AuthorityInfo, AuthorityRetired, AuthorityRotated, AuthorityState, AuthorityView, MemberTrust,
    RetireRequest, SshAuthorityInfo,
};
use ssh_key::{HashAlg, PrivateKey};
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
    let ssh = |role: &str, key: &PrivateKey| SshAuthorityInfo {
        role: role.into(),
        fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
        made: member.site.created,
    };
    let members = view.members()?.into_values().filter(|member| !member.removed);
    let nodes: Vec<_> = view.nodes()?.into_iter().filter(|node| node.identity.is_some()).collect();
    Ok(Json(AuthorityView {
        version,
        authorities,
        ssh: vec![ssh("host", &member.authority.ssh_host), ssh("user", &member.authority.ssh_user)],
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
