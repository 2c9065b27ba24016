//! `/member/v1`: what members ask each other. Both sides show a member's certificate and are known by its key ([`gate`](super::gate)); only
//! who joins has none yet.

use super::busy::Word;
use super::gate::{Gate, check, guard, shown};
use super::invite::{Side, Subject};
use super::join::{self, JoinReply, JoinRequest};
use super::voucher::{Acquaintance, Voucher, extend};
use crate::authority::KeyFiles;
use crate::content;
use crate::http::{Connection, Failure, Peer, parse};
use crate::listener::take_over;
use crate::node::enroll::p256_point;
use crate::secrets::Place;
use crate::state::{Member, now};
use crate::store::raft::{Call, INTRODUCE, PROTOCOL, Replicated, STREAM, SnapshotFile, follow};
use crate::store::{Command, Outcome, StoreError};
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, StatusCode, header};
use moor_api::ids::Sha256Digest;
use moor_api::problem::{Code, Problem};
use serde::Deserialize;
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::AsyncWriteExt as _;

/// Longest call; a batch of entries, of which one may be large.
const MAX_BODY: usize = 128 << 20;

/// The routes.
pub(crate) fn router(member: &Arc<Member>) -> Router<Arc<Member>> {
    let raft = [Call::Append, Call::Vote, Call::PreVote]
        .into_iter()
        .fold(Router::new(), |router, call| router.route(&call.path(), answers(call)))
        .route("/member/v1/snapshot", post(snapshot))
        .route(STREAM, get(stream))
        .route_layer(from_fn_with_state((member.clone(), Gate::Replication), guard));
    let among_members = Router::new()
        .route("/member/v1/propose", post(propose))
        .route("/member/v1/read-index", post(read_index))
        .route("/member/v1/blobs/{digest}", get(blob))
        .route(super::holders::PATH, post(lacking))
        .route(super::alive::PATH, post(alive))
        .route_layer(from_fn_with_state((member.clone(), Gate::Members), guard))
        .merge(raft)
        .layer(DefaultBodyLimit::max(MAX_BODY));
    Router::new()
        .route(join::PATH, post(let_in))
        .route(INTRODUCE, post(introduce))
        .layer(DefaultBodyLimit::max(64 << 10))
        .merge(among_members)
}

fn json(bytes: impl Into<Body>) -> Result<Response, Failure> {
    let response = Response::builder().header(header::CONTENT_TYPE, "application/json").body(bytes.into());
    response.map_err(|error| anyhow::Error::from(error).into())
}

/// What another member said is not a failure of this one's store.
fn refusal(error: StoreError) -> Failure {
    match error {
        StoreError::Message(text) => Problem::new(Code::BadRequest, text).into(),
        StoreError::Speaker { .. } => Problem::new(Code::Forbidden, error.to_string()).into(),
        error => error.into(),
    }
}

/// Answers one call of Raft. Nobody speaks in another member's name: what is said is bound to the keys of the connection.
fn answers(call: Call) -> MethodRouter<Arc<Member>> {
    post(
        move |State(member): State<Arc<Member>>, Extension(connection): Extension<Connection>, body: Bytes| async move {
            let by = shown(&connection)?.id;
            json(member.store.answer(call, &body, by).await.map_err(refusal)?)
        },
    )
}

/// The store of a member that is there as long as somebody uses it.
#[derive(Clone)]
struct OwnStore(Arc<Member>);

impl std::ops::Deref for OwnStore {
    type Target = Replicated;
    fn deref(&self) -> &Replicated {
        &self.0.store
    }
}

/// Takes entries from now on, as they come over this connection.
async fn stream(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    mut request: Request,
) -> Result<Response, Failure> {
    let by = shown(&connection)?.id;
    let wants = request.headers().get(header::UPGRADE).is_some_and(|wanted| wanted == PROTOCOL);
    if !wants {
        return Err(Problem::new(Code::BadRequest, format!("only {PROTOCOL} is spoken here")).into());
    }
    let switched = hyper::upgrade::on(&mut request);
    let store = OwnStore(member.clone());
    store.begin_beside(async move {
        match switched.await.map_err(io::Error::other).and_then(take_over) {
            Ok(stream) => {
                let may = {
                    let (member, connection) = (member.clone(), connection.clone());
                    move || {
                        check(&member, &connection, Gate::Replication)
                            .map_err(|Failure(problem)| StoreError::Leader(problem))
                    }
                };
                tokio::select! {
                    () = follow(stream, OwnStore(member), by, may) => {}
                    () = connection.stop.cancelled() => {}
                }
                // It counts as a connection until here.
                drop(connection.room);
            }
            Err(error) => tracing::debug!("switching a connection to {PROTOCOL}: {error}"),
        }
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, PROTOCOL)
        .body(Body::empty());
    response.map_err(|error| anyhow::Error::from(error).into())
}

#[derive(Deserialize)]
struct SnapshotQuery {
    vote: String,
}

async fn snapshot(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    Query(query): Query<SnapshotQuery>,
    body: Body,
) -> Result<Response, Failure> {
    let leading = member.store.leading(&query.vote, shown(&connection)?.id).map_err(refusal)?;
    let (file, path) = member.store.receiving().map_err(anyhow::Error::from)?;
    let received = receive(file, body).await;
    let file = match received {
        Ok(file) => file,
        Err(error) => {
            // The first failure is the one to report.
            let _ = std::fs::remove_file(&path);
            return Err(error.context("receiving a snapshot").into());
        }
    };
    let installed = member.store.install(leading, SnapshotFile::received(file, path.clone())).await;
    if installed.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    json(installed.map_err(refusal)?)
}

/// Writes a body to a file, from its beginning to its durable end.
async fn receive(file: std::fs::File, body: Body) -> anyhow::Result<std::fs::File> {
    let mut file = tokio::fs::File::from_std(file);
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        file.write_all(&part?).await?;
    }
    file.sync_all().await?;
    let file = file.into_std().await;
    std::io::Seek::rewind(&mut &file)?;
    Ok(file)
}

async fn propose(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Response, Failure> {
    member.calls.asks(shown(&connection)?.id);
    let command: Command = parse(&body)?;
    tracing::debug!("another member proposes: {}", command.kind());
    let outcome = member.store.propose_here(command).await?;
    json(crate::store::raft::proposed(outcome)?)
}

async fn read_index(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
) -> Result<Json<u64>, Failure> {
    member.calls.asks(shown(&connection)?.id);
    Ok(Json(member.store.read_index().await?))
}

async fn blob(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    Path(digest): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    super::blobs::send(&member, &connection, &digest, &headers).await
}

/// Which of these blobs this member does not have.
async fn lacking(State(member): State<Arc<Member>>, body: Bytes) -> Result<Json<Vec<Sha256Digest>>, Failure> {
    let asked: Vec<Sha256Digest> = parse(&body)?;
    let lacking = tokio::task::spawn_blocking(move || content::lacking(&member.config.blobs(), asked)).await;
    Ok(Json(lacking.map_err(anyhow::Error::from)?))
}

/// Takes word of nodes that are alive, and of how busy the member is that says so.
async fn alive(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    Query(word): Query<Word>,
    body: Bytes,
) -> Result<Json<()>, Failure> {
    member.busy.told(shown(&connection)?.id, word, Instant::now());
    Ok(Json(member.heartbeats.told(parse(&body)?)?))
}

/// Takes vouchers: they hold for this connection, and are looked at when nobody here knows the member that has shown them.
async fn introduce(Extension(connection): Extension<Connection>, body: Bytes) -> Result<StatusCode, Failure> {
    shown(&connection)?;
    let vouchers: Vec<Voucher> = parse(&body)?;
    // One that comes again says the same.
    let _ = connection.vouchers.set(vouchers);
    Ok(StatusCode::NO_CONTENT)
}

/// Lets a new member in.
async fn let_in(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<JoinReply>, Failure> {
    let Peer::Tls { address, exporter: Some(exporter), .. } = &connection.peer else {
        return Err(Problem::new(Code::Forbidden, "joining wants TLS 1.3").into());
    };
    if !member.joins.allow(address.ip()) {
        return Err(Problem::new(Code::RateLimited, "too many tries from this address: wait a minute").into());
    }
    let request: JoinRequest = parse(&body)?;
    for url in &request.urls {
        moor_api::client::node::parse_https(url).map_err(|error| Problem::new(Code::BadRequest, error.to_string()))?;
    }
    if request.urls.is_empty() || request.urls.len() > 16 {
        return Err(Problem::new(Code::BadRequest, "a member has 1 to 16 URLs").into());
    }
    if p256_point(&request.key.0).is_err() {
        return Err(Problem::new(Code::BadRequest, "a member's key is one on P-256").into());
    }
    // The invitation may have been made on another member a moment ago.
    member.store.linearize().await?;
    let refused = || {
        Problem::new(Code::Forbidden, "there is no such invitation, or it was used: `moor collective invite` makes one")
    };
    let invite = member.view()?.invite(request.invite)?.ok_or_else(refused)?;
    let place = invite_place(&request.invite);
    let secret = member.open_secret(place.as_place(), &invite.secret)?;
    let subject = Subject {
        collective: member.site.collective,
        invite: request.invite,
        member: request.member,
        key: &request.key.0,
        unwrap: &request.unwrap.0,
        exporter,
    };
    if !subject.verify(&secret, Side::Guest, &request.proof.0) {
        tracing::warn!("{address}: a wrong proof for the invitation of {}", invite.name);
        return Err(refused().into());
    }
    member
        .audit("join", serde_json::json!({ "name": invite.name, "member": request.member, "urls": request.urls }))
        .await?;
    let (number, keys) = take_in(&member, &request).await?;
    let own = &member.identity;
    let guest = Acquaintance { id: request.member, key: request.key.clone() };
    let introduction = extend(&own.introduction, own.id, &member.config.keys(), subject.collective, guest)?;
    let (removed, members): (Vec<_>, Vec<_>) =
        member.view()?.members()?.into_values().partition(|record| record.removed);
    tracing::info!("member {} ({number}) was let in from {address}", invite.name);
    Ok(Json(JoinReply {
        number,
        name: invite.name,
        site: member.site.clone(),
        keys,
        members: members.into_iter().map(|record| Acquaintance { id: record.id, key: record.key }).collect(),
        removed: removed.into_iter().map(|record| record.id).collect(),
        introduction,
        proof: subject.prove(&secret, Side::Host).into(),
    }))
}

/// The join itself; returns the new member's number, and the authorities for it. Where keys or authorities are rotated at the same moment, it
/// is tried again with the new ones.
async fn take_in(member: &Member, request: &JoinRequest) -> Result<(u64, KeyFiles), Failure> {
    let mut tries = 0;
    loop {
        tries += 1;
        let (authorities, trust, view) = member.export_keys()?;
        let ssh = view.ssh_authorities()?.1.map_or(1, |record| record.version);
        drop(view);
        let keys = member.ring()?.wrap_all(request.member, &request.unwrap);
        let keys = keys.map_err(|_| Problem::new(Code::BadRequest, "a member's key for the keys is one on X25519"))?;
        let command = Command::Join {
            invite: request.invite,
            member: request.member,
            key: request.key.clone(),
            unwrap: request.unwrap.clone(),
            keys: keys.into_iter().collect(),
            urls: request.urls.clone(),
            now: now(),
            level: request.level,
            trust,
            ssh,
        };
        match member.propose(command).await {
            Ok(Outcome::Number(number)) => return Ok((number, authorities)),
            Ok(_) => return Err(anyhow::anyhow!("a join has no number").into()),
            Err(problem) if problem.code == Code::Conflict && tries < 3 => member.store.linearize().await?,
            Err(problem) => return Err(problem.into()),
        }
    }
}

/// Where the secret of an invitation belongs.
pub(crate) struct InvitePlace(String);

pub(crate) fn invite_place(id: &uuid::Uuid) -> InvitePlace {
    InvitePlace(id.to_string())
}

impl InvitePlace {
    pub(crate) fn as_place(&self) -> Place<'_> {
        Place { table: "invites", id: &self.0, field: "secret" }
    }
}
