//! How many connections to one server are used side by side. A server that takes no more of them has not failed while those that there are deliver: what it
//! refuses then is done without for a while, and who wanted it waits its turn.

use super::attempt::Moment;
use super::fault::Fault;
use super::world::{World, within};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Connections to one server at most.
pub(super) const CONNECTIONS: u32 = 8;
/// One that was refused is tried again after so long, of several one after the other.
const DONE_WITHOUT: Duration = Duration::from_secs(5);
/// A connection that was asked for something, or has sent something, in this time is one that delivers.
const DELIVERS: Duration = Duration::from_secs(1);

/// Counts something as long as it lives.
pub(super) struct Counted(Arc<AtomicU32>);

impl Counted {
    pub(super) fn new(counter: &Arc<AtomicU32>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The places for connections to one server.
pub(super) struct Slots {
    world: Arc<dyn World>,
    free: Arc<Semaphore>,
    /// Places that are done without.
    refused: Arc<AtomicU32>,
    /// Requests that were sent, and whose answers are not there yet.
    asked: Arc<AtomicU32>,
    /// When one of them was sent last, or a part of an answer came.
    heard: Arc<Moment>,
    /// Places that are done without are tried at once.
    again: Arc<Notify>,
}

/// A place for one connection.
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
}

/// A request that was sent, until its answer is there.
pub(super) struct Asked {
    heard: Arc<Moment>,
    world: Arc<dyn World>,
    _counted: Counted,
}

impl Asked {
    /// A part of the answer came.
    pub(super) fn heard(&self) {
        self.heard.set(self.world.now());
    }
}

impl Slots {
    pub(super) fn new(world: Arc<dyn World>) -> Self {
        Self {
            world,
            free: Arc::new(Semaphore::new(CONNECTIONS as usize)),
            refused: Arc::default(),
            asked: Arc::default(),
            heard: Arc::new(Moment::new(Duration::ZERO)),
            again: Arc::default(),
        }
    }

    /// Waits for a place.
    pub(super) async fn turn(&self) -> Result<Slot, Fault> {
        let permit = self.free.clone().acquire_owned().await;
        permit.map(|permit| Slot { _permit: permit }).map_err(|_| Fault::Broken("the reader ends".into()))
    }

    /// A request is sent.
    pub(super) fn ask(&self) -> Asked {
        let asked = Asked { heard: self.heard.clone(), world: self.world.clone(), _counted: Counted::new(&self.asked) };
        asked.heard();
        asked
    }

    /// How many may be used side by side just now.
    pub(super) fn count(&self) -> u32 {
        CONNECTIONS.saturating_sub(self.refused.load(Ordering::Relaxed)).max(1)
    }

    /// Whether a connection delivers.
    pub(super) fn deliver(&self) -> bool {
        self.asked.load(Ordering::Relaxed) > 0 && self.world.since(self.heard.get()) < DELIVERS
    }

    /// Nobody has this place for a while. Since others deliver, and have theirs, one at least stays.
    pub(super) fn do_without(&self, slot: Slot) {
        let refused = Counted::new(&self.refused);
        let rest = DONE_WITHOUT * self.refused.load(Ordering::Relaxed);
        let (world, again) = (self.world.clone(), self.again.clone().notified_owned());
        self.world.spawn(Box::pin(async move {
            // Ended early or not, it is over.
            let _ = within(&*world, rest, again).await;
            drop((slot, refused));
        }));
    }

    /// The server has failed, and nothing that it refused before says anything of how it is once it is back.
    pub(super) fn begin_anew(&self) {
        self.again.notify_waiters();
    }
}
