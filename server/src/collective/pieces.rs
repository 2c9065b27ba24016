//! Which piece of a blob is asked for next, when several members send it: in order, a bounded distance ahead of what is on the disk, so that
//! what comes out of order waits in memory. One whose member failed is asked of another; one that takes much longer than the others is asked
//! for once more.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of one piece.
pub(super) const PIECE: u64 = 2 << 20;
/// No piece is asked for that begins further behind what is on the disk: the memory that a blob takes.
const WINDOW: u64 = 8 * PIECE;
/// So many times the average, and at least so long, a piece may take before another member is asked as well. Slow is not dead.
const LATE: (u32, Duration) = (4, Duration::from_secs(2));

/// A piece that is not here.
struct Open {
    since: Instant,
    /// Members that are asked for it.
    askers: u32,
}

/// The pieces of one blob, from where it goes on to its end; `T` is what a piece is.
pub(super) struct Pieces<T> {
    size: u64,
    /// Begin of the first piece that nobody was asked for.
    fresh: u64,
    /// Begin of the first piece that was not [taken](Self::take).
    taken: u64,
    open: BTreeMap<u64, Open>,
    here: BTreeMap<u64, T>,
    /// How long those that came took, all together, and how many they were.
    took: (Duration, u32),
}

impl<T> Pieces<T> {
    /// A blob of `size` bytes, of which those before `from` are here.
    pub(super) fn new(from: u64, size: u64) -> Self {
        Self { size, fresh: from, taken: from, open: BTreeMap::new(), here: BTreeMap::new(), took: (Duration::ZERO, 0) }
    }

    fn range(&self, start: u64) -> Range<u64> {
        start..start.saturating_add(PIECE).min(self.size)
    }

    fn is_late(&self, open: &Open, now: Instant) -> bool {
        let (took, count) = self.took;
        let (times, least) = LATE;
        count > 0 && now.duration_since(open.since) > (took / count * times).max(least)
    }

    /// What a member is to be asked for that has nothing to do.
    pub(super) fn next(&mut self, now: Instant) -> Option<Range<u64>> {
        let failed = self.open.iter().find(|(_, open)| open.askers == 0).map(|(start, _)| *start);
        let fresh = || (self.fresh < self.size && self.fresh < self.taken.saturating_add(WINDOW)).then_some(self.fresh);
        let late = || self.open.iter().find(|(_, open)| open.askers == 1 && self.is_late(open, now));
        let start = failed.or_else(fresh).or_else(|| late().map(|(start, _)| *start))?;
        let range = self.range(start);
        self.fresh = self.fresh.max(range.end);
        let open = self.open.entry(start).or_insert(Open { since: now, askers: 0 });
        if open.askers == 0 {
            open.since = now;
        }
        open.askers += 1;
        Some(range)
    }

    /// The piece that begins there has come; a second time it is no news.
    pub(super) fn came(&mut self, start: u64, piece: T, now: Instant) {
        let Some(open) = self.open.remove(&start) else { return };
        self.took = (self.took.0 + now.duration_since(open.since), self.took.1 + 1);
        self.here.insert(start, piece);
    }

    /// Who was asked for it does not send it.
    pub(super) fn failed(&mut self, start: u64) {
        if let Some(open) = self.open.get_mut(&start) {
            open.askers = open.askers.saturating_sub(1);
        }
    }

    /// The next piece in order, if it is here.
    pub(super) fn take(&mut self) -> Option<(Range<u64>, T)> {
        let piece = self.here.remove(&self.taken)?;
        let range = self.range(self.taken);
        self.taken = range.end;
        Some((range, piece))
    }

    /// Whether all pieces were taken.
    pub(super) fn is_whole(&self) -> bool {
        self.taken == self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn begins<T>(pieces: &mut Pieces<T>, now: Instant) -> Vec<u64> {
        std::iter::from_fn(|| pieces.next(now)).map(|range| range.start / PIECE).collect()
    }

    #[test]
    fn they_are_asked_for_in_order_as_far_as_memory_goes_and_taken_in_order() {
        let now = Instant::now();
        let mut pieces = Pieces::new(0, 20 * PIECE - 1);
        assert_eq!(begins(&mut pieces, now), [0, 1, 2, 3, 4, 5, 6, 7]);
        for (piece, ready) in [(1, 0), (2, 0), (0, 3)] {
            pieces.came(piece * PIECE, piece, now);
            let taken: Vec<_> = std::iter::from_fn(|| pieces.take()).collect();
            assert_eq!(taken.len(), ready, "{piece}");
            assert!(
                taken.iter().all(|(range, piece)| range.start == piece * PIECE && range.end == range.start + PIECE)
            );
        }
        assert_eq!(begins(&mut pieces, now), [8, 9, 10]);
        // The last one is short; one that goes on in the middle of a piece begins there.
        let mut pieces = Pieces::<()>::new(5, PIECE + 7);
        assert_eq!(pieces.next(now), Some(5..PIECE + 5));
        assert_eq!(pieces.next(now), Some(PIECE + 5..PIECE + 7));
        assert_eq!(pieces.next(now), None);
        assert!(!pieces.is_whole());
        assert!(Pieces::<()>::new(7, 7).is_whole());
    }

    #[test]
    fn what_failed_is_asked_of_another_before_anything_else() {
        let now = Instant::now();
        let mut pieces = Pieces::new(0, 4 * PIECE);
        assert_eq!(begins(&mut pieces, now), [0, 1, 2, 3]);
        pieces.failed(2 * PIECE);
        pieces.failed(PIECE);
        assert_eq!(begins(&mut pieces, now), [1, 2]);
        pieces.came(PIECE, (), now);
        pieces.failed(PIECE);
        assert_eq!(begins(&mut pieces, now), [0; 0], "it is here: who was slower with it does not matter");
    }

    #[test]
    fn only_what_is_much_slower_than_the_rest_is_asked_for_twice() {
        let mut now = Instant::now();
        let mut pieces = Pieces::new(0, 3 * PIECE);
        assert_eq!(begins(&mut pieces, now), [0, 1, 2]);
        // As long as none has come, nobody knows what is slow.
        now += 60 * SECOND;
        assert_eq!(begins(&mut pieces, now), [0; 0]);
        pieces.came(PIECE, 1, now);
        assert_eq!(begins(&mut pieces, now + 179 * SECOND), [0; 0]);
        assert_eq!(begins(&mut pieces, now + 181 * SECOND), [0, 2]);
        assert_eq!(begins(&mut pieces, now + 999 * SECOND), [0; 0], "not more often");
        // The first answer counts.
        pieces.came(0, 7, now);
        pieces.came(0, 8, now);
        assert_eq!(pieces.take(), Some((0..PIECE, 7)));
    }

    /// Members that fail, are slow and answer out of order: each byte is taken once, in order.
    #[test]
    fn whatever_members_do_all_comes_once_and_in_order() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (from, size) = (random.u64(0..PIECE), random.u64(PIECE..40 * PIECE));
            let mut pieces = Pieces::new(from, size);
            let (mut now, mut asked, mut next) = (Instant::now(), Vec::new(), from);
            while !pieces.is_whole() {
                now += random.u32(0..3000) * Duration::from_millis(1);
                if random.bool() {
                    asked.extend(pieces.next(now));
                }
                if !asked.is_empty() && random.bool() {
                    let range: Range<u64> = asked.swap_remove(random.usize(0..asked.len()));
                    if random.u8(0..4) == 0 {
                        pieces.failed(range.start);
                    } else {
                        pieces.came(range.start, range.clone(), now);
                    }
                }
                while let Some((range, piece)) = pieces.take() {
                    assert_eq!((&range, range.start), (&piece, next), "seed {seed}");
                    next = range.end;
                }
                assert!(pieces.here.len() <= 8, "seed {seed}");
            }
            assert_eq!(next, size, "seed {seed}");
        }
    }
}
