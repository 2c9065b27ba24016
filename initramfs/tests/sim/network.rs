//! Servers in a world of their own: each with a delay, a bandwidth, and a conduct that changes while the run goes on.

use super::world::Sim;
use bytes::Bytes;
use moor_tether::reader::Fault;
use moor_tether::reader::world::{Boxed, Head, Path, Wire, World as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Bytes that arrive at one time.
const PIECE: u64 = 16 << 10;
/// Bytes per second of a slow server.
const SLOW: u64 = 10_000;

/// What a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conduct {
    Good,
    /// Its process is gone: connections break, and new ones are refused.
    Refused,
    /// Nothing comes back.
    Blackholed,
    /// Requests are taken and not answered.
    Silent,
    /// Answers stop after so many bytes.
    Stalls(u64),
    /// Answers break after so many bytes.
    Cuts(u64),
    /// 10 KB/s.
    Slow,
    /// Everything comes so much later, in milliseconds.
    Late(u64),
    /// One bit of each answer is wrong.
    Corrupt,
    /// Another file of the same length.
    OtherImage,
    /// The whole file with status 200.
    NoRanges,
    /// A certificate that is not accepted; connections are new.
    Expired,
    Status(u16),
    /// Status 503, so many milliseconds late.
    FailsLate(u64),
    /// Another entity tag each time.
    Retags,
    /// Connections that are more than so many are closed at once; the others are served.
    Crowded(u64),
    /// New connections are closed at once, and nothing comes on the old ones any more.
    Starves,
}

pub(crate) struct Server {
    pub(crate) url: String,
    state: Mutex<State>,
    changed: Notify,
    sim: Sim,
}

struct State {
    file: Arc<Vec<u8>>,
    other: Arc<Vec<u8>>,
    delay: Duration,
    /// Bytes per second.
    bandwidth: u64,
    conduct: Conduct,
    /// Connections of an earlier life are broken.
    life: u64,
    /// Connections that there are.
    open: u64,
    /// The most that there were at one time.
    most_open: u64,
    /// Connections that were closed at once.
    refused: u64,
    busy_until: Duration,
    requests: Vec<(Duration, u64, u64)>,
}

impl Server {
    pub(crate) fn new(
        sim: &Sim,
        name: usize,
        (file, other): (&Arc<Vec<u8>>, &Arc<Vec<u8>>),
        delay: Duration,
        bandwidth: u64,
    ) -> Arc<Self> {
        let state = State {
            file: file.clone(),
            other: other.clone(),
            delay,
            bandwidth,
            conduct: Conduct::Good,
            life: 0,
            open: 0,
            most_open: 0,
            refused: 0,
            busy_until: Duration::ZERO,
            requests: Vec::new(),
        };
        Arc::new(Self {
            url: format!("https://server{name}/image.moor"),
            state: Mutex::new(state),
            changed: Notify::new(),
            sim: sim.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn behave(&self, conduct: Conduct) {
        let mut state = self.state();
        if matches!(conduct, Conduct::Refused | Conduct::Expired) {
            state.life += 1;
        }
        state.conduct = conduct;
        drop(state);
        self.changed.notify_waiters();
    }

    /// When which ranges were asked for: start and length.
    pub(crate) fn requests(&self) -> Vec<(Duration, u64, u64)> {
        self.state().requests.clone()
    }

    /// How many connections there were at one time since this was asked last.
    pub(crate) fn most_open(&self) -> u64 {
        let mut state = self.state();
        let open = state.open;
        std::mem::replace(&mut state.most_open, open)
    }

    /// How many connections were closed at once.
    pub(crate) fn refused(&self) -> u64 {
        self.state().refused
    }

    /// A connection begins; whether it is served.
    fn takes_one(&self) -> bool {
        let mut state = self.state();
        let is_taken = match state.conduct {
            Conduct::Crowded(most) => state.open < most,
            Conduct::Starves => false,
            _ => true,
        };
        if is_taken {
            state.open += 1;
            state.most_open = state.most_open.max(state.open);
        }
        state.refused += u64::from(!is_taken);
        is_taken
    }

    /// The way over the network, once. Waits while nothing gets through.
    async fn cross(&self) -> Conduct {
        let delay = {
            let state = self.state();
            match state.conduct {
                Conduct::Late(more) => state.delay + Duration::from_millis(more),
                _ => state.delay,
            }
        };
        self.sim.sleep(delay).await;
        self.settle(|conduct| conduct != Conduct::Blackholed).await
    }

    /// The same for the first packet of a connection. What is lost of those is sent again, at pauses that double (tcp(7), `tcp_syn_retries`).
    async fn greeted(&self) -> Conduct {
        let mut pause = Duration::from_secs(1);
        while self.state().conduct == Conduct::Blackholed {
            self.sim.sleep(pause).await;
            pause *= 2;
        }
        self.cross().await
    }

    /// Waits until the conduct is one of those.
    async fn settle(&self, wanted: impl Fn(Conduct) -> bool) -> Conduct {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            let conduct = self.state().conduct;
            if wanted(conduct) {
                return conduct;
            }
            changed.await;
        }
    }

    /// Sends so many bytes after all that is being sent.
    async fn send(&self, length: u64) {
        let wait = {
            let mut state = self.state();
            let rate = if state.conduct == Conduct::Slow { SLOW } else { state.bandwidth };
            let now = self.sim.now();
            let done = state.busy_until.max(now) + Duration::from_nanos(length * 1_000_000_000 / rate);
            if state.conduct != Conduct::Slow {
                // A slow server is slow on each connection; the others share the line.
                state.busy_until = done;
            }
            done.saturating_sub(now)
        };
        self.sim.sleep(wait).await;
    }
}

/// The way to a server.
pub(crate) struct Way(pub(crate) Arc<Server>);

impl Path for Way {
    fn url(&self) -> &str {
        &self.0.url
    }

    fn connect(&self) -> Boxed<'_, Result<Box<dyn Wire>, Fault>> {
        Box::pin(async {
            if self.0.greeted().await == Conduct::Refused {
                return Err(Fault::Connect("refused".into()));
            }
            let life = self.0.state().life;
            let is_taken = self.0.takes_one();
            Ok(Box::new(Line { server: self.0.clone(), life, is_taken, body: None }) as _)
        })
    }
}

struct Line {
    server: Arc<Server>,
    life: u64,
    is_taken: bool,
    body: Option<Body>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.server.state().open -= u64::from(self.is_taken);
    }
}

struct Body {
    bytes: Bytes,
    sent: u64,
    /// What has arrived and was not taken.
    arrived: Bytes,
}

impl Line {
    fn alive(&self) -> Result<(), Fault> {
        if self.server.state().life == self.life { Ok(()) } else { Err(Fault::Broken("reset".into())) }
    }

    async fn greet(&mut self) -> Result<(), Fault> {
        let conduct = self.server.cross().await;
        self.alive()?;
        if !self.is_taken {
            return Err(Fault::Broken("closed".into()));
        }
        if conduct == Conduct::Expired { Err(Fault::Authority("Expired".into())) } else { Ok(()) }
    }

    async fn request(&mut self, start: u64, length: u64) -> Result<Head, Fault> {
        self.alive()?;
        let conduct = self.server.cross().await;
        self.alive()?;
        if matches!(conduct, Conduct::Silent | Conduct::Starves) {
            self.server.settle(|conduct| !matches!(conduct, Conduct::Silent | Conduct::Starves)).await;
            self.alive()?;
        }
        if let Conduct::FailsLate(late) = conduct {
            self.server.sim.sleep(Duration::from_millis(late)).await;
        }
        let mut state = self.server.state();
        let now = self.server.sim.now();
        state.requests.push((now, start, length));
        let file = if conduct == Conduct::OtherImage { &state.other } else { &state.file };
        let total = file.len() as u64;
        let (from, to) = (usize::try_from(start).unwrap(), usize::try_from((start + length).min(total)).unwrap());
        let mut bytes = file[from..to].to_vec();
        if conduct == Conduct::Corrupt {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        }
        let etag = match conduct {
            Conduct::Retags => format!("\"{now:?}\""),
            _ => "\"same\"".to_owned(),
        };
        let (status, content_range) = match conduct {
            Conduct::NoRanges => (200, None),
            Conduct::Status(status) => (status, None),
            Conduct::FailsLate(_) => (503, None),
            _ => (206, Some(format!("bytes {start}-{}/{total}", to - 1))),
        };
        self.body = Some(Body { bytes: bytes.into(), sent: 0, arrived: Bytes::new() });
        Ok(Head { status, content_range, etag: Some(etag.into_bytes().into()) })
    }

    async fn more(&mut self, out: &mut [u8]) -> Result<usize, Fault> {
        self.server.settle(|conduct| conduct != Conduct::Blackholed).await;
        self.alive()?;
        let Some(body) = &mut self.body else { return Ok(0) };
        if body.arrived.is_empty() && !body.bytes.is_empty() {
            let conduct = self.server.state().conduct;
            match conduct {
                Conduct::Stalls(after) if body.sent >= after => {
                    self.server.settle(|conduct| !matches!(conduct, Conduct::Stalls(_))).await;
                }
                Conduct::Starves => {
                    self.server.settle(|conduct| conduct != Conduct::Starves).await;
                }
                Conduct::Cuts(after) if body.sent >= after => return Err(Fault::Broken("cut".into())),
                _ => {}
            }
            let size = if conduct == Conduct::Slow { SLOW / 10 } else { PIECE };
            let piece = body.bytes.split_to(body.bytes.len().min(usize::try_from(size).unwrap()));
            body.sent += piece.len() as u64;
            self.server.send(piece.len() as u64).await;
            body.arrived = piece;
            self.server.settle(|conduct| conduct != Conduct::Blackholed).await;
            if self.server.state().life != self.life {
                return Err(Fault::Broken("reset".into()));
            }
        }
        let part = body.arrived.split_to(body.arrived.len().min(out.len()));
        out[..part.len()].copy_from_slice(&part);
        Ok(part.len())
    }
}

impl Wire for Line {
    fn secure(&mut self) -> Boxed<'_, Result<(), Fault>> {
        Box::pin(self.greet())
    }

    fn ask(&mut self, start: u64, length: u64) -> Boxed<'_, Result<Head, Fault>> {
        Box::pin(self.request(start, length))
    }

    fn next<'a>(&'a mut self, out: &'a mut [u8]) -> Boxed<'a, Result<usize, Fault>> {
        Box::pin(self.more(out))
    }

    fn is_usable(&self) -> bool {
        self.alive().is_ok()
    }
}
