//! A node's connection to a member and the calls of `/node/v1` on it.

use super::ClientError;
use super::secured::Secured;
use crate::deploy::{DeployDocument, PhaseName};
use crate::ids::{CollectiveId, MemberId};
use crate::node::{
    EnrollComplete, EnrollReply, EnrollRequest, Enrolled, Heartbeat, HeartbeatReply, Hello, HelloReply,
    HostCertificateRequest, HostCertificates, ImageOffer, KeyEnvelope, KeyRequest, LogReport, SessionReply,
    SessionRequest, SshTrust, StageClosed, StatusReport, TraceReport,
};
use crate::proof::EXPORTER_LENGTH;
use crate::trust::Incarnation;
use bytes::Bytes;
use http::{Method, Uri};
use rustls::ClientConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The port of a URL that names none.
pub const DEFAULT_PORT: u16 = 443;

/// Host and port of `https://HOST[:PORT][/…]`.
///
/// # Errors
/// Another scheme, no host.
pub fn parse_https(url: &str) -> Result<(String, u16), ClientError> {
    let error = || ClientError::Config(format!("'{url}' is not a URL of the form https://HOST[:PORT]"));
    let uri: Uri = url.parse().map_err(|_| error())?;
    if uri.scheme_str() != Some("https") {
        return Err(error());
    }
    let host = uri.host().ok_or_else(error)?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    Ok((host.to_owned(), uri.port_u16().unwrap_or(DEFAULT_PORT)))
}

/// Path segments percent-encoded, `/` kept.
fn encode_path(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&hex::encode_upper([byte]));
        }
    }
    out
}

/// A connection to one member. The member's certificate was verified; its id and the exporter belong into proofs.
pub struct NodeConnection {
    secured: Secured,
    url: String,
}

impl NodeConnection {
    /// Connects. `config` comes from [`super::tls::member_tls_config`] for the bundle of `collective`; `timeout` bounds the
    /// connection, the handshake, and the time to each answer.
    ///
    /// # Errors
    /// No address, no connection, a certificate that is no member's.
    pub async fn connect(
        url: &str,
        collective: CollectiveId,
        config: Arc<ClientConfig>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        Ok(Self { secured: Secured::connect(url, collective, config, timeout).await?, url: url.to_owned() })
    }

    /// The member at the other end, as its certificate names it.
    #[must_use]
    pub fn member(&self) -> MemberId {
        self.secured.member
    }

    /// The incarnation of the collective that it is of.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.secured.incarnation
    }

    /// The exporter value for proofs on this connection.
    #[must_use]
    pub fn exporter(&self) -> &[u8; EXPORTER_LENGTH] {
        &self.secured.exporter
    }

    /// The URL it was made with.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The node's own address on this connection: it names the interface that reaches the member.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.secured.local
    }

    /// Whether the other side closed it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.secured.http.is_closed()
    }

    /// Uses this token from now on.
    pub fn set_token(&mut self, token: &str) -> Result<(), ClientError> {
        self.secured.http.set_token(token)
    }

    /// Names what the calls from now on belong to, in the logs of members.
    pub fn set_request_id(&mut self, id: &str) {
        self.secured.http.set_request_id(Some(id));
    }

    /// `POST hello`.
    pub async fn hello(&mut self, hello: &Hello) -> Result<HelloReply, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/hello", Some(hello)).await
    }

    /// `POST enroll`.
    pub async fn enroll(&mut self, request: &EnrollRequest) -> Result<EnrollReply, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/enroll", Some(request)).await
    }

    /// `POST enroll/complete`.
    pub async fn enroll_complete(&mut self, request: &EnrollComplete) -> Result<Enrolled, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/enroll/complete", Some(request)).await
    }

    /// `POST session`. The token is not yet used: [`Self::set_token`].
    pub async fn session(&mut self, request: &SessionRequest) -> Result<SessionReply, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/session", Some(request)).await
    }

    /// `GET config`.
    pub async fn config(&mut self) -> Result<DeployDocument, ClientError> {
        self.secured.http.json::<(), _>(Method::GET, "/node/v1/config", None).await
    }

    /// `GET image`.
    pub async fn image(&mut self) -> Result<ImageOffer, ClientError> {
        self.secured.http.json::<(), _>(Method::GET, "/node/v1/image", None).await
    }

    /// `POST image/key`.
    pub async fn image_key(&mut self, request: &KeyRequest) -> Result<KeyEnvelope, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/image/key", Some(request)).await
    }

    /// `GET files/PATH`, at most `limit` bytes.
    pub async fn file(&mut self, path: &str, limit: usize) -> Result<Bytes, ClientError> {
        self.secured.http.bytes(&format!("/node/v1/files/{}", encode_path(path)), limit).await
    }

    /// `GET scripts/PHASE/PATH`, at most `limit` bytes.
    pub async fn script(&mut self, phase: PhaseName, path: &str, limit: usize) -> Result<Bytes, ClientError> {
        self.secured.http.bytes(&format!("/node/v1/scripts/{}/{}", phase.as_str(), encode_path(path)), limit).await
    }

    /// `POST ssh/host-certificates`.
    pub async fn host_certificates(
        &mut self,
        request: &HostCertificateRequest,
    ) -> Result<HostCertificates, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/ssh/host-certificates", Some(request)).await
    }

    /// `GET ssh/trust`.
    pub async fn ssh_trust(&mut self) -> Result<SshTrust, ClientError> {
        self.secured.http.json::<(), _>(Method::GET, "/node/v1/ssh/trust", None).await
    }

    /// `POST status`.
    pub async fn status(&mut self, report: &StatusReport) -> Result<(), ClientError> {
        self.secured.http.post_only("/node/v1/status", report).await
    }

    /// `POST log`.
    pub async fn log(&mut self, report: &LogReport) -> Result<(), ClientError> {
        self.secured.http.post_only("/node/v1/log", report).await
    }

    /// `POST stage-closed`.
    pub async fn stage_closed(&mut self, report: &StageClosed) -> Result<(), ClientError> {
        self.secured.http.post_only("/node/v1/stage-closed", report).await
    }

    /// `POST trace`.
    pub async fn trace(&mut self, report: &TraceReport) -> Result<(), ClientError> {
        self.secured.http.post_only("/node/v1/trace", report).await
    }

    /// `POST heartbeat`.
    pub async fn heartbeat(&mut self, report: &Heartbeat) -> Result<HeartbeatReply, ClientError> {
        self.secured.http.json(Method::POST, "/node/v1/heartbeat", Some(report)).await
    }
}
