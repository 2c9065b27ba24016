//! TLS over a TCP connection, made for long answers: what comes from the kernel in one large piece is decrypted in place and copied once,
//! to where it is wanted. (rustls' own buffers take 4 KiB from the kernel at a time, and an HTTP library behind them copies twice more.)

use super::fault::Fault;
use rustls::client::UnbufferedClientConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{CertificateError, ClientConfig};
use rustls_pki_types::{ServerName, UnixTime};
use std::io;
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Bytes that are taken from the kernel at a time: several records, of at most 16 KiB and a little.
const TAKEN: usize = 128 << 10;
/// Room for what is sent, at first: a request or a flight of the handshake.
const SENT: usize = 4 << 10;

/// A TLS connection. After an error it is of no use.
pub(super) struct Secure {
    tcp: TcpStream,
    tls: UnbufferedClientConnection,
    /// What came and was not looked at yet is at `start..end`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// What has to be sent.
    outgoing: Vec<u8>,
    /// What was decrypted and is not wanted yet; from `spare_at` on.
    spare: Vec<u8>,
    spare_at: usize,
}

/// What has to be done before anything more can come of the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// More bytes are needed from the peer.
    Read,
    /// Enough was decrypted.
    Enough,
    /// The handshake is done, and nothing came since.
    Ready,
    /// The peer has ended the connection in order.
    Closed,
}

impl Secure {
    /// The handshake.
    pub(super) async fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Fault> {
        let tls = UnbufferedClientConnection::new(config, name).map_err(tls_fault)?;
        let mut secure = Self {
            tcp,
            tls,
            incoming: vec![0; TAKEN],
            start: 0,
            end: 0,
            outgoing: Vec::with_capacity(SENT),
            spare: Vec::new(),
            spare_at: 0,
        };
        loop {
            let step = secure.process(None, &mut |_| false)?;
            secure.flush().await?;
            match step {
                Step::Ready => return Ok(secure),
                // Data before any request are nobody's.
                Step::Enough | Step::Closed => return Err(ended()),
                Step::Read => secure.fill().await?,
            }
        }
    }

    /// Sends a request.
    pub(super) async fn send(&mut self, request: &[u8]) -> Result<(), Fault> {
        match self.process(Some(request), &mut |_| false)? {
            Step::Ready => self.flush().await,
            Step::Closed => Err(ended()),
            Step::Enough | Step::Read => Err(Fault::Broken("something came before it was asked for".into())),
        }
    }

    /// Appends up to `most` bytes to `out`, and returns how many; 0 at the end.
    pub(super) async fn receive(&mut self, out: &mut Vec<u8>, most: usize) -> Result<usize, Fault> {
        if self.spare_at < self.spare.len() {
            let part = &self.spare[self.spare_at..];
            let part = &part[..part.len().min(most)];
            out.extend_from_slice(part);
            self.spare_at += part.len();
            return Ok(part.len());
        }
        let before = out.len();
        loop {
            let (mut spare, mut at) = (std::mem::take(&mut self.spare), out.len());
            spare.clear();
            let step = self.process(None, &mut |payload| {
                let (wanted, more) = payload.split_at(payload.len().min(most - (at - before)));
                out.extend_from_slice(wanted);
                spare.extend_from_slice(more);
                at += wanted.len();
                at - before < most
            });
            (self.spare, self.spare_at) = (spare, 0);
            let step = step?;
            if !self.outgoing.is_empty() {
                self.flush().await?;
            }
            if out.len() > before {
                return Ok(out.len() - before);
            }
            match step {
                Step::Closed => return Ok(0),
                Step::Read | Step::Ready | Step::Enough => self.fill().await?,
            }
        }
    }

    /// Gives back what was received beyond the end of what it was received for.
    pub(super) fn unreceive(&mut self, bytes: &[u8]) {
        self.spare.splice(..self.spare_at, bytes.iter().copied());
        self.spare_at = 0;
    }

    /// Whether bytes are left that nobody has asked for.
    pub(super) fn has_more(&self) -> bool {
        self.spare_at < self.spare.len() || self.start < self.end
    }

    /// Goes through what came, as far as it goes. `take` gets what was decrypted, and tells whether it wants more. `request` is encrypted
    /// when the handshake is done.
    fn process(&mut self, mut request: Option<&[u8]>, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<Step, Fault> {
        loop {
            let incoming = &mut self.incoming[self.start..self.end];
            let UnbufferedStatus { discard, state } = self.tls.process_tls_records(incoming);
            let step = match state.map_err(tls_fault)? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    let mut goes_on = true;
                    while let Some(record) = traffic.next_record() {
                        goes_on &= take(record.map_err(tls_fault)?.payload);
                    }
                    if goes_on { None } else { Some(Step::Enough) }
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(&mut self.outgoing, |room| match data.encode(room) {
                        Ok(length) => Ok(Ok(length)),
                        Err(EncodeError::InsufficientSize(more)) => Ok(Err(more.required_size)),
                        Err(error @ EncodeError::AlreadyEncoded) => Err(Fault::Tls(error.to_string())),
                    })?;
                    None
                }
                // The caller sends it before it waits for an answer.
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    None
                }
                ConnectionState::WriteTraffic(mut traffic) => match request.take() {
                    Some(request) => {
                        append(&mut self.outgoing, |room| match traffic.encrypt(request, room) {
                            Ok(length) => Ok(Ok(length)),
                            Err(EncryptError::InsufficientSize(more)) => Ok(Err(more.required_size)),
                            Err(error @ EncryptError::EncryptExhausted) => Err(Fault::Tls(error.to_string())),
                        })?;
                        None
                    }
                    None => Some(Step::Ready),
                },
                ConnectionState::BlockedHandshake => Some(Step::Read),
                ConnectionState::PeerClosed | ConnectionState::Closed => Some(Step::Closed),
                other => return Err(Fault::Tls(format!("an unknown state: {other:?}"))),
            };
            self.start += discard;
            if let Some(step) = step {
                return Ok(step);
            }
        }
    }

    async fn flush(&mut self) -> Result<(), Fault> {
        self.tcp.write_all(&self.outgoing).await.map_err(|error| broken(&error))?;
        self.outgoing.clear();
        Ok(())
    }

    /// Takes more from the kernel.
    async fn fill(&mut self) -> Result<(), Fault> {
        // At most a part of one record is moved.
        self.incoming.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.incoming.len() {
            return Err(Fault::Tls("a record is longer than any can be".into()));
        }
        let length = self.tcp.read(&mut self.incoming[self.end..]).await.map_err(|error| broken(&error))?;
        if length == 0 {
            return Err(ended());
        }
        self.end += length;
        Ok(())
    }
}

/// Appends what `encode` writes into the room that it is given: its length, or how much room it needs.
fn append(
    out: &mut Vec<u8>,
    mut encode: impl FnMut(&mut [u8]) -> Result<Result<usize, usize>, Fault>,
) -> Result<(), Fault> {
    let before = out.len();
    let mut room = SENT;
    loop {
        out.resize(before + room, 0);
        match encode(&mut out[before..])? {
            Ok(length) => {
                out.truncate(before + length);
                return Ok(());
            }
            Err(required) if required > room => room = required,
            Err(_) => return Err(Fault::Tls("there is room, and it is not used".into())),
        }
    }
}

fn ended() -> Fault {
    Fault::Broken("the server closed it".into())
}

fn broken(error: &io::Error) -> Fault {
    Fault::Broken(error.to_string())
}

fn tls_fault(error: rustls::Error) -> Fault {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { time, .. }) => {
            Fault::Validity("valid yet", date(time))
        }
        rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { time, .. }) => {
            Fault::Validity("valid any more", date(time))
        }
        rustls::Error::InvalidCertificate(cause) => Fault::Authority(format!("{cause:?}")),
        rustls::Error::General(cause) => Fault::Authority(cause),
        cause => Fault::Tls(cause.to_string()),
    }
}

/// For people.
fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let date = OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok());
    date.unwrap_or_else(|| format!("{seconds} s after 1970"))
}
