//! Read-ahead: readers that go forward are recognised, and the chunks before them fetched in larger and larger ranges.
//!
//! What is fetched ahead is never more than half of what the reader has read in a row, so that what turns out to be a guess too many
//! is a small part of all: a boot reads thousands of short runs, and a fixed first window fetched twice of what it needed.

use super::class::DEMAND_RANGE;
use std::ops::Range;

/// Readers that are followed at the same time.
const STREAMS: usize = 16;
/// Largest read-ahead, in bytes.
const LARGEST: u64 = 4 << 20;
/// More is fetched ahead once there is room for so much, in bytes: one request, so that requests follow one another without a pause.
const STEP: u64 = DEMAND_RANGE;
/// One chunk ahead for so many in a row.
const SHARE: u64 = 2;

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The chunk that the reader would want next.
    next: u64,
    /// Up to where was fetched ahead.
    fetched: u64,
    /// Chunks that it has read in a row.
    row: u64,
    used: u64,
}

pub(super) struct Ahead {
    streams: Vec<Stream>,
    clock: u64,
    largest: u64,
    step: u64,
}

impl Ahead {
    pub(super) fn new(chunk_size: u64) -> Self {
        let chunks = |bytes: u64| (bytes / chunk_size).max(1);
        Self { streams: Vec::with_capacity(STREAMS), clock: 0, largest: chunks(LARGEST), step: chunks(STEP) }
    }

    /// A reader wants chunks `first` to `last`. Returns what to fetch ahead: nothing, unless it goes forward, and nothing from chunk `end` on.
    pub(super) fn observe(&mut self, first: u64, last: u64, end: u64) -> Range<u64> {
        self.clock += 1;
        let clock = self.clock;
        let known = self.streams.iter_mut().find(|stream| stream.next == first || stream.next == first + 1);
        let Some(stream) = known else {
            let new = Stream { next: last + 1, fetched: last + 1, row: last + 1 - first, used: clock };
            if self.streams.len() < STREAMS {
                self.streams.push(new);
            } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
                *oldest = new;
            }
            return 0..0;
        };
        stream.used = clock;
        if last < stream.next {
            // Once more within the same chunk: no step forward.
            return 0..0;
        }
        stream.row += last + 1 - stream.next;
        stream.next = last + 1;
        stream.fetched = stream.fetched.max(stream.next);
        let window = (stream.row / SHARE).min(self.largest);
        // What is fetched ahead and unread is enough; of a short run half of it.
        if stream.fetched - stream.next > window - window.div_ceil(2).min(self.step) {
            return 0..0;
        }
        let from = stream.fetched;
        stream.fetched = (stream.next + window).min(end).max(from);
        from..stream.fetched
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The read-ahead ends nowhere.
    const ANYWHERE: u64 = u64::MAX;

    #[test]
    fn a_reader_that_goes_forward_gets_growing_ranges_without_gaps() {
        let mut ahead = Ahead::new(64 << 10);
        assert!(ahead.observe(10, 11, ANYWHERE).is_empty());
        let (mut fetched, mut sizes) = (12, Vec::new());
        for step in 0..40 {
            let first = 12 + step * 2;
            let range = ahead.observe(first, first + 1, ANYWHERE);
            if !range.is_empty() {
                assert!(range.start <= fetched.max(first + 2), "gap before {range:?}");
                fetched = range.end;
                sizes.push(range.end - range.start);
            }
        }
        assert!(sizes.iter().all(|size| *size <= 64), "{sizes:?}");
        assert!(sizes.iter().any(|size| *size >= 16), "{sizes:?}");
        assert!(fetched > 12 + 40 * 2);
    }

    #[test]
    fn a_reader_that_stops_leaves_at_most_half_as_much_unread_as_it_has_read() {
        for length in 1..200 {
            let mut ahead = Ahead::new(64 << 10);
            let fetched = (0..length)
                .map(|chunk| ahead.observe(chunk, chunk, ANYWHERE))
                .fold(length, |end, range| end.max(range.end));
            assert!((fetched - length) * 2 <= length, "{fetched} for {length}");
        }
    }

    #[test]
    fn jumping_about_fetches_nothing() {
        let mut ahead = Ahead::new(64 << 10);
        for index in 0..200 {
            assert!(ahead.observe(index * 37 % 1009, index * 37 % 1009, ANYWHERE).is_empty());
        }
    }

    #[test]
    fn several_readers_do_not_disturb_each_other() {
        let mut ahead = Ahead::new(64 << 10);
        let mut forward = 0;
        for step in 0..20 {
            for reader in 0..4 {
                forward += u64::from(!ahead.observe(reader * 1000 + step, reader * 1000 + step, ANYWHERE).is_empty());
            }
        }
        assert!(forward >= 8, "{forward}");
    }
    #[test]
    fn nothing_is_fetched_beyond_the_end_and_what_was_left_out_is_caught_up_with() {
        let mut ahead = Ahead::new(64 << 10);
        for chunk in 0..20 {
            let range = ahead.observe(chunk, chunk, 20);
            assert!(range.is_empty() || range.end <= 20, "{range:?}");
        }
        let range = ahead.observe(20, 20, ANYWHERE);
        assert!(range.start == 21 && range.end > 25, "{range:?}");
    }
}
