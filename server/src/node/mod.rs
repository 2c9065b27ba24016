//! `/node/v1`: what nodes may ask (docs/node-api.md). Here are the routes and the check of tokens; each group of calls is a module.

pub mod config;
pub mod enroll;
pub mod files;
pub mod hello;
pub mod image;
pub mod nonce;
pub mod rate;
pub mod refusals;
pub mod report;
pub mod session;
mod spread;
pub mod ssh;
pub mod token;

use crate::http::{Connection, Failure, Peer};
use crate::late::Bound;
use crate::secrets::Ring;
use crate::state::{Member, now};
use crate::store::records::{BootRecord, NodeRecord, ProfileRecord};
use crate::store::{self, Snapshot, StoreError};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use http::header;
use moor_api::node::{MAX_BODY, MemberEndpoint, Stage};
use moor_api::problem::{Code, Problem};
use moor_api::proof::EXPORTER_LENGTH;
use refusals::Subject;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use token::Claims;

/// A call takes at most this long until its answer begins.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The path of the one call that a boot token may make again when its stage is over: the first answer may have been lost.
const STAGE_CLOSED: &str = "/node/v1/stage-closed";

/// The routes.
pub fn router(member: &Arc<Member>) -> Router<Arc<Member>> {
    let with_token = Router::new()
        .route("/node/v1/config", get(config::config))
        .route("/node/v1/attributes", get(config::attributes))
        .route("/node/v1/image", get(image::offer))
        .route("/node/v1/image/key", post(image::key))
        .route("/node/v1/images/{digest}", get(image::plain))
        .route("/node/v1/files/{*path}", get(files::file))
        .route("/node/v1/scripts/{phase}/{*path}", get(files::script))
        .route("/node/v1/ssh/host-certificates", post(ssh::host_certificates))
        .route("/node/v1/ssh/trust", get(ssh::trust))
        .route("/node/v1/status", post(report::status))
        .route("/node/v1/log", post(report::log))
        .route(STAGE_CLOSED, post(report::stage_closed))
        .route("/node/v1/heartbeat", post(report::heartbeat))
        .route("/node/v1/trace", post(report::trace))
        .route_layer(from_fn_with_state(member.clone(), authenticate));
    Router::new()
        .route("/node/v1/hello", post(hello::hello))
        .route("/node/v1/enroll", post(enroll::enroll))
        .route("/node/v1/enroll/complete", post(enroll::complete))
        .route("/node/v1/session", post(session::session))
        .merge(with_token)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .route_layer(from_fn(bounded))
}

/// TLS 1.3 only, and no call takes for ever.
async fn bounded(Extension(connection): Extension<Connection>, request: Request, next: Next) -> Response {
    if !matches!(connection.peer, Peer::Tls { exporter: Some(_), .. }) {
        return Failure(Problem::new(Code::Forbidden, "the node API wants TLS 1.3")).into_response();
    }
    tokio::time::timeout(TIMEOUT, next.run(request)).await.unwrap_or_else(|_| {
        let detail = format!("the call was not done within {} s", TIMEOUT.as_secs());
        Failure(Problem { status: 408, code: Code::BadRequest, detail }).into_response()
    })
}

/// What a connection proves by itself: the session key of its client certificate, and the exporter of its handshake.
pub(crate) struct Channel<'a> {
    client_key: &'a [u8],
    exporter: &'a [u8; EXPORTER_LENGTH],
}

impl<'a> Channel<'a> {
    fn of(peer: &'a Peer) -> Result<Self, Problem> {
        match peer {
            Peer::Tls { client_key: Some(client_key), exporter: Some(exporter), .. } => {
                Ok(Self { client_key, exporter })
            }
            _ => Err(Problem::new(
                Code::ProofInvalid,
                "the connection shows no client certificate: make one on the session key (RFC 8705)",
            )),
        }
    }
}

/// The node that a token speaks for, as it is now.
#[derive(Clone)]
pub struct Caller {
    /// It.
    pub node: Arc<NodeRecord>,
    /// What the token says.
    pub claims: Claims,
    /// Where it calls from.
    pub address: Option<IpAddr>,
}

impl Caller {
    /// The boot that the token belongs to.
    fn boot(&self) -> Option<&BootRecord> {
        self.node.boots.iter().find(|record| record.boot == self.claims.boot)
    }

    /// Members in the order in which the node is to try them.
    fn endpoints(&self, member: &Member) -> Result<Vec<MemberEndpoint>, StoreError> {
        member.endpoints_for(self.node.id, self.address)
    }

    /// Refuses what only the boot stage may ask for.
    fn boot_stage(&self, what: &str) -> Result<(), Problem> {
        match self.claims.stage {
            Stage::Boot => Ok(()),
            Stage::Run => Err(Problem::new(
                Code::StageForbidden,
                format!("{what} is given out in the boot stage only; this token is for the run stage"),
            )),
        }
    }

    /// The generation of the profile that this boot boots.
    fn generation(&self, view: &Snapshot) -> Result<Arc<ProfileRecord>, Failure> {
        let name = &self.node.name;
        let plan = self.boot().and_then(|boot| boot.plan.as_ref());
        let plan = plan.ok_or_else(|| match &self.node.deployment {
            None => {
                Problem::new(Code::NoProfile, format!("node {name} has no profile: `moor deploy {name} -n PROFILE`"))
            }
            Some(order) => Problem::new(
                Code::NoProfile,
                format!(
                    "this boot of {name} began before profile '{}' was published: open a new session",
                    order.profile
                ),
            ),
        })?;
        let generation = view.kept_generation(&plan.generation.to_string())?;
        let gone = || {
            Problem::new(
                Code::NoProfile,
                format!("generation {} of profile '{}' is gone: reboot", plan.generation, plan.profile),
            )
        };
        Ok(generation.ok_or_else(gone)?)
    }

    /// Writes down that this node gets a secret; durable when it returns. Without the line the secret must not leave.
    async fn released(&self, member: &Arc<Member>, what: &str, name: &str) -> Result<(), Problem> {
        let fields = serde_json::json!({
            "node": self.node.id, "name": self.node.name, "boot": self.claims.boot, "secret": name
        });
        member.audit_for_node(what, fields).await
    }

    /// Whether the node's secrets and the image key may be given to whoever holds this token.
    fn is_trusted(&self, profile: &ProfileRecord) -> bool {
        profile.manifest.allow_unproven || self.node.identity.as_ref().is_some_and(|identity| !identity.is_unproven())
    }

    /// Refuses what only a proven node gets.
    fn proven(&self, profile: &ProfileRecord, what: &str) -> Result<(), Problem> {
        if self.is_trusted(profile) {
            return Ok(());
        }
        let name = &self.node.name;
        Err(Problem::new(
            Code::Forbidden,
            format!(
                "{name} gets no {what}: it enrolled while armed continuously, which proves nothing. `moor node trust rearm {name}` and let it \
                 keep its key, or set 'allow_unproven: true' in profile '{}'",
                profile.name
            ),
        ))
    }
}

/// The keys of tokens. A member that has just joined has none yet.
fn token_keys(member: &Member) -> Result<Arc<Ring>, Problem> {
    let ring = member.secrets.ring();
    let none = |error: anyhow::Error| Problem {
        status: 503,
        ..Problem::new(Code::Other, format!("{error}: ask another member"))
    };
    ring.token().map_err(none)?;
    Ok(ring)
}

/// Who the bearer of a token is.
fn caller(member: &Member, request: &Request, connection: &Connection) -> Result<Caller, (Subject, Failure)> {
    let invalid = |subject: Subject, detail: String| (subject, Failure(Problem::new(Code::TokenInvalid, detail)));
    let bearer = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    let Some(bearer) = bearer else {
        return Err(invalid(Subject::default(), "the call needs a token: open a session first".into()));
    };
    let client_key = if let Peer::Tls { client_key, .. } = &connection.peer { client_key.as_deref() } else { None };
    let keys = token_keys(member).map_err(|problem| (Subject::default(), problem.into()))?;
    let public = keys.token_public().map_err(|error| (Subject::default(), error.into()))?;
    let claims = connection
        .token
        .read(public, (member.site.collective, member.site.incarnation), bearer, client_key, now())
        .map_err(|error| invalid(error.node().map(Subject::node).unwrap_or_default(), error.to_string()))?;
    let subject = Subject::node(claims.node);
    member.fresh(Bound::Nodes).map_err(|problem| (subject.clone(), problem.into()))?;
    let node = member
        .view()
        .and_then(|view| member.node(&view, claims.node))
        .map_err(|error| (subject.clone(), error.into()))?;
    let Some(node) = node else { return Err(invalid(Subject::default(), "the node was removed".into())) };
    if node.epoch != claims.epoch || node.identity.is_none() {
        return Err(invalid(
            subject,
            format!("the identity of {} changed since the token was issued: begin again with hello", node.name),
        ));
    }
    let caller = Caller { node, claims, address: connection.peer.ip() };
    if caller.claims.stage == Stage::Boot
        && request.uri().path() != STAGE_CLOSED
        && caller.boot().is_none_or(|boot| boot.closed)
    {
        let problem = Problem::new(Code::StageClosed, store::closed(&caller.node.name));
        return Err((subject, Failure(problem)));
    }
    Ok(caller)
}

/// Method and name of a call. Where a path of the caller's choice follows, without it: each would be a call of its own, to be counted
/// and kept apart.
fn call_name(request: &Request) -> String {
    let path = request.uri().path();
    let path = path.strip_prefix("/node/v1/").unwrap_or(path);
    let name = match path.split_once('/') {
        Some((name @ ("files" | "scripts" | "images"), _)) => name,
        _ => path,
    };
    format!("{} {name}", request.method())
}

/// Checks the token, hands the node to the handler, and records what was refused.
async fn authenticate(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    mut request: Request,
    next: Next,
) -> Response {
    let call = call_name(&request);
    let (subject, response) = match caller(&member, &request, &connection) {
        Ok(caller) => {
            let subject = Subject::node(caller.node.id);
            request.extensions_mut().insert(caller);
            (subject, next.run(request).await)
        }
        Err((subject, failure)) => (subject, failure.into_response()),
    };
    // A file that is not there is an answer, not a refusal.
    if let Some(problem) = response.extensions().get::<Problem>().filter(|problem| problem.code != Code::NotFound) {
        refusals::record(&member, &connection.peer, &call, &subject, problem).await;
    }
    response
}

/// Records a refusal of a call that comes without a token.
async fn recorded<T>(
    member: &Member,
    peer: &Peer,
    call: &str,
    subject: &Subject,
    result: Result<T, Failure>,
) -> Result<T, Failure> {
    if let Err(Failure(problem)) = &result {
        refusals::record(member, peer, call, subject, problem).await;
    }
    result
}
