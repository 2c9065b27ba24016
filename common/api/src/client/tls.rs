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

/// What TLS itself has against the other side, when that is why a connection failed.
fn refusal(error: &std::io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// A handshake with what should be a member failed. That its certificate is of another authority says what to do. `has_expired` as in
/// [`ClientError::Connect`].
pub(super) fn handshake_failure(url: &str, error: &std::io::Error, has_expired: bool) -> ClientError {
    let cause = match refusal(error) {
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "its certificate is of another authority than the site bundle's: it is no member of this collective, or the bundle is an older \
             one (`moor site --bundle` on a member prints it, `moor profile boot-files` makes boot files with it)"
                .into()
        }
        Some(error @ (Error::InvalidCertificate(_) | Error::General(_))) => disbelief(error),
        _ => chain(error),
    };
    ClientError::Connect { to: url.to_owned(), cause, has_expired }
}

/// A member's certificate has expired, as the clock of this machine has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expiry {
    /// What the clock shows.
    now: UnixTime,
    /// The last moment at which it was good.
    last: UnixTime,
}

impl Expiry {
    /// When a handshake failed because of that.
    pub(super) fn of(error: &std::io::Error) -> Option<Self> {
        match refusal(error)? {
            Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
                Some(Self { now: *time, last: *not_after })
            }
            _ => None,
        }
    }

    /// For a handshake at that last moment.
    pub(super) fn config(self, config: &ClientConfig) -> ClientConfig {
        let mut config = config.clone();
        config.time_provider = Arc::new(self);
        config
    }

    /// Whether this certificate, which was good then, has expired as well.
    pub(super) fn is_of(self, certificate: &CertificateDer<'_>) -> bool {
        let Some(certificate) = parsed(certificate) else { return false };
        u64::try_from(certificate.validity().not_after.timestamp()).is_ok_and(|end| end < self.now.as_secs())
    }
}

impl TimeProvider for Expiry {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.last)
    }
}

/// A moment at which a certificate that is out of its time was not.
fn in_time(error: &Error) -> Option<UnixTime> {
    match error {
        Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => Some(*not_after),
        Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => Some(*not_before),
        _ => None,
    }
}

/// What `judge` says of a chain at `now`. webpki looks at times before it looks at signatures, and so anybody can make a certificate that has expired:
/// that is said only of a chain that `judge` finds good at a time of its own. Of any other it is said what else is wrong with it. Where its
/// certificates have no time in common (a member's, which it issued by a wrong clock), `is_signed` decides.
fn judge_at<T>(
    now: UnixTime,
    judge: impl Fn(UnixTime) -> Result<T, Error>,
    is_signed: impl FnOnce() -> bool,
) -> Result<T, Error> {
    let judged = judge(now);
    let Some(mut then) = judged.as_ref().err().and_then(in_time) else { return judged };
    // By the leaf's time, and once more where its issuer is out of its own then.
    for _ in 0..2 {
        match judge(then) {
            Ok(_) => return judged,
            Err(error) => then = in_time(&error).ok_or(error)?,
        }
    }
    if is_signed() { judged } else { Err(CertificateError::UnknownIssuer.into()) }
}

fn parsed<'a>(certificate: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    X509Certificate::from_der(certificate).ok().map(|(_, certificate)| certificate)
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
    /// The same, as they are.
    certificates: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl MemberVerifier {
    /// For members of the bundle's collective.
    ///
    /// # Errors
    /// A root that is not a certificate; no root at all.
    pub fn new(bundle: &SiteBundle, provider: Arc<CryptoProvider>) -> Result<Self, ClientError> {
        let (mut roots, mut certificates) = (RootCertStore::empty(), Vec::new());
        for pem in &bundle.roots {
            let root = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| {
                ClientError::Config(format!("a root in the site bundle is not a PEM certificate: {error}"))
            })?;
            certificates.push(root.clone());
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
        Ok(Self { collective, incarnation, is_member: false, roots, certificates, provider })
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
    /// It is nobody's, or is not valid at `now`. The latter is said of a member's certificate only.
    pub fn member(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Named, Error> {
        let judge = |at| self.named(end_entity, intermediates, at);
        judge_at(now, judge, || self.is_signed(end_entity, intermediates))
    }

    /// As [`Self::member`], but that a time may be what is seen first to be wrong with a certificate that is nobody's.
    fn named(
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

    /// Whether a root has signed the issuer, and that one the leaf, at whatever time.
    fn is_signed(&self, end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> bool {
        let (Some(leaf), Some(issuer)) = (parsed(end_entity), intermediates.first().and_then(parsed)) else {
            return false;
        };
        let mut roots = self.certificates.iter().filter_map(parsed);
        leaf.verify_signature(Some(issuer.public_key())).is_ok()
            && roots.any(|root| issuer.verify_signature(Some(root.public_key())).is_ok())
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
        let judge = |at| self.check(self.named(end_entity, intermediates, at)?.incarnation);
        judge_at(now, judge, || self.is_signed(end_entity, intermediates))?;
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

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    fn expired(not_after: u64) -> Error {
        CertificateError::ExpiredContext { time: at(99), not_after: at(not_after) }.into()
    }

    fn early(not_before: u64) -> Error {
        CertificateError::NotValidYetContext { time: at(1), not_before: at(not_before) }.into()
    }

    #[test]
    fn that_a_certificate_has_expired_is_known_by_what_it_is_and_not_by_words() {
        let cases = [
            (expired(5), true),
            (early(9), false),
            // Its end is before its begin (webpki): no clock is at fault.
            (CertificateError::Expired.into(), false),
            (CertificateError::UnknownIssuer.into(), false),
        ];
        for (error, has_expired) in cases {
            let said = std::io::Error::new(ErrorKind::InvalidData, error.clone());
            assert_eq!(Expiry::of(&said).is_some(), has_expired, "{error:?}");
        }
        // Words prove nothing: a server may have a name like that.
        assert_eq!(Expiry::of(&std::io::Error::other("the certificate expired")), None);
    }

    #[test]
    fn a_time_is_wrong_only_where_nothing_else_is() {
        type Judge = fn(u64) -> Result<(), Error>;
        let cases: [(&str, Judge, Result<(), Error>); 7] = [
            ("good", |_| Ok(()), Ok(())),
            ("expired", |now| if now > 50 { Err(expired(50)) } else { Ok(()) }, Err(expired(50))),
            ("not good yet", |now| if now < 200 { Err(early(200)) } else { Ok(()) }, Err(early(200))),
            (
                "expired, after its issuer",
                |now| match now {
                    51.. => Err(expired(50)),
                    41..=50 => Err(expired(40)),
                    _ => Ok(()),
                },
                Err(expired(50)),
            ),
            (
                "expired, and bad",
                |now| if now > 50 { Err(expired(50)) } else { Err(CertificateError::BadSignature.into()) },
                Err(CertificateError::BadSignature.into()),
            ),
            (
                "expired, of an issuer that began later",
                |now| if now > 50 { Err(expired(50)) } else { Err(early(60)) },
                Err(expired(50)),
            ),
            ("never good", |now| if now > 50 { Err(expired(50)) } else { Err(expired(now - 1)) }, Err(expired(50))),
        ];
        for (name, judge, expected) in cases {
            let judge_at = |is_signed| judge_at(at(99), |now| judge(now.as_secs()), || is_signed);
            assert_eq!(judge_at(true), expected, "{name}");
            let is_at_odds = name == "never good" || name.ends_with("later");
            let expected = if is_at_odds { Err(CertificateError::UnknownIssuer.into()) } else { expected };
            assert_eq!(judge_at(false), expected, "{name}, and nobody has signed it");
        }
    }
}
