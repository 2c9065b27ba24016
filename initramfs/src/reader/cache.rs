//! Verified chunks in memory, within a bound, and the flights that bring more. One flight per chunk: whoever wants a chunk that is
//! already on its way waits for it.

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
    chunks: HashMap<u64, (u64, Bytes)>,
    by_use: BTreeMap<u64, u64>,
    flights: HashMap<u64, Coming>,
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
        Self { limit, size: 0, clock: 0, chunks: HashMap::new(), by_use: BTreeMap::new(), flights: HashMap::new() }
    }

    /// Bytes held.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn lookup(&mut self, chunk: u64) -> Lookup {
        if let Some((used, bytes)) = self.chunks.get_mut(&chunk) {
            self.clock += 1;
            self.by_use.remove(used);
            self.by_use.insert(self.clock, chunk);
            *used = self.clock;
            return Lookup::Cached(bytes.clone());
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

    /// A flight ends: what it brought goes to all who wait, and stays when it is good.
    pub(super) fn land(&mut self, chunk: u64, landed: &Landed) {
        for waiting in self.flights.remove(&chunk).unwrap_or_default().waiting {
            // Who went away needs no answer.
            let _ = waiting.send(landed.clone());
        }
        if let Ok(bytes) = landed {
            self.insert(chunk, bytes.clone());
        }
    }

    /// A flight ends without a result (its task was dropped): those who wait start another one.
    pub(super) fn crash(&mut self, chunk: u64, ticket: &Arc<Ticket>) {
        let is_its = |coming: &Coming| coming.ticket.as_ref().is_some_and(|held| Arc::ptr_eq(held, ticket));
        if self.flights.get(&chunk).is_some_and(is_its) {
            self.flights.remove(&chunk);
        }
    }

    fn insert(&mut self, chunk: u64, bytes: Bytes) {
        self.clock += 1;
        self.size += bytes.len() as u64;
        if let Some((used, old)) = self.chunks.insert(chunk, (self.clock, bytes)) {
            self.by_use.remove(&used);
            self.size -= old.len() as u64;
        }
        self.by_use.insert(self.clock, chunk);
        self.evict();
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
        while self.size > self.limit
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            if let Some((_, bytes)) = self.chunks.remove(&oldest) {
                self.size -= bytes.len() as u64;
            }
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
            cache.land(index, &Ok(chunk(0)));
        }
        assert!(matches!(cache.lookup(0), Lookup::Cached(_)));
        cache.land(3, &Ok(chunk(3)));
        assert_eq!(cache.size(), 30);
        assert!(matches!(cache.lookup(1), Lookup::Missing(_)));
        for index in [0, 2, 3] {
            assert!(matches!(cache.lookup(index), Lookup::Cached(_)), "{index}");
        }
        cache.land(3, &Ok(chunk(4)));
        assert_eq!(cache.size(), 30);
    }

    #[test]
    fn a_lower_bound_holds_at_once_and_a_higher_one_later() {
        let mut cache = Cache::new(30);
        for index in 0..3 {
            cache.land(index, &Ok(chunk(0)));
        }
        cache.set_limit(15);
        assert_eq!((cache.size(), cache.limit()), (10, 15));
        assert!(matches!(cache.lookup(2), Lookup::Cached(_)), "the last one stays");
        cache.land(3, &Ok(chunk(0)));
        assert_eq!(cache.size(), 10);
        cache.set_limit(30);
        cache.land(4, &Ok(chunk(0)));
        assert_eq!(cache.size(), 20);
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
        cache.land(7, &Ok(chunk(1)));
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
        cache.land(1, &Err(Arc::new(ImageError::Argument("bad"))));
        assert!(waiting.try_recv().unwrap().is_err());
        let Lookup::Missing(mut waiting) = cache.lookup(1) else { panic!("it was kept") };
        let lost = flight(Class::Demand, 1);
        cache.taken(1..2, &lost);
        cache.crash(1, &lost);
        assert!(waiting.try_recv().is_err());
        assert!(matches!(cache.lookup(1), Lookup::Missing(_)));
    }
}
