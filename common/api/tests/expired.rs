//! That a clock is wrong is believed of a member alone: whoever else shows a certificate that has expired must not make a booting node set its clock.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use moor_api::client::ClientError;
use moor_api::client::node::NodeConnection;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::trust::{Incarnation, SiteBundle, authority_uri, member_uri};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// From the beginning of one year to that of another.
type Years = (i32, i32);

/// Good now.
const NOW: Years = (1990, 2999);
/// So it has expired.
const PAST: Years = (1990, 2020);
/// Good now, and not then.
const LATE: Years = (2024, 2999);

fn params(name: &str, (begin, end): Years, uri: String) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(begin, 1, 1);
    params.not_after = rcgen::date_time_ymd(end, 1, 1);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params
}

/// What a server shows, and signs with.
#[derive(Clone)]
struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<KeyPair>,
}

impl Shown {
    /// Whoever has seen it can show it, with a key of his own.
    fn copied(&self) -> Self {
        Self { chain: self.chain.clone(), key: Arc::new(KeyPair::generate().unwrap()) }
    }

    fn config(&self) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let signing = aws_lc_rs::sign::any_supported_type(&key).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(self.chain.clone(), signing))));
        Arc::new(config)
    }
}

/// A collective, or who says that he is one.
struct Site {
    id: CollectiveId,
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Site {
    fn new(id: CollectiveId) -> Self {
        let mut root = params("root", NOW, authority_uri(id, "root"));
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { id, root: CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap() }
    }

    /// A member's certificate by the authority of `role`.
    fn shown(&self, role: &str, issuer: Years, leaf: Years) -> Shown {
        let mut authority = params(role, issuer, authority_uri(self.id, role));
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let issuer = CertifiedIssuer::signed_by(authority, KeyPair::generate().unwrap(), &self.root).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf =
            params("one of them", leaf, member_uri(self.id, MemberId::random())).signed_by(&key, &issuer).unwrap();
        Shown { chain: vec![leaf.der().clone(), issuer.der().clone()], key: Arc::new(key) }
    }

    fn bundle(&self, incarnation: Incarnation) -> SiteBundle {
        SiteBundle {
            version: 1,
            collective: self.id,
            name: "test".into(),
            roots: vec![self.root.pem()],
            members: Vec::new(),
            ssh_host_authorities: Vec::new(),
            built: 1_700_000_000,
            incarnation,
        }
    }
}

/// What a node makes of a server that shows each of these in turn, and then the last one again.
async fn connect(bundle: &SiteBundle, shown: &[Shown]) -> Result<NodeConnection, ClientError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let configs: Vec<_> = shown.iter().map(Shown::config).collect();
    let server = tokio::spawn(async move {
        let mut connections = 0;
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let config = configs[connections.min(configs.len() - 1)].clone();
            connections += 1;
            tokio::spawn(async move {
                // What the node thinks of it, the node says.
                if let Ok(tls) = TlsAcceptor::from(config).accept(tcp).await {
                    tokio::time::sleep(Duration::from_secs(5)).await;
                    drop(tls);
                }
            });
        }
    });
    let config = Arc::new(member_tls_config(bundle, None).unwrap());
    let connection = NodeConnection::connect(&url, bundle.collective, config, Duration::from_secs(20)).await;
    server.abort();
    connection
}

#[tokio::test]
async fn only_a_member_can_say_that_its_certificate_has_expired() {
    let ours = Site::new(CollectiveId::random());
    // Anybody may call himself what we are called.
    let theirs = Site::new(ours.id);
    let expired = ours.shown("member", NOW, PAST);
    let first = Incarnation::FIRST;
    let another = "of another authority";
    let cases = [
        ("a member's", first, vec![expired.clone()], true, "its certificate expired"),
        ("made by somebody", first, vec![theirs.shown("member", NOW, PAST)], false, another),
        ("of an expired authority made by somebody", first, vec![theirs.shown("member", PAST, NOW)], false, another),
        ("both of them", first, vec![theirs.shown("member", (1990, 2010), PAST)], false, another),
        ("not good yet, made by somebody", first, vec![theirs.shown("member", NOW, (2990, 2999))], false, another),
        ("by another authority of ours", first, vec![ours.shown("node", NOW, PAST)], false, "not issued by the member"),
        ("a member's of before", first.next(), vec![expired.clone()], false, "of incarnation 1"),
        (
            "a member's by a clock that was years behind",
            first,
            vec![ours.shown("member", LATE, PAST)],
            false,
            "expired",
        ),
        ("the same, made by somebody", first, vec![theirs.shown("member", LATE, PAST)], false, another),
        ("never good", first, vec![theirs.shown("member", NOW, (2020, 1990))], false, "xpired"),
        ("a member's, shown by somebody", first, vec![expired.copied()], false, "its certificate expired"),
        (
            "the same, who has the node talk to a member then",
            first,
            vec![expired.copied(), ours.shown("member", NOW, NOW)],
            false,
            "its certificate expired",
        ),
    ];
    for (name, incarnation, shown, has_expired, words) in cases {
        let error = connect(&ours.bundle(incarnation), &shown).await.err().unwrap();
        assert_eq!(error.has_expired(), has_expired, "{name}: {error}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    let good = connect(&ours.bundle(first), &[ours.shown("member", NOW, NOW)]).await;
    assert!(good.is_ok(), "{}", good.err().unwrap());
}
