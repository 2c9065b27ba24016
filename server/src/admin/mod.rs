//! `/admin/v1`: what administrators may do, over the socket by who they are and over HTTPS by a token.

mod audit;
mod authority;
mod backup;
mod collective;
mod content;
pub(crate) mod nodes;
mod view;

use crate::http::{Connection, Failure, Peer, parse};
use crate::observe;
use crate::state::{Member, now};
use crate::store::Command;
use crate::store::raft::in_term;
use crate::store::records::TokenRecord;
use crate::store::tables;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use http::{HeaderValue, Method, header};
use moor_api::admin::{STALE, SiteInfo, TokenCreated, TokenRequest};
use moor_api::problem::{Code, Problem};
use std::sync::Arc;
use std::time::Duration;

/// Longest lifetime of a token: a week.
const MAX_TOKEN_LIFETIME: u64 = 7 * 86_400;

/// A read waits this long for a majority to say what is newest.
const SOON: Duration = Duration::from_secs(2);

/// The routes, behind the check who asks.
pub fn router(member: &Arc<Member>) -> Router<Arc<Member>> {
    // What is about this member needs no majority, and says itself how it is. So does a backup, which is asked for without one in need.
    let of_this_member = Router::new()
        .route("/metrics", get(observe::metrics))
        .route("/admin/v1/collective", get(collective::show))
        .route("/admin/v1/backup", post(backup::backup));
    let of_nodes = Router::new()
        .route("/admin/v1/nodes", get(nodes::list).post(nodes::define))
        .route("/admin/v1/nodes/remove", post(nodes::remove))
        .route("/admin/v1/nodes/set", post(nodes::set))
        .route("/admin/v1/nodes/arm", post(nodes::arm))
        .route("/admin/v1/nodes/rearm", post(nodes::rearm))
        .route("/admin/v1/nodes/deploy", post(nodes::deploy))
        .route_layer(axum::middleware::from_fn_with_state(member.clone(), audit::along));
    Router::new()
        .route("/admin/v1/site", get(site))
        .route("/admin/v1/status", get(view::status))
        .route("/admin/v1/why/{subject}", get(view::why))
        .route("/admin/v1/log/{node}", get(view::log))
        .route("/admin/v1/blobs", put(content::add_blob))
        .route("/admin/v1/content", get(content::status))
        .route("/admin/v1/images", get(content::images).post(content::import))
        .route("/admin/v1/profiles", get(content::profiles).post(content::create_profile))
        .route("/admin/v1/profiles/{name}/publish", post(content::publish))
        .route("/admin/v1/profiles/{name}/boot", get(content::boot_files))
        .route("/admin/v1/tokens", post(create_token))
        .route("/admin/v1/collective/invite", post(collective::invite))
        .route("/admin/v1/collective/replace", post(collective::replace))
        .route("/admin/v1/collective/promote", post(collective::promote))
        .route("/admin/v1/collective/demote", post(collective::demote))
        .route("/admin/v1/collective/remove", post(collective::remove))
        .route("/admin/v1/collective/rotate-key", post(collective::rotate_key))
        .route("/admin/v1/authority", get(authority::show))
        .route("/admin/v1/authority/rotate", post(authority::rotate))
        .route("/admin/v1/authority/cancel", post(authority::cancel))
        .route("/admin/v1/authority/retire", post(authority::retire))
        .route("/admin/v1/authority/{kind}/rotate", post(authority::rotate_kind))
        .route("/admin/v1/authority/{kind}/retire", post(authority::retire_kind))
        .route_layer(axum::middleware::from_fn_with_state(member.clone(), audit::first))
        .merge(of_nodes)
        .route_layer(axum::middleware::from_fn_with_state(member.clone(), up_to_date))
        .merge(of_this_member)
        .route_layer(axum::middleware::from_fn_with_state(member.clone(), authorize))
}

/// Who may ask: root, the member's own user and the configured ones on the socket; the holder of a token over TLS 1.3.
async fn authorize(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    mut request: Request,
    next: Next,
) -> Response {
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    match administrator(&member, &connection.peer, token) {
        Ok(who) => request.extensions_mut().insert(audit::Who(who)),
        Err(failure) => return failure.into_response(),
    };
    next.run(request).await
}

/// What is read is at least as new as all that was acknowledged anywhere before. Without a majority it is what this member knows, and the
/// answer says why. Changes read too, which nodes a range means for one: they wait for the same, and without a majority are not begun. Where this
/// member leads, and has just heard of a majority, their own entries show whether that was so: each has one at least, its line in the audit log.
async fn up_to_date(State(member): State<Arc<Member>>, request: Request, next: Next) -> Response {
    if request.method() != Method::GET {
        if let Some(term) = member.store.leads_in() {
            return in_term(term, next.run(request)).await;
        }
        return match member.store.linearize().await {
            Ok(()) => next.run(request).await,
            Err(error) => Failure(error.into()).into_response(),
        };
    }
    let stale = may_be_stale(&member).await;
    let mut response = next.run(request).await;
    if let Some(why) = stale {
        response.headers_mut().insert(STALE, why);
    }
    response
}

/// Why what this member knows may not be the newest.
async fn may_be_stale(member: &Member) -> Option<HeaderValue> {
    let why = match tokio::time::timeout(SOON, member.store.linearize()).await {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no majority of the voting members answers (`moor collective show`)".into(),
    };
    Some(stale(&why))
}

/// The value of [`STALE`] that says why.
fn stale(why: &str) -> HeaderValue {
    HeaderValue::from_str(why).unwrap_or(HeaderValue::from_static("no majority answers"))
}

/// The name of an administrator, for the audit log.
fn administrator(member: &Member, peer: &Peer, token: Option<&str>) -> Result<String, Failure> {
    match peer {
        Peer::Socket { uid } => {
            if *uid == 0 || *uid == nix::unistd::getuid().as_raw() || member.config.admin_uids.contains(uid) {
                return Ok(format!("uid {uid}"));
            }
            let detail = format!(
                "user id {uid} may not administer this collective: root may, or list it in 'admin_uids' of moord.toml"
            );
            Err(Problem::new(Code::Forbidden, detail).into())
        }
        Peer::Tls { exporter: None, .. } => Err(Problem::new(Code::Forbidden, "the admin API wants TLS 1.3").into()),
        Peer::Tls { .. } => token_holder(member, token),
    }
}

fn hash_of(token: &str) -> String {
    hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes()))
}

/// The name of a token's holder. Looked up by hash: an attacker learns nothing of other tokens from the time it takes. Who shows one that
/// has expired has held it, so that its name is no secret from him.
fn token_holder(member: &Member, token: Option<&str>) -> Result<String, Failure> {
    let invalid = |what: String| {
        let detail = format!("{what}: `moor token create` on a member makes one");
        Failure(Problem::new(Code::TokenInvalid, detail))
    };
    let record = match token {
        Some(token) => member.view()?.get::<TokenRecord>(tables::TOKENS, &hash_of(token))?,
        None => None,
    };
    let record = record.ok_or_else(|| invalid("no valid administrator's token".into()))?;
    if record.expires <= now() {
        return Err(invalid(format!("the administrator's token '{}' has expired", record.name)));
    }
    Ok(record.name)
}

async fn site(State(member): State<Arc<Member>>) -> Result<Json<SiteInfo>, Failure> {
    let bundle = member.bundle()?;
    Ok(Json(SiteInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        collective: member.site.collective,
        name: member.site.name.clone(),
        member: member.identity.id,
        members: member.endpoints()?,
        known_hosts: bundle.ssh_host_authorities.iter().map(|line| format!("@cert-authority * {line}")).collect(),
        bundle,
    }))
}

async fn create_token(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<TokenCreated>, Failure> {
    if !matches!(connection.peer, Peer::Socket { .. }) {
        return Err(Problem::new(Code::Forbidden, "tokens are made on a member, over its socket").into());
    }
    let request: TokenRequest = parse(&body)?;
    if request.lifetime == 0 || request.lifetime > MAX_TOKEN_LIFETIME {
        return Err(Problem::new(Code::BadRequest, "a token is good for 1 second to 7 days").into());
    }
    let mut bytes = zeroize::Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(&mut *bytes).map_err(|_| Problem::new(Code::Internal, "no randomness"))?;
    let token = format!("moora_{}", hex::encode(*bytes));
    let expires = now() + request.lifetime;
    member.audit("token-created", serde_json::json!({ "name": request.name, "expires": expires })).await?;
    member
        .propose(Command::PutToken { hash: hash_of(&token), token: TokenRecord { name: request.name, expires } })
        .await?;
    Ok(Json(TokenCreated { token, expires }))
}
