//! A table of results: printed for people, written as JSON for programs.

use super::pairs::{Paired, median};
use anyhow::Context as _;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

/// What a row has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bar {
    /// Ratio (or figure, where there is no peer) at most this.
    AtMost(f64),
    /// Ratio (or figure) at least this.
    AtLeast(f64),
    /// Shown only.
    None,
}

impl Bar {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bar) => value <= bar,
            Self::AtLeast(bar) => value >= bar,
            Self::None => true,
        }
    }

    fn text(self) -> Option<String> {
        match self {
            Self::AtMost(bar) => Some(format!("<= {}", figure(bar))),
            Self::AtLeast(bar) => Some(format!(">= {}", figure(bar))),
            Self::None => None,
        }
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured.
    pub row: String,
    /// Our figure: the median.
    pub ours: Option<f64>,
    /// The peer's: the median.
    pub peer: Option<f64>,
    /// Who the peer is; empty where a bar is of our figure alone.
    pub peer_name: String,
    /// Unit of both figures.
    pub unit: String,
    /// Median over the pairs of ours / peer.
    pub ratio: Option<f64>,
    /// Smallest and largest ratio of a pair.
    pub spread: Option<(f64, f64)>,
    /// What has to be reached.
    pub bar: Option<String>,
    /// Whether it was.
    pub ok: bool,
    /// What a reader must know: a spread across the bar, why a peer did not run.
    pub note: String,
}

impl Row {
    /// Ours beside a peer's, in pairs.
    #[must_use]
    pub fn paired(row: &str, unit: &str, peer_name: &str, figures: &Paired, bar: Bar) -> Self {
        let ratios = figures.ratios();
        let ratio = median(&ratios);
        let spread = ratios.first().copied().zip(ratios.last().copied());
        let crosses = spread.is_some_and(|(low, high)| bar.holds(low) != bar.holds(high));
        Self {
            row: row.to_owned(),
            ours: Some(median(&figures.ours)),
            peer: Some(median(&figures.peer)),
            peer_name: peer_name.to_owned(),
            unit: unit.to_owned(),
            ratio: Some(ratio),
            spread,
            bar: bar.text(),
            ok: bar.holds(ratio),
            note: if crosses { "the spread crosses the bar".to_owned() } else { String::new() },
        }
    }

    /// A figure of ours alone.
    #[must_use]
    pub fn alone(row: &str, unit: &str, ours: f64, bar: Bar) -> Self {
        Self {
            row: row.to_owned(),
            ours: Some(ours),
            peer: None,
            peer_name: String::new(),
            unit: unit.to_owned(),
            ratio: None,
            spread: None,
            bar: bar.text(),
            ok: bar.holds(ours),
            note: String::new(),
        }
    }

    /// A peer that could not be measured: not ok where a bar holds against it.
    #[must_use]
    pub fn without_peer(row: &str, unit: &str, peer_name: &str, ours: Option<f64>, bar: Bar, why: &str) -> Self {
        Self {
            row: row.to_owned(),
            ours,
            peer: None,
            peer_name: peer_name.to_owned(),
            unit: unit.to_owned(),
            ratio: None,
            spread: None,
            bar: bar.text(),
            ok: matches!(bar, Bar::None),
            note: format!("{peer_name} could not be measured: {why}"),
        }
    }

    /// The same with a remark.
    #[must_use]
    pub fn noted(mut self, note: &str) -> Self {
        if !self.note.is_empty() {
            self.note.push_str("; ");
        }
        self.note.push_str(note);
        self
    }
}

/// The results of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// As given to `make bench TABLE=`.
    pub name: String,
    /// What was measured on: input sizes, versions of peers, levels.
    pub facts: Vec<String>,
    /// The comparisons.
    pub rows: Vec<Row>,
}

impl Table {
    /// An empty one.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), facts: Vec::new(), rows: Vec::new() }
    }

    /// Whether every row reached its bar.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.rows.iter().all(|row| row.ok)
    }

    /// As Markdown, as docs/benchmarks.md has it.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n", self.name);
        for fact in &self.facts {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "- {fact}");
        }
        text.push_str("\n| What | Ours | Peer | Ratio (smallest to largest) | Bar | |\n|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let value =
                |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{} {}", figure(v), row.unit));
            let peer = if row.peer_name.is_empty() {
                String::new()
            } else {
                format!("{} ({})", value(row.peer), row.peer_name)
            };
            let ratio = match (row.ratio, row.spread) {
                (Some(ratio), Some((low, high))) => format!("{ratio:.3} ({low:.3} to {high:.3})"),
                _ => String::new(),
            };
            let verdict = match (&row.bar, row.ok) {
                (None, true) => "",
                (_, true) => "ok",
                (_, false) => "**not ok**",
            };
            let note = if row.note.is_empty() { String::new() } else { format!("; {}", row.note) };
            let _ = writeln!(
                text,
                "| {} | {} | {peer} | {ratio} | {} | {verdict}{note} |",
                row.row,
                value(row.ours),
                row.bar.as_deref().unwrap_or_default()
            );
        }
        text
    }

    /// Writes the rows as JSON, beside and renamed.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("making '{}'", dir.display()))?;
        let path = dir.join(format!("{}.json", self.name));
        let new = path.with_extension("json.new");
        std::fs::write(&new, serde_json::to_vec_pretty(&self.rows)?)
            .and_then(|()| std::fs::rename(&new, &path))
            .with_context(|| format!("writing '{}'", path.display()))
    }
}

/// With as many digits as are worth reading.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        large if large >= 100.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: &[f64], bar: Bar) -> Row {
        let figures = Paired { ours: ours.to_vec(), peer: vec![1.0; ours.len()] };
        Row::paired("x", "s", "peer", &figures, bar)
    }

    #[test]
    fn the_median_decides_and_a_spread_across_the_bar_is_said() {
        let inside = row(&[0.9, 1.0, 1.01], Bar::AtMost(1.05));
        assert!(inside.ok && inside.note.is_empty());
        let crossing = row(&[0.9, 1.0, 1.2], Bar::AtMost(1.05));
        assert!(crossing.ok && crossing.note.contains("crosses"));
        assert!(!row(&[1.0, 1.1, 1.2], Bar::AtMost(1.05)).ok);
        assert!(row(&[8.0, 9.0, 9.0], Bar::AtLeast(8.0)).ok);
    }

    #[test]
    fn a_peer_that_did_not_run_says_why_and_is_not_ok_where_there_is_a_bar() {
        let row = |bar| Row::without_peer("x", "s", "rclone", Some(1.0), bar, "it crashed");
        assert!(row(Bar::None).ok);
        let row = row(Bar::AtLeast(1.0));
        assert!(!row.ok);
        let table = Table { name: "t".into(), facts: vec![], rows: vec![row] };
        assert!(!table.is_ok());
        assert!(table.markdown().contains("rclone could not be measured: it crashed"));
    }
}
