//! TLS over a TCP connection, made for long answers: what comes from the kernel in one large piece is decrypted to where it is wanted. (rustls'
//! own buffers take 4 KiB from the kernel at a time, and an HTTP library behind them copies twice more.) The handshake is rustls'; what comes
//! after it is in [`super::record`].

use super::fault::Fault;
use super::record::{Content, Records};
use rustls::client::UnbufferedClientConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
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
    stream: Stream,
    records: Records,
    /// What was decrypted and is not wanted yet; from `spare_at` on.
    spare: Vec<u8>,
    spare_at: usize,
}

/// What is below TLS.
struct Stream {
    tcp: TcpStream,
    /// What came and was not looked at yet is at `start..end`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// What has to be sent.
    outgoing: Vec<u8>,
}

/// How far a handshake is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// More bytes are needed from the peer.
    Read,
    /// It is done.
    Done,
}

impl Secure {
    /// The handshake.
    pub(super) async fn connect(
        tcp: TcpStream,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Fault> {
        let mut tls = UnbufferedClientConnection::new(config, name).map_err(tls_fault)?;
        let outgoing = Vec::with_capacity(SENT);
        let mut stream = Stream { tcp, incoming: vec![0; TAKEN], start: 0, end: 0, outgoing };
        loop {
            let step = stream.shake_hands(&mut tls)?;
            stream.flush().await?;
            match step {
                Step::Done => break,
                Step::Read => stream.fill().await?,
            }
        }
        Ok(Self { stream, records: Records::new(tls)?, spare: Vec::new(), spare_at: 0 })
    }

    /// Sends a request.
    pub(super) async fn send(&mut self, request: &[u8]) -> Result<(), Fault> {
        self.records.seal(request, &mut self.stream.outgoing)?;
        self.stream.flush().await
    }

    /// Fills `out` with what there is, and returns how many bytes; 0 at the end. Those behind them may be anything.
    pub(super) async fn receive(&mut self, out: &mut [u8]) -> Result<usize, Fault> {
        self.receive_records(out, usize::MAX).await
    }

    /// The same from one record at most: what does not go where `out` goes is better not copied there.
    pub(super) async fn receive_one(&mut self, out: &mut [u8]) -> Result<usize, Fault> {
        self.receive_records(out, 1).await
    }

    async fn receive_records(&mut self, out: &mut [u8], most: usize) -> Result<usize, Fault> {
        if self.spare_at < self.spare.len() {
            let part = &self.spare[self.spare_at..];
            let length = part.len().min(out.len());
            out[..length].copy_from_slice(&part[..length]);
            self.spare_at += length;
            return Ok(length);
        }
        loop {
            let (length, is_closed) = self.take_records(out, most)?;
            if !self.stream.outgoing.is_empty() {
                self.stream.flush().await?;
            }
            if length > 0 || is_closed {
                return Ok(length);
            }
            self.stream.fill().await?;
        }
    }

    /// Goes through the records that are there, until `out` is full or so many have had data; what is too much is kept. How many bytes of it are
    /// filled, and whether the peer has ended the connection.
    fn take_records(&mut self, out: &mut [u8], most: usize) -> Result<(usize, bool), Fault> {
        let stream = &mut self.stream;
        let (mut filled, mut records) = (0, 0);
        while filled < out.len()
            && records < most
            && let Some(length) = Records::length(&stream.incoming[stream.start..stream.end])?
        {
            let record = &mut stream.incoming[stream.start..stream.start + length];
            stream.start += length;
            let room = &mut out[filled..];
            let length = room.len();
            match self.records.open(record, room, &mut stream.outgoing)? {
                Content::Placed(length) => {
                    filled += length;
                    records += usize::from(length > 0);
                }
                Content::Data(data) => {
                    let (wanted, more) = data.split_at(data.len().min(length));
                    self.spare.clear();
                    self.spare.extend_from_slice(more);
                    self.spare_at = 0;
                    out[filled..filled + wanted.len()].copy_from_slice(wanted);
                    filled += wanted.len();
                    records += usize::from(!wanted.is_empty());
                }
                Content::Other => {}
                Content::Closed => return Ok((filled, true)),
            }
        }
        Ok((filled, false))
    }

    /// Gives back what was received beyond the end of what it was received for.
    pub(super) fn unreceive(&mut self, bytes: &[u8]) {
        self.spare.splice(..self.spare_at, bytes.iter().copied());
        self.spare_at = 0;
    }

    /// Whether it can take another request: nothing is left that nobody has asked for, and its keys are fresh enough.
    pub(super) fn is_usable(&self) -> bool {
        self.spare_at == self.spare.len() && self.stream.start == self.stream.end && !self.records.is_spent()
    }
}

impl Stream {
    /// Goes on with the handshake, as far as what came goes.
    fn shake_hands(&mut self, tls: &mut UnbufferedClientConnection) -> Result<Step, Fault> {
        loop {
            let incoming = &mut self.incoming[self.start..self.end];
            let UnbufferedStatus { discard, state } = tls.process_tls_records(incoming);
            let step = match state.map_err(tls_fault)? {
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
                ConnectionState::WriteTraffic(_) => Some(Step::Done),
                ConnectionState::BlockedHandshake => Some(Step::Read),
                // Data before any request are nobody's.
                ConnectionState::ReadTraffic(_) | ConnectionState::PeerClosed | ConnectionState::Closed => {
                    return Err(ended());
                }
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
