//! What clients get of a member that is busy with them.

use crate::content::with_initramfs;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use moor_api::admin::CreateProfile;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use std::sync::Arc;
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
    let mut roots = RootCertStore::empty();
    for root in member.site().await?.bundle.roots {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes())?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
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
