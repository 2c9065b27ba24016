//! HTTPS to one server: requests for ranges, one after the other on a connection, and no more of HTTP/1.1 than these need (RFC 9112).

use super::address::Address;
use super::fault::Fault;
use super::secure::Secure;
use super::world::{Boxed, Head, Path, Wire};
use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ClientConfig;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::net::TcpStream;

/// Longest head of an answer.
const HEAD: usize = 16 << 10;
/// Header fields of an answer.
const FIELDS: usize = 64;
/// An address that has not answered after so long is not waited for alone.
const NEXT_AFTER: Duration = Duration::from_millis(200);
/// A connection that has rested for so long is asked whether it lives, in seconds; again after so long; and so often in vain before it is closed.
const RESTS: u32 = 15;
const ASKS_EVERY: u32 = 5;
const ASKS: u32 = 3;

/// The way to the image on one HTTPS server.
pub struct Https {
    shared: Arc<Shared>,
}

struct Shared {
    address: Address,
    tls: Arc<ClientConfig>,
}

impl Https {
    /// Nothing is connected yet.
    #[must_use]
    pub fn new(address: Address, tls: &ClientConfig) -> Self {
        let mut tls = tls.clone();
        // After the handshake the reader decrypts by itself (`record`).
        tls.enable_secret_extraction = true;
        Self { shared: Arc::new(Shared { address, tls: Arc::new(tls) }) }
    }

    /// The ways to all `addresses`.
    #[must_use]
    pub fn all(addresses: Vec<Address>, tls: &Arc<ClientConfig>) -> Vec<Box<dyn Path>> {
        addresses.into_iter().map(|address| Box::new(Self::new(address, tls)) as Box<dyn Path>).collect()
    }
}

impl Path for Https {
    fn url(&self) -> &str {
        self.shared.address.url()
    }

    fn connect(&self) -> Boxed<'_, Result<Box<dyn Wire>, Fault>> {
        Box::pin(async {
            let tcp = connect(self.shared.address.sockets()).await?;
            prepare(&tcp).map_err(|error| Fault::Connect(error.to_string()))?;
            Ok(Box::new(Connection { shared: self.shared.clone(), step: Step::Tcp(tcp) }) as _)
        })
    }
}

/// Requests go out at once. And a connection that rests says now and then that it lives: what stands between may forget one that does not, and the
/// next request on it would be lost without a word.
fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    setsockopt(tcp, sockopt::KeepAlive, &true)?;
    setsockopt(tcp, sockopt::TcpKeepIdle, &RESTS)?;
    setsockopt(tcp, sockopt::TcpKeepInterval, &ASKS_EVERY)?;
    setsockopt(tcp, sockopt::TcpKeepCount, &ASKS)?;
    Ok(())
}

/// A connection to one of these addresses: to the next one, too, when one fails or takes long. A name may have an address that nobody answers at (IPv6
/// where there is none), and it must not cost the time that there is for all.
async fn connect(sockets: &[SocketAddr]) -> Result<TcpStream, Fault> {
    let mut rest = sockets.iter();
    let mut tried: Vec<Boxed<'_, io::Result<TcpStream>>> = Vec::new();
    let mut last = Fault::Connect("it has no address".into());
    loop {
        match rest.next() {
            Some(socket) => tried.push(Box::pin(TcpStream::connect(*socket))),
            None if tried.is_empty() => return Err(last),
            None => {}
        }
        let mut due = (rest.len() > 0).then(|| Box::pin(tokio::time::sleep(NEXT_AFTER)));
        let ended = poll_fn(|context| {
            for at in 0..tried.len() {
                if let Poll::Ready(ended) = tried[at].as_mut().poll(context) {
                    drop(tried.swap_remove(at));
                    return Poll::Ready(Some(ended));
                }
            }
            match &mut due {
                Some(due) => due.as_mut().poll(context).map(|()| None),
                None => Poll::Pending,
            }
        });
        match ended.await {
            Some(Ok(tcp)) => return Ok(tcp),
            Some(Err(error)) => last = Fault::Connect(error.to_string()),
            None => {}
        }
    }
}

struct Connection {
    shared: Arc<Shared>,
    step: Step,
}

enum Step {
    Tcp(TcpStream),
    Open { tls: Box<Secure>, answer: Left },
    Broken,
}

/// What is left of the answer that is being read.
#[derive(Clone, Copy)]
struct Left {
    bytes: u64,
    /// Whether the server takes another request after it.
    is_kept: bool,
}

impl Connection {
    async fn handshake(&mut self) -> Result<(), Fault> {
        let Step::Tcp(tcp) = std::mem::replace(&mut self.step, Step::Broken) else { return Err(out_of_order()) };
        let Shared { address, tls } = &*self.shared;
        let tls = Box::new(Secure::connect(tcp, tls.clone(), address.name().clone()).await?);
        self.step = Step::Open { tls, answer: Left { bytes: 0, is_kept: true } };
        Ok(())
    }

    async fn request(&mut self, start: u64, length: u64) -> Result<Head, Fault> {
        let Step::Open { tls, answer } = &mut self.step else { return Err(out_of_order()) };
        let address = &self.shared.address;
        // A fragment is for the client alone.
        let path = address.path().split('#').next().unwrap_or_default();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nRange: bytes={start}-{}\r\nAccept-Encoding: identity\r\n\r\n",
            address.authority(),
            start + length - 1
        );
        tls.send(request.as_bytes()).await?;
        let (mut text, mut length) = (vec![0; HEAD], 0);
        loop {
            // What is behind the head goes elsewhere, and most often begins a record.
            let more = tls.receive_one(&mut text[length..]).await?;
            if more == 0 {
                return Err(Fault::Broken("the server closed it before it answered".into()));
            }
            length += more;
            if let Some((head, left, end)) = parse(&text[..length])? {
                tls.unreceive(&text[end..length]);
                *answer = left;
                return Ok(head);
            }
            if length == HEAD {
                return Err(Fault::Broken(format!("the head of its answer is longer than {HEAD} bytes")));
            }
        }
    }

    async fn data(&mut self, out: &mut [u8]) -> Result<usize, Fault> {
        let Step::Open { tls, answer } = &mut self.step else { return Err(out_of_order()) };
        let most = usize::try_from(answer.bytes).map_or(out.len(), |left| left.min(out.len()));
        if most == 0 {
            return Ok(0);
        }
        let length = tls.receive(&mut out[..most]).await?;
        answer.bytes -= length as u64;
        Ok(length)
    }
}

impl Wire for Connection {
    fn secure(&mut self) -> Boxed<'_, Result<(), Fault>> {
        Box::pin(self.handshake())
    }

    fn ask(&mut self, start: u64, length: u64) -> Boxed<'_, Result<Head, Fault>> {
        Box::pin(self.request(start, length))
    }

    fn next<'a>(&'a mut self, out: &'a mut [u8]) -> Boxed<'a, Result<usize, Fault>> {
        Box::pin(self.data(out))
    }

    fn is_usable(&self) -> bool {
        matches!(&self.step, Step::Open { tls, answer } if answer.bytes == 0 && answer.is_kept && tls.is_usable())
    }
}

fn out_of_order() -> Fault {
    Fault::Broken("the connection is not ready for this step".into())
}

/// The head of an answer, what follows it, and where it ends; `None` if it is not whole. What a server says before the answer itself (1xx) is
/// passed over.
fn parse(text: &[u8]) -> Result<Option<(Head, Left, usize)>, Fault> {
    let mut from = 0;
    loop {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        let parsed = response.parse(&text[from..]);
        let httparse::Status::Complete(length) =
            parsed.map_err(|error| Fault::Broken(format!("its answer is no HTTP: {error}")))?
        else {
            return Ok(None);
        };
        from += length;
        let status = response.code.unwrap_or_default();
        if (100..200).contains(&status) {
            continue;
        }
        let field = |name: &str| {
            response.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
        };
        let text_of = |name: &str| field(name).and_then(|value| std::str::from_utf8(value).ok());
        let length = text_of("content-length").and_then(|length| length.trim().parse().ok());
        let bytes = match (length, field("transfer-encoding")) {
            (Some(length), None) => length,
            // Of other answers nothing but the head is read.
            _ if status != 206 => 0,
            _ => return Err(Fault::Broken("its answer does not say how long it is (Content-Length)".into())),
        };
        let closes = text_of("connection").is_some_and(|value| value.to_ascii_lowercase().contains("close"));
        let head = Head {
            status,
            content_range: text_of("content-range").map(str::to_owned),
            etag: field("etag").map(Bytes::copy_from_slice),
        };
        let is_kept = response.version == Some(1) && !closes && status == 206;
        return Ok(Some((head, Left { bytes, is_kept }, from)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::net::TcpListener;
    use std::time::Instant;
    use tokio::time::timeout;

    /// Where connections are taken, and where none is: those that are waiting already fill it.
    fn listeners() -> [(TcpListener, SocketAddr); 2] {
        let [good, full] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        listen(&full, Backlog::new(0).unwrap()).unwrap();
        [good, full].map(|listener| {
            let address = listener.local_addr().unwrap();
            (listener, address)
        })
    }

    #[tokio::test]
    async fn an_address_that_nobody_answers_at_does_not_hide_the_next_one() {
        let [(good, here), (full, nowhere)] = listeners();
        let mut filling = Vec::new();
        while let Ok(waiting) = std::net::TcpStream::connect_timeout(&nowhere, Duration::from_millis(200)) {
            filling.push(waiting);
        }
        // Nobody listens there any more.
        let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for addresses in [&[nowhere, here][..], &[here, nowhere], &[refused, here], &[nowhere, refused, here]] {
            let begun = Instant::now();
            let tcp = timeout(Duration::from_secs(20), connect(addresses)).await.unwrap().unwrap();
            assert_eq!(tcp.peer_addr().unwrap(), here);
            // The time limit of all is a second.
            assert!(begun.elapsed() < Duration::from_millis(800), "{addresses:?}: {:?}", begun.elapsed());
        }
        for addresses in [&[refused][..0], &[refused]] {
            assert!(matches!(connect(addresses).await, Err(Fault::Connect(_))));
        }
        drop((good, full, filling));
    }

    const GOOD: &str =
        "HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nETag: \"x\"\r\ncontent-range: bytes 0-9/20\r\n\r\n";

    #[test]
    fn an_answer_has_a_head_and_an_end() {
        let (head, left, end) = parse(format!("{GOOD}0123").as_bytes()).unwrap().unwrap();
        assert_eq!((head.status, head.content_range.as_deref()), (206, Some("bytes 0-9/20")));
        assert_eq!(head.etag.as_deref(), Some(&b"\"x\""[..]));
        assert_eq!((left.bytes, left.is_kept, end), (10, true, GOOD.len()));
        for cut in 0..GOOD.len() {
            assert!(parse(&GOOD.as_bytes()[..cut]).unwrap().is_none(), "{cut}");
        }
        let early = format!("HTTP/1.1 103 Early Hints\r\n\r\n{GOOD}");
        assert_eq!(parse(early.as_bytes()).unwrap().unwrap().2, early.len());
    }

    #[test]
    fn connections_that_end_with_the_answer_are_not_kept() {
        for other in [
            GOOD.replace("1.1", "1.0"),
            GOOD.replace("ETag: \"x\"", "Connection: Close"),
            GOOD.replace("206 Partial Content", "200 OK"),
        ] {
            assert!(!parse(other.as_bytes()).unwrap().unwrap().1.is_kept, "{other}");
        }
    }

    #[test]
    fn an_answer_without_a_length_and_what_is_no_answer_are_faults() {
        for bad in [
            GOOD.replace("Content-Length: 10\r\n", ""),
            GOOD.replace("Content-Length: 10", "Transfer-Encoding: chunked"),
            GOOD.replace("Content-Length: 10", "Content-Length: ten"),
            GOOD.replace("HTTP/1.1", "SSH-2.0"),
        ] {
            assert!(matches!(parse(bad.as_bytes()), Err(Fault::Broken(_))), "{bad}");
        }
    }
}
