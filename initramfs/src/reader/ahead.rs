//! Read-ahead: readers that go forward are recognised, and the chunks before them fetched in larger and larger ranges.

use std::ops::Range;

/// Readers that are followed at the same time.
const STREAMS: usize = 8;
/// Chunks of the first read-ahead, in bytes.
const FIRST: u64 = 128 << 10;
/// Largest read-ahead, in bytes.
const LARGEST: u64 = 1 << 20;

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The chunk that the reader would want next.
    next: u64,
    /// Up to where was fetched ahead.
    fetched: u64,
    /// How much to fetch ahead, in chunks; 0: not known to go forward yet.
    window: u64,
    used: u64,
}

pub(super) struct Ahead {
    streams: Vec<Stream>,
    clock: u64,
    first: u64,
    largest: u64,
}

impl Ahead {
    pub(super) fn new(chunk_size: u64) -> Self {
        Self {
            streams: Vec::with_capacity(STREAMS),
            clock: 0,
            first: (FIRST / chunk_size).max(1),
            largest: (LARGEST / chunk_size).max(1),
        }
    }

    /// A reader wants chunks `first` to `last`. Returns what to fetch ahead: nothing, unless it went forward twice in a row.
    pub(super) fn observe(&mut self, first: u64, last: u64) -> Range<u64> {
        self.clock += 1;
        let clock = self.clock;
        let known = self.streams.iter_mut().find(|stream| stream.next == first || stream.next == first + 1);
        let Some(stream) = known else {
            let new = Stream { next: last + 1, fetched: last + 1, window: 0, used: clock };
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
        stream.next = last + 1;
        stream.fetched = stream.fetched.max(stream.next);
        stream.window = if stream.window == 0 { self.first } else { stream.window };
        // Half of what was fetched ahead is still unread: enough.
        if stream.fetched - stream.next > stream.window / 2 {
            return 0..0;
        }
        let from = stream.fetched;
        stream.fetched = stream.next + stream.window;
        stream.window = (stream.window * 2).min(self.largest);
        from..stream.fetched.max(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_goes_forward_gets_growing_ranges_without_gaps() {
        let mut ahead = Ahead::new(64 << 10);
        assert!(ahead.observe(10, 11).is_empty());
        let (mut fetched, mut sizes) = (12, Vec::new());
        for step in 0..40 {
            let first = 12 + step * 2;
            let range = ahead.observe(first, first + 1);
            if !range.is_empty() {
                assert!(range.start <= fetched.max(first + 2), "gap before {range:?}");
                fetched = range.end;
                sizes.push(range.end - range.start);
            }
        }
        assert!(sizes.iter().all(|size| *size <= 16), "{sizes:?}");
        assert!(sizes.iter().any(|size| *size >= 8), "{sizes:?}");
        assert!(fetched > 12 + 40 * 2);
    }

    #[test]
    fn jumping_about_fetches_nothing() {
        let mut ahead = Ahead::new(64 << 10);
        for index in 0..200 {
            assert!(ahead.observe(index * 37 % 1009, index * 37 % 1009).is_empty());
        }
    }

    #[test]
    fn several_readers_do_not_disturb_each_other() {
        let mut ahead = Ahead::new(64 << 10);
        let mut forward = 0;
        for step in 0..20 {
            for reader in 0..4 {
                forward += u64::from(!ahead.observe(reader * 1000 + step, reader * 1000 + step).is_empty());
            }
        }
        assert!(forward >= 8, "{forward}");
    }
}
