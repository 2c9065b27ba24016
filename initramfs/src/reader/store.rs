//! Chunks that somebody keeps over restarts, as they were sealed: each is verified when it comes back, like one from a server.

use super::class::Class;
use super::flight::Run;
use super::world::{Boxed, within};
use super::{Landed, lock};
use moor_image::{Header, ImageError, LeafPage};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A disk that takes longer is worse than the network.
const LIMIT: Duration = Duration::from_secs(1);

/// Keeps sealed chunks of one image. What it returns is believed by nobody.
pub trait Store: Send + Sync + 'static {
    /// Whether it says that it has a chunk.
    fn has(&self, chunk: u64) -> bool;
    /// The sealed bytes of a chunk; `None`: it has not.
    fn read(&self, chunk: u64, length: usize) -> Boxed<'static, Option<Vec<u8>>>;
    /// What it returned for a chunk was something else.
    fn was_bad(&self, chunk: u64);
    /// It keeps its readers waiting.
    fn was_late(&self);
    /// Takes a chunk that was verified. Must not wait.
    fn keep(&self, chunk: u64, sealed: Vec<u8>);
}

/// Finds the store for an image once its header is known; `None`: there is none.
#[derive(Clone)]
pub struct FindStore(pub Arc<Find>);

/// How it is found.
pub type Find = dyn Fn(&Header) -> Option<Arc<dyn Store>> + Send + Sync;

impl fmt::Debug for FindStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FindStore")
    }
}

impl Run {
    /// The end of what has to be fetched from its first chunk on, before the store has one again.
    pub(super) fn missing(&self) -> u64 {
        let Some(store) = &self.inner.store else { return self.left.end };
        (self.left.start + 1..self.left.end).find(|chunk| store.has(*chunk)).unwrap_or(self.left.end)
    }

    /// Its next chunk from the store, if that has it and it verifies.
    pub(super) async fn stored(&self, page: &LeafPage) -> Option<(u64, Landed)> {
        let store = self.inner.store.as_ref()?;
        let chunk = self.left.start;
        if !store.has(chunk) {
            return None;
        }
        let (_, length) = self.inner.verifier.chunk_range(chunk)?;
        let read = store.read(chunk, usize::try_from(length).ok()?);
        let Some(read) = within(&*self.inner.world, LIMIT, read).await else {
            store.was_late();
            return None;
        };
        let mut bytes = read?;
        match self.inner.verifier.open_chunk(chunk, page, &mut bytes) {
            Ok(()) => Some((chunk, Ok(bytes.into()))),
            Err(error @ ImageError::Forged { .. }) => Some((chunk, Err(Arc::new(error)))),
            Err(_) => {
                store.was_bad(chunk);
                None
            }
        }
    }

    /// A chunk is there.
    pub(super) fn lands(&mut self, chunk: u64, landed: &Landed) {
        self.ticket.arrived(chunk);
        if self.class == Class::Prefetch {
            self.inner.counts.prefetched.fetch_add(1, Ordering::Relaxed);
        }
        let is_expected = self.class == Class::Prefetch && lock(&self.inner.prefetch).expects(chunk);
        lock(&self.inner.cache).land(chunk, landed, is_expected);
        self.left.start = chunk + 1;
    }
}
