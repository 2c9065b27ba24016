//! Who is a member: chain, role and collective decide, never the address (DESIGN.md §4, "Certificates").

use super::session::SessionKey;
use super::{ClientError, chain};
use crate::ids::{CollectiveId, MemberId};
use crate::trust::{Incarnation, SiteBundle, authority_uri, parse_incarnation_uri, parse_member_uri};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WantsClientCert, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// A clock that never shows a time before `earliest` (Unix seconds): a node whose hardware clock lost its battery still knows
/// that it is later than the build of its boot payload.
#[derive(Debug, Clone, Copy)]
pub struct ClockFloor {
    /// The earliest believable time.
    pub earliest: u64,
}

impl TimeProvider for ClockFloor {
    fn current_time(&self) -> Option<UnixTime> {
        let now = UnixTime::now().as_secs();
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.max(self.earliest))))
    }
}

/// The TLS configuration for members of the bundle's collective: TLS 1.3, the site's roots, role and collective checked.
/// With a session key its certificate is shown, and tokens may be used on the connection.
///
/// # Errors
/// A root that is not a certificate; no root at all.
pub fn member_tls_config(bundle: &SiteBundle, session: Option<&SessionKey>) -> Result<ClientConfig, ClientError> {
    member_tls_config_at(
        bundle,
        session,
        Arc::new(ClockFloor { earliest: bundle.built }),
        aws_lc_rs::default_provider(),
    )
}

/// The same with a clock of the caller's, which must show no time before the bundle was built, and with ciphers in the caller's order.
///
/// # Errors
/// As [`member_tls_config`].
pub fn member_tls_config_at(
    bundle: &SiteBundle,
    session: Option<&SessionKey>,
    clock: Arc<dyn TimeProvider>,
    provider: CryptoProvider,
) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(provider);
    let builder = config_builder(MemberVerifier::new(bundle, provider.clone())?, clock, provider)?;
    let config = match session {
        Some(session) => builder
            .with_client_auth_cert(vec![session.certificate()], session.private_key())
            .map_err(|error| ClientError::Config(format!("the session key is not usable: {error}")))?,
        None => builder.with_no_client_auth(),
    };
    Ok(finished(config))
}

/// The TLS configuration of a member that calls other members: as [`member_tls_config`], but they have to be of the bundle's own incarnation, and
/// `own` shows its own certificate.
///
/// # Errors
/// A root that is not a certificate; no root at all.
pub fn peer_tls_config(bundle: &SiteBundle, own: Arc<dyn ResolvesClientCert>) -> Result<ClientConfig, ClientError> {
    let clock = Arc::new(ClockFloor { earliest: bundle.built });
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = MemberVerifier::new(bundle, provider.clone())?.among_members();
    Ok(finished(config_builder(verifier, clock, provider)?.with_client_cert_resolver(own)))
}

fn config_builder(
    verifier: MemberVerifier,
    clock: Arc<dyn TimeProvider>,
    provider: Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, ClientError> {
    let builder = ClientConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ClientError::Config(format!("TLS 1.3 is not available: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    Ok(builder)
}

fn finished(mut config: ClientConfig) -> ClientConfig {
    // A resumed session would not show the certificates again, and the member's identity is read from them.
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// So much time, for people: clocks that are wrong are wrong by years, or by a time zone.
fn span(seconds: u64) -> String {
    match seconds {
        0..7200 => format!("{} min", seconds.div_ceil(60)),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// That a certificate is not good now, where it is that: members renew theirs each day, and so a clock is wrong.
fn wrong_clock(error: &CertificateError) -> Option<String> {
    let is = match error {
        CertificateError::ExpiredContext { time, not_after } => {
            format!("expired {} ago", span(time.as_secs().saturating_sub(not_after.as_secs())))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            format!("is not good for another {}", span(not_before.as_secs().saturating_sub(time.as_secs())))
        }
        CertificateError::Expired => "has expired".into(),
        CertificateError::NotValidYet => "is not good yet".into(),
        _ => return None,
    };
    Some(format!(
        "its certificate {is}, by the clock of this machine: one of the two clocks is wrong; set it, and keep it set (NTP)"
    ))
}

/// Why a certificate is not believed to be a member's, in one line: what to do, where that is known.
#[must_use]
pub fn disbelief(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(cause) => wrong_clock(cause).unwrap_or_else(|| error.to_string()),
        // It is a sentence of ours.
        Error::General(why) => why.clone(),
        _ => error.to_string(),
    }
}

/// A handshake with what should be a member failed. That its certificate is of another authority says what to do.
pub(super) fn handshake_failure(url: &str, error: &std::io::Error) -> ClientError {
    let shown = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let cause = match shown {
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "its certificate is of another authority than the site bundle's: it is no member of this collective, or the bundle is an older \
             one (`moor site --bundle` on a member prints it, `moor profile boot-files` makes boot files with it)"
                .into()
        }
        Some(error @ (Error::InvalidCertificate(_) | Error::General(_))) => disbelief(error),
        _ => chain(error),
    };
    let has_expired = matches!(
        shown,
        Some(Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }))
    );
    ClientError::Connect { to: url.to_owned(), cause, has_expired }
}

/// The incarnation of `collective` that a member's certificate is of.
pub(super) fn shown_incarnation(collective: CollectiveId, certificate: &CertificateDer<'_>) -> Option<Incarnation> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(incarnation_of(collective, &certificate))
}

/// The member that a certificate of `collective` names.
#[must_use]
pub fn member_of(collective: CollectiveId, certificate: &CertificateDer<'_>) -> Option<MemberId> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    uris(&certificate).iter().find_map(|uri| parse_member_uri(collective, uri))
}

fn incarnation_of(collective: CollectiveId, certificate: &X509Certificate<'_>) -> Incarnation {
    uris(certificate).iter().find_map(|uri| parse_incarnation_uri(collective, uri)).unwrap_or_default()
}

/// The key that a certificate is of: DER `SubjectPublicKeyInfo`.
#[must_use]
pub fn key_of(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw.to_vec())
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Vec<&'a str> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect()
}

/// A member, as its certificate names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Which.
    pub member: MemberId,
    /// Of which incarnation of its collective.
    pub incarnation: Incarnation,
}

/// Judges whether a certificate is a member's.
#[derive(Debug)]
pub struct MemberVerifier {
    collective: CollectiveId,
    incarnation: Incarnation,
    /// Whether a server may be of a later incarnation: whoever is no member may not have heard of that yet.
    is_member: bool,
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl MemberVerifier {
    /// For members of the bundle's collective.
    ///
    /// # Errors
    /// A root that is not a certificate; no root at all.
    pub fn new(bundle: &SiteBundle, provider: Arc<CryptoProvider>) -> Result<Self, ClientError> {
        let mut roots = RootCertStore::empty();
        for pem in &bundle.roots {
            let root = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| {
                ClientError::Config(format!("a root in the site bundle is not a PEM certificate: {error}"))
            })?;
            roots
                .add(root)
                .map_err(|error| ClientError::Config(format!("a root in the site bundle is not usable: {error}")))?;
        }
        if roots.is_empty() {
            return Err(ClientError::Config(
                "the site bundle has no root certificate: make it again with `moor site`".into(),
            ));
        }
        let SiteBundle { collective, incarnation, .. } = *bundle;
        Ok(Self { collective, incarnation, is_member: false, roots, provider })
    }

    /// For a member, which believes no server of another incarnation than its own.
    fn among_members(self) -> Self {
        Self { is_member: true, ..self }
    }

    fn check(&self, shown: Incarnation) -> Result<(), Error> {
        let own = self.incarnation;
        if shown < own {
            return Err(Error::General(format!(
                "its certificate is of incarnation {shown} of the collective, which was recovered or restored since and is at {own}: a member of \
                 before has to be stopped, and joins anew with `moor collective join --set-aside`"
            )));
        }
        if shown > own && self.is_member {
            return Err(Error::General(format!(
                "its certificate is of incarnation {shown} of the collective, and this member is of {own}: the collective was recovered or \
                 restored without this one; stop it, and let it join anew with `moor collective join --set-aside`"
            )));
        }
        Ok(())
    }

    /// The member whose certificate this is: the chain ends in a root, the member authority has signed it, and it names one. It may be of any
    /// incarnation.
    ///
    /// # Errors
    /// It is nobody's, or is not valid at `now`.
    pub fn member(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Named, Error> {
        let issuer_der = intermediates.first().ok_or(CertificateError::UnknownIssuer)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            &intermediates[..1],
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let bad = |_| Error::from(CertificateError::BadEncoding);
        let (_, issuer) = X509Certificate::from_der(issuer_der).map_err(bad)?;
        let (_, leaf) = X509Certificate::from_der(end_entity).map_err(bad)?;
        // The path search above may use any anchor; the member authority itself has to have signed the leaf.
        leaf.verify_signature(Some(issuer.public_key())).map_err(|_| CertificateError::UnknownIssuer)?;
        if !uris(&issuer).contains(&authority_uri(self.collective, "member").as_str()) {
            return Err(Error::General("it was not issued by the member authority of this collective".into()));
        }
        let member = uris(&leaf)
            .iter()
            .find_map(|uri| parse_member_uri(self.collective, uri))
            .ok_or_else(|| Error::General("it names no member of this collective".into()))?;
        Ok(Named { member, incarnation: incarnation_of(self.collective, &leaf) })
    }
}

impl ServerCertVerifier for MemberVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(self.member(end_entity, intermediates, now)?.incarnation)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::time::Duration;

    #[test]
    fn that_a_certificate_has_expired_is_known_whatever_the_words() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let cases = [
            (CertificateError::Expired, true),
            (CertificateError::ExpiredContext { time: at(9), not_after: at(5) }, true),
            (CertificateError::NotValidYet, false),
            (CertificateError::NotValidYetContext { time: at(5), not_before: at(9) }, false),
            (CertificateError::UnknownIssuer, false),
        ];
        for (error, expired) in cases {
            let said = std::io::Error::new(ErrorKind::InvalidData, Error::InvalidCertificate(error.clone()));
            assert_eq!(handshake_failure("https://a", &said).has_expired(), expired, "{error:?}");
        }
        // Words prove nothing: a server may have a name like that.
        let words = std::io::Error::other("the certificate expired");
        assert!(!handshake_failure("https://a", &words).has_expired());
    }
}
