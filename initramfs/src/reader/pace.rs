//! How quick a member is: smoothed times, and the 95th percentile of the last requests.

use std::time::Duration;

/// Requests that the percentile is taken of.
const SAMPLES: usize = 64;
/// Fewer say nothing about a percentile.
const FEWEST: usize = 8;
/// What was measured longer ago says nothing of a member.
pub(super) const STALE: Duration = Duration::from_secs(30);
/// A new time counts for this share of the smoothed one.
const WEIGHT: u32 = 8;

/// Times of one member.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// From the request to the first verified chunk.
    first: Option<Duration>,
    /// From chunk to chunk.
    next: Option<Duration>,
    /// The last times to the first chunk, in microseconds, in a ring.
    samples: Vec<u32>,
    at: usize,
    percentile: Option<Duration>,
    /// The longest time after which a request was given up since the last answer.
    silent: Duration,
    /// When something was measured last.
    measured: Duration,
}

fn smooth(old: &mut Option<Duration>, new: Duration) {
    *old = Some(match *old {
        Some(old) => (old * (WEIGHT - 1) + new) / WEIGHT,
        None => new,
    });
}

impl Pace {
    /// The first chunk of an answer took so long.
    pub(super) fn first(&mut self, took: Duration, now: Duration) {
        self.silent = Duration::ZERO;
        self.count(took, now);
    }

    fn count(&mut self, took: Duration, now: Duration) {
        if now.saturating_sub(self.measured) > STALE {
            (self.first, self.next) = (None, None);
        }
        smooth(&mut self.first, took);
        let sample = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        if self.samples.len() < SAMPLES {
            self.samples.push(sample);
        } else {
            self.samples[self.at] = sample;
            self.at = (self.at + 1) % SAMPLES;
        }
        if self.samples.len() >= FEWEST {
            let mut sorted = self.samples.clone();
            let rank = (sorted.len() * 95).div_ceil(100) - 1;
            let (_, sample, _) = sorted.select_nth_unstable(rank);
            self.percentile = Some(Duration::from_micros(u64::from(*sample)));
        }
        self.measured = now;
    }

    /// A further chunk of an answer came after so long.
    pub(super) fn next(&mut self, took: Duration, now: Duration) {
        smooth(&mut self.next, took);
        self.measured = now;
    }

    /// The first chunk was given up after so long: it would have taken longer.
    pub(super) fn gave_up(&mut self, after: Duration, now: Duration) {
        if self.first.is_none_or(|first| after > first) {
            self.silent = self.silent.max(after);
            self.count(after, now);
        }
    }

    /// The time in which the first chunk is to be expected. Of a member that was given up and has not answered since, it is known that it
    /// took longer than that, whatever it took before: else the dead one of two slow members would seem to be the quicker.
    pub(super) fn expected(&self) -> Option<Duration> {
        self.first.map(|first| first.max(self.silent))
    }

    /// The same, unless it is known from long ago only.
    pub(super) fn expected_lately(&self, now: Duration) -> Option<Duration> {
        self.expected().filter(|_| now.saturating_sub(self.measured) <= STALE)
    }

    /// The time in which an answer of so many chunks is to be expected.
    pub(super) fn whole(&self, chunks: u64) -> Option<Duration> {
        let more = u32::try_from(chunks.saturating_sub(1)).unwrap_or(u32::MAX);
        Some(self.first?.saturating_add(self.next.unwrap_or_default().saturating_mul(more)))
    }

    /// The time that 95 of 100 requests need at most; unknown after a few only.
    pub(super) fn percentile(&self) -> Option<Duration> {
        self.percentile
    }

    /// When something was measured last.
    pub(super) fn measured(&self) -> Duration {
        self.measured
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn the_percentile_follows_the_last_requests() {
        let mut pace = Pace::default();
        for _ in 0..7 {
            pace.first(ms(4), ms(0));
        }
        assert_eq!(pace.percentile(), None);
        pace.first(ms(4), ms(0));
        assert_eq!(pace.percentile(), Some(ms(4)));
        for index in 1..=100 {
            pace.first(ms(index), ms(0));
        }
        // The last 64 are 37 to 100: of them 61 are at most 97.
        assert_eq!(pace.percentile(), Some(ms(97)));
    }

    #[test]
    fn what_is_known_from_long_ago_weighs_nothing() {
        let mut pace = Pace::default();
        pace.first(ms(900), ms(0));
        assert_eq!(pace.expected_lately(STALE), Some(ms(900)));
        assert_eq!(pace.expected_lately(STALE + ms(1)), None);
        pace.first(ms(5), STALE + ms(1));
        assert_eq!(pace.expected_lately(STALE + ms(2)), Some(ms(5)));
    }

    #[test]
    fn what_was_given_up_counts_as_slow_and_never_as_quick() {
        let mut pace = Pace::default();
        pace.first(ms(80), ms(0));
        pace.gave_up(ms(10), ms(0));
        assert_eq!(pace.expected(), Some(ms(80)));
        pace.gave_up(ms(400), ms(0));
        assert_eq!(pace.expected(), Some(ms(400)), "it has not answered since");
        pace.first(ms(120), ms(0));
        assert_eq!(pace.expected(), Some(ms(120)));
    }
}
