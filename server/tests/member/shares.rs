//! What clients get of a member that is busy with them.

use crate::content::with_initramfs;
use crate::node_api::prepared;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use moor_api::admin::CreateProfile;
use moor_api::client::tls::member_tls_config;
use moor_api::node::Stage;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Connections of the greedy client; the modest one has one.
const MANY: usize = 32;
/// What each asks for; much more than sockets hold.
const SIZE: usize = 16 << 20;

/// A connection that asks for files.
pub(crate) struct Connection(BufReader<TlsStream<TcpStream>>);

impl Connection {
    pub(crate) async fn new(from: [u8; 4], member: &Member, tls: &TlsConnector) -> anyhow::Result<Self> {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind((from, 0).into())?;
        let tcp = socket.connect(([127, 0, 0, 1], member.port).into()).await?;
        Ok(Self(BufReader::new(tls.connect(ServerName::try_from("127.0.0.1")?, tcp).await?)))
    }

    /// Asks; when it returns, the answer has begun.
    pub(crate) async fn ask(&mut self, path: &str) -> anyhow::Result<()> {
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await?;
        let (mut line, mut length) = (String::new(), None);
        loop {
            line.clear();
            self.0.read_line(&mut line).await?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = Some(value.trim().parse::<usize>()?);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        ensure!(length == Some(SIZE), "the answer has {length:?} bytes");
        self.0.fill_buf().await?;
        Ok(())
    }

    /// Reads the answer to its end.
    pub(crate) async fn read(&mut self) -> anyhow::Result<()> {
        let mut piece = vec![0; 64 << 10];
        let mut left = SIZE;
        while left > 0 {
            let count = self.0.read(&mut piece).await?;
            ensure!(count > 0, "the member closed it");
            left -= count;
        }
        Ok(())
    }
}

/// The path of a boot file of that size, which the member has from now on.
pub(crate) async fn large_file(member: &Member) -> anyhow::Result<&'static str> {
    with_initramfs(member, 1, vec![7; SIZE]).await?;
    let mut admin = member.admin().await?;
    let template = "debian-diskless".to_owned();
    admin.create_profile(&CreateProfile { name: "p".parse()?, image: "root".parse()?, template }).await?;
    admin.publish(&"p".parse()?).await?;
    Ok("/public/boot/p/initramfs")
}

/// Believes the member.
pub(crate) async fn connector(member: &Member) -> anyhow::Result<TlsConnector> {
    Ok(TlsConnector::from(Arc::new(anybody(member).await?)))
}

async fn anybody(member: &Member) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in member.site().await?.bundle.roots {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes())?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A connection of HTTP/2 that takes a KiB of each answer before it has read it.
async fn http_2(member: &Member, mut config: ClientConfig) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(("127.0.0.1", member.port)).await?;
    let tls = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (sender, connection) = builder.initial_stream_window_size(1024).handshake(TokioIo::new(tls)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Asks twelve times for what is `expected`, and takes what comes.
async fn two_at_a_time(
    sender: &SendRequest<Empty<Bytes>>,
    request: &http::Request<Empty<Bytes>>,
    expected: &[u8],
) -> anyhow::Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(500);
    let mut bodies = Vec::new();
    for _ in 0..12 {
        // Heads wait for nobody.
        let answer = tokio::time::timeout(LIMIT, sender.clone().send_request(request.clone())).await??;
        ensure!(answer.status().is_success(), "{answer:?}");
        bodies.push(answer.into_body());
    }
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (mut takers, mut tasks) = (Vec::new(), JoinSet::new());
    for mut body in bodies {
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let (tell, index) = (tell.clone(), takers.len());
        tasks.spawn(async move {
            // There is room for a small part.
            let first = body.frame().await.context("no body")??.into_data().ok().context("no data")?;
            tell.send(index)?;
            gone.await?;
            let rest = body.collect().await?.to_bytes();
            anyhow::Ok([first, rest].concat())
        });
        takers.push(Some(go));
    }
    let mut taken = 0;
    let mut begun = Vec::new();
    for _ in 0..2 {
        begun.push(tokio::time::timeout(LIMIT, told.recv()).await?.context("nobody")?);
    }
    ensure!(tokio::time::timeout(SHORT, told.recv()).await.is_err(), "a third is on its way");
    // What is taken makes place for the next.
    while let Some(index) = begun.pop() {
        let go = takers[index].take().context("it began twice")?;
        ensure!(go.send(()).is_ok(), "it has ended");
        taken += 1;
        if taken + begun.len() < 12 {
            begun.push(tokio::time::timeout(LIMIT, told.recv()).await?.context("nobody")?);
        }
    }
    for got in tokio::time::timeout(LIMIT, tasks.join_all()).await? {
        ensure!(got? == expected, "other bytes");
    }
    Ok(())
}

/// A client that takes nothing of many answers would have a buffer and a file kept for each.
#[tokio::test]
async fn of_many_files_over_one_connection_two_are_on_their_way() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, _) = member.publish().await?;
    let whole = member.admin().await?.image(image.digest, 1 << 20).await?;
    let sender = http_2(&member, anybody(&member).await?).await?;
    let url = format!("{}/public/images/{}", member.url(), image.digest);
    // Small ones too: what was handed to the connection as a whole, and is not taken, is kept as well.
    for (range, expected) in [("bytes=0-", &whole[..]), ("bytes=5-4999", &whole[5..5000])] {
        let request = http::Request::get(&url).header("range", range).body(Empty::new())?;
        two_at_a_time(&sender, &request, expected).await.context(range)?;
    }
    Ok(())
}

/// The same of what only nodes get.
#[tokio::test]
async fn of_many_files_of_a_profile_two_are_on_their_way() -> anyhow::Result<()> {
    let (member, machine) = prepared().await?;
    let (file, script) = ("f".repeat(200_000), "s".repeat(100_000));
    member.write_profile("p", "files/large", &file)?;
    member.write_profile("p", "scripts/pre/10-x", &script)?;
    member.admin().await?.publish(&"p".parse()?).await?;
    member.arm("n1", "once").await?;
    let token = machine.log_in(&mut machine.connect().await?, Stage::Boot).await?.token;
    let sender = http_2(&member, member_tls_config(&machine.bundle, Some(&machine.session))?).await?;
    for (path, expected) in [("files/large", &file), ("scripts/pre/10-x", &script)] {
        let request = http::Request::get(format!("{}/node/v1/{path}", member.url()));
        let request = request.header("authorization", format!("Bearer {token}")).body(Empty::new())?;
        two_at_a_time(&sender, &request, expected.as_bytes()).await.context(path)?;
    }
    Ok(())
}

/// Thirty-two answers have begun when the last client asks, for as much as each of them: it is answered before any of the others all the same. A
/// member that divided itself among connections would answer it last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_one_connection_is_answered_before_those_of_a_client_that_has_many() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (path, tls) = (large_file(&member).await?, connector(&member).await?);
    let mut modest = Connection::new([127, 0, 0, 3], &member, &tls).await?;
    let mut many = Vec::new();
    for _ in 0..MANY {
        many.push(Connection::new([127, 0, 0, 2], &member, &tls).await?);
    }
    for connection in &mut many {
        connection.ask(path).await?;
    }
    let mut answers = JoinSet::new();
    for mut connection in many {
        answers.spawn(async move { connection.read().await.map(|()| "one of many") });
    }
    modest.ask(path).await?;
    answers.spawn(async move { modest.read().await.map(|()| "the only one") });
    let first = answers.join_next().await.context("nobody is answered")???;
    ensure!(first == "the only one", "{first} is answered first");
    // The others are as well.
    while let Some(answer) = answers.join_next().await {
        answer??;
    }
    Ok(())
}
