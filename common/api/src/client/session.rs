//! The session key: made per stage of a boot, shown as a self-signed client certificate, bound into tokens (RFC 8705).

use super::ClientError;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A P-256 key with its self-signed certificate. Never stored. No `Debug`.
pub struct SessionKey {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl SessionKey {
    /// A new one.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, ClientError> {
        let failed = |error: rcgen::Error| ClientError::Config(format!("cannot make a session key: {error}"));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        let certificate = params.self_signed(&key).map_err(failed)?.der().clone();
        Ok(Self { key, certificate })
    }

    /// DER `SubjectPublicKeyInfo`, as proofs hash it.
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}
