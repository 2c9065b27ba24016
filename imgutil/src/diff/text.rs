//! A difference as lines for people.

use super::{Changed, Difference, Kind, Named};
use crate::cmd::printable;
use crate::progress::bytes_text;
use std::fmt::Write as _;
use std::path::Path;

/// Lines: `+` added, `-` removed, `~` changed; a directory with all below it is one line.
pub(super) fn of(difference: &Difference) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    let packages = &difference.packages;
    line(format!(
        "packages: {} added, {} removed, {} changed",
        packages.added.len(),
        packages.removed.len(),
        packages.changed.len()
    ));
    for (sign, list) in [('+', &packages.added), ('-', &packages.removed)] {
        for package in list {
            line(format!(
                "{sign} {} {} {}",
                printable(&package.name),
                printable(&package.version),
                printable(&package.arch)
            ));
        }
    }
    for package in &packages.changed {
        let versions = |versions: &[String]| printable(&versions.join(", "));
        line(format!("~ {} {} -> {}", printable(&package.name), versions(&package.from), versions(&package.to)));
    }
    line(format!(
        "files: {} added, {} removed, {} changed",
        difference.added.len(),
        difference.removed.len(),
        difference.changed.len()
    ));
    for (sign, list) in [('+', &difference.added), ('-', &difference.removed)] {
        for collected in collect(list) {
            line(format!("{sign} {collected}"));
        }
    }
    for changed in &difference.changed {
        line(format!("~ {}", changes(changed)));
    }
    let (a, b) = (difference.total_a, difference.total_b);
    let (sign, change) = if b.bytes < a.bytes { ('-', a.bytes - b.bytes) } else { ('+', b.bytes - a.bytes) };
    line(format!(
        "total: {} in {} files, {} packages -> {} in {} files, {} packages ({sign}{})",
        bytes_text(a.bytes),
        a.files,
        a.packages,
        bytes_text(b.bytes),
        b.files,
        b.packages,
        bytes_text(change)
    ));
    text
}

/// Files by name; what is below a directory of the same list is counted with it. The list is in the order of paths.
fn collect(list: &[Named]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = list;
    while let Some((first, after)) = rest.split_first() {
        let name = printable(&first.path.display().to_string());
        let below = after.iter().take_while(|named| named.path.starts_with(&first.path)).count();
        if first.entry.kind == Kind::Directory {
            let bytes: u64 = after[..below].iter().map(|named| named.entry.size).sum();
            lines.push(format!("{name}/ ({below} files below it, {})", bytes_text(bytes)));
            rest = &after[below..];
        } else {
            lines.push(match first.entry.kind {
                Kind::File => format!("{name} ({})", bytes_text(first.entry.size)),
                Kind::Symlink => format!("{name} -> {}", printable(&target(first.entry.target.as_deref()))),
                _ => name,
            });
            rest = after;
        }
    }
    lines
}

fn target(path: Option<&Path>) -> String {
    path.unwrap_or(Path::new("")).display().to_string()
}

fn changes(changed: &Changed) -> String {
    let (from, to) = (&changed.from, &changed.to);
    let mut text = format!("{}:", printable(&changed.path.display().to_string()));
    for (index, what) in changed.what.iter().enumerate() {
        let separator = if index == 0 { " " } else { ", " };
        let change = match *what {
            "size" => format!("size {} -> {}", bytes_text(from.size), bytes_text(to.size)),
            "mode" => format!("mode {:04o} -> {:04o}", from.mode, to.mode),
            "owner" => format!("owner {}:{} -> {}:{}", from.uid, from.gid, to.uid, to.gid),
            "target" => {
                let (from, to) = (target(from.target.as_deref()), target(to.target.as_deref()));
                format!("target {} -> {}", printable(&from), printable(&to))
            }
            "type" => format!("{:?} -> {:?}", from.kind, to.kind).to_lowercase(),
            other => other.to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{change}");
    }
    text
}
