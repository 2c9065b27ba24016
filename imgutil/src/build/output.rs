//! What the tools print while an image is built: kept in a log, turned into progress, and searched for the reason when a
//! tool fails. Parsing is apart from reading, so that it is tested with recorded lines.

use super::Event;
use std::collections::VecDeque;
use std::io::{self, BufRead, Write};

/// So many last lines are kept for an error.
const TAIL: usize = 20;
/// A longer line is cut.
const LINE_LIMIT: usize = 4096;

/// What the lines of one tool mean.
pub(super) trait Meaning: Send {
    /// The event that a line tells of, if any.
    fn of<'a>(&mut self, line: &'a str) -> Option<Event<'a>>;
}

/// A tool whose lines are only kept.
pub(super) struct NoMeaning;

impl Meaning for NoMeaning {
    fn of<'a>(&mut self, _: &'a str) -> Option<Event<'a>> {
        None
    }
}

/// Reads lines from `source` until its end, writes them to `log`, and tells `progress` what they mean. Gives the last lines.
pub(super) fn follow(
    source: impl io::Read,
    mut log: impl Write,
    meaning: &mut dyn Meaning,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
) -> io::Result<Tail> {
    let mut source = io::BufReader::new(source);
    let mut tail = Tail::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if io::Read::take(&mut source, LINE_LIMIT as u64).read_until(b'\n', &mut line)? == 0 {
            return Ok(tail);
        }
        log.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        // apt redraws lines with carriage returns.
        let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
        if text.is_empty() {
            continue;
        }
        if let Some(event) = meaning.of(text) {
            progress(event);
        }
        tail.push(text);
    }
}

/// The last lines a tool printed.
#[derive(Debug, Default, Clone)]
pub struct Tail(VecDeque<String>);

impl Tail {
    fn push(&mut self, line: &str) {
        if self.0.len() == TAIL {
            self.0.pop_front();
        }
        self.0.push_back(line.to_owned());
    }

    /// The lines, oldest first.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// What follows `start` in the lines that begin with it.
    pub(super) fn after(&self, start: &str) -> Vec<&str> {
        self.lines().filter_map(|line| line.strip_prefix(start)).collect()
    }

    /// The line that most likely says what went wrong.
    pub(super) fn reason(&self) -> String {
        let errors = ["E: ", "dpkg: error", "Failed to ", "error: ", "Error: "];
        let follow_up =
            ["E: Sub-process", "E: setup failed", "E: mmdebstrap failed", "E: run_", "E: apt-get", "E: env "];
        self.lines()
            .find(|line| {
                errors.iter().any(|start| line.starts_with(start))
                    && !follow_up.iter().any(|start| line.starts_with(start))
            })
            .or_else(|| self.0.back().map(String::as_str))
            .unwrap_or("it printed nothing")
            .trim_start_matches("E: ")
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(lines: &str) -> Tail {
        follow(lines.as_bytes(), io::sink(), &mut NoMeaning, &mut |_| {}).unwrap()
    }

    #[test]
    fn the_reason_of_a_failure_is_found_in_what_the_tools_print() {
        assert_eq!(
            tail("a\ndpkg: error processing package x\nE: Sub-process returned 1\n").reason(),
            "dpkg: error processing package x"
        );
        assert_eq!(tail("just this\n").reason(), "just this");
        assert_eq!(tail("").reason(), "it printed nothing");
    }

    #[test]
    fn a_tail_is_short_and_lines_are_cut() {
        let many: String = (0..100).fold(String::new(), |text, number| format!("{text}{number}\n"));
        assert_eq!(tail(&many).lines().collect::<Vec<_>>().first(), Some(&"80"));
        assert!(tail(&"x".repeat(100_000)).lines().all(|line| line.len() <= LINE_LIMIT));
    }
}
