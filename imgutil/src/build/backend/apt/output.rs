//! What apt, dpkg and mmdebstrap print: as progress, and as the reason of a failure. Parsing is apart from reading, so that it
//! is tested with recorded lines.

use super::index::Index;
use crate::build::near::near;
use crate::build::output::{Meaning, Tail};
use crate::build::{BuildError, Event};
use std::path::Path;

/// Counts packages fetched and set up.
#[derive(Default)]
pub(super) struct Counter {
    total: usize,
    fetched: usize,
    set_up: usize,
}

impl Meaning for Counter {
    fn of<'a>(&mut self, line: &'a str) -> Option<Event<'a>> {
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

/// Why a tool failed while it was `doing` something in `place`. `index` offers names near an unknown one.
pub(super) fn explain(doing: &str, tail: Tail, index: Option<&Index>, place: &Path) -> BuildError {
    let unknown = unknown_packages(&tail);
    if let Some((name, others)) = unknown.split_first() {
        let near = index.map(|index| near(name, index.names())).unwrap_or_default();
        return BuildError::UnknownPackage { name: name.clone(), near, others: others.to_vec() };
    }
    if let Some(what) = untrusted(&tail) {
        return BuildError::Untrusted(what);
    }
    if let Some(what) = altered(&tail) {
        return BuildError::Altered(what);
    }
    match unreachable(&tail) {
        // A full disk is told as a failed fetch.
        Some((address, reason)) if !reason.contains("No space left") => BuildError::Unreachable { address, reason },
        _ => {
            let reason = tail.reason();
            BuildError::tool(doing, &reason, tail, place)
        }
    }
}

/// Packages that apt does not know.
fn unknown_packages(tail: &Tail) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let found = tail.after("E: Unable to locate package ").into_iter().chain(
        // A name with a dot is taken for a pattern, and refused in other words.
        tail.after("E: Couldn't find any package by glob ").into_iter().map(|name| name.trim_matches('\'')),
    );
    for name in found {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// An archive that cannot be reached: its address and the reason.
fn unreachable(tail: &Tail) -> Option<(String, String)> {
    let line = tail.after("E: Failed to fetch ").into_iter().next()?;
    let (address, reason) = line.split_once(' ').unwrap_or((line, "no reason given"));
    Some((address.to_owned(), reason.trim().to_owned()))
}

/// An archive whose signature does not check out.
fn untrusted(tail: &Tail) -> Option<String> {
    let words = ["is not signed", "NO_PUBKEY", "signatures couldn't be verified", "signatures were invalid", "BADSIG"];
    tail.lines()
        .find(|line| words.iter().any(|word| line.contains(word)))
        .map(|line| line.trim_start_matches(|c: char| c.is_ascii_uppercase() || c == ':' || c == ' ').to_owned())
}

/// An index or a package that is not the file that the signed index above it names.
fn altered(tail: &Tail) -> Option<String> {
    let words = ["Hash Sum mismatch", "File has unexpected size"];
    let lines = tail.after("E: Failed to fetch ");
    let line = lines.into_iter().find(|line| words.iter().any(|word| line.contains(word)))?;
    Some(line.split(' ').next().unwrap_or(line).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::output::{NoMeaning, follow};

    fn tail(lines: &str) -> Tail {
        follow(lines.as_bytes(), std::io::sink(), &mut NoMeaning, &mut |_| {}).unwrap()
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
        follow(lines.as_bytes(), std::io::sink(), &mut Counter::default(), &mut |event| {
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
        assert_eq!(unknown_packages(&unknown), ["nosuch", "vmi"]);

        let lost = tail(
            "Err:1 http://127.0.0.1:9/debian bookworm InRelease\n\
             E: Failed to fetch http://127.0.0.1:9/debian/dists/bookworm/InRelease  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)\n\
             E: Some index files failed to download.\n",
        );
        let (address, reason) = unreachable(&lost).unwrap();
        assert_eq!(address, "http://127.0.0.1:9/debian/dists/bookworm/InRelease");
        assert!(reason.starts_with("Could not connect"));

        let bad = tail(
            "W: GPG error: http://x bookworm InRelease: The following signatures couldn't be verified: NO_PUBKEY 0E98\n",
        );
        assert!(untrusted(&bad).unwrap().contains("NO_PUBKEY"));

        let other = tail(
            "E: Failed to fetch copy:/a/./Packages  File has unexpected size (7 != 8). Mirror sync in progress? [IP: 1]\n   Hashes of expected file:\n\
             E: Some index files failed to download.\n",
        );
        let sum = tail("E: Failed to fetch copy:/a/./own.deb  Hash Sum mismatch\n   Hashes of expected file:\n");
        assert_eq!([altered(&other).unwrap(), altered(&sum).unwrap()], ["copy:/a/./Packages", "copy:/a/./own.deb"]);
        assert_eq!((altered(&lost), untrusted(&other)), (None, None));
    }
}
