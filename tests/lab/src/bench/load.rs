//! Requests in a closed loop over keep-alive TLS: so many connections, on each one request after the other. Ours and the peer get the same
//! generator, so that what it takes of the machine it takes from both; it does as little as can be, because it shares the machine with them.

use anyhow::{Context as _, ensure};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest answer with its head.
const MAX_ANSWER: usize = 64 << 10;

/// One connection, and what is sent on it, over and over.
pub(super) struct Client {
    pub(super) tls: Arc<ClientConfig>,
    /// On the loopback.
    pub(super) port: u16,
    /// Made by [`request`].
    pub(super) requests: Vec<Vec<u8>>,
    /// What every answer has to hold.
    pub(super) expected: &'static str,
    /// Between an answer and the next request.
    pub(super) pause: Duration,
}

/// How it went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) per_second: f64,
    /// 99th percentile of the time to an answer, in milliseconds.
    pub(super) p99: f64,
}

/// An HTTP/1.1 request as it goes onto the wire.
pub(super) fn request(method: &str, path: &str, token: Option<&str>, body: &str) -> Vec<u8> {
    let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{token}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// Lets all clients go for `warm`, then counts what is answered within `time`.
pub(super) async fn drive(clients: Vec<Client>, warm: Duration, time: Duration) -> anyhow::Result<Rate> {
    let times = times(clients, warm, time).await?;
    #[expect(clippy::cast_precision_loss, reason = "some millions")]
    let per_second = times.len() as f64 / time.as_secs_f64();
    Ok(Rate { per_second, p99: p99(times)? })
}

/// The 99th percentile of some microseconds, in milliseconds.
pub(super) fn p99(mut times: Vec<u32>) -> anyhow::Result<f64> {
    ensure!(!times.is_empty(), "nothing was answered");
    times.sort_unstable();
    Ok(f64::from(times[(times.len() * 99 / 100).min(times.len() - 1)]) / 1e3)
}

/// As [`drive`]: microseconds of each answer.
pub(super) async fn times(clients: Vec<Client>, warm: Duration, time: Duration) -> anyhow::Result<Vec<u32>> {
    let mut lines = Vec::with_capacity(clients.len());
    for client in clients {
        lines.push(Line::new(client).await?);
    }
    let from = Instant::now() + warm;
    let until = from + time;
    let running: Vec<_> = lines.into_iter().map(|line| tokio::spawn(line.run(from, until))).collect();
    let mut times = Vec::new();
    for line in running {
        times.extend(line.await.context("a client panicked")??);
    }
    Ok(times)
}

struct Line {
    client: Client,
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Line {
    async fn new(client: Client) -> anyhow::Result<Self> {
        let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, client.port)).await.context("connecting")?;
        tcp.set_nodelay(true)?;
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        let stream = TlsConnector::from(client.tls.clone()).connect(name, tcp).await.context("TLS")?;
        Ok(Self { client, stream, buffer: vec![0; MAX_ANSWER] })
    }

    /// Microseconds of each answer that came between the two moments.
    async fn run(mut self, from: Instant, until: Instant) -> anyhow::Result<Vec<u32>> {
        let mut times = Vec::new();
        for at in (0..self.client.requests.len()).cycle() {
            let sent = Instant::now();
            if sent >= until {
                break;
            }
            self.call(at).await?;
            let answered = Instant::now();
            if answered >= from && answered < until {
                times.push(u32::try_from((answered - sent).as_micros()).unwrap_or(u32::MAX));
            }
            if !self.client.pause.is_zero() {
                tokio::time::sleep(self.client.pause).await;
            }
        }
        Ok(times)
    }

    async fn call(&mut self, at: usize) -> anyhow::Result<()> {
        self.stream.write_all(&self.client.requests[at]).await.context("sending")?;
        self.stream.flush().await.context("sending")?;
        let mut length = 0;
        let mut end = None;
        loop {
            let count = self.stream.read(&mut self.buffer[length..]).await.context("reading an answer")?;
            ensure!(count > 0, "the server hangs up, or says more than {MAX_ANSWER} bytes");
            length += count;
            if end.is_none() {
                end = answer_length(&self.buffer[..length])?;
            }
            if end.is_some_and(|end| length >= end) {
                break;
            }
        }
        let text = std::str::from_utf8(&self.buffer[..length]).context("an answer that is no text")?;
        let is_good = text.starts_with("HTTP/1.1 2") && text.contains(self.client.expected);
        ensure!(is_good, "an answer that is not expected: {text}");
        Ok(())
    }
}

/// How long the answer is with its head, once that is there.
fn answer_length(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&bytes[..head]).context("a head that is no text")?;
    for line in text.lines() {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            return Ok(Some(head + 4 + value.trim().parse::<usize>().context("a length")?));
        }
    }
    // RFC 9110 §15.3.5: no content.
    ensure!(text.starts_with("HTTP/1.1 204"), "an answer without a length: {text}");
    Ok(Some(head + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_head_says() {
        assert_eq!(answer_length(b"HTTP/1.1 200 OK\r\nContent-Len").unwrap(), None);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
        assert_eq!(answer_length(answer).unwrap(), Some(answer.len()));
        assert!(answer_length(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(answer_length(answer).unwrap(), Some(answer.len()));
    }
}
