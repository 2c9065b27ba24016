//! What is fetched when: what somebody wants at once, what is guessed as far as there is room beside it. Each chunk comes in one flight, neighbours
//! in one range.

use super::attempt::{Item, Need};
use super::cache::{Cache, Landed, Lookup};
use super::class::{Class, DEMAND_RANGE, Ticket};
use super::flight::{Flight, Run};
use super::{BUDGET, BUDGET_UNIT, Inner, ReadError, lock, millis};
use bytes::Bytes;
use moor_image::{LEAVES_PER_PAGE, LeafPage};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::oneshot;

impl Inner {
    /// Looks chunks `first` to `last` up, and starts flights for what is missing and for what is likely to be wanted next.
    pub(super) fn order(self: &Arc<Self>, first: u64, last: u64) -> Vec<Lookup> {
        let now = self.world.now();
        self.read_at.store(millis(now), Ordering::Relaxed);
        if self.is_at_rest.swap(false, Ordering::Relaxed) {
            self.keep();
        }
        lock(&self.trace).wanted(first, last, now);
        let ahead = if self.is_short() { 0..0 } else { self.guess(first, last) };
        let mut missing = Vec::new();
        let mut lookups = Vec::new();
        let runs: Vec<_> = {
            let mut cache = lock(&self.cache);
            for chunk in first..=last {
                let lookup = cache.lookup(chunk);
                if matches!(lookup, Lookup::Missing(_)) {
                    missing.push(chunk);
                }
                lookups.push(lookup);
            }
            self.take(&mut cache, Class::Demand, &missing)
        };
        for (run, ticket) in runs {
            self.launch(Class::Demand, run, ticket);
        }
        lock(&self.prefetch).wanted(first, last);
        lock(&self.lines).push(ahead.start.max(last + 1)..ahead.end.min(self.verifier.header().chunks));
        self.pump();
        lookups
    }

    /// What to fetch ahead of somebody who wants chunks `first` to `last`. While it boots, a list of what earlier boots read knows better than
    /// any guess where they stopped.
    fn guess(&self, first: u64, last: u64) -> Range<u64> {
        let end = if self.is_booting() { lock(&self.prefetch).end(first, last) } else { None };
        lock(&self.ahead).observe(first, last, end.unwrap_or(u64::MAX))
    }

    /// Joins chunks into runs, each with a ticket of its own, and says that they are on their way.
    fn take(&self, cache: &mut Cache, class: Class, chunks: &[u64]) -> Vec<(Range<u64>, Arc<Ticket>)> {
        let with_ticket = |run: Range<u64>| {
            let ticket = Arc::new(Ticket::new(class, run.start));
            cache.taken(run.clone(), &ticket);
            (run, ticket)
        };
        runs(chunks, self.verifier.header().chunk_size()).into_iter().map(with_ticket).collect()
    }

    /// Fetches a run, in a task of its own.
    fn launch(self: &Arc<Self>, class: Class, run: Range<u64>, ticket: Arc<Ticket>) {
        let chunks = run.end - run.start;
        lock(&self.lines).begins(class, chunks);
        let place = Place { inner: self.clone(), class, chunks };
        let run = Run { inner: self.clone(), class, ticket, left: run };
        self.world.spawn(Box::pin(async move {
            let inner = place.inner.clone();
            let units = u32::try_from((chunks * inner.verifier.header().chunk_size()).min(BUDGET) / BUDGET_UNIT);
            // Guesses are bounded by their lines, and must not hold up what is wanted.
            let budget = match class {
                Class::Demand => Some(inner.budget.acquire_many(units.unwrap_or(1)).await),
                Class::Ahead | Class::Prefetch => None,
            };
            run.fly().await;
            drop(budget);
            drop(place);
            inner.pump();
        }));
    }

    /// Starts what may be fetched without anybody waiting for it, as far as there is room.
    pub(super) fn pump(self: &Arc<Self>) {
        // While nothing is served, guesses would only stand in the way of what is wanted.
        while !self.fleet.is_down() && !self.is_short() {
            let (class, chunks) = {
                let mut lines = lock(&self.lines);
                lines.has_connections(self.fleet.side_by_side());
                match lines.ahead() {
                    Some(chunks) => (Class::Ahead, chunks),
                    None => match lock(&self.prefetch).take(lines.prefetch()) {
                        Some(chunks) => (Class::Prefetch, chunks),
                        None => return,
                    },
                }
            };
            let (runs, rest) = {
                let mut cache = lock(&self.cache);
                let end = chunks.end;
                let is_missing = |chunk: &u64| cache.is_missing(*chunk);
                // One run: each takes a connection, and only one is known to be free.
                let missing: Vec<_> = chunks.skip_while(|chunk| !is_missing(chunk)).take_while(is_missing).collect();
                let rest = missing.last().map_or(end, |last| last + 1)..end;
                (self.take(&mut cache, class, &missing), rest)
            };
            lock(&self.lines).put_back(rest);
            for (run, ticket) in runs {
                self.launch(class, run, ticket);
            }
        }
    }

    /// Waits for a chunk. A flight that was lost is started once more.
    pub(super) async fn arrive(self: &Arc<Self>, chunk: u64, lookup: Lookup) -> Result<Bytes, ReadError> {
        let mut lookup = lookup;
        loop {
            let receiver: oneshot::Receiver<Landed> = match lookup {
                Lookup::Cached(bytes) => return Ok(bytes),
                Lookup::Waiting(receiver) | Lookup::Missing(receiver) => receiver,
            };
            if let Ok(landed) = receiver.await {
                return landed.map_err(ReadError::Bad);
            }
            let runs = {
                let mut cache = lock(&self.cache);
                lookup = cache.lookup(chunk);
                let missing = if matches!(lookup, Lookup::Missing(_)) { vec![chunk] } else { Vec::new() };
                self.take(&mut cache, Class::Demand, &missing)
            };
            for (run, ticket) in runs {
                self.launch(Class::Demand, run, ticket);
            }
        }
    }

    /// A page of leaf hashes, from memory or from any member. Waits as long as none serves it.
    pub(super) async fn page(self: &Arc<Self>, index: u64) -> Arc<LeafPage> {
        if let Some(page) = lock(&self.table).get(index) {
            return page;
        }
        let _flight = self.table_flight.lock().await;
        if let Some(page) = lock(&self.table).get(index) {
            return page;
        }
        let mut flight = Flight::new(self.clone(), Arc::new(Ticket::new(Class::Demand, 0)));
        loop {
            if let Item::Page(page) = flight.next(&Need::Page(index)).await {
                lock(&self.table).insert(page.clone());
                return page;
            }
        }
    }
}

/// A fetch's place in its line, as long as it lasts.
struct Place {
    inner: Arc<Inner>,
    class: Class,
    chunks: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.inner.lines).ends(self.class, self.chunks);
    }
}

/// Joins chunks (in ascending order) into ranges of at most [`DEMAND_RANGE`] bytes that stay within one page of the table.
fn runs(chunks: &[u64], chunk_size: u64) -> Vec<Range<u64>> {
    let longest = (DEMAND_RANGE / chunk_size).max(1);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &chunk in chunks {
        match runs.last_mut() {
            Some(run) if run.end == chunk && run.end - run.start < longest && chunk % LEAVES_PER_PAGE != 0 => {
                run.end += 1;
            }
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_chunks_join_into_ranges() {
        let size = 64 << 10;
        assert_eq!(runs(&[], size), []);
        assert_eq!(runs(&[1, 2, 3, 5], size), [1..4, 5..6]);
        assert_eq!(runs(&(0..40).collect::<Vec<_>>(), size), [0..16, 16..32, 32..40]);
        assert_eq!(runs(&[2046, 2047, 2048], size), [2046..2048, 2048..2049]);
        assert_eq!(runs(&[0, 1], 1 << 20), [0..1, 1..2]);
    }
}
