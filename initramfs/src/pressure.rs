//! While the machine is short of memory, or nothing is read, the reader gives back what it can do without. Short by what is available: the kernel's own measure of how
//! long programs wait for memory (PSI) is switched off on many of them (RHEL's), and tells of a shortage only once somebody waits.

use crate::kmsg::ASIDE;
use crate::meminfo::{Memory, Source};
use crate::reader::Reader;
use std::convert::Infallible;
use std::io;
use std::time::Duration;

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// A machine is short of memory when less than one part in so many is available,
const SHARE: u64 = 32;
/// but not above this much, nor below that, in bytes: what it is about are 10 MiB.
const MOST: u64 = 512 << 20;
const LEAST: u64 = 64 << 20;

/// The way to see how much memory is left.
pub struct Pressure(Source);

impl Pressure {
    /// Opens it: needs paths, and later only what is open.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn open() -> io::Result<Self> {
        Source::open().map(Self)
    }

    /// Tells `reader` when the machine is short of memory, and when it is not any more; and lets it rest.
    pub async fn follow(&self, reader: &Reader) -> Infallible {
        let mut is_short = false;
        loop {
            match self.0.read() {
                Ok(memory) if is_scarce(memory, is_short) != is_short => {
                    is_short = !is_short;
                    reader.save_memory(is_short);
                    let word = if is_short { "is" } else { "is not" };
                    let mib = memory.available >> 20;
                    tracing::info!(target: ASIDE, "the machine {word} short of memory ({mib} MiB are available)");
                }
                Ok(_) => {}
                Err(error) => tracing::debug!("cannot see how much memory is left: {error}"),
            }
            reader.rest();
            tokio::time::sleep(EVERY).await;
        }
    }
}

/// Whether the machine is short of memory, where it `was` a moment ago: it is over when half as much again is there.
fn is_scarce(memory: Memory, was: bool) -> bool {
    let limit = (memory.total / SHARE).clamp(LEAST, MOST);
    memory.available < if was { limit + limit / 2 } else { limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_part_of_all_within_bounds_and_ends_a_good_deal_above() {
        for (total, limit) in [(1 << 10, 64), (4 << 10, 128), (256 << 10, 512)] {
            let is = |available: u64, was| is_scarce(Memory { total: total << 20, available: available << 20 }, was);
            assert!(!is(limit, false) && is(limit - 1, false), "{total}");
            assert!(is(limit * 3 / 2 - 1, true) && !is(limit * 3 / 2, true), "{total}");
        }
    }
}
