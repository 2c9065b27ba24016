//! HTTPS to one server: connections that are kept, range requests on them, and the rules of an answer.

use super::address::Address;
use super::fault::Fault;
use bytes::{Buf as _, Bytes};
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Connections to one server at most.
pub(super) const CONNECTIONS: usize = 4;
/// Time for a TCP connection.
const CONNECT: Duration = Duration::from_secs(1);
/// Time without a byte.
const SILENCE: Duration = Duration::from_secs(2);

/// The way to one server.
pub(super) struct Link {
    address: Address,
    tls: TlsConnector,
    idle: Mutex<Vec<SendRequest<Empty<Bytes>>>>,
    slots: Arc<Semaphore>,
}

/// The part of an answer that came with its head: total length of the file, and its entity tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) total: u64,
    pub(super) etag: Option<Bytes>,
}

/// How long the slowest step of a request took, as a share of its time limit without patience.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slowness(f32);

impl Slowness {
    #[cfg(test)]
    pub(super) fn of(share: f32) -> Self {
        Self(share)
    }

    fn note(&mut self, since: Instant, limit: Duration) {
        self.0 = self.0.max(since.elapsed().as_secs_f32() / limit.as_secs_f32());
    }

    /// The patience that gives such a server four times the time that it took.
    pub(super) fn patience(self) -> u32 {
        let wanted = (self.0 * 4.0).ceil().clamp(1.0, 1000.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was clamped")]
        let wanted = wanted as u32;
        wanted
    }
}

/// An answer whose body is being read. Dropped before its end, it closes the connection.
pub(super) struct Answer {
    pub(super) head: Head,
    body: Incoming,
    pending: Bytes,
    left: u64,
    patience: u32,
    slowness: Slowness,
    connection: Option<SendRequest<Empty<Bytes>>>,
    _slot: OwnedSemaphorePermit,
}

impl Link {
    pub(super) fn new(address: Address, tls: Arc<ClientConfig>) -> Self {
        Self {
            address,
            tls: TlsConnector::from(tls),
            idle: Mutex::new(Vec::new()),
            slots: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Closes the connections that rest: after a fault they are not to be trusted either.
    pub(super) fn forget_connections(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Asks for `length` bytes from `start`. `patience` multiplies the time limits.
    pub(super) async fn get(&self, start: u64, length: u64, patience: u32) -> Result<Answer, Fault> {
        let slot = self.slots.clone().acquire_owned().await.map_err(|_| Fault::Broken("the reader ends".into()))?;
        let range = format!("bytes={start}-{}", start + length - 1);
        let mut slowness = Slowness::default();
        loop {
            let rested = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let is_rested = rested.is_some();
            let mut connection = match rested {
                Some(connection) => connection,
                None => self.connect(patience, &mut slowness).await?,
            };
            let asked = Instant::now();
            match self.ask(&mut connection, &range, patience).await {
                Ok(response) => {
                    slowness.note(asked, SILENCE);
                    let head = check_head(&response, start, length)?;
                    return Ok(Answer {
                        head,
                        body: response.into_body(),
                        pending: Bytes::new(),
                        left: length,
                        patience,
                        slowness,
                        connection: Some(connection),
                        _slot: slot,
                    });
                }
                // The server may close a connection that rests at any time: that is not its fault.
                Err(Fault::Broken(_)) if is_rested => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    async fn ask(
        &self,
        connection: &mut SendRequest<Empty<Bytes>>,
        range: &str,
        patience: u32,
    ) -> Result<Response<Incoming>, Fault> {
        let request = Request::builder()
            .uri(self.address.path())
            .header(header::HOST, self.address.authority())
            .header(header::RANGE, range)
            .header(header::ACCEPT_ENCODING, "identity")
            .body(Empty::new())
            .map_err(|error| Fault::Broken(error.to_string()))?;
        let limit = SILENCE * patience;
        timeout(limit, async {
            connection.ready().await?;
            connection.send_request(request).await
        })
        .await
        .map_err(|_| Fault::Silent(limit))?
        .map_err(|error| Fault::Broken(chain(&error)))
    }

    async fn connect(&self, patience: u32, slowness: &mut Slowness) -> Result<SendRequest<Empty<Bytes>>, Fault> {
        let begun = Instant::now();
        let limit = CONNECT * patience;
        let mut last = Fault::Unreachable(limit);
        let mut tcp = None;
        for socket in self.address.sockets() {
            match timeout(limit, TcpStream::connect(socket)).await {
                Ok(Ok(stream)) => {
                    tcp = Some(stream);
                    break;
                }
                Ok(Err(error)) => last = Fault::Connect(error.to_string()),
                Err(_) => last = Fault::Unreachable(limit),
            }
        }
        let tcp = tcp.ok_or(last)?;
        slowness.note(begun, CONNECT);
        tcp.set_nodelay(true).map_err(|error| Fault::Connect(error.to_string()))?;
        let begun = Instant::now();
        let limit = SILENCE * patience;
        let handshake = async {
            let tls = self.tls.connect(self.address.name().clone(), tcp).await.map_err(|error| tls_fault(&error))?;
            http1::handshake(TokioIo::new(tls)).await.map_err(|error| Fault::Broken(chain(&error)))
        };
        let (sender, connection) = timeout(limit, handshake).await.map_err(|_| Fault::Silent(limit))??;
        slowness.note(begun, SILENCE);
        tokio::spawn(async move {
            // An error of the connection reaches the request that waits on it.
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Takes an answer back whose body was read to its end, so that its connection serves the next request.
    pub(super) fn keep(&self, mut answer: Answer) {
        if answer.left == 0
            && answer.pending.is_empty()
            && let Some(connection) = answer.connection.take()
            && !connection.is_closed()
        {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
    }
}

impl Answer {
    pub(super) fn slowness(&self) -> Slowness {
        self.slowness
    }

    /// The next `length` bytes of the body. `count` is told how many bytes came, also when they are not enough.
    pub(super) async fn take(&mut self, length: usize, mut count: impl FnMut(u64)) -> Result<Vec<u8>, Fault> {
        let mut out = Vec::with_capacity(length);
        while out.len() < length {
            if self.pending.is_empty() {
                let begun = Instant::now();
                let limit = SILENCE * self.patience;
                let frame = timeout(limit, self.body.frame()).await.map_err(|_| Fault::Silent(limit))?;
                self.slowness.note(begun, SILENCE);
                let frame = match frame {
                    Some(Ok(frame)) => frame,
                    Some(Err(error)) => return Err(Fault::Broken(chain(&error))),
                    None => return Err(Fault::Broken("the answer ended early".into())),
                };
                // Trailers carry nothing for us.
                let Ok(data) = frame.into_data() else { continue };
                count(data.len() as u64);
                self.left = self
                    .left
                    .checked_sub(data.len() as u64)
                    .ok_or_else(|| Fault::OtherRange("more bytes than its Content-Range says".into()))?;
                self.pending = data;
            }
            let part = self.pending.len().min(length - out.len());
            out.extend_from_slice(&self.pending[..part]);
            self.pending.advance(part);
        }
        Ok(out)
    }
}

/// Status, Content-Range and entity tag of an answer to a request for `length` bytes from `start`.
fn check_head(response: &Response<Incoming>, start: u64, length: u64) -> Result<Head, Fault> {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {}
        StatusCode::OK => return Err(Fault::NoRanges),
        StatusCode::RANGE_NOT_SATISFIABLE => {
            // The file ends before the range: say how long it is, when the server tells.
            let actual = header_text(response, header::CONTENT_RANGE)
                .and_then(|text| text.strip_prefix("bytes */")?.parse().ok());
            return Err(Fault::Length { expected: start + length, actual: actual.unwrap_or(0) });
        }
        status => return Err(Fault::Status(status.as_u16())),
    }
    let text = header_text(response, header::CONTENT_RANGE).unwrap_or("no Content-Range");
    let (first, last, total) = parse_content_range(text).ok_or_else(|| Fault::OtherRange(text.to_owned()))?;
    if first == start && last < start + length - 1 && total == last + 1 {
        return Err(Fault::Length { expected: start + length, actual: total });
    }
    if first != start || last != start + length - 1 {
        return Err(Fault::OtherRange(text.to_owned()));
    }
    let etag = response.headers().get(header::ETAG).map(|value| Bytes::copy_from_slice(value.as_bytes()));
    Ok(Head { total, etag })
}

fn header_text(response: &Response<Incoming>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110 §14.4).
fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (first.parse().ok()?, last.parse().ok()?, total.parse().ok()?);
    (first <= last && last < total).then_some((first, last, total))
}

fn tls_fault(error: &io::Error) -> Fault {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(cause)) => Fault::Authority(format!("{cause:?}")),
        Some(rustls::Error::General(cause)) => Fault::Authority(cause.clone()),
        Some(cause) => Fault::Tls(cause.to_string()),
        None => Fault::Broken(error.to_string()),
    }
}

/// The whole chain of an error in one line; hyper's own text alone says little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_exact() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, 9, 100)));
        for bad in [
            "",
            "bytes 0-9/*",
            "bytes */100",
            "bytes 9-0/100",
            "bytes 0-100/100",
            "items 0-9/100",
            "bytes 0-9",
            "bytes -9/100",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
