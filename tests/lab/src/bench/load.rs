//! Requests in a closed loop over keep-alive TLS: so many connections, on each one request after the other. Ours and the peer get the same
//! generator, so that what it takes of the machine it takes from both; it does as little as can be, because it shares the machine with them.

use anyhow::{Context as _, ensure};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::net::Ipv4Addr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest answer with its head.
const MAX_ANSWER: usize = 64 << 10;
/// So much of an answer that is not what was expected is told.
const SHOWN: usize = 400;

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
#[derive(Debug, Clone)]
pub(super) struct Rate {
    pub(super) per_second: f64,
    /// 99th percentile of the time to an answer, in milliseconds.
    pub(super) p99: f64,
    failed: usize,
    failure: Option<String>,
}

/// What is to be said of answers that were not what was expected, and are counted nowhere; `None`: there were none.
pub(super) fn failures<'a>(rates: impl IntoIterator<Item = &'a Rate>) -> Option<String> {
    let (mut failed, mut first) = (0, None);
    for rate in rates {
        failed += rate.failed;
        first = first.or(rate.failure.as_deref());
    }
    first.map(|first| said(failed, first))
}

fn said(failed: usize, first: &str) -> String {
    format!("{failed} answers failed, the first: {first}")
}

/// What clients were answered.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// Microseconds of each that was good.
    times: Vec<u32>,
    /// How many were not, and the first of those.
    failed: usize,
    failure: Option<String>,
}

impl Answers {
    fn add(&mut self, other: Self) {
        self.times.extend(other.times);
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
    }

    fn fail(&mut self, why: String) {
        self.failed += 1;
        self.failure.get_or_insert(why);
    }

    /// What is to be said of those that were not good; `None`: there were none.
    pub(super) fn failures(&self) -> Option<String> {
        self.failure.as_deref().map(|first| said(self.failed, first))
    }

    /// 99th percentile of the time to a good answer, in milliseconds.
    pub(super) fn p99(&self) -> anyhow::Result<f64> {
        let mut times = self.times.clone();
        ensure!(!times.is_empty(), "nothing was answered as it should be: {:?}", self.failure);
        times.sort_unstable();
        Ok(f64::from(times[(times.len() * 99 / 100).min(times.len() - 1)]) / 1e3)
    }
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
    let running = Running::start(clients, warm).await?;
    tokio::time::sleep_until((running.from + time).into()).await;
    let answers = running.stop().await?;
    #[expect(clippy::cast_precision_loss, reason = "some millions")]
    let per_second = answers.times.len() as f64 / time.as_secs_f64();
    let (failed, failure) = (answers.failed, answers.failure.clone());
    Ok(Rate { per_second, p99: answers.p99()?, failed, failure })
}

/// Clients that go on until they are stopped, each on one connection.
pub(super) struct Running {
    /// From when on answers are counted.
    from: Instant,
    end: Arc<OnceLock<Instant>>,
    lines: Vec<JoinHandle<anyhow::Result<Answers>>>,
}

impl Running {
    /// Answers are counted after `warm`. Clients that pause begin one after the other within their pause: machines do not call in step, and what the last
    /// one of a crowd waits for says how large the crowd is.
    pub(super) async fn start(clients: Vec<Client>, warm: Duration) -> anyhow::Result<Self> {
        let mut lines = Vec::with_capacity(clients.len());
        for client in clients {
            lines.push(Line::new(client).await?);
        }
        let (from, end) = (Instant::now() + warm, Arc::new(OnceLock::new()));
        let count = u32::try_from(lines.len()).context("too many clients")?.max(1);
        let begins = |(at, line): (u32, Line)| {
            let first = line.client.pause * at / count;
            tokio::spawn(line.run(first, from, end.clone()))
        };
        let lines = (0..).zip(lines).map(begins).collect();
        Ok(Self { from, end, lines })
    }

    /// What was answered until now.
    pub(super) async fn stop(self) -> anyhow::Result<Answers> {
        self.end.get_or_init(Instant::now);
        let mut answers = Answers::default();
        for line in self.lines {
            answers.add(line.await.context("a client panicked")??);
        }
        Ok(answers)
    }
}

struct Line {
    client: Client,
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

async fn connect(client: &Client) -> anyhow::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, client.port)).await.context("connecting")?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    TlsConnector::from(client.tls.clone()).connect(name, tcp).await.context("TLS")
}

impl Line {
    async fn new(client: Client) -> anyhow::Result<Self> {
        let stream = connect(&client).await?;
        Ok(Self { client, stream, buffer: vec![0; MAX_ANSWER] })
    }

    /// Begins after `first`. The answers that came from `from` on, until there is an `end`.
    async fn run(mut self, first: Duration, from: Instant, end: Arc<OnceLock<Instant>>) -> anyhow::Result<Answers> {
        let mut answers = Answers::default();
        tokio::time::sleep(first).await;
        for at in (0..self.client.requests.len()).cycle() {
            if end.get().is_some() {
                break;
            }
            let sent = Instant::now();
            match self.call(at).await? {
                None => {
                    let answered = Instant::now();
                    if answered >= from && end.get().is_none_or(|end| answered < *end) {
                        answers.times.push(u32::try_from((answered - sent).as_micros()).unwrap_or(u32::MAX));
                    }
                }
                Some(failure) => {
                    answers.fail(failure);
                    // Who refuses may hang up.
                    self.stream = connect(&self.client).await?;
                }
            }
            if !self.client.pause.is_zero() {
                tokio::time::sleep(self.client.pause).await;
            }
        }
        Ok(answers)
    }

    /// Sends a request and reads its answer; gives the beginning of one that is not what was expected.
    async fn call(&mut self, at: usize) -> anyhow::Result<Option<String>> {
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
        Ok((!is_good).then(|| text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()))
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
    fn what_failed_is_said_and_counts_nowhere() {
        let mut answers = Answers::default();
        for time in 1..=100 {
            answers.times.push(time * 1000);
        }
        assert_eq!(answers.failures(), None);
        answers.fail("HTTP/1.1 503".into());
        let mut other = Answers::default();
        other.fail("HTTP/1.1 500".into());
        answers.add(other);
        assert_eq!(answers.failures().unwrap(), "2 answers failed, the first: HTTP/1.1 503");
        assert!((answers.p99().unwrap() - 100.0).abs() < 1e-9);
        assert!(Answers::default().p99().is_err());
    }

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
