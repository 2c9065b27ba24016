//! How long the files of a store take to become durable: counted, and said when it is long. A disk that stalls looks like a network that does, or
//! like a member that is dead: changes wait, leaders are deposed and elected late, and nothing else says why.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What takes longer is said. A heartbeat is due five times in it, and an election lasts no longer.
const SLOW: Duration = Duration::from_secs(1);
/// One line of a file in this time; what else was slow is counted, and said with the next one.
const QUIET: Duration = Duration::from_secs(10);
/// Upper bounds that durations are counted by, in milliseconds, and in seconds as Prometheus has them.
const BOUNDS: [(u64, &str); 8] =
    [(1, "0.001"), (4, "0.004"), (16, "0.016"), (64, "0.064"), (250, "0.25"), (1000, "1"), (4000, "4"), (16_000, "16")];

/// What is known of the syncs of one file since it was opened.
pub(crate) struct Syncs {
    file: PathBuf,
    /// What waits for them, for people.
    waits: &'static str,
    /// How many took at most as long as each of [`BOUNDS`] and longer than the one before; the last: longer than all.
    counts: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
    longest: AtomicU64,
    said: Mutex<Said>,
}

/// What was said of slow ones.
#[derive(Debug, Default)]
struct Said {
    at: Option<Instant>,
    /// Slow ones since that were not said.
    more: u64,
}

/// How long the syncs of one file took.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Figures {
    /// Its name, without its directory.
    pub(crate) file: String,
    /// Upper bounds in seconds, each with how many took no longer.
    pub(crate) within: Vec<(&'static str, u64)>,
    /// How many there were.
    pub(crate) count: u64,
    /// Seconds that all of them took.
    pub(crate) sum: f64,
    /// Seconds that the longest took.
    pub(crate) longest: f64,
}

impl Syncs {
    /// Of this file; `waits` is what waits for them, for people.
    pub(super) fn new(file: PathBuf, waits: &'static str) -> Self {
        let (counts, said) = (std::array::from_fn(|_| AtomicU64::new(0)), Mutex::default());
        Self { file, waits, counts, microseconds: AtomicU64::new(0), longest: AtomicU64::new(0), said }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        // Every change is made whole before anything could panic.
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what makes something durable in the file, and says so if that takes long.
    pub(super) fn time<T>(&self, sync: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = sync();
        let now = Instant::now();
        if let Some(line) = self.note(now.saturating_duration_since(began), now) {
            tracing::warn!("{line}");
        }
        done
    }

    /// Counts one that took so long until `now`; returns what there is to say of it.
    fn note(&self, took: Duration, now: Instant) -> Option<String> {
        let at = BOUNDS.iter().position(|(bound, _)| took <= Duration::from_millis(*bound)).unwrap_or(BOUNDS.len());
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
        self.longest.fetch_max(microseconds, Ordering::Relaxed);
        if took <= SLOW {
            return None;
        }
        let mut said = self.said();
        let ago = said.at.map(|at| now.saturating_duration_since(at));
        if ago.is_some_and(|ago| ago < QUIET) {
            said.more += 1;
            return None;
        }
        let more = std::mem::take(&mut said.more);
        said.at = Some(now);
        drop(said);
        let others = match ago {
            Some(ago) if more > 0 => {
                format!(", and {more} more took over {} s in the {} s before", SLOW.as_secs(), ago.as_secs())
            }
            _ => String::new(),
        };
        Some(format!(
            "syncing '{}' took {:.1} s{others}: its disk is slow or has much else to do, and {} wait for it",
            self.file.display(),
            took.as_secs_f64(),
            self.waits
        ))
    }

    /// How long they took up to now.
    pub(crate) fn figures(&self) -> Figures {
        let mut count = 0;
        let mut up_to = |at: usize| {
            count += self.counts[at].load(Ordering::Relaxed);
            count
        };
        let within = BOUNDS.iter().enumerate().map(|(at, (_, bound))| (*bound, up_to(at))).collect();
        let seconds = |of: &AtomicU64| Duration::from_micros(of.load(Ordering::Relaxed)).as_secs_f64();
        Figures {
            file: self.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            within,
            count: up_to(BOUNDS.len()),
            sum: seconds(&self.microseconds),
            longest: seconds(&self.longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_one_is_said_and_those_that_follow_are_counted_until_it_is_said_again() {
        let syncs = Syncs::new("/s/log.journal".into(), "changes and elections");
        let begin = Instant::now();
        let mut said = Vec::new();
        for (milliseconds, at) in [
            (5, 0),
            (1000, 1),
            (1001, 2),
            // Within ten seconds of the line.
            (3400, 6),
            (2000, 11),
            (2, 12),
            (9960, 12),
            (20_000, 59),
            // Nothing was slow since.
            (1500, 69),
        ] {
            said.extend(syncs.note(Duration::from_millis(milliseconds), begin + Duration::from_secs(at)));
        }
        let end = ": its disk is slow or has much else to do, and changes and elections wait for it";
        assert_eq!(
            said,
            [
                format!("syncing '/s/log.journal' took 1.0 s{end}"),
                format!("syncing '/s/log.journal' took 10.0 s, and 2 more took over 1 s in the 10 s before{end}"),
                format!("syncing '/s/log.journal' took 20.0 s{end}"),
                format!("syncing '/s/log.journal' took 1.5 s{end}"),
            ]
        );
        assert_eq!(
            syncs.figures(),
            Figures {
                file: "log.journal".into(),
                within: BOUNDS
                    .iter()
                    .zip([0, 1, 2, 2, 2, 3, 7, 8])
                    .map(|((_, bound), count)| (*bound, count))
                    .collect(),
                count: 9,
                sum: 38.868,
                longest: 20.0,
            }
        );
    }

    #[test]
    fn what_is_timed_is_what_was_done() {
        let syncs = Syncs::new("log.redb".into(), "changes");
        let done: Result<u8, &str> = syncs.time(|| {
            std::thread::sleep(Duration::from_millis(20));
            Err("no")
        });
        let figures = syncs.figures();
        assert_eq!((done, figures.count), (Err("no"), 1), "one that failed has taken its time as well");
        assert!(figures.longest >= 0.02 && (figures.sum - figures.longest).abs() < f64::EPSILON, "{figures:?}");
        assert_eq!(figures.within[2], ("0.016", 0));
    }
}
