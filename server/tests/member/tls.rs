//! Who may act as a member, and over what.

use crate::machine::Machine;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use moor_api::client::node::NodeConnection;
use moor_api::client::tls::{ClockFloor, member_tls_config, member_tls_config_at};
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::trust::{Incarnation, SiteBundle, incarnation_uri, member_uri};
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
async fn anybody(member: &Member, version: &'static SupportedProtocolVersion) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in member.site().await?.bundle.roots {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes())?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

async fn get(member: &Member, version: &'static SupportedProtocolVersion, request: &str) -> anyhow::Result<Vec<u8>> {
    ask(member, anybody(member, version).await?, request).await
}

/// The same as text.
async fn text(member: &Member, version: &'static SupportedProtocolVersion, request: &str) -> anyhow::Result<String> {
    Ok(String::from_utf8_lossy(&get(member, version, request).await?).into_owned())
}

/// Sends a request and returns all that comes.
async fn ask(member: &Member, config: ClientConfig, request: &str) -> anyhow::Result<Vec<u8>> {
    let tcp = TcpStream::connect(("127.0.0.1", member.port)).await?;
    let mut tls = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
    tls.write_all(format!("{request}Host: x\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // An end without close_notify is an end.
    let _ = tls.read_to_end(&mut answer).await;
    Ok(answer)
}

#[tokio::test]
async fn tls_1_2_is_for_public_files_only() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let kernel = "GET /public/boot/p/kernel HTTP/1.1\r\n";
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let answer = text(&member, version, kernel).await?;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("kernel"), "{version:?}: {answer}");
        // The next generation has another one by this name.
        let keeps: Vec<_> = answer.lines().filter(|line| line.starts_with("cache-control")).collect();
        assert_eq!(keeps, ["cache-control: no-cache"], "{answer}");
    }
    let hello = "POST /node/v1/hello HTTP/1.1\r\nContent-Length: 0\r\n";
    let answer = text(&member, &rustls::version::TLS12, hello).await?;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("wants TLS 1.3"), "{answer}");
    let answer = text(&member, &rustls::version::TLS12, "GET /admin/v1/site HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("wants TLS 1.3"), "{answer}");
    let answer = text(&member, &rustls::version::TLS13, "GET /admin/v1/site HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("problem+json"), "{answer}");
    // Anybody may ask how it is, and administrators how it is in detail.
    let answer = text(&member, &rustls::version::TLS12, "GET /healthz HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
    let answer = text(&member, &rustls::version::TLS13, "GET /metrics HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("problem+json"), "{answer}");
    let answer = text(&member, &rustls::version::TLS13, "GET /nothing HTTP/1.1\r\n").await?;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("problem+json"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn images_come_whole_or_by_range() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, _) = member.publish().await?;
    let whole = member.admin().await?.image(image.digest, 1 << 20).await?;
    let path = format!("/public/images/{}", image.digest);
    let split = |answer: &[u8]| {
        let at = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
        (String::from_utf8_lossy(&answer[..at]).to_ascii_lowercase(), answer[at..].to_vec())
    };
    let size = image.size;
    for (method, range, status, expected) in [
        ("GET", String::new(), "200", 0..size),
        ("GET", "Range: bytes=5-9\r\n".into(), "206", 5..10),
        ("GET", format!("Range: bytes=70000-{}\r\n", size + 5), "206", 70_000..size),
        ("GET", "Range: bytes=-3\r\n".into(), "206", size - 3..size),
        ("GET", format!("Range: bytes={size}-\r\n"), "416", 0..0),
        ("HEAD", String::new(), "200", 0..0),
    ] {
        let answer = get(&member, &rustls::version::TLS13, &format!("{method} {path} HTTP/1.1\r\n{range}")).await?;
        let (head, body) = split(&answer);
        assert!(head.starts_with(&format!("http/1.1 {status}")), "{range}: {head}");
        assert!(
            body == whole[usize::try_from(expected.start)?..usize::try_from(expected.end)?],
            "{range}: other bytes"
        );
        assert!(
            head.contains(&format!("etag: \"{}\"", image.digest)) && head.contains("accept-ranges: bytes"),
            "{head}"
        );
    }
    Ok(())
}

/// As curl asks where it may choose.
#[tokio::test]
async fn images_come_over_http_2_as_well() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, _) = member.publish().await?;
    let whole = member.admin().await?.image(image.digest, 1 << 20).await?;
    let (roots, got) = (member.path("roots.pem"), member.path("got"));
    std::fs::write(&roots, member.site().await?.bundle.roots.concat())?;
    let url = format!("{}/public/images/{}", member.url(), image.digest);
    let curl = |more: &[&str]| -> anyhow::Result<String> {
        let mut command = std::process::Command::new("curl");
        command.args(["-sS", "--http2", "--max-time", "30", "-w", "%{http_version} %{http_code}", "--cacert"]);
        let output = command.arg(&roots).arg("-o").arg(&got).args(more).arg(&url).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    assert_eq!(curl(&["-r", "5-9"])?, "2 206");
    assert!(std::fs::read(&got)? == whole[5..10]);
    assert_eq!(curl(&[])?, "2 200");
    assert!(std::fs::read(&got)? == whole);
    // Two at once on one connection.
    let second = member.path("second");
    let more = [url.as_str(), "-o", second.to_str().context("a path")?, "-Z"];
    assert_eq!(curl(&more)?, "2 2002 200");
    assert!(std::fs::read(&got)? == whole && std::fs::read(&second)? == whole);
    Ok(())
}

#[tokio::test]
async fn a_client_is_kept_to_its_share_of_connections() -> anyhow::Result<()> {
    let mut member = Member::init()?;
    member.configure("connections_per_address = 4\n")?;
    member.run()?;
    let connect = async |from: &str| -> anyhow::Result<TcpStream> {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(format!("{from}:0").parse()?)?;
        Ok(socket.connect(([127, 0, 0, 1], member.port).into()).await?)
    };
    // Whether the member wants to hear more, or has closed it.
    let is_open = async |stream: &mut TcpStream| {
        tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0])).await.is_err()
    };
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(connect("127.0.0.2").await?);
    }
    for stream in &mut held {
        assert!(is_open(stream).await);
    }
    assert!(!is_open(&mut connect("127.0.0.2").await?).await, "a fifth");
    assert!(is_open(&mut connect("127.0.0.3").await?).await, "another client");
    held.pop();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while !is_open(&mut connect("127.0.0.2").await?).await {
        ensure!(std::time::Instant::now() < end, "the place of who has left stays taken");
    }
    Ok(())
}

#[tokio::test]
async fn a_plain_image_comes_over_the_session_key_alone() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut admin = member.admin().await?;
    let plain = crate::support::import(&mut admin, "plain", [2; 16], 1, None).await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.arm("n1", "once").await?;
    let create = moor_api::admin::CreateProfile {
        name: "p".parse()?,
        image: "plain".parse()?,
        template: "debian-diskless".into(),
    };
    admin.create_profile(&create).await?;
    admin.publish(&"p".parse()?).await?;
    member.deploy("n1").await?;
    let mut connection = machine.connect().await?;
    let token = machine.log_in(&mut connection, moor_api::node::Stage::Boot).await?.token;
    let request = format!(
        "GET /node/v1/images/{} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nRange: bytes=0-3\r\n",
        plain.digest
    );
    let own = member_tls_config(&machine.bundle, Some(&machine.session))?;
    let answer = ask(&member, own, &request).await?;
    assert!(
        answer.starts_with(b"HTTP/1.1 206") && answer.ends_with(&[0x89, b'M', b'O', b'O']),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    let none = member_tls_config(&machine.bundle, None)?;
    assert!(ask(&member, none, &request).await?.starts_with(b"HTTP/1.1 401"));
    Ok(())
}

/// A chain and its key.
pub(crate) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A certificate with these URI names by an authority of a member, and that authority's own.
fn issue(keys: &Path, authority: &str, uris: &[String], shown: &[&str]) -> anyhow::Result<Identity> {
    issue_for(&KeyPair::generate()?, keys, authority, uris, shown)
}

/// The same for a key that is there.
pub(crate) fn issue_for(
    key: &KeyPair,
    keys: &Path,
    authority: &str,
    uris: &[String],
    shown: &[&str],
) -> anyhow::Result<Identity> {
    issue_until(4000, key, keys, authority, uris, shown)
}

/// The same, good until the beginning of a year.
pub(crate) fn issue_until(
    year: i32,
    key: &KeyPair,
    keys: &Path,
    authority: &str,
    uris: &[String],
    shown: &[&str],
) -> anyhow::Result<Identity> {
    let read = |name: &str| std::fs::read_to_string(keys.join(name)).with_context(|| name.to_owned());
    let (certificate, ca_key) = if authority == "root" {
        ("root.pem".to_owned(), "root.key".to_owned())
    } else {
        (format!("{authority}-ca.pem"), format!("{authority}-ca.key"))
    };
    let issuer = Issuer::from_ca_cert_pem(&read(&certificate)?, KeyPair::from_pem(&read(&ca_key)?)?)?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".into()])?;
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    for uri in uris {
        params.subject_alt_names.push(SanType::URI(uri.clone().try_into()?));
    }
    let mut chain = vec![params.signed_by(key, &issuer)?.der().clone()];
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

/// With boot files of before the collective was recovered, and with those of after it.
#[tokio::test]
async fn a_member_is_of_the_incarnation_of_the_bundle_or_a_later_one() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (site, keys) = (member.site().await?, member.path("state/store/keys"));
    let (bundle, id) = (site.bundle, MemberId::random());
    let uri = member_uri(bundle.collective, id);
    let (first, second) = (Incarnation::FIRST, Incarnation::FIRST.next());
    let elsewhere = incarnation_uri(CollectiveId::random(), second);
    for (names, trusted, is_good) in [
        (vec![uri.clone()], first, true),
        (vec![uri.clone(), incarnation_uri(bundle.collective, second)], first, true),
        (vec![uri.clone(), incarnation_uri(bundle.collective, second)], second, true),
        (vec![uri.clone()], second, false),
        (vec![uri.clone(), elsewhere], second, false),
        (vec![uri.clone(), incarnation_uri(bundle.collective, second)], second.next(), false),
    ] {
        let trusting = SiteBundle { incarnation: trusted, ..bundle.clone() };
        let taken = is_taken(&trusting, issue(&keys, "member", &names, &["member-ca.pem"])?).await?;
        ensure!(taken.is_ok() == is_good, "{names:?} by who trusts {trusted}: {taken:?}");
        if let Err(error) = taken {
            ensure!(error.contains("was recovered or restored since") && error.contains("--set-aside"), "{error}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn who_has_a_wrong_clock_is_told_so() -> anyhow::Result<()> {
    let member = Member::start()?;
    let bundle = member.site().await?.bundle;
    // A certificate of today is good for 90 days.
    let clock = ClockFloor { earliest: moord::state::now() + 400 * 86_400 };
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = Arc::new(member_tls_config_at(&bundle, None, Arc::new(clock), provider)?);
    let connected = NodeConnection::connect(&member.url(), bundle.collective, config, Duration::from_secs(10)).await;
    let error = connected.err().context("it connects")?.to_string();
    for says in ["its certificate expired 3", " days ago, by the clock of this machine", "set it"] {
        ensure!(error.contains(says), "{says}: {error}");
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
