//! What of a tree does not go into an image: secrets, what belongs to one machine, what is left over, and what the user excludes.
//!
//! The tree itself is never changed: the packer looks at it through a [`View`]. Whether a private key is left is decided by what
//! files hold ([`KeyGuard`], [`KeyRules`]), while they are read to be packed.

mod guard;
mod keys;
mod md5;
mod owned;
mod pattern;
mod rules;

pub(crate) use guard::{KeyGuard, KeyRules};
pub(crate) use keys::BOUND as KEY_BOUND;
pub(crate) use owned::FILE as OWNED_BOUND;
pub use owned::Owned;
pub use pattern::PatternError;
pub use rules::{Action, Category, RULES, Rule};

use anyhow::{Context as _, Result, bail};
use pattern::{Patterns, Place};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What the user wants left out or kept.
#[derive(Debug, Clone, Default)]
pub struct ViewOptions {
    /// Leave out what [`RULES`] name, and refuse private keys.
    pub scrub: bool,
    /// Patterns of what is left out besides.
    pub exclude: Vec<Vec<u8>>,
    /// Patterns of files that may hold a private key.
    pub allow_keys: Vec<Vec<u8>>,
}

/// Something that was left out, or emptied.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Scrubbed {
    /// Its path from the root of the image; a directory stands for all below it.
    #[serde(serialize_with = "crate::lossy::path")]
    pub path: PathBuf,
    /// Why.
    pub category: Category,
    /// It is in the image, without contents.
    pub emptied: bool,
    /// Bytes that it held, if it is a file.
    pub bytes: u64,
}

/// All that the image lacks on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// By the rules.
    pub scrubbed: Vec<Scrubbed>,
    /// By the user's patterns.
    #[serde(serialize_with = "crate::lossy::paths")]
    pub excluded: Vec<PathBuf>,
    /// Patterns of the user's that matched nothing.
    pub unmatched: Vec<String>,
}

impl LeftOut {
    /// What the rules took, as one line for each category; empty if they took nothing.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut counts: BTreeMap<Category, (usize, u64)> = BTreeMap::new();
        for scrubbed in &self.scrubbed {
            let (count, bytes) = counts.entry(scrubbed.category).or_default();
            *count += 1;
            *bytes += scrubbed.bytes;
        }
        let mut text = String::new();
        for (category, (count, bytes)) in counts {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{} {count}", if text.is_empty() { "" } else { ", " }, category.text());
            if bytes > 0 {
                let _ = write!(text, " ({})", crate::progress::bytes_text(bytes));
            }
        }
        text
    }
}

/// How the packer sees a tree.
#[derive(Debug, Default)]
pub struct View {
    rules: Patterns,
    exclude: Patterns,
    excluded_by: Vec<(String, bool)>,
    left_out: LeftOut,
    matched: Vec<usize>,
}

/// A directory, as the patterns see it.
#[derive(Debug, Clone, Default)]
pub(crate) struct ViewPlace {
    rules: Place,
    exclude: Place,
}

/// What an entry is, for those who judge it.
pub(crate) struct Candidate<'a> {
    pub(crate) path: &'a Path,
    pub(crate) name: &'a [u8],
    pub(crate) is_directory: bool,
    pub(crate) is_regular: bool,
    pub(crate) bytes: u64,
}

/// What becomes of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Keep,
    LeaveOut,
    Empty,
}

impl View {
    /// Makes the view that the options ask for.
    pub fn new(options: &ViewOptions) -> Result<Self> {
        let mut view = Self::default();
        if options.scrub {
            for rule in RULES {
                view.rules.add(rule.pattern.as_bytes())?;
            }
        }
        for pattern in &options.exclude {
            view.exclude.add(pattern)?;
            view.excluded_by.push((String::from_utf8_lossy(pattern).into_owned(), false));
        }
        Ok(view)
    }

    /// The place of the root's entries.
    pub(crate) fn root(&self) -> ViewPlace {
        ViewPlace { rules: self.rules.root(), exclude: self.exclude.root() }
    }

    /// Goes down into a directory that is kept without being judged: a mount point, on the way to the root of its file system.
    pub(crate) fn step(&self, place: &ViewPlace, name: &[u8]) -> ViewPlace {
        let mut matched = Vec::new();
        ViewPlace {
            rules: self.rules.step(&place.rules, name, true, &mut matched),
            exclude: self.exclude.step(&place.exclude, name, true, &mut matched),
        }
    }

    /// Judges an entry of the directory at `place`; `head` reads the first bytes of a regular file.
    pub(crate) fn judge(
        &mut self,
        place: &ViewPlace,
        entry: &Candidate<'_>,
        head: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<(Verdict, ViewPlace)> {
        let mut matched = std::mem::take(&mut self.matched);
        let exclude = self.exclude.step(&place.exclude, entry.name, entry.is_directory, &mut matched);
        for pattern in &matched {
            self.excluded_by[*pattern].1 = true;
        }
        let is_excluded = !matched.is_empty();
        let rules = self.rules.step(&place.rules, entry.name, entry.is_directory, &mut matched);
        let verdict = if is_excluded {
            self.left_out.excluded.push(entry.path.to_owned());
            Verdict::LeaveOut
        } else {
            let verdict = self.scrub(&matched, entry, head);
            verdict.with_context(|| format!("cannot look into '{}'", entry.path.display()))?
        };
        self.matched = matched;
        Ok((verdict, ViewPlace { rules, exclude }))
    }

    fn scrub(
        &mut self,
        matched: &[usize],
        entry: &Candidate<'_>,
        head: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Verdict> {
        let mut head = Some(head);
        let mut bytes = None;
        for rule in matched.iter().map(|index| &RULES[*index]) {
            let verdict = match rule.action {
                Action::Remove => Verdict::LeaveOut,
                Action::RemoveFile if !entry.is_directory => Verdict::LeaveOut,
                Action::Empty if entry.is_regular && entry.bytes > 0 => Verdict::Empty,
                Action::RemoveIfHolds(needles) if entry.is_regular => {
                    if let Some(head) = head.take() {
                        bytes = Some(head()?);
                    }
                    let text = bytes.as_deref().unwrap_or_default();
                    if !needles.iter().any(|needle| memchr::memmem::find(text, needle.as_bytes()).is_some()) {
                        continue;
                    }
                    Verdict::LeaveOut
                }
                _ => continue,
            };
            self.left_out.scrubbed.push(Scrubbed {
                path: entry.path.to_owned(),
                category: rule.category,
                emptied: verdict == Verdict::Empty,
                bytes: if entry.is_regular { entry.bytes } else { 0 },
            });
            return Ok(verdict);
        }
        Ok(Verdict::Keep)
    }

    /// What was left out.
    #[must_use]
    pub fn finish(mut self) -> LeftOut {
        self.left_out.unmatched =
            self.excluded_by.into_iter().filter(|(_, used)| !used).map(|(pattern, _)| pattern).collect();
        self.left_out
    }
}

/// Reads a file of patterns: one a line; empty lines and lines that begin with `#` are passed over.
pub fn read_patterns(path: &Path) -> Result<Vec<Vec<u8>>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read the patterns '{}'", path.display()))?;
    let mut patterns = Vec::new();
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let context = || format!("in '{}', line {number}", path.display());
        if line.starts_with(b"!") || line.starts_with(b"+ ") || line.starts_with(b"- ") {
            bail!("{}: exceptions and rsync's '+' and '-' are not known: write plain patterns", context());
        }
        Patterns::default().add(line).with_context(context)?;
        patterns.push(line.to_vec());
    }
    Ok(patterns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_a_pattern() {
        View::new(&ViewOptions { scrub: true, ..ViewOptions::default() }).expect("compiles");
        let rooted = |rule: &Rule| rule.pattern.starts_with('/') || rule.pattern.starts_with("**/");
        assert!(RULES.iter().all(rooted), "a rule says where it applies");
    }
}
