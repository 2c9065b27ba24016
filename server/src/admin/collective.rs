//! The members: show, invite, replace, promote, demote, remove; and their keys.

use crate::collective::identity::check_name;
use crate::collective::invite::Invitation;
use crate::collective::{holders, invite_place, rotation};
use crate::http::{Connection, Failure, Peer, parse};
use crate::state::{Member, now};
use crate::store::records::{InviteRecord, MemberRecord};
use crate::store::tables;
use crate::store::{Command, Snapshot};
use axum::extract::State;
use axum::{Extension, Json};
use bytes::Bytes;
use http::StatusCode;
use moor_api::admin::{
    CollectiveMember, CollectiveView, InviteRequest, Invited, KeysRotated, MemberRequest, ReplaceRequest,
};
use moor_api::problem::{Code, Problem};
use std::sync::Arc;

/// Longest lifetime of an invitation: a day.
const MAX_LIFETIME: u64 = 86_400;

pub(super) async fn show(State(member): State<Arc<Member>>) -> Result<Json<CollectiveView>, Failure> {
    let looker = member.clone();
    // What fails there is in the log: the same is done again and again.
    let unreadable = tokio::task::spawn_blocking(move || rotation::kept(&looker)).await.map_err(anyhow::Error::from)?;
    let (standing, view) = (member.store.standing(), member.view()?);
    let now = now();
    let members = view.members()?.into_iter().filter(|(_, record)| !record.removed).map(|(number, record)| {
        let last = if number == standing.number { Some(standing.last) } else { None };
        CollectiveMember {
            number,
            id: record.id,
            name: record.name,
            urls: record.urls,
            votes: standing.members.get(&number).is_some_and(|(_, votes)| *votes),
            voter: record.voter,
            last: last.or_else(|| standing.followers.get(&number).copied()),
            level: record.level.0,
            near: record.near,
        }
    });
    let invitations = view.all::<InviteRecord>(tables::INVITES)?.into_iter().filter(|invite| invite.expires > now);
    Ok(Json(CollectiveView {
        number: standing.number,
        leader: standing.leader,
        term: standing.term,
        last: standing.last,
        applied: standing.applied,
        majority: standing.has_majority(),
        level: view.level()?.0,
        incarnation: member.site.incarnation,
        members: members.collect(),
        invitations: invitations.map(|invite| (invite.name, invite.expires)).collect(),
        keys: view.key_versions()?.versions.iter().map(|version| version.version).collect(),
        unreadable: unreadable.unwrap_or_default(),
    }))
}

pub(super) async fn invite(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<Invited>, Failure> {
    let request: InviteRequest = parse(&body)?;
    make_invitation(&member, &connection, request, None).await
}

/// An invitation to take a member's place, with its vote if it has one.
pub(super) async fn replace(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<Invited>, Failure> {
    let request: ReplaceRequest = parse(&body)?;
    member.store.linearize().await?;
    let (number, record) = find(&member.view()?, &request.member)?;
    let invite = InviteRequest { name: request.name, voter: record.voter, lifetime: request.lifetime };
    make_invitation(&member, &connection, invite, Some(number)).await
}

async fn make_invitation(
    member: &Member,
    connection: &Connection,
    request: InviteRequest,
    replaces: Option<u64>,
) -> Result<Json<Invited>, Failure> {
    if !matches!(connection.peer, Peer::Socket { .. }) {
        return Err(Problem::new(Code::Forbidden, "invitations are made on a member, over its socket").into());
    }
    check_name(&request.name).map_err(|error| Problem::new(Code::BadRequest, error.to_string()))?;
    if request.lifetime == 0 || request.lifetime > MAX_LIFETIME {
        return Err(Problem::new(Code::BadRequest, "an invitation is good for 1 second to 24 hours").into());
    }
    let (invitation, secret) = Invitation::new(request.name.clone(), member.bundle()?)?;
    let expires = now() + request.lifetime;
    let sealed = member.seal(invite_place(&invitation.id).as_place(), &secret)?;
    let record = InviteRecord { name: request.name, voter: request.voter, expires, replaces, secret: sealed };
    member.propose(Command::Invite { id: invitation.id, invite: record, now: now() }).await?;
    Ok(Json(Invited { invitation: invitation.to_text()?.to_string(), expires }))
}

/// The member of this name or number.
fn find(view: &Snapshot, wanted: &str) -> Result<(u64, MemberRecord), Failure> {
    let found = view.members()?.into_iter().find(|(number, record)| {
        !record.removed && (record.name == wanted || wanted.parse::<u64>().is_ok_and(|wanted| wanted == *number))
    });
    let wanted = crate::http::clean(wanted, 64);
    found.ok_or_else(|| {
        Problem::new(Code::NotFound, format!("there is no member '{wanted}': `moor collective show` lists them")).into()
    })
}

/// Refuses to take a member's vote where no majority of those that vote then answers: nothing could be agreed any more, not even to take it back,
/// although as many are there as before.
async fn check_rest(member: &Member, view: &Snapshot, number: u64, record: &MemberRecord) -> Result<(), Failure> {
    if !record.voter {
        return Ok(());
    }
    let is_left = |(other, record): &(u64, MemberRecord)| *other != number && record.voter && !record.removed;
    let rest: Vec<_> = view.members()?.into_iter().filter(is_left).collect();
    let others = rest.iter().filter(|(other, _)| *other != member.identity.number);
    let peers: Vec<_> = others.map(|(_, record)| record.peer()).collect();
    let silent: Vec<_> = holders::silent(member, &peers).await.into_iter().map(|peer| peer.name.as_str()).collect();
    // Of the last one that votes the store says what there is to do.
    let most_answer = |of: &[&MemberRecord]| {
        let answering = of.iter().filter(|record| !silent.contains(&record.name.as_str())).count();
        of.is_empty() || answering * 2 > of.len()
    };
    // Some of them are to vote, and do not yet: it takes a majority of the others until they do.
    let standing = member.store.standing();
    let votes_now = |number: &u64| standing.members.get(number).is_some_and(|(_, votes)| *votes);
    let all: Vec<_> = rest.iter().map(|(_, record)| record).collect();
    let now: Vec<_> = rest.iter().filter(|(other, _)| votes_now(other)).map(|(_, record)| record).collect();
    if most_answer(&all) && most_answer(&now) {
        return Ok(());
    }
    let detail = format!(
        "of the {} members that would vote then, {} do not answer ({}): no majority would be left, and nothing could be changed any more. Bring them back or \
         remove them first, or say `--force`",
        rest.len(),
        silent.len(),
        silent.join(", ")
    );
    Err(Problem::new(Code::Conflict, detail).into())
}

/// `takes_vote`: the member votes no more then.
async fn change(
    member: &Member,
    body: &Bytes,
    takes_vote: bool,
    command: impl FnOnce(u64) -> Command,
) -> Result<StatusCode, Failure> {
    let request: MemberRequest = parse(body)?;
    member.store.linearize().await?;
    let view = member.view()?;
    let (number, record) = find(&view, &request.member)?;
    if takes_vote && !request.force {
        check_rest(member, &view, number, &record).await?;
    }
    member.propose(command(number)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn promote(State(member): State<Arc<Member>>, body: Bytes) -> Result<StatusCode, Failure> {
    change(&member, &body, false, |number| Command::SetVoter { number, voter: true }).await
}

pub(super) async fn demote(State(member): State<Arc<Member>>, body: Bytes) -> Result<StatusCode, Failure> {
    change(&member, &body, true, |number| Command::SetVoter { number, voter: false }).await
}

pub(super) async fn remove(State(member): State<Arc<Member>>, body: Bytes) -> Result<StatusCode, Failure> {
    change(&member, &body, true, |number| Command::RemoveMember { number }).await
}

pub(super) async fn rotate_key(State(member): State<Arc<Member>>) -> Result<Json<KeysRotated>, Failure> {
    Ok(Json(KeysRotated { version: rotation::rotate(&member).await? }))
}
