//! What the reader needs of the world around it: time, tasks, chance, and a way to each server. [`super::https`] and [`super::real`] are
//! the world there is; tests bring one in which time, delays and faults are inputs, so that a run can be repeated from its seed.

use super::fault::Fault;
use bytes::Bytes;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

/// A future whose type nobody has to know.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Time, tasks and chance.
pub trait World: Send + Sync + 'static {
    /// Time since some beginning. Never goes back.
    fn now(&self) -> Duration;
    /// How long ago that was.
    fn since(&self, then: Duration) -> Duration {
        self.now().saturating_sub(then)
    }
    /// Waits.
    fn sleep(&self, time: Duration) -> Boxed<'static, ()>;
    /// Runs a task beside its caller.
    fn spawn(&self, task: Boxed<'static, ()>);
    /// Any number.
    fn random(&self) -> u64;
}

/// The way to the image on one server.
pub trait Path: Send + Sync + 'static {
    /// The image's URL there.
    fn url(&self) -> &str;
    /// A new connection. Dropped before it is done, it is given up.
    fn connect(&self) -> Boxed<'_, Result<Box<dyn Wire>, Fault>>;
}

/// One connection. Dropped, it is closed.
pub trait Wire: Send {
    /// Finds out whether the server is who it should be; comes first, and once.
    fn secure(&mut self) -> Boxed<'_, Result<(), Fault>>;
    /// Asks for `length` bytes of the image from `start`.
    fn ask(&mut self, start: u64, length: u64) -> Boxed<'_, Result<Head, Fault>>;
    /// Puts more bytes of the answer's body into `out`, and returns how many; 0 at its end. What is behind them in `out` may be anything.
    fn next<'a>(&'a mut self, out: &'a mut [u8]) -> Boxed<'a, Result<usize, Fault>>;
    /// Whether the connection can take another request, after the body of the last one.
    fn is_usable(&self) -> bool;
}

/// What an answer says before its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The HTTP status.
    pub status: u16,
    /// `Content-Range`, as it was sent.
    pub content_range: Option<String>,
    /// `ETag`, as it was sent.
    pub etag: Option<Bytes>,
}

/// What `future` gives, unless it takes longer than `limit`.
pub(super) async fn within<T>(world: &dyn World, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut sleep) = (pin!(future), world.sleep(limit));
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => sleep.as_mut().poll(context).map(|()| None),
    })
    .await
}
