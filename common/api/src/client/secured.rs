//! A TLS connection to a member, with what it proves: which member it is, and the exporter that proofs are bound to.

use super::node::parse_https;
use super::tls::{handshake_failure, key_of, member_of, shown_incarnation};
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
            let tls = TlsConnector::from(config)
                .connect(server_name, tcp)
                .await
                .map_err(|error| handshake_failure(url, &error))?;
            Ok::<_, ClientError>((tls, local))
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
