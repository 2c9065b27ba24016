//! What clients get of a member that is busy with them.

use crate::support::Member;
use anyhow::{Context as _, ensure};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio_rustls::TlsConnector;

/// Connections of the greedy client; the modest one has one.
const MANY: u64 = 32;
const TIME: Duration = Duration::from_secs(4);

/// Asks for a file over one connection from an address, again and again, and counts the bytes.
async fn load(from: [u8; 4], port: u16, tls: TlsConnector, path: String, got: Arc<AtomicU64>) -> anyhow::Result<()> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    let tcp = socket.connect(([127, 0, 0, 1], port).into()).await?;
    let mut stream = BufReader::new(tls.connect(ServerName::try_from("127.0.0.1")?, tcp).await?);
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    loop {
        stream.write_all(request.as_bytes()).await?;
        let (mut line, mut length) = (String::new(), None);
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = Some(value.trim().parse::<u64>()?);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut left = length.context("an answer without a length")?;
        let mut piece = vec![0; 64 << 10];
        while left > 0 {
            let count = stream.read(&mut piece).await?;
            ensure!(count > 0, "the member closed it");
            left -= count as u64;
            got.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

/// A member divides itself among connections: whoever has one is not starved by who has many, and gets as much as each of those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_one_connection_gets_as_much_of_a_busy_member_as_each_of_another_client_s_many() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, _) = member.publish().await?;
    let mut roots = RootCertStore::empty();
    for root in member.site().await?.bundle.roots {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes())?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tls = TlsConnector::from(Arc::new(config));
    let path = format!("/public/images/{}", image.digest);
    let [greedy, modest] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
    let mut loads = tokio::task::JoinSet::new();
    for _ in 0..MANY {
        loads.spawn(load([127, 0, 0, 2], member.port, tls.clone(), path.clone(), greedy.clone()));
    }
    loads.spawn(load([127, 0, 0, 3], member.port, tls, path, modest.clone()));
    // Handshakes first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let read = || [&greedy, &modest].map(|got| got.load(Ordering::Relaxed));
    let before = read();
    tokio::select! {
        () = tokio::time::sleep(TIME) => {}
        Some(ended) = loads.join_next() => ended??,
    }
    let after = read();
    let [greedy, modest] = [after[0] - before[0], after[1] - before[1]];
    println!("{MANY} connections got {} KiB, one got {} KiB", greedy >> 10, modest >> 10);
    ensure!(modest * MANY * 2 >= greedy, "{MANY} connections got {greedy} bytes, one got {modest}");
    Ok(())
}
