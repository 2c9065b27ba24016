//! HTTP/1.1 to a member, over TLS or its unix socket: one connection, typed calls, bounded answers, problems as errors.
//!
//! [`tls`] decides who is a member, [`session`] holds the key that tokens are bound to, [`node`], [`admin`] and [`member`] are the calls.

pub mod admin;
pub mod member;
pub mod node;
mod secured;
pub mod session;
pub mod tls;

use crate::problem::{self, Problem};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::Zeroizing;

/// The header by which what belongs together is found in the logs of all members: a node sends the id of its boot.
pub const REQUEST_ID: &str = "x-request-id";

/// Longest JSON answer that is read, in bytes.
const MAX_JSON: usize = 64 << 20;

/// A call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The other side answered, and refused.
    #[error("{0}")]
    Problem(Problem),
    /// No connection.
    #[error("cannot connect to {to}: {cause}")]
    Connect {
        /// URL or socket path.
        to: String,
        /// Why, in one line.
        cause: String,
        /// Whether the other side, or one of several, is a member whose certificate has expired by the clock of this machine: it has shown that it
        /// holds the key, and nothing else is wrong with the certificate.
        has_expired: bool,
    },
    /// The connection broke, or the answer took too long.
    #[error("{call}: {cause}")]
    Broken {
        /// Method and path.
        call: String,
        /// Why.
        cause: String,
    },
    /// The answer is not what the API says.
    #[error("{call}: the answer is not understood: {cause}")]
    Answer {
        /// Method and path.
        call: String,
        /// Why.
        cause: String,
    },
    /// The URL, the bundle or the key of this side is unusable.
    #[error("{0}")]
    Config(String),
}

impl ClientError {
    /// The problem, when the other side refused.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        if let Self::Problem(problem) = self { Some(problem) } else { None }
    }

    /// No connection, for a reason that says nothing of certificates.
    #[must_use]
    pub fn connect(to: &str, cause: String) -> Self {
        Self::Connect { to: to.to_owned(), cause, has_expired: false }
    }

    /// Whether there is no connection because the certificate of the member at the other side has expired by the clock of this machine: one of the
    /// two clocks is wrong. Nobody but a member, or whoever has the key of one, makes this true.
    #[must_use]
    pub fn has_expired(&self) -> bool {
        matches!(self, Self::Connect { has_expired: true, .. })
    }

    /// Whether another member, or the same one later, may answer otherwise.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Problem(problem) => problem.status >= 500 || problem.status == 429,
            Self::Connect { .. } | Self::Broken { .. } => true,
            Self::Answer { .. } | Self::Config(_) => false,
        }
    }
}

/// The whole chain of an error in one line; hyper's own text alone says little.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

/// A body to send.
pub type Body = BoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A body from bytes in memory.
#[must_use]
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed()
}

/// A body of JSON in memory that is wiped when it was sent, or was given up: it may hold an image's key or a passphrase. What carries it is
/// written out of that memory (both TLS and unix sockets take several buffers at once; hyper would copy it otherwise).
fn json_body<Q: Serialize + ?Sized>(value: &Q) -> serde_json::Result<Body> {
    let mut length = Length(0);
    serde_json::to_writer(&mut length, value)?;
    // As large as it gets: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(length.0));
    serde_json::to_writer(&mut *bytes, value)?;
    Ok(full(Bytes::from_owner(bytes)))
}

/// Counts what is written to it, and keeps nothing.
struct Length(usize);

impl std::io::Write for Length {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Is told why an answer may be out of date.
type Listener = Box<dyn FnMut(&str) + Send + Sync>;

/// One HTTP/1.1 connection. Calls run one after the other.
pub struct Http {
    sender: http1::SendRequest<Body>,
    host: HeaderValue,
    token: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    timeout: Duration,
    stale: Option<Listener>,
}

impl Http {
    /// Starts HTTP on a stream that is ready for it. `host` goes into the `Host` header; `timeout` bounds the time until an
    /// answer begins, and each pause within it.
    async fn start<S>(stream: S, to: &str, host: &str, timeout: Duration) -> Result<Self, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let host =
            HeaderValue::from_str(host).map_err(|_| ClientError::Config(format!("'{host}' is not a host name")))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| ClientError::connect(to, chain(&error)))?;
        tokio::spawn(async move {
            // An error of the connection reaches the call that waits on it.
            let _ = connection.with_upgrades().await;
        });
        Ok(Self { sender, host, token: None, request_id: None, timeout, stale: None })
    }

    /// Sends this token with each call from now on.
    pub fn set_token(&mut self, token: &str) -> Result<(), ClientError> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| ClientError::Config("the token has characters that no header may have".into()))?;
        value.set_sensitive(true);
        self.token = Some(value);
        Ok(())
    }

    /// Names what the calls from now on belong to, in the logs of members; `None`, or what no header may have: nothing.
    pub fn set_request_id(&mut self, id: Option<&str>) {
        self.request_id = id.and_then(|id| HeaderValue::from_str(id).ok());
    }

    /// Whether the connection was closed by the other side.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request and returns the answer once its head is there and says success; a problem becomes an error.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: Body,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder().method(method).uri(path);
        if !content_type.is_empty() {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        self.send_request(request, body).await
    }

    /// Asks for these bytes of a file, of which there is one at least.
    pub async fn send_range(&mut self, path: &str, range: &Range<u64>) -> Result<Response<Incoming>, ClientError> {
        let wanted = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        let request = Request::builder().method(Method::GET).uri(path).header(header::RANGE, wanted);
        self.send_request(request, full(Bytes::new())).await
    }

    async fn send_request(
        &mut self,
        request: http::request::Builder,
        body: Body,
    ) -> Result<Response<Incoming>, ClientError> {
        let call = match (request.method_ref(), request.uri_ref()) {
            (Some(method), Some(uri)) => format!("{method} {uri}"),
            _ => "a call".into(),
        };
        let mut request = request.header(header::HOST, self.host.clone());
        if let Some(id) = &self.request_id {
            request = request.header(REQUEST_ID, id.clone());
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token.clone());
        }
        let request = request.body(body).map_err(|error| ClientError::Config(format!("{call}: {error}")))?;
        let broken = |cause: String| ClientError::Broken { call: call.clone(), cause };
        tokio::time::timeout(self.timeout, self.sender.ready())
            .await
            .map_err(|_| broken("the connection is busy".into()))?
            .map_err(|error| broken(chain(&error)))?;
        let response = tokio::time::timeout(self.timeout, self.sender.send_request(request))
            .await
            .map_err(|_| broken(format!("no answer within {} s", self.timeout.as_secs())))?
            .map_err(|error| broken(chain(&error)))?;
        if response.status().is_success() {
            let why = response.headers().get(crate::admin::STALE).and_then(|why| why.to_str().ok());
            if let (Some(why), Some(tell)) = (why, &mut self.stale) {
                tell(why);
            }
            return Ok(response);
        }
        Err(self.refusal(&call, response).await)
    }

    /// Asks for another protocol on this connection (RFC 9110 §7.8), which is that protocol's from the answer on.
    async fn switch(mut self, path: &str, protocol: &'static str) -> Result<Upgraded, ClientError> {
        let call = format!("GET {path}");
        let request = Request::builder()
            .uri(path)
            .header(header::HOST, self.host.clone())
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, protocol)
            .body(full(Bytes::new()))
            .map_err(|error| ClientError::Config(format!("{call}: {error}")))?;
        let broken = |cause: String| ClientError::Broken { call: call.clone(), cause };
        let limit = self.timeout;
        let switch = async {
            self.sender.ready().await.map_err(|error| broken(chain(&error)))?;
            let response = self.sender.send_request(request).await.map_err(|error| broken(chain(&error)))?;
            match response.status() {
                StatusCode::SWITCHING_PROTOCOLS => {
                    hyper::upgrade::on(response).await.map_err(|error| broken(chain(&error)))
                }
                status if status.is_success() => Err(ClientError::Answer {
                    call: call.clone(),
                    cause: format!("the protocol was not switched to {protocol}"),
                }),
                _ => Err(self.refusal(&call, response).await),
            }
        };
        tokio::time::timeout(limit, switch)
            .await
            .map_err(|_| broken(format!("no answer within {} s", limit.as_secs())))?
    }

    async fn refusal(&self, call: &str, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let is_problem = response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(problem::CONTENT_TYPE.as_bytes()));
        let body = self.collect(call, response, 1 << 20).await.unwrap_or_default();
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) if is_problem => ClientError::Problem(problem),
            _ => ClientError::Answer { call: call.to_owned(), cause: format!("HTTP status {status}") },
        }
    }

    /// Reads a whole body of at most `limit` bytes.
    async fn collect(&self, call: &str, response: Response<Incoming>, limit: usize) -> Result<Bytes, ClientError> {
        let broken = |cause: String| ClientError::Broken { call: call.to_owned(), cause };
        let body = Limited::new(response.into_body(), limit);
        // Generous, because a body of the largest size may come over a slow link; a stalled one still ends.
        let body = tokio::time::timeout(self.timeout * 4, body.collect())
            .await
            .map_err(|_| broken("the answer stalled".into()))?;
        body.map(http_body_util::Collected::to_bytes).map_err(|error| broken(chain(&*error)))
    }

    /// A call with a JSON body (or none) and a JSON answer.
    pub async fn json<Q: Serialize + ?Sized, A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<A, ClientError> {
        let call = format!("{method} {path}");
        let response = self.send_json(method, path, body).await?;
        let bytes = self.collect(&call, response, MAX_JSON).await?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Answer { call, cause: error.to_string() })
    }

    /// A call with a JSON body and no answer (204).
    pub async fn post_only<Q: Serialize + ?Sized>(&mut self, path: &str, body: &Q) -> Result<(), ClientError> {
        let call = format!("POST {path}");
        let response = self.send_json(Method::POST, path, Some(body)).await?;
        if response.status() != StatusCode::NO_CONTENT {
            return Err(ClientError::Answer {
                call,
                cause: format!("HTTP status {} instead of 204", response.status()),
            });
        }
        self.collect(&call, response, 1024).await.map(drop)
    }

    /// A file of at most `limit` bytes.
    pub async fn bytes(&mut self, path: &str, limit: usize) -> Result<Bytes, ClientError> {
        let response = self.send(Method::GET, path, "", full(Bytes::new())).await?;
        self.collect(&format!("GET {path}"), response, limit).await
    }

    async fn send_json<Q: Serialize + ?Sized>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<Response<Incoming>, ClientError> {
        let (kind, body) = match body {
            Some(body) => {
                let body = json_body(body).map_err(|error| ClientError::Config(format!("{path}: {error}")))?;
                ("application/json", body)
            }
            None => ("", full(Bytes::new())),
        };
        self.send(method, path, kind, body).await
    }
}
