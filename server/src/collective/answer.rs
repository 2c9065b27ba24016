//! Who answers at the address of another member, for whoever is about to go on without it ([`recover`](super::recover)). A connection between
//! members says only whether it came about; here somebody who is not believed counts as well: the authority may have been rotated without this
//! member, or the collective recovered without it, or a clock is wrong.

use crate::state::now;
use crate::store::raft::Peer;
use crate::store::records::SiteRecord;
use crate::trust::Taken;
use anyhow::Context as _;
use moor_api::client::chain;
use moor_api::client::node::parse_https;
use moor_api::client::tls::{Named, disbelief, key_of, member_of};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// A connection comes about in this time, or not at all; and so long a handshake takes at most.
const CONNECT: Duration = Duration::from_secs(2);

/// What there is to do for whoever wanted to recover.
const NOTHING: &str = "nothing was changed. A collective is recovered when the majority is lost for ever; stop the members that still run, or bring one back, \
                       or take out those that are dead (`moor collective remove`)";
/// The same where the others go on without this member.
const JOIN: &str = "nothing was changed. Let this member join anew (`moor collective join --set-aside` with an invitation of that one), or stop that one first";

/// Who answers at an address, for people.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nobody takes a connection.
    Nobody,
    /// Something that is no member.
    Stranger(String),
    /// A member, or somebody who calls himself one of this collective: why nobody goes on without it.
    Member(String),
}

/// What is shown at an address.
#[derive(Debug)]
enum Answer {
    Nobody,
    /// No certificate: why.
    Something(String),
    /// These certificates, its own first; it has the key of that.
    Certificates(Vec<CertificateDer<'static>>),
}

/// Takes any certificate whose handshake signature is good. It is for looking alone: nothing is sent over such a connection.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Calls members of a collective, and judges who answers by what this member trusts.
pub(super) struct Caller {
    site: SiteRecord,
    trust: Arc<Taken>,
    tls: TlsConnector,
}

impl Caller {
    /// For a member of `site` that trusts `trust`.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub(super) fn new(site: &SiteRecord, trust: Arc<Taken>) -> anyhow::Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .context("setting up TLS")?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_no_client_auth();
        // Members are not asked by name, and it may be an address.
        config.enable_sni = false;
        Ok(Self { site: site.clone(), trust, tls: TlsConnector::from(Arc::new(config)) })
    }

    /// Who answers at `url`, which is one of `peer`'s.
    ///
    /// # Errors
    /// It is no URL of a member.
    pub(super) async fn call(&self, peer: &Peer, url: &str) -> anyhow::Result<Heard> {
        Ok(match self.ask(url).await? {
            Answer::Nobody => Heard::Nobody,
            Answer::Something(why) => stranger(peer, url, &why),
            Answer::Certificates(shown) => self.judge(peer, url, &shown),
        })
    }

    async fn ask(&self, url: &str) -> anyhow::Result<Answer> {
        let (host, port) = parse_https(url)?;
        let Ok(Ok(tcp)) = timeout(CONNECT, TcpStream::connect((host.as_str(), port))).await else {
            return Ok(Answer::Nobody);
        };
        let name = ServerName::try_from("member").context("naming a member")?;
        Ok(match timeout(CONNECT, self.tls.connect(name, tcp)).await {
            Ok(Ok(tls)) => match tls.get_ref().1.peer_certificates() {
                Some(shown) if !shown.is_empty() => Answer::Certificates(shown.to_vec()),
                _ => Answer::Something("it shows no certificate".into()),
            },
            Ok(Err(error)) => Answer::Something(chain(&error)),
            Err(_) => Answer::Something(format!("it says nothing within {} s", CONNECT.as_secs())),
        })
    }

    fn judge(&self, peer: &Peer, url: &str, shown: &[CertificateDer<'static>]) -> Heard {
        let [leaf, intermediates @ ..] = shown else { return Heard::Nobody };
        let SiteRecord { collective, incarnation: own, created, .. } = &self.site;
        // As when members call each other: never before the collective was made.
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now().max(*created)));
        let name = &peer.name;
        Heard::Member(match self.trust.verifier.member(leaf, intermediates, now) {
            Ok(Named { incarnation, .. }) if incarnation > *own => format!(
                "{url} ({name}) answers for incarnation {incarnation} of the collective, and this member is of {own}: it was recovered or restored \
                 without this one. So {JOIN}"
            ),
            Ok(Named { incarnation, .. }) if incarnation < *own => format!(
                "{url} ({name}) answers for incarnation {incarnation} of the collective, which is of before it was recovered or restored (this \
                 member is of {own}): nothing was changed. Stop that one first"
            ),
            Ok(Named { member, .. }) if member == peer.id && key_of(leaf).as_ref() == Some(&peer.key.0) => {
                format!("member {name} answers at {url}: {NOTHING}")
            }
            Ok(Named { member, .. }) => format!(
                "{url}, where member {name} was, answers as member {member} by a key that this one has not heard of: the collective goes on \
                 without this one, and {JOIN}"
            ),
            Err(cause) => match member_of(*collective, leaf) {
                Some(member) => format!(
                    "{url}, where member {name} was, answers as member {member} of this collective, and is not believed here ({}): the \
                     authority was rotated while this member was away or removed, or a clock is wrong; {JOIN}",
                    disbelief(&cause)
                ),
                None => return stranger(peer, url, &disbelief(&cause)),
            },
        })
    }
}

fn stranger(peer: &Peer, url: &str, why: &str) -> Heard {
    Heard::Stranger(format!(
        "something answers at {url}, where member {} was, and is no member of this collective ({why}): make sure that it is not that member",
        peer.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{self, Addresses, MemberIssuer, create_member_key};
    use crate::trust::Trust;
    use moor_api::ids::{CollectiveId, MemberId};
    use moor_api::trust::Incarnation;
    use rustls::ServerConfig;
    use rustls::sign::SingleCertAndKey;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// Somebody with authorities and a key of his own.
    struct Somebody {
        dir: tempfile::TempDir,
        site: SiteRecord,
        peer: Peer,
    }

    impl Somebody {
        fn new(collective: CollectiveId, incarnation: Incarnation) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let site = SiteRecord { collective, name: "x".into(), bundle_version: 1, created: now(), incarnation };
            authority::create(dir.path(), collective, "x", site.created).unwrap();
            let key = create_member_key(dir.path()).unwrap().into();
            let peer = Peer { id: MemberId::random(), key, name: "m2".into(), urls: Vec::new() };
            Self { dir, site, peer }
        }

        /// Who has the same authorities, and another key.
        fn beside(&self, incarnation: Incarnation) -> Self {
            let other = Self::new(self.site.collective, incarnation);
            for entry in std::fs::read_dir(self.dir.path()).unwrap() {
                let entry = entry.unwrap();
                if entry.file_name() != "member.key" {
                    std::fs::copy(entry.path(), other.dir.path().join(entry.file_name())).unwrap();
                }
            }
            other
        }

        fn caller(&self) -> Caller {
            Caller::new(&self.site, Trust::open(self.dir.path(), &self.site).unwrap().taken()).unwrap()
        }

        /// Answers one connection as a member; returns where.
        async fn answers(&self) -> String {
            let issuer = MemberIssuer {
                keys: self.dir.path().to_owned(),
                collective: self.site.collective,
                incarnation: self.site.incarnation,
                member: self.peer.id,
                addresses: Addresses::default(),
                created: self.site.created,
            };
            let certified = Arc::new(SingleCertAndKey::from(issuer.issue().unwrap()));
            let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(certified);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("https://{}", listener.local_addr().unwrap());
            tokio::spawn(async move {
                let (tcp, _) = listener.accept().await.unwrap();
                TlsAcceptor::from(Arc::new(config)).accept(tcp).await
            });
            url
        }
    }

    async fn said(caller: &Somebody, called: &Somebody, peer: &Peer) -> String {
        let url = called.answers().await;
        let heard = caller.caller().call(peer, &url).await.unwrap();
        let (Heard::Member(line) | Heard::Stranger(line)) = &heard else { panic!("{heard:?}") };
        assert!(line.contains(&url) && line.contains("m2") && !line.contains('\n'), "{line}");
        assert_eq!(matches!(heard, Heard::Member(_)), line.contains("nothing was changed"), "{line}");
        line.clone()
    }

    #[tokio::test]
    async fn nobody_is_taken_for_lost_who_calls_himself_a_member_also_if_he_is_not_believed() {
        let (first, second) = (Incarnation::FIRST, Incarnation::FIRST.next());
        let own = Somebody::new(CollectiveId::random(), first);
        let same = own.beside(first);
        let line = said(&own, &same, &same.peer).await;
        assert!(line.starts_with("member m2 answers at "), "{line}");
        let gone = own.beside(first);
        let line = said(&own, &same, &gone.peer).await;
        assert!(line.contains("by a key that this one has not heard of"), "{line}");
        let disguised = Peer { key: gone.peer.key.clone(), ..same.peer.clone() };
        let line = said(&own, &same, &disguised).await;
        assert!(line.contains("by a key that this one has not heard of"), "by another key: {line}");
        let later = own.beside(second);
        let line = said(&own, &later, &later.peer).await;
        assert!(line.contains("for incarnation 2 of the collective, and this member is of 1"), "{line}");
        let line = said(&later, &same, &same.peer).await;
        assert!(line.contains("for incarnation 1 of the collective, which is of before"), "{line}");
        let rotated = Somebody::new(own.site.collective, first);
        let line = said(&own, &rotated, &rotated.peer).await;
        assert!(line.contains("is not believed here") && line.contains("`moor collective join --set-aside`"), "{line}");
        let foreign = Somebody::new(CollectiveId::random(), first);
        let line = said(&own, &foreign, &foreign.peer).await;
        assert!(line.starts_with("something answers at ") && line.contains("no member of this collective"), "{line}");
    }

    #[tokio::test]
    async fn who_takes_connections_and_is_silent_is_told_and_who_takes_none_is_nobody() {
        let own = Somebody::new(CollectiveId::random(), Incarnation::FIRST);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let heard = own.caller().call(&own.peer, &url).await.unwrap();
        assert!(matches!(&heard, Heard::Stranger(line) if line.contains("it says nothing within 2 s")), "{heard:?}");
        drop(listener);
        assert_eq!(own.caller().call(&own.peer, &url).await.unwrap(), Heard::Nobody);
        assert!(own.caller().call(&own.peer, "http://127.0.0.1:1").await.is_err());
    }
}
