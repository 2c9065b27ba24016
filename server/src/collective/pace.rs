//! No more content in a second than the administrator wants, from all members together.

use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Keeps to so many bytes in a second, on average.
pub(super) struct Pace {
    rate: Option<f64>,
    /// When what was taken so far is paid for.
    paid: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(mib_per_second: Option<NonZeroU32>) -> Self {
        let rate = mib_per_second.map(|mib| f64::from(mib.get()) * f64::from(1 << 20));
        Self { rate, paid: Mutex::new(Instant::now()) }
    }

    /// When this many bytes more are within the pace.
    fn due(&self, bytes: usize, now: Instant) -> Instant {
        let Some(rate) = self.rate else { return now };
        let seconds = f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / rate;
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = (*paid).max(now) + Duration::from_secs_f64(seconds);
        *paid
    }

    /// Waits until then. Meanwhile nobody reads, and the sender waits too.
    pub(super) async fn take(&self, bytes: usize) {
        tokio::time::sleep_until(self.due(bytes, Instant::now())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_on_average_and_none_is_none() {
        let began = Instant::now();
        let pace = Pace::new(NonZeroU32::new(2));
        let mut due = began;
        for _ in 0..64 {
            due = pace.due(64 << 10, due);
        }
        let took = due - began;
        assert!((Duration::from_millis(1990)..Duration::from_millis(2100)).contains(&took), "{took:?}");
        // A pause is not made up for afterwards.
        let later = due + Duration::from_mins(1);
        assert!(pace.due(1 << 20, later) >= later + Duration::from_millis(499));
        assert_eq!(Pace::new(None).due(usize::MAX, later), later);
    }
}
