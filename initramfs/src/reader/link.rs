//! Requests to one server: connections that are kept, the time limits, and the rules of an answer.

use super::fault::Fault;
use super::slots::{Asked, Slot, Slots};
use super::world::{Head, Path, Wire, World, within};
use bytes::Bytes;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

/// Connections that are kept when nothing is asked for a while: the next burst begins without a handshake.
const KEPT: usize = 2;
/// A connection that has rested longer is closed, unless it is one of those.
const RESTED_LONG: Duration = Duration::from_secs(20);
/// Time for a TCP connection, and after which another one is begun beside it where there is more time.
const CONNECT: Duration = Duration::from_secs(1);
/// So many that are not answered stand side by side.
const HELLOS: usize = 4;
/// Time without a byte.
const SILENCE: Duration = Duration::from_secs(2);

struct Rested {
    wire: Box<dyn Wire>,
    since: Duration,
}

/// The way to one server.
pub(super) struct Link {
    path: Box<dyn Path>,
    world: Arc<dyn World>,
    idle: Mutex<Vec<Rested>>,
    slots: Slots,
}

/// How long the slowest step of a request took, as a share of its time limit without patience.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slowness(f32);

impl Slowness {
    #[cfg(test)]
    pub(super) fn of(share: f32) -> Self {
        Self(share)
    }

    fn note(&mut self, took: Duration, limit: Duration) {
        self.0 = self.0.max(took.as_secs_f32() / limit.as_secs_f32());
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
    /// Length of the whole file, as the server says.
    pub(super) total: u64,
    pub(super) etag: Option<Bytes>,
    wire: Box<dyn Wire>,
    world: Arc<dyn World>,
    left: u64,
    patience: u32,
    slowness: Slowness,
    asked: Asked,
    _slot: Slot,
}

impl Link {
    pub(super) fn new(path: Box<dyn Path>, world: Arc<dyn World>) -> Self {
        Self { path, world: world.clone(), idle: Mutex::new(Vec::new()), slots: Slots::new(world) }
    }

    pub(super) fn url(&self) -> &str {
        self.path.url()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Rested>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connections that rest: after a fault they are not to be trusted either.
    pub(super) fn forget_connections(&self) {
        self.idle().clear();
        self.slots.begin_anew();
    }

    /// Waits until one more connection may be used.
    pub(super) async fn turn(&self) -> Result<Slot, Fault> {
        self.slots.turn().await
    }

    /// How many connections may be used side by side just now.
    pub(super) fn side_by_side(&self) -> u32 {
        self.slots.count()
    }

    /// Asks for `length` bytes from `start`. `patience` multiplies the time limits.
    pub(super) async fn get(&self, slot: Slot, start: u64, length: u64, patience: u32) -> Result<Answer, Fault> {
        let mut slowness = Slowness::default();
        loop {
            // The one that was used last: it is the least likely to have been closed meanwhile.
            let rested = self.idle().pop();
            let is_rested = rested.is_some();
            let mut wire = match rested {
                Some(rested) => rested.wire,
                None => match self.connect(patience, &mut slowness).await {
                    Ok(wire) => wire,
                    // Another one has become free meanwhile.
                    Err(fault) if fault.is_of_a_connection() && !self.idle().is_empty() => continue,
                    Err(fault) if fault.is_of_a_connection() && self.slots.deliver() => {
                        self.slots.do_without(slot);
                        return Err(Fault::Crowded(Box::new(fault)));
                    }
                    Err(fault) => return Err(fault),
                },
            };
            let limit = SILENCE * patience;
            let (begun, asked) = (self.world.now(), self.slots.ask());
            let head = within(&*self.world, limit, wire.ask(start, length)).await.unwrap_or(Err(Fault::Silent(limit)));
            match head {
                Ok(head) if is_rested && head.status == 408 => {}
                Ok(head) => {
                    slowness.note(self.world.since(begun), SILENCE);
                    let total = check_head(&head, start, length)?;
                    return Ok(Answer {
                        total,
                        etag: head.etag,
                        wire,
                        world: self.world.clone(),
                        left: length,
                        patience,
                        slowness,
                        asked,
                        _slot: slot,
                    });
                }
                // The server may close a connection that rests at any time: that is not its fault, however it says so (RFC 9110 §15.5.9).
                Err(Fault::Broken(_) | Fault::Tls(_)) if is_rested => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    async fn connect(&self, patience: u32, slowness: &mut Slowness) -> Result<Box<dyn Wire>, Fault> {
        let (mut wire, took) = self.reach(CONNECT * patience).await?;
        slowness.note(took, CONNECT);
        let (begun, limit) = (self.world.now(), SILENCE * patience);
        within(&*self.world, limit, wire.secure()).await.unwrap_or(Err(Fault::Silent(limit)))?;
        slowness.note(self.world.since(begun), SILENCE);
        Ok(wire)
    }

    /// A TCP connection, and how long it took. The kernel says "hello" again at pauses that double, whether or not the server is back meanwhile: so each
    /// second it is said anew, on a connection of its own, and the first one that is answered counts.
    async fn reach(&self, limit: Duration) -> Result<(Box<dyn Wire>, Duration), Fault> {
        let begun = self.world.now();
        let mut tried = VecDeque::new();
        loop {
            let left = limit.saturating_sub(self.world.since(begun));
            if left.is_zero() {
                return Err(Fault::Unreachable(limit));
            }
            if tried.len() == HELLOS {
                tried.pop_front();
            }
            tried.push_back((self.path.connect(), self.world.now()));
            let answered = poll_fn(|context| {
                for (connected, since) in &mut tried {
                    if let Poll::Ready(result) = connected.as_mut().poll(context) {
                        return Poll::Ready(result.map(|wire| (wire, *since)));
                    }
                }
                Poll::Pending
            });
            if let Some(answered) = within(&*self.world, CONNECT.min(left), answered).await {
                return answered.map(|(wire, since)| (wire, self.world.since(since)));
            }
        }
    }

    /// Gives up what was kept for more requests at a time than there are any more.
    pub(super) fn trim(&self) {
        trim(&mut self.idle(), self.world.now(), KEPT);
    }

    /// Takes an answer back whose body was read to its end, so that its connection serves the next request.
    pub(super) fn keep(&self, answer: Answer) {
        if answer.left > 0 || !answer.wire.is_usable() {
            return;
        }
        let now = self.world.now();
        let mut idle = self.idle();
        trim(&mut idle, now, KEPT - 1);
        idle.push(Rested { wire: answer.wire, since: now });
    }
}

/// Gives up connections that have rested long, but for so many.
fn trim(idle: &mut Vec<Rested>, now: Duration, most: usize) {
    // The oldest stand first.
    while idle.len() > most
        && let Some(oldest) = idle.first()
        && now.saturating_sub(oldest.since) > RESTED_LONG
    {
        idle.remove(0);
    }
}

impl Answer {
    pub(super) fn slowness(&self) -> Slowness {
        self.slowness
    }

    /// The next bytes of the body, as many as `out` has room for, in `out`. `count` is told how many bytes came, also when they are not enough.
    pub(super) async fn take(&mut self, mut out: Vec<u8>, mut count: impl FnMut(u64)) -> Result<Vec<u8>, Fault> {
        let mut filled = 0;
        while filled < out.len() {
            let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(out.len() - filled);
            let (begun, limit) = (self.world.now(), SILENCE * self.patience);
            let got = within(&*self.world, limit, self.wire.next(&mut out[filled..filled + most])).await;
            let got = got.unwrap_or(Err(Fault::Silent(limit)))?.min(most);
            self.slowness.note(self.world.since(begun), SILENCE);
            if got == 0 {
                return Err(Fault::Broken("the answer ended early".into()));
            }
            self.asked.heard();
            count(got as u64);
            filled += got;
            self.left = self.left.saturating_sub(got as u64);
        }
        Ok(out)
    }
}

/// Status and Content-Range of an answer to a request for `length` bytes from `start`. Returns the length of the file.
fn check_head(head: &Head, start: u64, length: u64) -> Result<u64, Fault> {
    match head.status {
        206 => {}
        200 => return Err(Fault::NoRanges),
        416 => {
            // The file ends before the range: say how long it is, when the server tells.
            let actual = head.content_range.as_deref().and_then(|text| text.strip_prefix("bytes */")?.parse().ok());
            return Err(Fault::Length { expected: start + length, actual: actual.unwrap_or(0) });
        }
        status => return Err(Fault::Status(status)),
    }
    let text = head.content_range.as_deref().unwrap_or("no Content-Range");
    let (first, last, total) = parse_content_range(text).ok_or_else(|| Fault::OtherRange(text.to_owned()))?;
    if first == start && last < start + length - 1 && total == last + 1 {
        return Err(Fault::Length { expected: start + length, actual: total });
    }
    if first != start || last != start + length - 1 {
        return Err(Fault::OtherRange(text.to_owned()));
    }
    Ok(total)
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110 §14.4).
fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (first.parse().ok()?, last.parse().ok()?, total.parse().ok()?);
    (first <= last && last < total).then_some((first, last, total))
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
