//! Who may act as a member, and over what.

use crate::support::{Machine, Member};
use anyhow::{Context as _, ensure};
use moor_api::client::node::NodeConnection;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::trust::{SiteBundle, member_uri};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// An ordinary client, as firmware or curl: the site's root, the address in the certificate.
async fn get(member: &Member, version: &'static SupportedProtocolVersion, request: &str) -> anyhow::Result<String> {
    let mut roots = RootCertStore::empty();
    for root in member.site().await?.bundle.roots {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes())?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(("127.0.0.1", member.port)).await?;
    let mut tls = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
    tls.write_all(format!("{request}Host: x\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // An end without close_notify is an end.
    let _ = tls.read_to_end(&mut answer).await;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn tls_1_2_is_for_public_files_only() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let kernel = "GET /public/boot/p/kernel HTTP/1.1\r\n";
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let answer = get(&member, version, kernel).await?;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("kernel"), "{version:?}: {answer}");
    }
    let hello = "POST /node/v1/hello HTTP/1.1\r\nContent-Length: 0\r\n";
    let answer = get(&member, &rustls::version::TLS12, hello).await?;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("wants TLS 1.3"), "{answer}");
    let answer = get(&member, &rustls::version::TLS12, "GET /admin/v1/site HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("wants TLS 1.3"), "{answer}");
    let answer = get(&member, &rustls::version::TLS13, "GET /admin/v1/site HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("problem+json"), "{answer}");
    let answer = get(&member, &rustls::version::TLS13, "GET /nothing HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("problem+json"), "{answer}");
    Ok(())
}

/// A chain and its key.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A certificate with these URI names by an authority of a member, and that authority's own.
fn issue(keys: &Path, authority: &str, uris: &[String], shown: &[&str]) -> anyhow::Result<Identity> {
    let read = |name: &str| std::fs::read_to_string(keys.join(name)).with_context(|| name.to_owned());
    let (certificate, key) = if authority == "root" {
        ("root.pem".to_owned(), "root.key".to_owned())
    } else {
        (format!("{authority}-ca.pem"), format!("{authority}-ca.key"))
    };
    let issuer = Issuer::from_ca_cert_pem(&read(&certificate)?, KeyPair::from_pem(&read(&key)?)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".into()])?;
    for uri in uris {
        params.subject_alt_names.push(SanType::URI(uri.clone().try_into()?));
    }
    let mut chain = vec![params.signed_by(&key, &issuer)?.der().clone()];
    for name in shown {
        chain.push(CertificateDer::from_pem_slice(read(name)?.as_bytes())?);
    }
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok((chain, key))
}

/// Whether a node takes a server with this identity for a member.
async fn is_taken(bundle: &SiteBundle, (chain, key): Identity) -> anyhow::Result<Result<MemberId, String>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("https://{}", listener.local_addr()?);
    let server = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await?;
        TlsAcceptor::from(Arc::new(config)).accept(tcp).await
    });
    let client = Arc::new(member_tls_config(bundle, None)?);
    let connection = NodeConnection::connect(&url, bundle.collective, client, Duration::from_secs(10)).await;
    server.abort();
    Ok(connection.map(|connection| connection.member()).map_err(|error| error.to_string()))
}

#[tokio::test]
async fn only_a_members_certificate_makes_a_member() -> anyhow::Result<()> {
    let member = Member::start()?;
    let site = member.site().await?;
    let (bundle, keys) = (site.bundle, member.path("state/store/keys"));
    let id = MemberId::random();
    let uri = member_uri(bundle.collective, id);
    let chain = ["member-ca.pem"];

    // The control: what a second member would show.
    let taken = is_taken(&bundle, issue(&keys, "member", std::slice::from_ref(&uri), &chain)?).await?;
    assert_eq!(taken, Ok(id));

    let elsewhere = member_uri(CollectiveId::random(), id);
    let node_uri = format!("mooring://{}/node/{id}", bundle.collective);
    let other = Member::init()?;
    let other_keys = other.path("state/store/keys");
    let self_signed = {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["127.0.0.1".into()])?;
        params.subject_alt_names.push(SanType::URI(uri.clone().try_into()?));
        let certificate = params.self_signed(&key)?.der().clone();
        (vec![certificate], PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?)
    };
    let cases = [
        ("a node's certificate", issue(&keys, "node", &[node_uri], &["node-ca.pem"])?),
        (
            "a node authority's certificate with a member's name",
            issue(&keys, "node", std::slice::from_ref(&uri), &["node-ca.pem"])?,
        ),
        ("the same behind the member authority", issue(&keys, "node", std::slice::from_ref(&uri), &chain)?),
        (
            "the same with both authorities",
            issue(&keys, "node", std::slice::from_ref(&uri), &["member-ca.pem", "node-ca.pem"])?,
        ),
        ("a token authority's certificate", issue(&keys, "token", std::slice::from_ref(&uri), &["token-ca.pem"])?),
        ("one by the root itself", issue(&keys, "root", std::slice::from_ref(&uri), &[])?),
        (
            "one by the root itself, beside the member authority",
            issue(&keys, "root", std::slice::from_ref(&uri), &chain)?,
        ),
        ("a member authority's certificate without a member's name", issue(&keys, "member", &[], &chain)?),
        ("a member of another collective by this authority", issue(&keys, "member", &[elsewhere], &chain)?),
        (
            "a member by another collective's authority",
            issue(&other_keys, "member", std::slice::from_ref(&uri), &chain)?,
        ),
        ("a certificate that nobody else signed", self_signed),
    ];
    for (what, identity) in cases {
        let taken = is_taken(&bundle, identity).await?;
        ensure!(taken.is_err(), "{what} was taken for a member");
    }
    Ok(())
}

#[tokio::test]
async fn a_proof_wants_a_client_certificate() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.arm("n1", "once").await?;
    let config = Arc::new(member_tls_config(&machine.bundle, None)?);
    let mut connection =
        NodeConnection::connect(&member.url(), machine.bundle.collective, config, Duration::from_secs(10)).await?;
    let known = machine.known(&mut connection).await?;
    let (code, detail) =
        crate::support::refusal(connection.enroll(&machine.enroll_request(&connection, &known)?).await);
    assert_eq!(code, moor_api::problem::Code::ProofInvalid);
    assert!(detail.contains("client certificate"), "{detail}");
    Ok(())
}
