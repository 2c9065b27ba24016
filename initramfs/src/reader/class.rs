//! How urgent a fetch is, and what waits its turn: guesses yield to what somebody wants.

use super::slots::CONNECTIONS;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

/// Bytes of plaintext of one request that somebody waits for.
pub(super) const DEMAND_RANGE: u64 = 1 << 20;
/// Bytes of all prefetches that run at one time.
const PREFETCH_BYTES: u64 = 4 << 20;
/// The same while there are requests that somebody waits for: what stands before those on the wire has to be short.
const YIELDING_BYTES: u64 = 256 << 10;
/// Bytes that are fetched ahead of readers at one time.
const AHEAD_BYTES: u64 = 4 << 20;
/// Read-aheads that may wait: older ones were overtaken by their readers.
const AHEAD_WAITING: usize = 32;
/// Prefetches side by side.
const PREFETCHES: u64 = 4;
/// Connections to one server that are not for guesses, but for what is wanted.
const WANTED: u64 = 2;

/// From the most urgent down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Somebody waits for it.
    Demand,
    /// A reader goes there.
    Ahead,
    /// Earlier boots read it.
    Prefetch,
}

/// What a flight and those who wait for it share.
#[derive(Debug)]
pub(super) struct Ticket {
    /// Whether somebody waits.
    wanted: std::sync::atomic::AtomicBool,
    /// The next chunk that it brings.
    at: AtomicU64,
    promoted: Notify,
}

impl Ticket {
    pub(super) fn new(class: Class, first: u64) -> Self {
        Self { wanted: (class == Class::Demand).into(), at: AtomicU64::new(first), promoted: Notify::new() }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Somebody waits for it from now on.
    pub(super) fn promote(&self) {
        if !self.wanted.swap(true, Ordering::Relaxed) {
            self.promoted.notify_one();
        }
    }

    /// Ends once it is promoted.
    pub(super) async fn promotion(&self) {
        self.promoted.notified().await;
    }

    /// It begins anew, with this chunk.
    pub(super) fn begins(&self, chunk: u64) {
        self.at.store(chunk, Ordering::Relaxed);
    }

    /// The bytes of this chunk are there; of two that bring them, the first counts.
    pub(super) fn arrived(&self, chunk: u64) {
        self.at.fetch_max(chunk + 1, Ordering::Relaxed);
    }

    /// How many chunks come before this one.
    pub(super) fn before(&self, chunk: u64) -> u64 {
        chunk.saturating_sub(self.at.load(Ordering::Relaxed))
    }
}

/// What runs and what waits.
#[derive(Debug)]
pub(super) struct Lines {
    chunk_size: u64,
    ahead: VecDeque<Range<u64>>,
    demands: u64,
    aheads: u64,
    ahead_bytes: u64,
    prefetches: u64,
    prefetch_bytes: u64,
    /// Guesses side by side, of both kinds.
    guesses: u64,
}

impl Lines {
    pub(super) fn new(chunk_size: u64) -> Self {
        let mut lines = Self {
            chunk_size,
            ahead: VecDeque::new(),
            demands: 0,
            aheads: 0,
            ahead_bytes: 0,
            prefetches: 0,
            prefetch_bytes: 0,
            guesses: 0,
        };
        lines.has_connections(CONNECTIONS);
        lines
    }

    /// A server takes so many connections just now. Where it takes hardly any, guesses have one all the same: nobody may be waiting.
    pub(super) fn has_connections(&mut self, count: u32) {
        self.guesses = u64::from(count).saturating_sub(WANTED).max(1);
    }

    /// A reader goes to these chunks.
    pub(super) fn push(&mut self, chunks: Range<u64>) {
        if !chunks.is_empty() {
            // What was put back may be one more.
            while self.ahead.len() >= AHEAD_WAITING {
                self.ahead.pop_front();
            }
            self.ahead.push_back(chunks);
        }
    }

    /// These chunks are the next ones to fetch ahead: what [`Lines::ahead`] gave had gaps.
    pub(super) fn put_back(&mut self, chunks: Range<u64>) {
        if !chunks.is_empty() {
            self.ahead.push_front(chunks);
        }
    }

    /// Nothing waits to be fetched ahead any more.
    pub(super) fn clear(&mut self) {
        self.ahead.clear();
    }

    /// The next chunks to fetch ahead, if there is room for it.
    pub(super) fn ahead(&mut self) -> Option<Range<u64>> {
        if self.ahead_bytes >= AHEAD_BYTES || self.are_enough() {
            return None;
        }
        let mut chunks = self.ahead.pop_front()?;
        let most = (DEMAND_RANGE / self.chunk_size).max(1);
        if chunks.end - chunks.start > most {
            self.ahead.push_front(chunks.start + most..chunks.end);
            chunks.end = chunks.start + most;
        }
        Some(chunks)
    }

    fn are_enough(&self) -> bool {
        self.aheads + self.prefetches >= self.guesses
    }

    /// How many chunks a prefetch may have now; 0: none now.
    pub(super) fn prefetch(&self) -> u64 {
        let yields = self.demands > 0 || self.ahead_bytes > 0;
        let most = if yields { YIELDING_BYTES } else { PREFETCH_BYTES };
        if self.prefetches >= PREFETCHES || self.prefetch_bytes >= most || self.are_enough() {
            return 0;
        }
        ((most - self.prefetch_bytes).min(DEMAND_RANGE) / self.chunk_size).max(1)
    }

    pub(super) fn begins(&mut self, class: Class, chunks: u64) {
        match class {
            Class::Demand => self.demands += 1,
            Class::Ahead => {
                self.aheads += 1;
                self.ahead_bytes += chunks * self.chunk_size;
            }
            Class::Prefetch => {
                self.prefetches += 1;
                self.prefetch_bytes += chunks * self.chunk_size;
            }
        }
    }

    pub(super) fn ends(&mut self, class: Class, chunks: u64) {
        match class {
            Class::Demand => self.demands -= 1,
            Class::Ahead => {
                self.aheads -= 1;
                self.ahead_bytes -= chunks * self.chunk_size;
            }
            Class::Prefetch => {
                self.prefetches -= 1;
                self.prefetch_bytes -= chunks * self.chunk_size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetches_yield_and_read_ahead_is_bounded() {
        let mut lines = Lines::new(64 << 10);
        assert_eq!(lines.prefetch(), 16);
        lines.begins(Class::Demand, 1);
        assert_eq!(lines.prefetch(), 4);
        lines.begins(Class::Prefetch, 1);
        assert_eq!(lines.prefetch(), 3);
        lines.begins(Class::Prefetch, 3);
        assert_eq!(lines.prefetch(), 0);
        lines.ends(Class::Demand, 1);
        assert_eq!(lines.prefetch(), 16);
        lines.begins(Class::Prefetch, 16);
        lines.begins(Class::Prefetch, 16);
        assert_eq!(lines.prefetch(), 0, "four are enough");
        for chunks in [1, 3, 16, 16] {
            lines.ends(Class::Prefetch, chunks);
        }
        lines.push(0..100);
        for part in [0..16, 16..32, 32..48, 48..64] {
            assert_eq!(lines.ahead(), Some(part));
            lines.begins(Class::Ahead, 16);
        }
        assert_eq!(lines.ahead(), None);
        lines.ends(Class::Ahead, 16);
        assert_eq!(lines.ahead(), Some(64..80));
    }

    #[test]
    fn short_guesses_leave_connections_for_what_is_wanted() {
        let mut lines = Lines::new(64 << 10);
        for index in 0..10 {
            lines.push(index * 100..index * 100 + 1);
        }
        lines.begins(Class::Prefetch, 1);
        let begun = std::iter::from_fn(|| {
            lines.ahead()?;
            lines.begins(Class::Ahead, 1);
            Some(())
        });
        assert_eq!(begun.count(), 5);
        assert_eq!(lines.prefetch(), 0);
        lines.ends(Class::Prefetch, 1);
        assert!(lines.prefetch() > 0 && lines.ahead().is_some());
        // Where the server takes fewer, so do they; and never none.
        lines.has_connections(4);
        assert!(lines.prefetch() == 0 && lines.ahead().is_none());
        for _ in 0..5 {
            lines.ends(Class::Ahead, 1);
        }
        lines.has_connections(1);
        assert!(lines.ahead().is_some());
        lines.begins(Class::Ahead, 1);
        assert!(lines.ahead().is_none());
    }

    #[test]
    fn old_read_ahead_gives_way() {
        let mut lines = Lines::new(64 << 10);
        for index in 0..100 {
            lines.push(index * 100..index * 100 + 1);
        }
        assert_eq!(lines.ahead(), Some(6800..6801));
        // Also where the rest of one, and what had gaps, were put back.
        lines.push(0..100);
        for index in 0..100 {
            lines.put_back(index..index + 1);
            lines.push(index * 100..index * 100 + 1);
            assert_eq!(lines.ahead.len(), AHEAD_WAITING);
        }
    }
}
