//! A member that many connect to at once.

use crate::shares::connector;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls_pki_types::ServerName;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;
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
