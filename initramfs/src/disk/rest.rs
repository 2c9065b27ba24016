//! A disk that keeps its readers waiting is left alone.

use std::time::{Duration, Instant};

/// A disk that kept somebody waiting is left alone for so long, and for twice as long each time it does so again.
const REST: Duration = Duration::from_secs(5);
/// The longest of these rests.
const REST_MAX: Duration = Duration::from_mins(10);

/// Whether the disk is left alone for a while, because it kept somebody waiting: it may be busy with something else, and what it answers
/// late is not wrong.
#[derive(Debug, Default)]
pub(super) struct Rest {
    until: Option<Instant>,
    /// Rests in a row.
    row: u32,
}

impl Rest {
    pub(super) fn is_on(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// A read was given up. Returns for how long the disk rests now; `None`: it does so already.
    pub(super) fn was_late(&mut self, now: Instant) -> Option<Duration> {
        if self.is_on(now) {
            return None;
        }
        let rest = REST.saturating_mul(1 << self.row.min(10)).min(REST_MAX);
        self.row += 1;
        self.until = Some(now + rest);
        Some(rest)
    }

    /// A read came back that somebody still waited for. One that was begun before the rest says nothing of what comes after it.
    pub(super) fn was_in_time(&mut self, now: Instant) {
        if !self.is_on(now) {
            self.row = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_disk_rests_longer_each_time_until_it_is_in_time_again() {
        let mut rest = Rest::default();
        let mut now = Instant::now();
        for expected in [5, 10, 20, 40, 80, 160, 320, 600, 600] {
            assert_eq!(rest.was_late(now), Some(Duration::from_secs(expected)));
            // Those that waited beside it.
            assert_eq!(rest.was_late(now), None);
            rest.was_in_time(now);
            let end = now + Duration::from_secs(expected);
            assert!(rest.is_on(now + Duration::from_secs(expected - 1)));
            assert!(!rest.is_on(end));
            now = end;
        }
        rest.was_in_time(now);
        assert_eq!(rest.was_late(now), Some(REST));
    }
}
