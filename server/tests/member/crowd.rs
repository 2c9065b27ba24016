//! A member that many connect to at once.

use crate::collective::{joined, voters};
use crate::forged::{Insider, connect, is_member};
use crate::shares::connector;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls_pki_types::ServerName;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// A connection to a member of this machine, from one of its addresses.
async fn from(address: IpAddr, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let socket = if to.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
    socket.bind((address, 0).into())?;
    Ok(socket.connect(to).await?)
}

/// Whether the member wants to hear more, or has closed it.
async fn is_open(stream: &mut TcpStream) -> bool {
    tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0])).await.is_err()
}

/// Runs a test in a network of its own, where every address of `fd00::/64` is one of this machine.
fn on_own_network(test: impl AsyncFnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        for words in ["link set lo up", "-6 route add local fd00::/64 dev lo"] {
            let output = Command::new("ip").args(words.split(' ')).output()?;
            ensure!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // Routed here, they may be bound as well.
        std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1").context("binding to any address")?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test())
    });
    thread.join().map_err(|_| anyhow::anyhow!("it panicked"))?
}

/// The nodes of a cluster that has one network of IPv6 are switched on: each says hello, and has some connections.
#[test]
fn nodes_of_one_network_of_ipv6_are_clients_of_their_own() -> anyhow::Result<()> {
    const NODES: u16 = 150;
    const CONNECTIONS: usize = 8;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    on_own_network(async || {
        let mut member = Member::init()?;
        let config = std::fs::read_to_string(member.config())?;
        std::fs::write(member.config(), config.replace("listen = [\"127.0.0.1:", "listen = [\"[::]:"))?;
        member.run()?;
        let (tls, to) = (connector(&member).await?, SocketAddr::new("fd00::1".parse()?, member.port));
        let mut held = Vec::new();
        for node in 0..NODES {
            let address = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 1, node]);
            let tcp = from(address, to).await?;
            let hello = async {
                let mut tls = tls.connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
                tls.write_all(b"POST /node/v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}").await?;
                let mut status = [0; 12];
                tls.read_exact(&mut status).await?;
                // It does not say who it is; but it is read.
                ensure!(status == *b"HTTP/1.1 400", "{}", String::from_utf8_lossy(&status));
                anyhow::Ok(tls)
            };
            let first = hello.await.with_context(|| format!("hello of node {node}"))?;
            let mut more = Vec::new();
            for _ in 1..CONNECTIONS {
                more.push(from(address, to).await?);
            }
            held.push((first, more));
        }
        let (_, more) = held.last_mut().context("nobody")?;
        ensure!(
            is_open(&mut more[CONNECTIONS - 2]).await,
            "the last of {} was closed",
            usize::from(NODES) * CONNECTIONS
        );
        Ok(())
    })
}

/// A crowd that has taken all connections gets no more, and is told so at once; the collective goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_house_closes_the_door_at_once_and_members_come_in() -> anyhow::Result<()> {
    let most = 40;
    let mut first = Member::init()?;
    first.configure(&format!("connections = {most}\n"))?;
    first.run()?;
    let second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    let (bundle, insider) = (first.site().await?.bundle, Insider::of(&second)?);
    let (to, crowd) = (SocketAddr::from(([127, 0, 0, 1], first.port)), IpAddr::from([127, 0, 0, 2]));
    let tls = connector(&first).await?;
    // Handshakes that never end are given up after ten seconds, so each is brought to its end.
    let mut held = Vec::new();
    while let Ok(stream) = tls.connect(ServerName::try_from("127.0.0.1")?, from(crowd, to).await?).await {
        held.push(stream);
        ensure!(held.len() <= most, "one more than there are places");
    }
    ensure!(held.len() >= most / 2, "{} connections alone were taken", held.len());
    let begun = Instant::now();
    let mut late = from(IpAddr::from([127, 0, 0, 3]), to).await?;
    ensure!(late.read(&mut [0]).await.unwrap_or_default() == 0, "it is open");
    ensure!(begun.elapsed() < Duration::from_secs(1), "it was kept waiting for {:?}", begun.elapsed());
    // Who comes from a member's address is heard, and stays if it is the member.
    let mut members = Vec::new();
    for _ in 0..3 {
        let mut connection = connect(&first, &bundle, insider.itself()?).await?;
        is_member(2, &mut connection).await?;
        members.push(connection);
    }
    let mut stranger = tls.connect(ServerName::try_from("127.0.0.1")?, from([127, 0, 0, 1].into(), to).await?).await?;
    ensure!(stranger.read(&mut [0]).await.unwrap_or_default() == 0, "whoever comes from a member's address stays");
    ensure!(first.log().contains("connections are taken"), "it does not say so:\n{}", first.log());
    Ok(())
}

/// Anybody can open a connection.
#[tokio::test]
async fn who_asks_for_nothing_is_closed_soon() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (tls, to) = (connector(&member).await?, SocketAddr::from(([127, 0, 0, 1], member.port)));
    let connect = async || -> anyhow::Result<_> {
        Ok(tls.connect(ServerName::try_from("127.0.0.1")?, from([127, 0, 0, 2].into(), to).await?).await?)
    };
    let (begun, mut silent, mut asks) = (Instant::now(), connect().await?, connect().await?);
    let answer = async |stream: &mut tokio_rustls::client::TlsStream<TcpStream>| -> anyhow::Result<()> {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        let mut answer = [0; 1 << 10];
        let count = stream.read(&mut answer).await?;
        ensure!(answer.starts_with(b"HTTP/1.1 200") && answer[..count].ends_with(b"ok\n"), "it is closed");
        Ok(())
    };
    answer(&mut asks).await?;
    let closed = tokio::time::timeout(Duration::from_secs(40), silent.read(&mut [0])).await;
    ensure!(closed.context("it is open")?.unwrap_or_default() == 0, "something came");
    ensure!(begun.elapsed() > Duration::from_secs(15), "it had no time to ask: {:?}", begun.elapsed());
    answer(&mut asks).await.context("one that has asked")
}
