//! An HTTPS server on the loopback interface that serves one file by ranges, and misbehaves on demand.

use super::authority::Identity;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// What the server does with a request.
#[derive(Debug, Clone)]
pub(crate) enum Conduct {
    /// Serves the file.
    Good,
    /// Takes the request and never answers.
    Silent,
    /// Answers, sends this many bytes of the body, and no more.
    StallsAfter(usize),
    /// Sends 10 KB/s.
    Slow,
    /// Closes the connection after this many bytes of the body.
    CutsAfter(usize),
    /// Turns one bit of every answer around.
    FlipsBits,
    /// Serves another file, as if it were this one.
    Serves(Arc<Vec<u8>>),
    /// Sends the whole file with status 200.
    NoRanges,
    /// Answers with other bytes of the same file, labelled as such.
    ShiftsRanges,
    /// Refuses each request with this status.
    Status(u16),
    /// Serves the file, each time with another entity tag.
    ChangesTags,
}

struct Shared {
    file: Arc<Vec<u8>>,
    conduct: Mutex<Conduct>,
    requests: AtomicU64,
}

pub(crate) struct Server {
    shared: Arc<Shared>,
    tls: Arc<rustls::ServerConfig>,
    address: SocketAddr,
    runtime: Option<Runtime>,
}

impl Server {
    pub(crate) fn new(file: &Arc<Vec<u8>>, identity: &Identity) -> Self {
        let shared = Shared { file: file.clone(), conduct: Mutex::new(Conduct::Good), requests: AtomicU64::new(0) };
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let mut server = Self { shared: Arc::new(shared), tls: tls(identity), address, runtime: None };
        server.start();
        server
    }

    /// Starts it on the port that it had before, if it had one.
    pub(crate) fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        // Its own runtime: `stop` ends every connection with it, as a killed server would.
        let listener = std::thread::scope(|scope| {
            scope.spawn(|| runtime.block_on(TcpListener::bind(self.address)).unwrap()).join().unwrap()
        });
        self.address = listener.local_addr().unwrap();
        runtime.spawn(accept(listener, TlsAcceptor::from(self.tls.clone()), self.shared.clone()));
        self.runtime = Some(runtime);
    }

    /// Begins anew with another certificate.
    pub(crate) fn present(&mut self, identity: &Identity) {
        self.stop();
        self.tls = tls(identity);
        self.start();
    }

    /// Ends it and all its connections.
    pub(crate) fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        // The port is free once the listener is dropped.
        let end = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect_timeout(&self.address, Duration::from_millis(200)).is_ok() {
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn behave(&self, conduct: Conduct) {
        *self.shared.conduct.lock().unwrap() = conduct;
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}/image.moor", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn tls(identity: &Identity) -> Arc<rustls::ServerConfig> {
    let tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.private_key())
        .unwrap();
    Arc::new(tls)
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), shared.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = service_fn(move |request| answer(request, shared.clone()));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// A body that is sent piece by piece, and may break.
struct Pieces(mpsc::Receiver<io::Result<Bytes>>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

type Answer = Response<Pieces>;

fn empty(status: StatusCode) -> http::response::Builder {
    Response::builder().status(status).header(header::CONTENT_LENGTH, 0)
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Answer, Infallible> {
    let count = shared.requests.fetch_add(1, Ordering::Relaxed);
    let conduct = shared.conduct.lock().unwrap().clone();
    let file = match &conduct {
        Conduct::Serves(other) => other.clone(),
        _ => shared.file.clone(),
    };
    let (sender, body) = mpsc::channel(4);
    let body = Pieces(body);
    match conduct {
        Conduct::Silent => std::future::pending().await,
        Conduct::Status(status) => {
            return Ok(empty(StatusCode::from_u16(status).unwrap()).body(body).unwrap());
        }
        Conduct::NoRanges => {
            let response = Response::builder().header(header::CONTENT_LENGTH, file.len()).body(body).unwrap();
            tokio::spawn(async move { sender.send(Ok(Bytes::from(file.to_vec()))).await });
            return Ok(response);
        }
        _ => {}
    }
    let (start, last) = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'))
        .map(|(start, last)| (start.parse::<usize>().unwrap(), last.parse::<usize>().unwrap()))
        .expect("every request names a range");
    if start >= file.len() {
        let response = empty(StatusCode::RANGE_NOT_SATISFIABLE);
        return Ok(response.header(header::CONTENT_RANGE, format!("bytes */{}", file.len())).body(body).unwrap());
    }
    let last = last.min(file.len() - 1);
    let shift = usize::from(matches!(conduct, Conduct::ShiftsRanges) && start > 0);
    let mut bytes = file[start - shift..=last - shift].to_vec();
    if matches!(conduct, Conduct::FlipsBits) {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    }
    let tag = if matches!(conduct, Conduct::ChangesTags) { format!("\"{count}\"") } else { "\"same\"".to_owned() };
    let response = Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(header::CONTENT_LENGTH, bytes.len())
        .header(header::CONTENT_RANGE, format!("bytes {}-{}/{}", start - shift, last - shift, file.len()))
        .header(header::ETAG, tag)
        .body(body)
        .unwrap();
    tokio::spawn(async move {
        match conduct {
            Conduct::StallsAfter(count) if count < bytes.len() => {
                bytes.truncate(count);
                let _ = sender.send(Ok(bytes.into())).await;
                std::future::pending::<()>().await;
            }
            Conduct::Slow => {
                for piece in bytes.chunks(1000) {
                    if sender.send(Ok(piece.to_vec().into())).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Conduct::CutsAfter(count) if count < bytes.len() => {
                bytes.truncate(count);
                let _ = sender.send(Ok(bytes.into())).await;
                let _ = sender.send(Err(io::ErrorKind::ConnectionReset.into())).await;
            }
            _ => _ = sender.send(Ok(bytes.into())).await,
        }
    });
    Ok(response)
}
