//! How many requests may be sent twice: a share of all, so that hedging never feeds an overload.

use std::sync::atomic::{AtomicU64, Ordering};

/// One hedge for so many demand requests: 5 %.
const REQUESTS_PER_HEDGE: u64 = 20;
/// Hedges that are free at the start, when nothing is known of any member yet.
pub(super) const AT_FIRST: u64 = 4;
/// Hedges that can be saved up.
const SAVED: u64 = 16;

/// Credit, in twentieths of a hedge.
#[derive(Debug)]
pub(super) struct Hedges(AtomicU64);

impl Hedges {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(AT_FIRST * REQUESTS_PER_HEDGE))
    }

    /// A demand request was made.
    pub(super) fn earn(&self) {
        let most = SAVED * REQUESTS_PER_HEDGE;
        // A full account stays as it is.
        let _ =
            self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |credit| (credit < most).then_some(credit + 1));
    }

    /// Whether a request may be sent twice now.
    pub(super) fn spend(&self) -> bool {
        let spend = |credit: u64| credit.checked_sub(REQUESTS_PER_HEDGE);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_in_twenty_after_the_first_few() {
        let hedges = Hedges::new();
        let spent = |count: u64| (0..count).filter(|_| hedges.spend()).count() as u64;
        assert_eq!(spent(100), AT_FIRST);
        let mut all = 0;
        for _ in 0..1000 {
            hedges.earn();
            all += spent(1);
        }
        assert_eq!(all, 50);
        for _ in 0..10_000 {
            hedges.earn();
        }
        assert_eq!(spent(100), SAVED);
    }
}
