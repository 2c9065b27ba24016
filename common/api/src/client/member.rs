//! A member's connection to another member, and the calls of `/member/v1` on it.

use super::secured::Secured;
use super::{Body, ClientError, full};
use crate::ids::{CollectiveId, MemberId};
use crate::proof::EXPORTER_LENGTH;
use bytes::Bytes;
use http::{Method, StatusCode};
use hyper::body::Incoming;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

/// A connection to one member. The member's certificate was verified.
pub struct MemberConnection(Secured);

impl MemberConnection {
    /// Connects. `config` comes from [`super::tls::peer_tls_config`] for the bundle of `collective`; `timeout` bounds the
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
        Secured::connect(url, collective, config, timeout).await.map(Self)
    }

    /// The member at the other end, as its certificate names it.
    #[must_use]
    pub fn member(&self) -> MemberId {
        self.0.member
    }

    /// The key that the member has shown to have: DER `SubjectPublicKeyInfo`.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.0.key
    }

    /// The exporter value for proofs on this connection.
    #[must_use]
    pub fn exporter(&self) -> &[u8; EXPORTER_LENGTH] {
        &self.0.exporter
    }

    /// Whether the other side closed it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.http.is_closed()
    }

    /// Names what the calls from now on belong to, in the logs of members.
    pub fn set_request_id(&mut self, id: Option<&str>) {
        self.0.http.set_request_id(id);
    }

    /// From now on an answer may take this long.
    pub fn patience(&mut self, timeout: Duration) {
        self.0.http.timeout = timeout;
    }

    /// A POST with JSON in memory; the answer has at most `limit` bytes.
    ///
    /// # Errors
    /// The connection broke, or a refusal.
    pub async fn post(&mut self, path: &str, body: Bytes, limit: usize) -> Result<Bytes, ClientError> {
        self.post_body(path, full(body), limit).await
    }

    /// A POST with a body of any length.
    ///
    /// # Errors
    /// The connection broke, or a refusal.
    pub async fn post_body(&mut self, path: &str, body: Body, limit: usize) -> Result<Bytes, ClientError> {
        let http = &mut self.0.http;
        let response = http.send(Method::POST, path, "application/json", body).await?;
        http.collect(&format!("POST {path}"), response, limit).await
    }

    /// A GET of a file from the byte `start` on, whose answer is read as it comes; with it, where it begins: at `start`, or, from who knows no
    /// ranges, at the beginning.
    ///
    /// # Errors
    /// The connection broke, or a refusal.
    pub async fn get_from(&mut self, path: &str, start: u64) -> Result<(u64, Incoming), ClientError> {
        let response = self.0.http.send_from(path, start).await?;
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
        Ok((if is_part { start } else { 0 }, response.into_body()))
    }
}
