//! Whom the reader believes to be a server of the image: a member of the site's collective, or whoever a given authority vouches
//! for. Everything is read once, at the start: the files may lie on the root that is served. What comes later comes by the control socket.

use crate::clock::OwnClock;
use moor_api::client::tls::member_tls_config_at;
use moor_api::tether;
use moor_api::trust::SiteBundle;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CipherSuite, ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("'{}' is not usable: {why}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What came by the control socket cannot take the place of what is in use.
    #[error("{0}")]
    Successor(String),
    /// The TLS library refuses its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Library(rustls::Error),
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

/// AES with 128 bits comes first: it is as strong as the handshake's curves, sealed images are encrypted with 256 bits as well, and
/// it saves both ends a quarter of the cipher's time.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    // The others stay in their order.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// Who vouches for servers.
pub struct Trust {
    /// The bundle; `None`: an authority that was named alone.
    site: Option<SiteBundle>,
    clock: Arc<OwnClock>,
    config: Arc<ClientConfig>,
}

impl Trust {
    /// Servers have to be members of the collective of the site bundle in `path`: role and collective count, not the address.
    ///
    /// # Errors
    /// The bundle cannot be read or has no usable root.
    pub fn site(path: &Path) -> Result<Self, TlsError> {
        let content = |why: String| TlsError::Content { path: path.to_owned(), why };
        let bundle: SiteBundle = serde_json::from_slice(&read(path)?)
            .map_err(|error| content(format!("it is no site bundle: {error}; make it again with `moor site`")))?;
        let clock = Arc::new(OwnClock::new(bundle.built));
        let config = members_of(&bundle, &clock).map_err(content)?;
        Ok(Self { site: Some(bundle), clock, config })
    }

    /// Servers have to show a certificate for the name or address in their URL, issued under an authority in the PEM file `path`.
    ///
    /// # Errors
    /// The file cannot be read or holds no certificate.
    pub fn authority(path: &Path) -> Result<Self, TlsError> {
        let clock = Arc::new(OwnClock::new(0));
        let config =
            issued_under(&read(path)?, &clock).map_err(|why| TlsError::Content { path: path.to_owned(), why })?;
        Ok(Self { site: None, clock, config })
    }

    /// What connections are made with.
    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// What takes its place. The clock goes on, and is not before the new bundle was built.
    ///
    /// # Errors
    /// It is of another kind or collective, is older, or cannot be used.
    pub fn successor(&self, wanted: &tether::Trust) -> Result<Self, TlsError> {
        let refused = |why: String| TlsError::Successor(why);
        match (&self.site, wanted) {
            (Some(now), tether::Trust::Site(bundle)) => {
                if bundle.collective != now.collective {
                    return Err(refused(format!(
                        "the new trust bundle is of collective {}, and the root is served by {}",
                        bundle.collective, now.collective
                    )));
                }
                if bundle.version < now.version {
                    return Err(refused(format!(
                        "the new trust bundle has version {}, which is older than {}, the one in use",
                        bundle.version, now.version
                    )));
                }
                let config = members_of(bundle, &self.clock)
                    .map_err(|why| refused(format!("the new trust bundle is not usable: {why}")))?;
                self.clock.raise(bundle.built);
                Ok(Self { site: Some(bundle.clone()), clock: self.clock.clone(), config })
            }
            (None, tether::Trust::Authority(pem)) => {
                let config = issued_under(pem.as_bytes(), &self.clock)
                    .map_err(|why| refused(format!("the new authority is not usable: {why}")))?;
                Ok(Self { site: None, clock: self.clock.clone(), config })
            }
            (Some(_), _) => Err(refused("the servers are members of a site: give its bundle, with --site".into())),
            (None, _) => Err(refused("the servers are vouched for by an authority: give it, with --ca".into())),
        }
    }
}

fn members_of(bundle: &SiteBundle, clock: &Arc<OwnClock>) -> Result<Arc<ClientConfig>, String> {
    member_tls_config_at(bundle, None, clock.clone(), provider()).map(Arc::new).map_err(|error| error.to_string())
}

fn issued_under(pem: &[u8], clock: &Arc<OwnClock>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("it is no PEM file: {error}"))?;
        roots.add(certificate).map_err(|error| format!("a certificate in it cannot be an authority: {error}"))?;
    }
    if roots.is_empty() {
        return Err("it holds no certificate: it has to be a PEM file with BEGIN CERTIFICATE".into());
    }
    let mut config = ClientConfig::builder_with_details(Arc::new(provider()), clock.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Library(error).to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
