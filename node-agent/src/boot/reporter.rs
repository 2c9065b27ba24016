//! Tells people and members how far a node is: each line once on the console, each report and each output of a script in order to a
//! member, sooner or later.

use crate::console;
use crate::members::Members;
use crate::process::uptime_ms;
use moor_api::client::ClientError;
use moor_api::deploy::PhaseName;
use moor_api::ids::BootId;
use moor_api::node::{LogReport, StatusReport};
use moor_api::problem::Code;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// The same line is said again after this.
const REPEAT: Duration = Duration::from_mins(1);

/// Most reports that wait for a token; a node that waits for days says little that is new.
const MAX_QUEUE: usize = 128;

/// Most bytes of a log report's text; a member takes 64 KiB.
pub const MAX_LOG: usize = 60 << 10;

/// How long reports may hold up the boot.
const FLUSH_LIMIT: Duration = Duration::from_secs(20);

/// What a member is to be told.
enum Message {
    Status(StatusReport),
    Log(LogReport),
}

/// Console lines, status reports and outputs of one boot.
pub struct Reporter {
    boot: BootId,
    sequence: u64,
    queue: VecDeque<Message>,
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
        self.sequence += 1;
        self.push(Message::Status(StatusReport {
            boot: self.boot,
            sequence: self.sequence,
            state: word.to_owned(),
            detail: console::one_line(sentence),
            uptime_ms: uptime_ms(),
            figures,
        }));
    }

    /// The same for how far something is: the last such report that nobody has taken yet has nothing to say any more.
    pub fn progress(&mut self, word: &str, sentence: &str, figures: BTreeMap<String, u64>) {
        let is_older = |message: &Message| match message {
            Message::Status(last) => last.state == word && last.figures.keys().next() == figures.keys().next(),
            Message::Log(_) => false,
        };
        if !figures.is_empty() && self.queue.back().is_some_and(is_older) {
            self.queue.pop_back();
        }
        self.report(word, sentence, figures);
    }

    /// Keeps the output of a script, or another text worth keeping, for the member; of a long one the end.
    pub fn log(&mut self, phase: Option<PhaseName>, text: &str) {
        let mut begin = text.len().saturating_sub(MAX_LOG);
        while !text.is_char_boundary(begin) {
            begin += 1;
        }
        self.push(Message::Log(LogReport { boot: self.boot, phase, text: text[begin..].to_owned() }));
    }

    fn push(&mut self, message: Message) {
        if self.queue.len() >= MAX_QUEUE {
            self.queue.pop_front();
        }
        self.queue.push_back(message);
    }

    /// Sends what waits, in order, once there is a token. What a member does not take now waits on; what it refuses for good is dropped.
    pub async fn flush(&mut self, members: &mut Members) {
        if !members.has_token() {
            return;
        }
        let begin = Instant::now();
        while let Some(message) = self.queue.front() {
            let Some(left) = FLUSH_LIMIT.checked_sub(begin.elapsed()) else { return };
            let send = members.call(async |member| match message {
                Message::Status(report) => member.status(report).await,
                Message::Log(report) => member.log(report).await,
            });
            let sent = tokio::time::timeout(left, send).await;
            match sent {
                Ok(Err(error)) if may_be_heard_later(&error) => return,
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

    /// The status reports that wait.
    #[cfg(test)]
    pub(super) fn reports(&self) -> impl Iterator<Item = &StatusReport> {
        self.queue.iter().filter_map(|message| match message {
            Message::Status(report) => Some(report),
            Message::Log(_) => None,
        })
    }

    /// Whether everything was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// Not heard, a fault of the member (its disk is full), or a token that is void: the same report may do later.
fn may_be_heard_later(error: &ClientError) -> bool {
    error.is_transient() || error.problem().is_none_or(|problem| problem.code == Code::TokenInvalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::problem::Problem;

    fn numbers(reporter: &Reporter) -> Vec<u64> {
        let of_status =
            |message: &Message| if let Message::Status(report) = message { Some(report.sequence) } else { None };
        reporter.queue.iter().filter_map(of_status).collect()
    }

    #[test]
    fn a_line_that_repeats_is_reported_once() {
        let mut reporter = Reporter::new(BootId::random(), 7);
        for _ in 0..3 {
            reporter.note("wait", "node 'n1' is not armed");
        }
        reporter.note("session", "proving");
        assert_eq!(numbers(&reporter), [8, 9]);
        assert_eq!(reporter.sequence(), 9);
    }

    #[test]
    fn the_queue_is_bounded_and_keeps_the_newest() {
        let mut reporter = Reporter::new(BootId::random(), 0);
        for index in 0..500 {
            reporter.note("wait", &format!("reason {index}"));
        }
        assert_eq!(reporter.queue.len(), MAX_QUEUE);
        assert_eq!(numbers(&reporter).last(), Some(&500));
    }

    #[test]
    fn how_far_something_is_waits_once_and_pushes_nothing_out() {
        let mut reporter = Reporter::new(BootId::random(), 0);
        reporter.note("mount", "the first try was killed");
        for bytes in 0..500 {
            let figures = BTreeMap::from([("image.bytes_arrived".to_owned(), bytes)]);
            reporter.progress("mount", &format!("{bytes} MiB"), figures);
        }
        let kept: Vec<&str> = reporter.reports().map(|report| report.detail.as_str()).collect();
        assert_eq!(kept, ["the first try was killed", "499 MiB"]);
    }

    #[test]
    fn what_a_member_could_not_take_is_kept_and_what_it_refuses_is_not() {
        let cases = [
            (Code::Internal, true),
            (Code::RateLimited, true),
            (Code::TokenInvalid, true),
            (Code::BadRequest, false),
            (Code::StageClosed, false),
        ];
        for (code, kept) in cases {
            assert_eq!(may_be_heard_later(&ClientError::Problem(Problem::new(code, "x"))), kept, "{code:?}");
        }
        assert!(may_be_heard_later(&ClientError::Broken { call: "POST status".into(), cause: "cut off".into() }));
    }

    #[test]
    fn of_a_long_text_the_end_is_kept() {
        let mut reporter = Reporter::new(BootId::random(), 0);
        reporter.log(None, &format!("{}end", "ä".repeat(MAX_LOG)));
        let Some(Message::Log(report)) = reporter.queue.front() else { panic!("no log") };
        assert!(report.text.ends_with("end") && report.text.len() <= MAX_LOG && report.text.len() > MAX_LOG - 2);
    }
}
