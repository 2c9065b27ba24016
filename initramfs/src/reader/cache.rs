//! Verified chunks in memory, within a bound, and the flights that bring more. One flight per chunk: whoever wants a chunk that is
//! already on its way waits for it.

use bytes::Bytes;
use moor_image::ImageError;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tokio::sync::oneshot;

/// What a flight brings: verified plaintext, or the finding that the image itself is bad, whoever serves it.
pub(super) type Landed = Result<Bytes, Arc<ImageError>>;

/// A chunk that was asked for.
pub(super) enum Lookup {
    Cached(Bytes),
    /// On its way.
    Waiting(oneshot::Receiver<Landed>),
    /// Nobody fetches it yet: the caller has to. The receiver tells when it is there.
    Missing(oneshot::Receiver<Landed>),
}

pub(super) struct Cache {
    limit: u64,
    size: u64,
    clock: u64,
    chunks: HashMap<u64, (u64, Bytes)>,
    by_use: BTreeMap<u64, u64>,
    flights: HashMap<u64, Vec<oneshot::Sender<Landed>>>,
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
        if let Some(waiting) = self.flights.get_mut(&chunk) {
            waiting.push(sender);
            return Lookup::Waiting(receiver);
        }
        self.flights.insert(chunk, vec![sender]);
        Lookup::Missing(receiver)
    }

    /// Starts a flight that nobody waits for yet. `false`: the chunk is there or on its way.
    pub(super) fn claim(&mut self, chunk: u64) -> bool {
        if self.chunks.contains_key(&chunk) || self.flights.contains_key(&chunk) {
            return false;
        }
        self.flights.insert(chunk, Vec::new());
        true
    }

    /// A flight ends: what it brought goes to all who wait, and stays when it is good.
    pub(super) fn land(&mut self, chunk: u64, landed: &Landed) {
        for waiting in self.flights.remove(&chunk).unwrap_or_default() {
            // Who went away needs no answer.
            let _ = waiting.send(landed.clone());
        }
        if let Ok(bytes) = landed {
            self.insert(chunk, bytes.clone());
        }
    }

    /// A flight ends without a result (its task was dropped): those who wait start another one.
    pub(super) fn crash(&mut self, chunk: u64) {
        self.flights.remove(&chunk);
    }

    fn insert(&mut self, chunk: u64, bytes: Bytes) {
        self.clock += 1;
        self.size += bytes.len() as u64;
        if let Some((used, old)) = self.chunks.insert(chunk, (self.clock, bytes)) {
            self.by_use.remove(&used);
            self.size -= old.len() as u64;
        }
        self.by_use.insert(self.clock, chunk);
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
    fn one_flight_serves_all_who_wait() {
        let mut cache = Cache::new(100);
        let Lookup::Missing(mut first) = cache.lookup(7) else { panic!("somebody fetches it") };
        let Lookup::Waiting(mut second) = cache.lookup(7) else { panic!("a second flight") };
        assert!(!cache.claim(7));
        cache.land(7, &Ok(chunk(1)));
        assert_eq!(first.try_recv().unwrap().unwrap(), second.try_recv().unwrap().unwrap());
        assert!(!cache.claim(7));
        assert!(cache.claim(8));
    }

    #[test]
    fn a_bad_chunk_is_told_and_not_kept_and_a_lost_flight_is_noticed() {
        let mut cache = Cache::new(100);
        let Lookup::Missing(mut waiting) = cache.lookup(1) else { panic!() };
        cache.land(1, &Err(Arc::new(ImageError::Argument("bad"))));
        assert!(waiting.try_recv().unwrap().is_err());
        let Lookup::Missing(mut waiting) = cache.lookup(1) else { panic!("it was kept") };
        cache.crash(1);
        assert!(waiting.try_recv().is_err());
        assert!(matches!(cache.lookup(1), Lookup::Missing(_)));
    }
}
