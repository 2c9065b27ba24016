//! A member's connection to another member, and the calls of `/member/v1` on it.

use super::secured::Secured;
use super::{Body, ClientError, full};
use crate::ids::{CollectiveId, MemberId};
use crate::proof::EXPORTER_LENGTH;
use bytes::Bytes;
use http::{Method, header};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A connection that is no HTTP any more.
pub type Switched = TokioIo<Upgraded>;

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

    /// Switches the connection to another protocol (RFC 9110 §7.8).
    ///
    /// # Errors
    /// The connection broke, or a refusal.
    pub async fn switch(self, path: &str, protocol: &'static str) -> Result<Switched, ClientError> {
        self.0.http.switch(path, protocol).await.map(TokioIo::new)
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

    /// A GET of these bytes of a file (or of as many of them as there are), whose answer is read as it comes. `range` is not empty.
    ///
    /// # Errors
    /// The connection broke; a refusal, also because there are none of these bytes; other bytes came.
    pub async fn get_range(&mut self, path: &str, range: &Range<u64>) -> Result<(Part, Incoming), ClientError> {
        let response = self.0.http.send_range(path, range).await?;
        let said = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let part = said
            .and_then(Part::parse)
            .filter(|part| part.range.start == range.start && part.range.end == range.end.min(part.size));
        let part = part.ok_or_else(|| ClientError::Answer {
            call: format!("GET {path}"),
            cause: format!("bytes {} to {} were asked for, and others came", range.start, range.end),
        })?;
        Ok((part, response.into_body()))
    }
}

/// Which bytes of a file an answer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// These.
    pub range: Range<u64>,
    /// Of so many.
    pub size: u64,
}

impl Part {
    /// `bytes FIRST-LAST/SIZE` (RFC 9110 §14.4).
    fn parse(text: &str) -> Option<Self> {
        let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let (first, last, size): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, size.parse().ok()?);
        (first <= last && last < size).then(|| Self { range: first..last + 1, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_within_its_file() {
        let part = |range, size| Some(Part { range, size });
        for (text, expected) in [
            ("bytes 0-0/1", part(0..1, 1)),
            ("bytes 5-9/10", part(5..10, 10)),
            ("bytes 0-18446744073709551614/18446744073709551615", part(0..u64::MAX, u64::MAX)),
            ("bytes 0-18446744073709551615/18446744073709551615", None),
            ("bytes 5-10/10", None),
            ("bytes 6-5/10", None),
            ("bytes */10", None),
            ("bytes 0-5/*", None),
            ("lines 0-5/10", None),
            ("bytes -1-5/10", None),
            ("", None),
        ] {
            assert_eq!(Part::parse(text), expected, "{text}");
        }
    }
}
