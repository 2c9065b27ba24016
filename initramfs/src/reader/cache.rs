//! Verified chunks in memory, within a bound, and the flights that bring more. One flight per chunk: whoever wants a chunk that is
//! already on its way waits for it.
//!
//! What was read least recently goes first. Chunks that earlier boots read and this one is yet to read have up to half of the bound for themselves:
//! what is read on the way to them would else push them out just before their turn, and each would be fetched twice.

use super::class::Ticket;
use bytes::Bytes;
use moor_image::ImageError;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;

/// What a flight brings: verified plaintext, or the finding that the image itself is bad, whoever serves it.
pub(super) type Landed = Result<Bytes, Arc<ImageError>>;

/// A flight that nobody waits for yet, and that has more chunks than this to bring before the one that is wanted now, is not waited for.
const NEAR: u64 = 4;

/// A chunk that was asked for.
pub(super) enum Lookup {
    Cached(Bytes),
    /// On its way.
    Waiting(oneshot::Receiver<Landed>),
    /// Nobody fetches it yet, or not soon: the caller has to, and says so by [`Cache::taken`]. The receiver tells when it is there.
    Missing(oneshot::Receiver<Landed>),
}

pub(super) struct Cache {
    limit: u64,
    size: u64,
    clock: u64,
    chunks: HashMap<u64, Held>,
    /// Chunks by when they were used last.
    by_use: BTreeMap<u64, u64>,
    /// Those that were prefetched and not read yet, by when they came.
    unread: BTreeMap<u64, u64>,
    unread_size: u64,
    flights: HashMap<u64, Coming>,
}

/// A chunk that is there.
struct Held {
    bytes: Bytes,
    /// Its place in one of the two orders.
    at: u64,
    is_unread: bool,
}

/// A chunk on its way.
#[derive(Default)]
struct Coming {
    waiting: Vec<oneshot::Sender<Landed>>,
    /// The flight that brings it.
    ticket: Option<Arc<Ticket>>,
}

impl Cache {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            size: 0,
            clock: 0,
            chunks: HashMap::new(),
            by_use: BTreeMap::new(),
            unread: BTreeMap::new(),
            unread_size: 0,
            flights: HashMap::new(),
        }
    }

    /// Bytes held.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn lookup(&mut self, chunk: u64) -> Lookup {
        if let Some(held) = self.take_out(chunk) {
            let bytes = held.bytes.clone();
            self.put(chunk, held.bytes, false);
            return Lookup::Cached(bytes);
        }
        let (sender, receiver) = oneshot::channel();
        let coming = self.flights.entry(chunk).or_default();
        coming.waiting.push(sender);
        match &coming.ticket {
            Some(ticket) if ticket.is_wanted() || ticket.before(chunk) <= NEAR => {
                ticket.promote();
                Lookup::Waiting(receiver)
            }
            _ => Lookup::Missing(receiver),
        }
    }

    /// Whether a chunk is neither there nor on its way.
    pub(super) fn is_missing(&self, chunk: u64) -> bool {
        !self.chunks.contains_key(&chunk) && !self.flights.contains_key(&chunk)
    }

    /// These chunks are brought by this flight from now on.
    pub(super) fn taken(&mut self, chunks: Range<u64>, ticket: &Arc<Ticket>) {
        for chunk in chunks {
            self.flights.entry(chunk).or_default().ticket = Some(ticket.clone());
        }
    }

    /// A flight ends: what it brought goes to all who wait, and stays when it is good. `is_expected`: it was prefetched, and is yet to be read.
    pub(super) fn land(&mut self, chunk: u64, landed: &Landed, is_expected: bool) {
        let waiting = self.flights.remove(&chunk).unwrap_or_default().waiting;
        let is_unread = is_expected && waiting.is_empty();
        for waiting in waiting {
            // Who went away needs no answer.
            let _ = waiting.send(landed.clone());
        }
        if let Ok(bytes) = landed {
            // Two may have brought it.
            self.take_out(chunk);
            self.put(chunk, bytes.clone(), is_unread);
            self.evict();
        }
    }

    /// A flight ends without a result (its task was dropped): those who wait start another one.
    pub(super) fn crash(&mut self, chunk: u64, ticket: &Arc<Ticket>) {
        let is_its = |coming: &Coming| coming.ticket.as_ref().is_some_and(|held| Arc::ptr_eq(held, ticket));
        if self.flights.get(&chunk).is_some_and(is_its) {
            self.flights.remove(&chunk);
        }
    }

    /// A chunk that is not there, as the last of its order.
    fn put(&mut self, chunk: u64, bytes: Bytes, is_unread: bool) {
        self.clock += 1;
        let length = bytes.len() as u64;
        self.size += length;
        if is_unread {
            self.unread_size += length;
        }
        let order = if is_unread { &mut self.unread } else { &mut self.by_use };
        order.insert(self.clock, chunk);
        self.chunks.insert(chunk, Held { bytes, at: self.clock, is_unread });
    }

    fn take_out(&mut self, chunk: u64) -> Option<Held> {
        let held = self.chunks.remove(&chunk)?;
        let length = held.bytes.len() as u64;
        self.size -= length;
        if held.is_unread {
            self.unread_size -= length;
            self.unread.remove(&held.at);
        } else {
            self.by_use.remove(&held.at);
        }
        Some(held)
    }

    /// The boot is over: what it was expected to read and has not is a chunk like any other, and older than those read since.
    pub(super) fn expect_no_more(&mut self) {
        for chunk in self.unread.values() {
            if let Some(held) = self.chunks.get_mut(chunk) {
                held.is_unread = false;
            }
        }
        self.by_use.append(&mut self.unread);
        self.unread_size = 0;
    }

    /// Bytes that it holds at most.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// It holds no more than so many bytes from now on.
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.limit {
            let (used, unread) = (self.by_use.first_key_value(), self.unread.first_key_value());
            let oldest = if self.unread_size > self.limit / 2 { unread.or(used) } else { used.or(unread) };
            let Some((_, &chunk)) = oldest else { return };
            self.take_out(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::class::Class;
    use super::*;

    fn chunk(byte: u8) -> Bytes {
        Bytes::from(vec![byte; 10])
    }

    #[test]
    fn the_bound_holds_and_the_least_recently_used_goes_first() {
        let mut cache = Cache::new(30);
        for index in 0..3 {
            cache.land(index, &Ok(chunk(0)), false);
        }
        assert!(matches!(cache.lookup(0), Lookup::Cached(_)));
        cache.land(3, &Ok(chunk(3)), false);
        assert_eq!(cache.size(), 30);
        assert!(matches!(cache.lookup(1), Lookup::Missing(_)));
        for index in [0, 2, 3] {
            assert!(matches!(cache.lookup(index), Lookup::Cached(_)), "{index}");
        }
        cache.land(3, &Ok(chunk(4)), false);
        assert_eq!(cache.size(), 30);
    }

    #[test]
    fn a_lower_bound_holds_at_once_and_a_higher_one_later() {
        let mut cache = Cache::new(30);
        for index in 0..3 {
            cache.land(index, &Ok(chunk(0)), false);
        }
        cache.set_limit(15);
        assert_eq!((cache.size(), cache.limit()), (10, 15));
        assert!(matches!(cache.lookup(2), Lookup::Cached(_)), "the last one stays");
        cache.land(3, &Ok(chunk(0)), false);
        assert_eq!(cache.size(), 10);
        cache.set_limit(30);
        cache.land(4, &Ok(chunk(0)), false);
        assert_eq!(cache.size(), 20);
    }

    #[test]
    fn what_was_prefetched_stays_until_it_is_read_in_half_of_the_bound() {
        let mut cache = Cache::new(60);
        let prefetched = |cache: &mut Cache, index| cache.land(index, &Ok(chunk(0)), true);
        let read = |cache: &mut Cache, index| cache.land(index, &Ok(chunk(0)), false);
        let has = |cache: &Cache, indices: &[u64]| indices.iter().all(|index| !cache.is_missing(*index));
        for index in 0..3 {
            prefetched(&mut cache, index);
        }
        for index in 100..120 {
            read(&mut cache, index);
        }
        assert!(has(&cache, &[0, 1, 2, 117, 118, 119]), "they were pushed out by what was read meanwhile");
        assert_eq!(cache.size(), 60);

        // Once read it is like any other.
        assert!(matches!(cache.lookup(0), Lookup::Cached(_)));
        for index in 120..124 {
            read(&mut cache, index);
        }
        assert!(cache.is_missing(0) && has(&cache, &[1, 2]));

        // No more than half of the bound, also when that is lower: the oldest go.
        for index in 10..16 {
            prefetched(&mut cache, index);
        }
        assert!(has(&cache, &[13, 14, 15, 121, 122, 123]));
        assert!([1, 2, 10, 11, 12].iter().all(|index| cache.is_missing(*index)));
        cache.set_limit(20);
        assert!(has(&cache, &[15, 123]));
        assert_eq!(cache.size(), 20);

        // Nobody waits for it any more.
        cache.expect_no_more();
        for index in 130..132 {
            read(&mut cache, index);
        }
        assert!(cache.is_missing(15) && has(&cache, &[130, 131]));
    }

    #[test]
    fn a_prefetch_that_somebody_waits_for_is_read_when_it_lands() {
        let mut cache = Cache::new(20);
        cache.taken(7..8, &flight(Class::Prefetch, 7));
        let Lookup::Waiting(mut waiting) = cache.lookup(7) else { panic!("a second flight") };
        cache.land(7, &Ok(chunk(1)), true);
        assert!(waiting.try_recv().unwrap().is_ok());
        for index in 0..2 {
            cache.land(index, &Ok(chunk(0)), false);
        }
        assert!(cache.is_missing(7));
    }

    fn flight(class: Class, first: u64) -> Arc<Ticket> {
        Arc::new(Ticket::new(class, first))
    }

    #[test]
    fn one_flight_serves_all_who_wait() {
        let mut cache = Cache::new(100);
        let Lookup::Missing(mut first) = cache.lookup(7) else { panic!("somebody fetches it") };
        cache.taken(7..8, &flight(Class::Demand, 7));
        let Lookup::Waiting(mut second) = cache.lookup(7) else { panic!("a second flight") };
        assert!(!cache.is_missing(7) && cache.is_missing(8));
        cache.land(7, &Ok(chunk(1)), false);
        assert_eq!(first.try_recv().unwrap().unwrap(), second.try_recv().unwrap().unwrap());
        assert!(!cache.is_missing(7));
    }

    #[test]
    fn a_guess_that_somebody_waits_for_becomes_a_demand_unless_it_is_far_off() {
        let mut cache = Cache::new(100);
        let guess = flight(Class::Prefetch, 0);
        cache.taken(0..64, &guess);
        assert!(matches!(cache.lookup(40), Lookup::Missing(_)), "40 chunks come before it");
        cache.taken(40..41, &flight(Class::Demand, 40));
        assert!(!guess.is_wanted());
        // The guess ends early: what somebody else brings is still on its way.
        cache.crash(40, &guess);
        assert!(matches!(cache.lookup(40), Lookup::Waiting(_)));
        guess.arrived(1);
        assert!(matches!(cache.lookup(4), Lookup::Waiting(_)));
        assert!(guess.is_wanted());
    }

    #[test]
    fn a_bad_chunk_is_told_and_not_kept_and_a_lost_flight_is_noticed() {
        let mut cache = Cache::new(100);
        let Lookup::Missing(mut waiting) = cache.lookup(1) else { panic!() };
        cache.land(1, &Err(Arc::new(ImageError::Argument("bad"))), false);
        assert!(waiting.try_recv().unwrap().is_err());
        let Lookup::Missing(mut waiting) = cache.lookup(1) else { panic!("it was kept") };
        let lost = flight(Class::Demand, 1);
        cache.taken(1..2, &lost);
        cache.crash(1, &lost);
        assert!(waiting.try_recv().is_err());
        assert!(matches!(cache.lookup(1), Lookup::Missing(_)));
    }
}
