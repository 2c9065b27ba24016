//! The node's clock before NTP: never before the boot payload was built, then the time of a member that proved its role
//! (DESIGN.md §4, "Time").

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A clock that differs by less from a member's is left alone: NTP will slew it.
const TOLERANCE: Duration = Duration::from_secs(5);

/// Seconds since 1970 by the node's clock; 0 for a clock before that.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What to set the clock to: `None`, leave it. `offered` is a member's time or the build time, `floor` the build time.
#[must_use]
pub fn correction(now: u64, offered: u64, floor: u64) -> Option<u64> {
    let target = offered.max(floor);
    (now.abs_diff(target) > TOLERANCE.as_secs()).then_some(target)
}

/// Sets the clock of the system.
///
/// # Errors
/// The kernel refuses: not root, or a time that it cannot hold.
pub fn set(seconds: u64) -> Result<(), nix::Error> {
    let seconds = i64::try_from(seconds).map_err(|_| nix::Error::EINVAL)?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_set_only_when_it_is_clearly_wrong_and_never_before_the_build() {
        let cases = [
            ("right", 1000, 1002, 500, None),
            ("lost its battery", 0, 1000, 500, Some(1000)),
            ("in the future", 9000, 1000, 500, Some(1000)),
            ("a member that is itself in the past", 1000, 10, 500, Some(500)),
            ("at the edge of the tolerance", 1000, 1005, 0, None),
        ];
        for (name, now, offered, floor, expected) in cases {
            assert_eq!(correction(now, offered, floor), expected, "{name}");
        }
    }
}
