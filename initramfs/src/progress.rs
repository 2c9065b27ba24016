//! How far an image is that comes as a whole, and how long the rest will take.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What came in this time says how long the rest will take.
const WINDOW: Duration = Duration::from_secs(30);
/// Most moments of it that are kept; it is asked once a second.
const MOMENTS: usize = 64;
/// How often the log tells of it: in so many parts.
const PARTS: u64 = 10;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// Verified bytes that are in memory.
    pub bytes: u64,
    /// Bytes that are to be there.
    pub of: u64,
    /// Seconds until they are, if it goes on as in the last 30 s; `None`: nothing came in that time.
    pub seconds_left: Option<u64>,
}

/// Counts them.
pub struct Progress {
    of: u64,
    found: AtomicU64,
    fetched: AtomicU64,
    /// Parts that the log has told of.
    said: AtomicU64,
    /// Moments, and what was fetched by then.
    moments: Mutex<VecDeque<(Instant, u64)>>,
}

impl Progress {
    /// Of an image of so many bytes, of which nothing is there.
    #[must_use]
    pub fn new(of: u64) -> Self {
        let (found, fetched, said) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Self { of, found, fetched, said, moments: Mutex::default() }
    }

    /// So many more bytes were there already.
    pub fn found(&self, bytes: u64) {
        self.found.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many more bytes came.
    pub fn fetched(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
        let have = self.bytes();
        let part = have.saturating_mul(PARTS) / self.of.max(1);
        if self.said.fetch_max(part, Ordering::Relaxed) < part {
            tracing::info!("{} of {} MiB are there", have >> 20, self.of.div_ceil(1 << 20));
        }
    }

    fn bytes(&self) -> u64 {
        self.found.load(Ordering::Relaxed).saturating_add(self.fetched.load(Ordering::Relaxed))
    }

    /// How far it is `now`, which is not before the last time that it was asked.
    pub fn arrived(&self, now: Instant) -> Arrived {
        let (bytes, fetched) = (self.bytes(), self.fetched.load(Ordering::Relaxed));
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        moments.push_back((now, fetched));
        let is_old = |moment: &(Instant, u64)| now.saturating_duration_since(moment.0) > WINDOW;
        while moments.len() > MOMENTS || (moments.len() > 2 && moments.front().is_some_and(is_old)) {
            moments.pop_front();
        }
        let (since, before) = moments.front().copied().unwrap_or((now, fetched));
        let left = self.of.saturating_sub(bytes);
        // What was found took no time worth counting.
        let (came, took) = (fetched.saturating_sub(before), now.saturating_duration_since(since).as_millis());
        let seconds = |came: u64| u64::try_from(u128::from(left) * took / u128::from(came) / 1000).ok();
        let seconds_left = if left == 0 { Some(0) } else { Some(came).filter(|came| *came > 0).and_then(seconds) };
        Arrived { bytes, of: self.of, seconds_left }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_what_came_lately() {
        let (progress, begin) = (Progress::new(1000 << 20), Instant::now());
        let at = |seconds| progress.arrived(begin + Duration::from_secs(seconds));
        assert_eq!(at(0), Arrived { bytes: 0, of: 1000 << 20, seconds_left: None });
        // What was there already says nothing of the network.
        progress.found(400 << 20);
        assert_eq!(at(1), Arrived { bytes: 400 << 20, of: 1000 << 20, seconds_left: None });
        for second in 2..=11 {
            progress.fetched(10 << 20);
            at(second);
        }
        // 100 MiB in the eleven seconds since it began; 500 are left.
        assert_eq!(at(11), Arrived { bytes: 500 << 20, of: 1000 << 20, seconds_left: Some(55) });
        // An outage: at first it seems slower, then nothing is known.
        assert!(at(20).seconds_left > Some(90), "{:?}", at(20));
        for second in 21..=60 {
            at(second);
        }
        assert_eq!(at(60).seconds_left, None);
        progress.fetched(500 << 20);
        assert_eq!(at(61), Arrived { bytes: 1000 << 20, of: 1000 << 20, seconds_left: Some(0) });
    }

    #[test]
    fn what_is_kept_is_bounded_however_often_it_is_asked() {
        let (progress, begin) = (Progress::new(1000), Instant::now());
        for milliseconds in 0..10_000 {
            progress.arrived(begin + Duration::from_millis(milliseconds));
        }
        assert!(progress.moments.lock().unwrap().len() <= MOMENTS);
        assert_eq!(Progress::new(0).arrived(begin).seconds_left, Some(0));
    }
}
