//! A root that comes as a whole: the fetch, what is said of it meanwhile, and that nothing of it is left when the boot gives up.
//!
//! Members are told how far it is ever less often: each time is a change that a majority of them writes, and one of the 500 lines that they keep of
//! a node.

use super::Boot;
use super::image::{MOUNT_LIMIT, WHOLE_LIMIT};
use super::states::State;
use crate::child::{self, ChildError};
use crate::handover::Arrived;
use moor_api::deploy::RootMode;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::pin::pin;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// How long it is tried to take what there is of an image out of memory, and the pause between tries: a fetch that was killed just now holds it
/// for a moment.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);
const UNMOUNT_PAUSE: Duration = Duration::from_secs(1);
/// How long after its begin a fetch of a whole image is told of for the first time. The pause doubles each time.
const FIRST: Duration = Duration::from_secs(2);
/// The longest of these pauses on the console, and for members as long as somebody may watch it.
const SHORT: Duration = Duration::from_secs(30);
/// Their pauses later: from then on, so long.
const LATER: [(Duration, Duration); 2] =
    [(Duration::from_hours(1), Duration::from_mins(30)), (Duration::from_mins(5), Duration::from_mins(5))];
/// In between it is told of each of so many parts.
const PARTS: u64 = 10;

/// The pause after a report that was made `since` the begin.
fn pause(since: Duration) -> Duration {
    let later = LATER.iter().find(|(from, _)| since >= *from);
    later.map_or_else(|| since.clamp(FIRST, SHORT), |(_, pause)| *pause)
}

/// When the next report is due. One for all tries of a boot: each of them begins where the last one has ended.
#[derive(Debug)]
pub(super) struct Schedule {
    begun: Instant,
    /// Not before then, since the begin; but for a part that is complete.
    next: Duration,
    /// Parts that were told of.
    parts: u64,
}

impl Schedule {
    /// Of a fetch that begins now.
    pub(super) fn new(now: Instant) -> Self {
        Self { begun: now, next: FIRST, parts: 0 }
    }

    /// Whether it is to be told now that so much is there. Whoever is told so does it.
    pub(super) fn is_due(&mut self, now: Instant, arrived: Arrived) -> bool {
        let since = now.saturating_duration_since(self.begun);
        let parts = arrived.bytes.saturating_mul(PARTS).checked_div(arrived.of).unwrap_or(PARTS);
        let is_part = parts > self.parts && pause(since) > SHORT;
        if since < self.next && !is_part {
            return false;
        }
        self.parts = self.parts.max(parts);
        self.next = since + pause(since);
        true
    }
}

impl Boot {
    /// Takes the image away again, where one is.
    pub(super) async fn unmount_image(&self) -> Result<(), ChildError> {
        let directory = self.options.run.path("tether");
        // Where a tether has died, nothing can be said of it (ENOTCONN), and it is there.
        if std::fs::symlink_metadata(directory.join("image")).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            return Ok(());
        }
        let mut unmount = Command::new(&self.options.tether);
        unmount.arg("unmount").arg(&directory);
        child::run(unmount, b"", MOUNT_LIMIT).await.map(drop)
    }

    /// What there is of a whole image when no try is to come that goes on with it. A machine that is held would lack its memory until somebody switches
    /// it off.
    pub(super) async fn drop_whole_image(&self) {
        let is_whole = self.offer.as_ref().map(|offer| self.root_mode(offer)) == Some(RootMode::Untethered);
        // What a root was made of is in use, and stays.
        if !is_whole || self.schedule.is_none() {
            return;
        }
        let begun = Instant::now();
        while let Err(error) = self.unmount_image().await {
            if begun.elapsed() >= UNMOUNT_LIMIT {
                let word = State::Tether.rule().word;
                crate::console::say(word, &format!("what there is of the image stays in memory: {error}"));
                return;
            }
            tokio::time::sleep(UNMOUNT_PAUSE).await;
        }
    }

    /// Brings a whole image into memory, and says meanwhile how far that is: on the console, and less often to a member.
    pub(super) async fn fetch(&mut self, fetch: Command, key: &[u8]) -> Result<String, ChildError> {
        self.options.run.forget_tether();
        self.schedule.get_or_insert_with(|| Schedule::new(Instant::now()));
        let mut ended = pin!(child::run(fetch, key, WHOLE_LIMIT));
        let (mut pause, mut told) = (FIRST, None);
        loop {
            if let Ok(result) = tokio::time::timeout(pause, ended.as_mut()).await {
                return result;
            }
            let arrived = self.options.run.tether().and_then(|tether| tether.arrived);
            // Where nothing has changed there is nothing to say: of an outage the tether tells.
            if let Some(arrived) = arrived.filter(|arrived| told != Some(arrived.bytes)) {
                told = Some(arrived.bytes);
                pause = pause.saturating_mul(2).min(SHORT);
                let (sentence, figures) = described(arrived);
                crate::console::say(State::Tether.rule().word, &sentence);
                if !self.schedule.as_mut().is_some_and(|schedule| schedule.is_due(Instant::now(), arrived)) {
                    continue;
                }
                self.reporter.progress(State::Tether.rule().word, &sentence, figures);
                // A slow fetch outlasts a token. Without a new one it is not heard now, and the image comes all the same.
                let _ = Box::pin(self.ensure_token()).await;
                self.flush().await;
            }
        }
    }
}

/// How far an image is on its way into memory: for people, and as figures.
fn described(arrived: Arrived) -> (String, BTreeMap<String, u64>) {
    let Arrived { bytes, of, seconds_left } = arrived;
    let rest = seconds_left.map(|seconds| format!(", about {seconds} s left")).unwrap_or_default();
    let sentence = format!("{} of {} MiB of the image are in memory{rest}", bytes >> 20, of.div_ceil(1 << 20));
    let figures =
        [("image.bytes_arrived", Some(bytes)), ("image.bytes_total", Some(of)), ("image.seconds_left", seconds_left)];
    let known = figures.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    (sentence, known.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF: u64 = 100 << 30;

    /// When reports are made in this time, in seconds, of a fetch that is looked at each second and would take `whole`.
    fn reports(time: Duration, whole: Duration) -> Vec<u64> {
        let begun = Instant::now();
        let mut schedule = Schedule::new(begun);
        let mut is_due = |second: u64| {
            let bytes = OF / whole.as_secs() * second;
            let arrived = Arrived { bytes: bytes.min(OF), of: OF, seconds_left: None };
            schedule.is_due(begun + Duration::from_secs(second), arrived)
        };
        (1..=time.as_secs()).filter(|second| is_due(*second)).collect()
    }

    fn largest_pause(reports: &[u64]) -> u64 {
        reports.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap()
    }

    #[test]
    fn who_watches_sees_it_move_and_a_long_fetch_does_not_push_all_else_out() {
        let (minute, hour) = (Duration::from_mins(1), Duration::from_hours(1));
        // A quick one: as before.
        assert_eq!(reports(minute, minute), [2, 4, 8, 16, 32]);
        let of_an_hour = reports(hour, hour);
        assert!(of_an_hour.len() <= 36, "{of_an_hour:?}");
        assert!(largest_pause(&of_an_hour) <= 300, "{of_an_hour:?}");
        let watched = of_an_hour.iter().position(|second| *second > 300).unwrap();
        assert!(largest_pause(&of_an_hour[..watched]) <= 30, "{of_an_hour:?}");
        // Where the pauses are long, each tenth is told of as soon as it is there.
        for tenth in 1..10 {
            assert!(of_an_hour.iter().any(|second| second.abs_diff(tenth * 360) <= 1), "{tenth}: {of_an_hour:?}");
        }
        // A week of tries leaves room for what else the node has to say.
        let week = hour * 24 * 7;
        let of_a_week = reports(week, week);
        assert!(of_a_week.len() < 400, "{}", of_a_week.len());
        assert!(largest_pause(&of_a_week) <= 30 * 60, "{}", largest_pause(&of_a_week));
    }

    #[test]
    fn a_part_is_told_of_once_although_a_try_begins_with_less() {
        let begun = Instant::now();
        let mut schedule = Schedule::new(begun);
        let mut is_due = |seconds, tenths: u64| {
            let arrived = Arrived { bytes: OF / 10 * tenths + 1, of: OF, seconds_left: None };
            schedule.is_due(begun + Duration::from_secs(seconds), arrived)
        };
        assert!(is_due(600, 3));
        assert!(!is_due(601, 3));
        assert!(is_due(602, 4), "another tenth");
        assert!(!is_due(603, 0) && !is_due(604, 4), "the next try");
        assert!(is_due(902, 4), "the pause is over");
        // Nothing is to come, and nothing is divided by it.
        assert!(Schedule::new(begun).is_due(begun + FIRST, Arrived { bytes: 0, of: 0, seconds_left: None }));
    }
}
