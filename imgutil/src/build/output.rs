//! What the tools print while an image is built: kept in a log, turned into progress, and searched for the reason when a
//! tool fails. Parsing is apart from reading, so that it is tested with recorded lines.

use super::Event;
use std::collections::VecDeque;
use std::io::{self, BufRead, Write};

/// So many last lines are kept for an error.
const TAIL: usize = 20;
/// A longer line is cut.
const LINE_LIMIT: usize = 4096;

/// Reads lines from `source` until its end, writes them to `log`, and tells `progress` what they mean. Gives the last lines.
pub(super) fn follow(
    source: impl io::Read,
    mut log: impl Write,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
) -> io::Result<Tail> {
    let mut source = io::BufReader::new(source);
    let mut counter = Counter::default();
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
        if let Some(event) = counter.read(text) {
            progress(event);
        }
        tail.push(text);
    }
}

/// Counts packages fetched and set up.
#[derive(Default)]
struct Counter {
    total: usize,
    fetched: usize,
    set_up: usize,
}

impl Counter {
    fn read<'a>(&mut self, line: &'a str) -> Option<Event<'a>> {
        if let Some(stage) = line.strip_prefix("I: ") {
            return stage_name(stage).map(Event::Stage);
        }
        if let Some((_, new)) = line.split_once(" upgraded, ") {
            self.total = new.split(' ').next()?.parse().ok()?;
            (self.fetched, self.set_up) = (0, 0);
            return None;
        }
        if line.starts_with("Get:") {
            // "Get:7 http://deb.debian.org/debian bookworm/main amd64 debianutils amd64 5.7 [103 kB]"
            let package = line.split(' ').nth(4)?;
            if self.fetched >= self.total {
                return None;
            }
            self.fetched += 1;
            return Some(Event::Item { what: "fetching", name: package, done: self.fetched, total: self.total });
        }
        let package = line.strip_prefix("Setting up ")?.split([' ', ':']).next()?;
        self.set_up += 1;
        Some(Event::Item { what: "setting up", name: package, done: self.set_up, total: self.total.max(self.set_up) })
    }
}

/// The stages of mmdebstrap in our words; `None` for remarks.
fn stage_name(text: &str) -> Option<&'static str> {
    [
        ("running apt-get update", "fetching the lists of packages"),
        ("downloading packages", "fetching essential packages"),
        ("extracting archives", "unpacking essential packages"),
        ("installing essential packages", "setting up essential packages"),
        ("installing remaining packages", "installing the other packages"),
        ("cleaning package lists", "cleaning up"),
    ]
    .into_iter()
    .find_map(|(start, name)| text.starts_with(start).then_some(name))
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

    fn after(&self, start: &str) -> Vec<&str> {
        self.lines().filter_map(|line| line.strip_prefix(start)).collect()
    }

    /// Packages that apt does not know.
    pub(super) fn unknown_packages(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        let found = self.after("E: Unable to locate package ").into_iter().chain(
            // A name with a dot is taken for a pattern, and refused in other words.
            self.after("E: Couldn't find any package by glob ").into_iter().map(|name| name.trim_matches('\'')),
        );
        for name in found {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        names
    }

    /// An archive that cannot be reached: its address and the reason.
    pub(super) fn unreachable(&self) -> Option<(String, String)> {
        let line = self.after("E: Failed to fetch ").into_iter().next()?;
        let (address, reason) = line.split_once(' ').unwrap_or((line, "no reason given"));
        Some((address.to_owned(), reason.trim().to_owned()))
    }

    /// An archive whose signature does not check out.
    pub(super) fn untrusted(&self) -> Option<String> {
        let words =
            ["is not signed", "NO_PUBKEY", "signatures couldn't be verified", "signatures were invalid", "BADSIG"];
        self.lines()
            .find(|line| words.iter().any(|word| line.contains(word)))
            .map(|line| line.trim_start_matches(|c: char| c.is_ascii_uppercase() || c == ':' || c == ' ').to_owned())
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
        follow(lines.as_bytes(), io::sink(), &mut |_| {}).unwrap()
    }

    #[test]
    fn progress_counts_packages() {
        let lines = "I: automatically chosen mode: root\n\
            I: downloading packages with apt...\n\
            0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.\n\
            Get:1 http://deb.debian.org/debian bookworm/main amd64 dash amd64 0.5 [37 kB]\n\
            Get:2 http://deb.debian.org/debian bookworm/main amd64 bash amd64 5.2 [37 kB]\n\
            Setting up dash (0.5) ...\n";
        let mut seen = Vec::new();
        follow(lines.as_bytes(), io::sink(), &mut |event| {
            seen.push(match event {
                Event::Stage(stage) => stage.to_owned(),
                Event::Item { what, name, done, total } => format!("{what} {name} {done}/{total}"),
            });
        })
        .unwrap();
        assert_eq!(
            seen,
            ["fetching essential packages", "fetching dash 1/2", "fetching bash 2/2", "setting up dash 1/2"]
        );
    }

    #[test]
    fn the_reason_of_a_failure_is_found_in_what_the_tools_print() {
        let unknown = tail(
            "Building dependency tree...\nE: Unable to locate package nosuch\nE: Unable to locate package vmi\n\
             E: Unable to locate package nosuch\nE: mmdebstrap failed to run\n",
        );
        assert_eq!(unknown.unknown_packages(), ["nosuch", "vmi"]);

        let unreachable = tail(
            "Err:1 http://127.0.0.1:9/debian bookworm InRelease\n\
             E: Failed to fetch http://127.0.0.1:9/debian/dists/bookworm/InRelease  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)\n\
             E: Some index files failed to download.\n",
        );
        let (address, reason) = unreachable.unreachable().unwrap();
        assert_eq!(address, "http://127.0.0.1:9/debian/dists/bookworm/InRelease");
        assert!(reason.starts_with("Could not connect"));

        let untrusted = tail(
            "W: GPG error: http://x bookworm InRelease: The following signatures couldn't be verified: NO_PUBKEY 0E98\n",
        );
        assert!(untrusted.untrusted().unwrap().contains("NO_PUBKEY"));

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
