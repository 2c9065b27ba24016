//! The member's certificate as it is now: shown to nodes and administrators as a server's, to members also as a client's. Connections
//! that stand keep theirs.

use crate::authority::MemberIssuer;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The certificate is renewed this often.
const RENEWAL: Duration = Duration::from_hours(24);

/// The certificate.
#[derive(Debug)]
pub struct Certificate(RwLock<Arc<CertifiedKey>>);

impl Certificate {
    /// A first one.
    ///
    /// # Errors
    /// The member authority is missing or damaged.
    pub fn new(issuer: &MemberIssuer) -> anyhow::Result<Self> {
        Ok(Self(RwLock::new(Arc::new(issuer.issue()?))))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        // Whoever panicked here had at most replaced it.
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Renews it until `stop`.
    pub async fn renew(&self, issuer: &MemberIssuer, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RENEWAL) => {}
            }
            match issuer.issue() {
                Ok(issued) => *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(issued),
                // The old one is good for weeks: it is tried again, and said each time.
                Err(error) => tracing::error!("renewing the member's certificate: {error:#}"),
            }
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Certificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
