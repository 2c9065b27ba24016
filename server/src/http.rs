//! What all handlers share: who is at the other end, and problems as answers.

use crate::addresses::client;
use crate::collective::voucher::Voucher;
use crate::house::Room;
use crate::idle::Asked;
use crate::node::token::Known;
use axum::Extension;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use moor_api::client::tls::Named;
use moor_api::problem::{CONTENT_TYPE, Code, Problem};
use moor_api::proof::EXPORTER_LENGTH;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Files on their way over one connection. One of HTTP/2 has many requests at a time, and whose client takes nothing of it holds a buffer and an
/// open file for each.
const FILES: usize = 2;

/// The connection a request came over.
#[derive(Debug, Clone)]
pub struct Connection {
    /// From where.
    pub peer: Peer,
    /// The node's token that came over it.
    pub token: Arc<Known>,
    /// The vouchers that a member has shown over it.
    pub vouchers: Arc<OnceLock<Vec<Voucher>>>,
    files: Arc<Semaphore>,
    /// When it was asked for something last.
    pub(crate) asked: Arc<Asked>,
    /// What it takes of the limits. Whoever switches it to another protocol keeps that for as long as it lives.
    pub(crate) room: Option<Arc<Room>>,
    /// The member stops: what goes on for ever over it has to end.
    pub(crate) stop: CancellationToken,
}

impl Connection {
    /// A new one.
    #[must_use]
    pub fn new(peer: Peer) -> Self {
        let stop = CancellationToken::new();
        let files = Arc::new(Semaphore::new(FILES));
        Self { peer, token: Arc::default(), vouchers: Arc::default(), files, asked: Arc::default(), room: None, stop }
    }

    /// Whose permits are the right to send a file. One is to be had before the first byte is read, and kept until the last is taken.
    pub(crate) fn files(&self) -> Arc<Semaphore> {
        self.files.clone()
    }

    /// The same, with its room, of a member that stops with `stop`.
    pub(crate) fn accepted(self, room: Room, stop: CancellationToken) -> Self {
        Self { room: Some(Arc::new(room)), stop, ..self }
    }
}

/// Who is at the other end.
#[derive(Debug, Clone)]
pub enum Peer {
    /// A TLS connection.
    Tls {
        /// Address and port.
        address: SocketAddr,
        /// The client certificate's `SubjectPublicKeyInfo`, proven by the handshake.
        client_key: Option<Vec<u8>>,
        /// Exporter value of the connection; absent below TLS 1.3.
        exporter: Option<[u8; EXPORTER_LENGTH]>,
        /// The member whose certificate the client showed, of whatever incarnation of the collective; or why what looked like one is not believed.
        member: Option<Result<Named, String>>,
    },
    /// The unix socket, with the peer's user id.
    Socket {
        /// User id.
        uid: u32,
    },
}

impl Peer {
    /// The address without the port; none on the socket.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        if let Self::Tls { address, .. } = self { Some(client(address.ip())) } else { None }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tls { address, .. } => address.fmt(f),
            Self::Socket { uid } => write!(f, "uid {uid}"),
        }
    }
}

/// A problem as an answer.
#[derive(Debug)]
pub struct Failure(pub Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<crate::store::StoreError> for Failure {
    fn from(error: crate::store::StoreError) -> Self {
        Self(error.into())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        tracing::error!("{error:#}");
        Self(Problem::new(Code::Internal, "the member failed: its log says more"))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
        // For the layers around the handler, which record refusals.
        response.extensions_mut().insert(self.0);
        response
    }
}

/// Foreign text as it may go to an administrator's terminal or log: no control characters, and not too long.
#[must_use]
pub fn clean(text: &str, maximum: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(maximum).collect()
}

/// Parses a JSON body; the error says what is wrong with it.
///
/// # Errors
/// [`Code::BadRequest`].
pub fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure(Problem::new(
            Code::BadRequest,
            format!("the body is not understood: {}", clean(&error.to_string(), 300)),
        ))
    })
}

/// Notes that a connection is asked for something.
pub async fn noted(Extension(connection): Extension<Connection>, request: Request, next: Next) -> Response {
    connection.asked.note();
    next.run(request).await
}

/// Makes a problem of refusals that the framework answers in plain text (no such path, a body that is too large).
pub async fn problems(request: Request, next: Next) -> Response {
    let call = format!("{} {}", request.method(), request.uri().path());
    let response = next.run(request).await;
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) || response.extensions().get::<Problem>().is_some() {
        return response;
    }
    let code = match status {
        StatusCode::NOT_FOUND => Code::NotFound,
        status if status.is_server_error() => Code::Internal,
        _ => Code::BadRequest,
    };
    let reason = match status {
        StatusCode::NOT_FOUND => "there is no such call here",
        StatusCode::METHOD_NOT_ALLOWED => "the call has another method",
        StatusCode::PAYLOAD_TOO_LARGE => "the body is larger than this call takes",
        StatusCode::RANGE_NOT_SATISFIABLE => return response,
        other => other.canonical_reason().unwrap_or("refused"),
    };
    Failure(Problem { status: status.as_u16(), code, detail: format!("{call}: {reason}") }).into_response()
}
