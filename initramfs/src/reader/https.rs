//! HTTPS to one server, by hyper and rustls.

use super::address::Address;
use super::fault::Fault;
use super::world::{Boxed, Head, Path, Wire};
use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use moor_api::client::chain;
use rustls::{CertificateError, ClientConfig};
use rustls_pki_types::UnixTime;
use std::io;
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The way to the image on one HTTPS server.
pub struct Https {
    shared: Arc<Shared>,
}

struct Shared {
    address: Address,
    tls: TlsConnector,
}

impl Https {
    /// Nothing is connected yet.
    #[must_use]
    pub fn new(address: Address, tls: Arc<ClientConfig>) -> Self {
        Self { shared: Arc::new(Shared { address, tls: TlsConnector::from(tls) }) }
    }

    /// The ways to all `addresses`.
    #[must_use]
    pub fn all(addresses: Vec<Address>, tls: &Arc<ClientConfig>) -> Vec<Box<dyn Path>> {
        addresses.into_iter().map(|address| Box::new(Self::new(address, tls.clone())) as Box<dyn Path>).collect()
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
    Http { sender: SendRequest<Empty<Bytes>>, body: Option<Incoming> },
    Broken,
}

impl Connection {
    async fn handshake(&mut self) -> Result<(), Fault> {
        let Step::Tcp(tcp) = std::mem::replace(&mut self.step, Step::Broken) else { return Err(out_of_order()) };
        let Shared { address, tls } = &*self.shared;
        let tls = tls.connect(address.name().clone(), tcp).await.map_err(|error| tls_fault(&error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(tls)).await.map_err(|error| Fault::Broken(chain(&error)))?;
        tokio::spawn(async move {
            // An error of the connection reaches the request that waits on it.
            let _ = connection.await;
        });
        self.step = Step::Http { sender, body: None };
        Ok(())
    }

    async fn request(&mut self, start: u64, length: u64) -> Result<Head, Fault> {
        let Step::Http { sender, body } = &mut self.step else { return Err(out_of_order()) };
        let request = Request::builder()
            .uri(self.shared.address.path())
            .header(header::HOST, self.shared.address.authority())
            .header(header::RANGE, format!("bytes={start}-{}", start + length - 1))
            .header(header::ACCEPT_ENCODING, "identity")
            .body(Empty::new())
            .map_err(|error| Fault::Broken(error.to_string()))?;
        let broken = |error: hyper::Error| Fault::Broken(chain(&error));
        sender.ready().await.map_err(broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let head = head(&response);
        *body = Some(response.into_body());
        Ok(head)
    }

    async fn data(&mut self) -> Result<Option<Bytes>, Fault> {
        let Step::Http { body: Some(body), .. } = &mut self.step else { return Err(out_of_order()) };
        loop {
            match body.frame().await {
                Some(Ok(frame)) => {
                    // Trailers carry nothing for us.
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(Fault::Broken(chain(&error))),
                None => return Ok(None),
            }
        }
    }
}

impl Wire for Connection {
    fn secure(&mut self) -> Boxed<'_, Result<(), Fault>> {
        Box::pin(self.handshake())
    }

    fn ask(&mut self, start: u64, length: u64) -> Boxed<'_, Result<Head, Fault>> {
        Box::pin(self.request(start, length))
    }

    fn next(&mut self) -> Boxed<'_, Result<Option<Bytes>, Fault>> {
        Box::pin(self.data())
    }

    fn is_usable(&self) -> bool {
        matches!(&self.step, Step::Http { sender, .. } if !sender.is_closed())
    }
}

fn out_of_order() -> Fault {
    Fault::Broken("the connection is not ready for this step".into())
}

fn head(response: &Response<Incoming>) -> Head {
    let headers = response.headers();
    Head {
        status: response.status().as_u16(),
        content_range: headers.get(header::CONTENT_RANGE).and_then(|value| Some(value.to_str().ok()?.to_owned())),
        etag: headers.get(header::ETAG).map(|value| Bytes::copy_from_slice(value.as_bytes())),
    }
}

fn tls_fault(error: &io::Error) -> Fault {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { time, .. })) => {
            Fault::Validity("valid yet", date(*time))
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { time, .. })) => {
            Fault::Validity("valid any more", date(*time))
        }
        Some(rustls::Error::InvalidCertificate(cause)) => Fault::Authority(format!("{cause:?}")),
        Some(rustls::Error::General(cause)) => Fault::Authority(cause.clone()),
        Some(cause) => Fault::Tls(cause.to_string()),
        None => Fault::Broken(error.to_string()),
    }
}

/// For people.
fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let date = OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok());
    date.unwrap_or_else(|| format!("{seconds} s after 1970"))
}
