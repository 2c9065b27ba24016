//! Whom the reader believes to be a server of the image: a member of the site's collective, or whoever a given authority vouches
//! for. Everything is read once, at the start: the files may lie on the root that is served.

use moor_api::client::tls::member_tls_config;
use moor_api::trust::SiteBundle;
use rustls::{ClientConfig, RootCertStore};
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
    /// The TLS library refuses its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Library(rustls::Error),
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

/// Servers have to be members of the collective of the site bundle in `path`: role and collective count, not the address.
///
/// # Errors
/// The bundle cannot be read or has no usable root.
pub fn site(path: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let content = |why: String| TlsError::Content { path: path.to_owned(), why };
    let bundle: SiteBundle = serde_json::from_slice(&read(path)?)
        .map_err(|error| content(format!("it is no site bundle: {error}; make it again with `moor site`")))?;
    member_tls_config(&bundle, None).map(Arc::new).map_err(|error| content(error.to_string()))
}

/// Servers have to show a certificate for the name or address in their URL, issued under an authority in the PEM file `path`.
///
/// # Errors
/// The file cannot be read or holds no certificate.
pub fn authority(path: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let content = |why: String| TlsError::Content { path: path.to_owned(), why };
    let pem = read(path)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| content(format!("it is no PEM file: {error}")))?;
        roots
            .add(certificate)
            .map_err(|error| content(format!("a certificate in it cannot be an authority: {error}")))?;
    }
    if roots.is_empty() {
        return Err(content("it holds no certificate: it has to be a PEM file with BEGIN CERTIFICATE".into()));
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Library)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
