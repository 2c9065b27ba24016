//! HTTPS to one server: requests for ranges, one after the other on a connection, and no more of HTTP/1.1 than these need (RFC 9112).

use super::address::Address;
use super::fault::Fault;
use super::secure::Secure;
use super::world::{Boxed, Head, Path, Wire};
use bytes::Bytes;
use rustls::ClientConfig;
use std::sync::Arc;
use tokio::net::TcpStream;

/// Longest head of an answer.
const HEAD: usize = 16 << 10;
/// Header fields of an answer.
const FIELDS: usize = 64;

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
            let mut last = Fault::Connect("it has no address".into());
            for socket in self.shared.address.sockets() {
                match TcpStream::connect(socket).await {
                    Ok(tcp) => {
                        tcp.set_nodelay(true).map_err(|error| Fault::Connect(error.to_string()))?;
                        return Ok(Box::new(Connection { shared: self.shared.clone(), step: Step::Tcp(tcp) }) as _);
                    }
                    Err(error) => last = Fault::Connect(error.to_string()),
                }
            }
            Err(last)
        })
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
        let mut text = Vec::with_capacity(1024);
        loop {
            let room = HEAD - text.len();
            if tls.receive(&mut text, room).await? == 0 {
                return Err(Fault::Broken("the server closed it before it answered".into()));
            }
            if let Some((head, left, end)) = parse(&text)? {
                tls.unreceive(&text[end..]);
                *answer = left;
                return Ok(head);
            }
            if text.len() == HEAD {
                return Err(Fault::Broken(format!("the head of its answer is longer than {HEAD} bytes")));
            }
        }
    }

    async fn data(&mut self, out: &mut Vec<u8>, most: usize) -> Result<usize, Fault> {
        let Step::Open { tls, answer } = &mut self.step else { return Err(out_of_order()) };
        let most = usize::try_from(answer.bytes).map_or(most, |left| left.min(most));
        if most == 0 {
            return Ok(0);
        }
        let length = tls.receive(out, most).await?;
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

    fn next<'a>(&'a mut self, out: &'a mut Vec<u8>, most: usize) -> Boxed<'a, Result<usize, Fault>> {
        Box::pin(self.data(out, most))
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
