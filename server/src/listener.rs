//! Listening: HTTPS with an accept loop of our own, which hands each request its peer's key and exporter; and the unix socket, which
//! hands it the peer's user id. A connection that misbehaves ends alone, and a client that opens many is kept to its share.

use crate::certificate::Certificate;
use crate::house::{House, NoRoom, Room};
use crate::http::{Connection, Peer};
use crate::idle::{self, Verdict};
use crate::state::Member;
use anyhow::Context as _;
use axum::{Extension, Router};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use moor_api::client::tls::disbelief;
use moor_api::proof::{EXPORTER_LABEL, EXPORTER_LENGTH};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, ProtocolVersion, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Connections on the socket at a time; of their own, so that a crowd outside does not lock the administrator out.
const MAX_LOCAL: u32 = 256;
/// A handshake takes at most this long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The head of the next request comes within this time. It counts from the answer before, so it is more than two heartbeats: nodes keep
/// their connection.
const HEAD: Duration = Duration::from_secs(150);
/// A client that takes nothing of an answer for so long is gone, or means harm: what is on its way to it costs memory and a connection.
const TAKES_NOTHING: Duration = Duration::from_mins(1);
/// Requests of one HTTP/2 connection at a time (each may have a file open), and bytes of their heads.
const STREAMS: u32 = 16;
const HEADS: u32 = 16 << 10;
/// An HTTP/2 connection is asked so often whether somebody is there, and ends without an answer in the time of a handshake.
const PING: Duration = Duration::from_secs(30);
/// ALPN identifications (RFC 7301 §6).
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

/// A connection of a client, given up when nothing can be written to it.
type Guarded<S> = Pin<Box<TimeoutStream<S>>>;
type Tcp = tokio_rustls::server::TlsStream<Guarded<TcpStream>>;

/// Takes any client certificate whose handshake signature is good: it only says which key the client holds (RFC 8705 §2.2), and
/// tokens name that key.
#[derive(Debug)]
struct AnyKey(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match X509Certificate::from_der(end_entity) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(_) => Err(Error::InvalidCertificate(rustls::CertificateError::BadEncoding)),
        }
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

/// TLS as this member speaks it.
fn tls_config(certificate: Arc<Certificate>) -> anyhow::Result<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        // TLS 1.2 is for boot loaders that fetch public files; /node and /admin ask for the exporter of 1.3.
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_client_cert_verifier(Arc::new(AnyKey(provider)))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![HTTP_2.to_vec(), HTTP_1.to_vec()];
    // A resumed session has no client certificate of its own: each connection proves its key anew.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Serves until `stop`; then open requests have a moment to end.
///
/// # Errors
/// An address or the socket is not to be had.
pub async fn serve(member: Arc<Member>, app: Router, stop: CancellationToken) -> anyhow::Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(tls_config(member.certificate.clone()).context("setting up TLS")?));
    let wanted = member.config.connections.map(std::num::NonZeroU32::get);
    let house = House::new(wanted, member.config.connections_per_address.get());
    let house = Arc::new(house.context("reading the limit of open files")?);
    let mut loops = tokio::task::JoinSet::new();
    let (renewed, until) = (member.clone(), stop.clone());
    loops.spawn(async move { renewed.certificate.renew(&renewed.issuer, until).await });
    for address in &member.config.listen {
        let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
        tracing::info!("listening on https://{address}");
        let tls = Tls { acceptor: acceptor.clone(), member: member.clone(), house: house.clone() };
        loops.spawn(accept_tls(listener, tls, app.clone(), stop.clone()));
    }
    let socket = &member.config.socket;
    // A socket that a killed member left is in the way; one that answers is somebody's.
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("another member answers on '{}'", socket.display());
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("listening on '{}'", socket.display()))?;
    // Anybody may connect: the peer's credentials decide.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))
        .with_context(|| format!("opening '{}' to users", socket.display()))?;
    let local = Arc::new(Semaphore::new(MAX_LOCAL as usize));
    loops.spawn(accept_unix(listener, app, local.clone(), TAKES_NOTHING, stop.clone()));
    stop.cancelled().await;
    loops.join_all().await;
    let idle = async {
        house.emptied().await;
        let _ = local.acquire_many(MAX_LOCAL).await;
    };
    // Streams that watch go on for ever: they are cut off after a moment.
    let _ = tokio::time::timeout(Duration::from_secs(3), idle).await;
    let _ = std::fs::remove_file(socket);
    Ok(())
}

/// Room for one more connection; `None` once the member stops. A full house (256 who watch) must not keep it from stopping.
async fn permit(permits: &Arc<Semaphore>, stop: &CancellationToken) -> Option<OwnedSemaphorePermit> {
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        permit = permits.clone().acquire_owned() => permit.ok(),
    }
}

/// The next connection. An error of `accept` (too many open files, a peer that left) ends nothing; it is tried again soon.
async fn next<T>(stop: &CancellationToken, accept: impl Future<Output = std::io::Result<T>>) -> Option<T> {
    tokio::select! {
        () = stop.cancelled() => None,
        accepted = accept => match accepted {
            Ok(accepted) => Some(accepted),
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                None
            }
        },
    }
}

/// What a TLS connection begins with.
#[derive(Clone)]
struct Tls {
    acceptor: TlsAcceptor,
    /// Knows other members by their certificates.
    member: Arc<Member>,
    house: Arc<House>,
}

/// Who finds no room is closed at once, and not left to wait where the system keeps connections that nobody has accepted: it can try another member.
async fn accept_tls(listener: TcpListener, tls: Tls, app: Router, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let Some((tcp, address)) = next(&stop, listener.accept()).await else { continue };
        let room = match tls.house.enter(address.ip(), || tls.house.is_of_members(&tls.member, address.ip())) {
            Ok(room) => room,
            Err(NoRoom::Full) => {
                tls.house.say_full();
                continue;
            }
            Err(NoRoom::Share) => {
                tracing::debug!("{address}: has as many connections as it may have");
                continue;
            }
        };
        let (tls, app, stop) = (tls.clone(), app.clone(), stop.clone());
        tokio::spawn(async move {
            let Some((stream, peer)) = handshake(&tls, tcp, address).await else { return };
            // From a member's address others may come as well.
            if !tls.house.meet(&tls.member, &peer) && room.is_for_members {
                tracing::debug!("{peer}: is no member, and there is no room for others");
                return;
            }
            let is_http_2 = stream.get_ref().1.alpn_protocol() == Some(HTTP_2);
            let connection = Connection::new(peer).accepted(room, stop);
            if is_http_2 {
                serve_http_2(stream, connection, app).await;
            } else {
                serve_http_1(stream, connection, app).await;
            }
        });
    }
}

/// A stream whose writes fail when they wait for so long.
fn guarded<S: AsyncRead + AsyncWrite>(stream: S, limit: Duration) -> Guarded<S> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limit));
    Box::pin(stream)
}

async fn handshake(
    Tls { acceptor, member, .. }: &Tls,
    tcp: TcpStream,
    address: std::net::SocketAddr,
) -> Option<(Tcp, Peer)> {
    let _ = tcp.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE, acceptor.accept(guarded(tcp, TAKES_NOTHING))).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            tracing::info!("{address}: no TLS: {error}");
            return None;
        }
        Err(_) => {
            tracing::info!("{address}: no TLS within {} s", HANDSHAKE.as_secs());
            return None;
        }
    };
    let session = tls.get_ref().1;
    let exporter = (session.protocol_version() == Some(ProtocolVersion::TLSv1_3))
        .then(|| session.export_keying_material([0; EXPORTER_LENGTH], EXPORTER_LABEL, None).ok())
        .flatten();
    let client_key = session.peer_certificates().and_then(<[_]>::first).and_then(|certificate| {
        X509Certificate::from_der(certificate).ok().map(|(_, certificate)| certificate.public_key().raw.to_vec())
    });
    // Most clients are nodes, whose certificate has no chain: only a member's has.
    let member = match session.peer_certificates() {
        Some([leaf, chain @ ..]) if !chain.is_empty() && exporter.is_some() => {
            let judged = member.trust.taken().verifier.member(leaf, chain, UnixTime::now());
            Some(judged.map_err(|error| disbelief(&error)))
        }
        _ => None,
    };
    Some((tls, Peer::Tls { address, client_key, exporter, member }))
}

/// `limit`: for so long a client may take nothing of an answer.
async fn accept_unix(
    listener: UnixListener,
    app: Router,
    permits: Arc<Semaphore>,
    limit: Duration,
    stop: CancellationToken,
) {
    while let Some(permit) = permit(&permits, &stop).await {
        let Some((stream, _)) = next(&stop, listener.accept()).await else { continue };
        // A peer whose credentials are not to be had is nobody; the loop goes on.
        let Ok(credentials) = stream.peer_cred() else { continue };
        let (app, stop) = (app.clone(), stop.clone());
        tokio::spawn(async move {
            let (peer, room) = (Peer::Socket { uid: credentials.uid() }, Room::local(permit));
            // A backup that nobody takes would keep the store from forgetting what it has of before.
            let stream = guarded(stream, limit);
            serve_http_1(stream, Connection::new(peer).accepted(room, stop), app).await;
        });
    }
}

/// What answers on a connection.
fn service(app: Router, connection: &Connection) -> TowerToHyperService<Router> {
    TowerToHyperService::new(app.layer(Extension(connection.clone())))
}

async fn serve_http_1<S>(stream: S, of: Connection, app: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), service(app, &of))
        // Among members: a connection that is switched lives on with the route that it was switched by, which keeps its room.
        .with_upgrades();
    until_stopped(connection, http1::UpgradeableConnection::graceful_shutdown, &of).await;
}

async fn serve_http_2(stream: Tcp, of: Connection, app: Router) {
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(HANDSHAKE)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADS)
        .serve_connection(TokioIo::new(stream), service(app, &of));
    until_stopped(connection, http2::Connection::graceful_shutdown, &of).await;
}

/// A connection that was switched, from now on for tasks of the runtime that calls this: elsewhere what comes would wake a thread there first.
///
/// # Errors
/// It is none over TLS; the other side has sent something before it was answered; the system has no more files.
pub(crate) fn take_over(switched: hyper::upgrade::Upgraded) -> io::Result<impl AsyncRead + AsyncWrite> {
    let parts = switched.downcast::<TokioIo<Tcp>>().map_err(|_| io::Error::other("it is no connection over TLS"))?;
    if !parts.read_buf.is_empty() {
        return Err(io::Error::other("something was sent before the answer"));
    }
    let mut tls = parts.io.into_inner();
    let tcp = tls.get_mut().0.as_mut().get_pin_mut().get_mut();
    let same = std::net::TcpStream::from(tcp.as_fd().try_clone_to_owned()?);
    *tcp = TcpStream::from_std(same)?;
    Ok(tls)
}

/// Drives a connection to its end. Once the member stops, or the connection was asked for nothing for too long, `shut_down` tells it to take no more
/// requests.
async fn until_stopped<C: Future<Output = hyper::Result<()>>>(
    connection: C,
    shut_down: impl FnOnce(Pin<&mut C>),
    of: &Connection,
) {
    tokio::pin!(connection);
    let ended = loop {
        let verdict = idle::verdict(of);
        let look_again = async {
            match verdict {
                Verdict::Until(then) => tokio::time::sleep_until(then).await,
                Verdict::Stays => std::future::pending().await,
                Verdict::Ends | Verdict::AsksNoMore => {}
            }
        };
        tokio::select! {
            ended = connection.as_mut() => break ended,
            () = of.stop.cancelled() => {}
            () = look_again => match verdict {
                Verdict::Until(_) | Verdict::Stays => continue,
                Verdict::Ends => {
                    tracing::debug!("{}: asks for nothing", of.peer);
                    return;
                }
                Verdict::AsksNoMore => {}
            },
        }
        shut_down(connection.as_mut());
        break connection.await;
    };
    if let Err(error) = ended {
        tracing::debug!("{}: {error}", of.peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::wrappers::ReceiverStream;

    #[tokio::test]
    async fn who_takes_nothing_is_given_up_and_who_is_slow_is_not() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 10);
        let limit = Duration::from_secs(2);
        let mut stream = guarded(ours, limit);
        let begun = tokio::time::Instant::now();
        let writing = tokio::spawn(async move { stream.write_all(&[1; 6 << 10]).await });
        for _ in 0..5 {
            tokio::time::sleep(limit / 4).await;
            theirs.read_exact(&mut [0; 1 << 10]).await.unwrap();
        }
        writing.await.unwrap().unwrap();
        assert!(begun.elapsed() > limit);

        let (ours, _theirs) = tokio::io::duplex(1 << 10);
        let mut stream = guarded(ours, limit / 20);
        let error = stream.write_all(&[1; 6 << 10]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_full_house_stops() {
        let (stop, permits) = (CancellationToken::new(), Arc::new(Semaphore::new(0)));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let accepting = tokio::spawn(accept_unix(listener, Router::new(), permits, TAKES_NOTHING, stop.clone()));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!accepting.is_finished());
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), accepting).await.expect("it waits for room").unwrap();
    }

    /// What an answer is made of is kept as long as it is sent: of a backup that is the store as it was.
    #[tokio::test]
    async fn an_answer_on_the_socket_that_nobody_takes_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<bytes::Bytes>>(1);
        let body = Arc::new(std::sync::Mutex::new(Some(Body::from_stream(ReceiverStream::new(receiver)))));
        let app = Router::new().fallback(move || std::future::ready(body.lock().unwrap().take().unwrap()));
        let limit = Duration::from_millis(500);
        let (stop, permits) = (CancellationToken::new(), Arc::new(Semaphore::new(1)));
        let accepting = tokio::spawn(accept_unix(listener, app, permits, limit, stop.clone()));
        let mut client = tokio::net::UnixStream::connect(&path).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let writes = async {
            let piece = bytes::Bytes::from(vec![7; 64 << 10]);
            while sender.send(Ok(piece.clone())).await.is_ok() {}
        };
        tokio::time::timeout(limit * 20, writes).await.expect("it is kept for who takes nothing");
        stop.cancel();
        accepting.await.unwrap();
    }
}
