//! The member's certificate as it is now: shown to nodes and administrators as a server's, to members also as a client's. Connections
//! that stand keep theirs.

use crate::authority::MemberIssuer;
use crate::state::now;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The certificate is renewed this often, by the clock: also when that was set, because it was made for another time then.
const RENEWAL: Duration = Duration::from_hours(24);
/// The clock is looked at this often.
const LOOK: Duration = Duration::from_secs(10);

/// The certificate.
#[derive(Debug)]
pub struct Certificate {
    key: RwLock<Arc<CertifiedKey>>,
    /// One is made at a time: of two, the one that stays must not be from the authority that was the right one before.
    replacing: Mutex<()>,
    /// When it was made, Unix seconds.
    made: AtomicU64,
}

impl Certificate {
    /// A first one.
    ///
    /// # Errors
    /// The member authority is missing or damaged.
    pub fn new(issuer: &MemberIssuer) -> anyhow::Result<Self> {
        let made = AtomicU64::new(now());
        Ok(Self { key: RwLock::new(Arc::new(issuer.issue()?)), replacing: Mutex::default(), made })
    }

    fn current(&self) -> Arc<CertifiedKey> {
        // Whoever panicked here had at most replaced it.
        self.key.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes another in its place, which new connections show.
    ///
    /// # Errors
    /// As of [`Certificate::new`]; then the one before stays.
    pub fn replace(&self, issuer: &MemberIssuer) -> anyhow::Result<()> {
        let _alone = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let issued = Arc::new(issuer.issue()?);
        *self.key.write().unwrap_or_else(PoisonError::into_inner) = issued;
        Ok(())
    }

    /// Renews it until `stop`.
    pub async fn renew(&self, issuer: &MemberIssuer, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let now = now();
            if now.abs_diff(self.made.load(Ordering::Relaxed)) < RENEWAL.as_secs() {
                continue;
            }
            // Tried again a day later where it fails, or when the clock is set again.
            self.made.store(now, Ordering::Relaxed);
            // The old one is good for weeks: it is tried again, and said each time.
            if let Err(error) = self.replace(issuer) {
                tracing::error!("renewing the member's certificate: {error:#}");
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
