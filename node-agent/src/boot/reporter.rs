//! Tells people and members how far the boot is: each line once on the console, each report in order to a member.

use crate::console;
use crate::members::Members;
use crate::process::uptime_ms;
use moor_api::ids::BootId;
use moor_api::node::StatusReport;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// The same line is said again after this.
const REPEAT: Duration = Duration::from_mins(1);

/// Most reports that wait for a token; a node that waits for days says little that is new.
const MAX_QUEUE: usize = 128;

/// How long reports may hold up the boot.
const FLUSH_LIMIT: Duration = Duration::from_secs(20);

/// Console lines and status reports of one boot.
pub struct Reporter {
    boot: BootId,
    sequence: u64,
    queue: VecDeque<StatusReport>,
    said: BTreeMap<String, Instant>,
}

impl Reporter {
    /// Counts on from `sequence`.
    #[must_use]
    pub fn new(boot: BootId, sequence: u64) -> Self {
        Self { boot, sequence, queue: VecDeque::new(), said: BTreeMap::new() }
    }

    /// The number of the last report.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Says a line and keeps it for the member. A line that was said within the last minute is not said again, and one that was
    /// said before is not reported again.
    pub fn note(&mut self, word: &str, sentence: &str) {
        let line = format!("{word}: {sentence}");
        let last = self.said.get(&line).copied();
        if last.is_some_and(|last| last.elapsed() < REPEAT) {
            return;
        }
        console::say(word, sentence);
        if self.said.len() > 1000 {
            self.said.clear();
        }
        self.said.insert(line, Instant::now());
        if last.is_none() {
            self.report(word, sentence, BTreeMap::new());
        }
    }

    /// Keeps a report for the member.
    pub fn report(&mut self, word: &str, sentence: &str, figures: BTreeMap<String, u64>) {
        if self.queue.len() >= MAX_QUEUE {
            self.queue.pop_front();
        }
        self.sequence += 1;
        self.queue.push_back(StatusReport {
            boot: self.boot,
            sequence: self.sequence,
            state: word.to_owned(),
            detail: console::one_line(sentence),
            uptime_ms: uptime_ms(),
            figures,
        });
    }

    /// Sends what waits, in order, once there is a token. What a member does not take now waits on; what it refuses is dropped.
    pub async fn flush(&mut self, members: &mut Members) {
        if !members.has_token() {
            return;
        }
        let begin = Instant::now();
        while let Some(report) = self.queue.front() {
            let Some(left) = FLUSH_LIMIT.checked_sub(begin.elapsed()) else { return };
            let sent = tokio::time::timeout(left, members.call(async |member| member.status(report).await)).await;
            match sent {
                Ok(Err(error)) if error.problem().is_none() => return,
                Ok(_) => {
                    self.queue.pop_front();
                }
                Err(_) => {
                    // Cut off in the middle of an answer: this connection is of no use any more.
                    members.disconnect();
                    return;
                }
            }
        }
    }

    /// Whether everything was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_repeats_is_reported_once() {
        let mut reporter = Reporter::new(BootId::random(), 7);
        for _ in 0..3 {
            reporter.note("wait", "node 'n1' is not armed");
        }
        reporter.note("session", "proving");
        let numbers: Vec<u64> = reporter.queue.iter().map(|report| report.sequence).collect();
        assert_eq!(numbers, [8, 9]);
        assert_eq!(reporter.sequence(), 9);
    }

    #[test]
    fn the_queue_is_bounded_and_keeps_the_newest() {
        let mut reporter = Reporter::new(BootId::random(), 0);
        for index in 0..500 {
            reporter.note("wait", &format!("reason {index}"));
        }
        assert_eq!(reporter.queue.len(), MAX_QUEUE);
        assert_eq!(reporter.queue.back().map(|report| report.sequence), Some(500));
    }
}
