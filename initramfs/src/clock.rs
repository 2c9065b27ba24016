//! The time by which certificates are judged. It is the system's at the start, which the boot stage took from a member that proved itself,
//! and goes on with the kernel's own count of seconds: a clock that somebody sets wrong later must not take away the root.

use nix::time::{ClockId, clock_gettime};
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A clock that nobody sets.
#[derive(Debug)]
pub struct OwnClock {
    /// Unix seconds when `CLOCK_BOOTTIME` was 0.
    boot: AtomicU64,
}

/// Seconds since the kernel started, with those in which it slept.
fn uptime() -> u64 {
    // Every kernel since 2.6.39 has it; without it the clock stands still, and is not before what it was set to.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| u64::try_from(time.tv_sec()).unwrap_or(0))
}

impl OwnClock {
    /// Begins with the system's time, or with `earliest` (Unix seconds) where that is later.
    #[must_use]
    pub fn new(earliest: u64) -> Self {
        let system = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Self { boot: AtomicU64::new(system.max(earliest).saturating_sub(uptime())) }
    }

    /// Unix seconds.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.boot.load(Ordering::Relaxed).saturating_add(uptime())
    }

    /// It is not before `earliest` (Unix seconds): something was made then.
    pub fn raise(&self, earliest: u64) {
        self.boot.fetch_max(earliest.saturating_sub(uptime()), Ordering::Relaxed);
    }
}

impl TimeProvider for OwnClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.now())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_from_the_system_s_time_and_never_before_what_is_known() {
        let system = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let clock = OwnClock::new(1_700_000_000);
        assert!(clock.now().abs_diff(system) <= 2, "{} {system}", clock.now());
        clock.raise(system - 1000);
        assert!(clock.now().abs_diff(system) <= 2);
        clock.raise(system + 1000);
        assert!(clock.now().abs_diff(system + 1000) <= 2);
        assert!(OwnClock::new(system + 5000).now() >= system + 5000);
    }
}
