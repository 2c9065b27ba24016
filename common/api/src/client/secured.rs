//! A TLS connection to a member, with what it proves: which member it is, and the exporter that proofs are bound to.

use super::node::parse_https;
use super::tls::{Expiry, handshake_failure, key_of, member_of, shown_incarnation};
use super::{ClientError, Http};
use crate::ids::{CollectiveId, MemberId};
use crate::proof::{EXPORTER_LABEL, EXPORTER_LENGTH};
use crate::trust::Incarnation;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The connection.
pub(super) struct Secured {
    pub(super) http: Http,
    pub(super) member: MemberId,
    pub(super) incarnation: Incarnation,
    pub(super) key: Vec<u8>,
    pub(super) exporter: [u8; EXPORTER_LENGTH],
    pub(super) local: SocketAddr,
}

impl Secured {
    /// Connects; `timeout` bounds the connection, the handshake, and the time to each answer.
    pub(super) async fn connect(
        url: &str,
        collective: CollectiveId,
        config: Arc<ClientConfig>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let (host, port) = parse_https(url)?;
        let failed = |cause: String| ClientError::connect(url, cause);
        let server_name = match host.parse::<IpAddr>() {
            Ok(address) => ServerName::IpAddress(address.into()),
            Err(_) => ServerName::try_from(host.clone())
                .map_err(|_| ClientError::Config(format!("'{host}' is not a host name")))?,
        };
        let connect = async {
            let tcp = TcpStream::connect((host.as_str(), port)).await.map_err(|error| failed(error.to_string()))?;
            tcp.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
            let local = tcp.local_addr().map_err(|error| failed(error.to_string()))?;
            let error = match TlsConnector::from(config.clone()).connect(server_name.clone(), tcp).await {
                Ok(tls) => return Ok::<_, ClientError>((tls, local)),
                Err(error) => error,
            };
            let has_expired = match Expiry::of(&error) {
                Some(expiry) => Box::pin(holds_its_key(expiry, (host.as_str(), port), &config, server_name)).await,
                None => false,
            };
            Err(handshake_failure(url, &error, has_expired))
        };
        let (tls, local) = tokio::time::timeout(timeout, connect)
            .await
            .map_err(|_| failed(format!("no TLS connection within {} s", timeout.as_secs())))??;
        let session = tls.get_ref().1;
        let (member, incarnation, key) = session
            .peer_certificates()
            .and_then(<[_]>::first)
            .and_then(|shown| {
                Some((member_of(collective, shown)?, shown_incarnation(collective, shown)?, key_of(shown)?))
            })
            .ok_or_else(|| failed("its certificate names no member of this collective".into()))?;
        let exporter = session
            .export_keying_material([0; EXPORTER_LENGTH], EXPORTER_LABEL, None)
            .map_err(|error| failed(format!("no TLS exporter: {error}")))?;
        let authority = url.trim_start_matches("https://").split('/').next().unwrap_or_default().to_owned();
        let http = Http::start(tls, url, &authority, timeout).await?;
        Ok(Self { http, member, incarnation, key, exporter, local })
    }
}

/// Whether the other side has the key of a member's certificate that has expired, by another handshake, at a time when it was good. Members show
/// their certificates to everybody, and so whoever shows one that has expired since need not be one: the handshake ended before it came to the key.
async fn holds_its_key(
    expiry: Expiry,
    address: (&str, u16),
    config: &ClientConfig,
    server_name: ServerName<'static>,
) -> bool {
    let Ok(tcp) = TcpStream::connect(address).await else { return false };
    let Ok(tls) = TlsConnector::from(Arc::new(expiry.config(config))).connect(server_name, tcp).await else {
        return false;
    };
    // Another one may stand behind the same address, or be connected through.
    let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    shown.is_some_and(|certificate| expiry.is_of(certificate))
}
