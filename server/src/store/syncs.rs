//! How long the files of a store take to become durable: counted, and said when it is long. A disk that stalls looks like a network that does, or
//! like a member that is dead: changes wait, leaders are deposed and elected late, and nothing else says why.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// What takes longer is said. A heartbeat is due five times in it, and an election lasts no longer.
const SLOW: Duration = Duration::from_secs(1);
/// One line of a file in this time; what else was slow is counted, and said with the next one.
const QUIET: Duration = Duration::from_secs(10);
/// What is under way is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
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

/// The one that is under way, and what was said of slow ones.
#[derive(Debug, Default)]
struct Said {
    began: Option<Instant>,
    /// Whether something was said of that one.
    is_told: bool,
    at: Option<Instant>,
    /// Slow ones since that were not said.
    more: u64,
}

impl Said {
    /// Since something was said; none: nothing was yet.
    fn ago(&self, now: Instant) -> Option<Duration> {
        self.at.map(|at| now.saturating_duration_since(at))
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.ago(now).is_some_and(|ago| ago < QUIET)
    }
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

    /// Does what makes something durable in the file, one at a time, and says so if that takes long.
    pub(super) fn time<T>(&self, sync: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        self.begin(began);
        let done = sync();
        if let Some(line) = self.end(began, Instant::now()) {
            tracing::warn!("{line}");
        }
        done
    }

    fn begin(&self, now: Instant) {
        let mut said = self.said();
        (said.began, said.is_told) = (Some(now), false);
    }

    /// Counts the one from `began` to `now`; returns what there is to say of it.
    fn end(&self, began: Instant, now: Instant) -> Option<String> {
        let mut said = self.said();
        // The next one may have begun since this one let go of the file.
        let is_told = said.began == Some(began) && said.is_told;
        said.began = said.began.filter(|other| *other != began);
        let took = now.saturating_duration_since(began);
        let at = BOUNDS.iter().position(|(bound, _)| took <= Duration::from_millis(*bound)).unwrap_or(BOUNDS.len());
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
        self.longest.fetch_max(microseconds, Ordering::Relaxed);
        if took <= SLOW {
            return None;
        }
        if said.is_quiet(now) {
            said.more += u64::from(!is_told);
            return None;
        }
        Some(self.line(&mut said, &format!("took {:.1} s", took.as_secs_f64()), now))
    }

    /// What there is to say of the one that is under way: a disk that hangs may never come to its end.
    fn lasts(&self, now: Instant) -> Option<String> {
        let mut said = self.said();
        let takes = now.saturating_duration_since(said.began?);
        if takes <= SLOW || said.is_quiet(now) {
            return None;
        }
        said.is_told = true;
        Some(self.line(&mut said, &format!("takes {:.1} s so far", takes.as_secs_f64()), now))
    }

    fn line(&self, said: &mut Said, takes: &str, now: Instant) -> String {
        let others = match (said.ago(now), std::mem::take(&mut said.more)) {
            (Some(ago), more @ 1..) => {
                format!(", and {more} more took over {} s in the {} s before", SLOW.as_secs(), ago.as_secs())
            }
            _ => String::new(),
        };
        said.at = Some(now);
        format!(
            "syncing '{}' {takes}{others}: its disk is slow or has much else to do, and {} wait for it",
            self.file.display(),
            self.waits
        )
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

/// Looks all the time for syncs of these files that do not come to their end, and says so.
pub(super) async fn watch(files: [Arc<Syncs>; 3]) {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        for line in files.iter().filter_map(|file| file.lasts(Instant::now())) {
            tracing::warn!("{line}");
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
            let now = begin + Duration::from_secs(60 + at);
            let began = now.checked_sub(Duration::from_millis(milliseconds)).unwrap();
            syncs.begin(began);
            said.extend(syncs.end(began, now));
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
    fn one_that_does_not_come_to_its_end_is_said_again_and_again() {
        let syncs = Syncs::new("log.redb".into(), "changes");
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        assert_eq!(syncs.lasts(at(0)), None, "nothing is under way");
        syncs.begin(at(0));
        let said: Vec<_> = (0..=25).filter_map(|second| syncs.lasts(at(second))).collect();
        let end = "so far: its disk is slow or has much else to do, and changes wait for it";
        let expected = [2, 12, 22].map(|seconds| format!("syncing 'log.redb' takes {seconds}.0 s {end}"));
        assert_eq!(said, expected);
        // Of that one was said what there is to say.
        assert_eq!(syncs.end(at(0), at(26)), None);
        syncs.begin(at(26));
        assert_eq!(syncs.end(at(26), at(28)), None, "within ten seconds");
        syncs.begin(at(30));
        let line = syncs.lasts(at(32)).unwrap();
        assert!(
            line.starts_with("syncing 'log.redb' takes 2.0 s so far, and 1 more took over 1 s in the 10 s before: "),
            "{line}"
        );
        assert_eq!(syncs.figures().count, 2, "this one is not at its end");
    }

    #[test]
    fn one_that_begins_before_the_last_is_counted_takes_nothing_from_it() {
        let syncs = Syncs::new("member.redb".into(), "changes");
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        syncs.begin(at(0));
        syncs.begin(at(4));
        assert!(syncs.end(at(0), at(4)).is_some_and(|line| line.contains("took 4.0 s")));
        assert_eq!(syncs.end(at(4), at(5)), None);
        let figures = syncs.figures();
        assert_eq!((figures.count, figures.longest), (2, 4.0));
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
