//! The end of `imgutil exec --try`: shows what has changed, asks, keeps or drops.

use crate::cmd::printable;
use crate::exec::{Change, Kind, State, Trial};
use serde::Serialize;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};

/// What becomes of the changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    Keep,
    Drop,
    /// The user is asked at the terminal; without one they are dropped.
    Ask,
}

/// The document of `--json`.
#[derive(Serialize)]
struct Document<'a> {
    changes: &'a [Change],
    added: usize,
    changed: usize,
    removed: usize,
    kept: bool,
}

/// The command's streams when standard output is for the document.
pub(super) fn streams_for_json() -> io::Result<[OwnedFd; 3]> {
    let above = |fd: &dyn AsFd| -> io::Result<OwnedFd> { Ok(rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3)?) };
    Ok([above(&io::stdin())?, above(&io::stderr())?, above(&io::stderr())?])
}

/// Shows the changes and does with them what was chosen. `ran`: the command could be started; else there is nothing to show.
pub(super) fn settle(trial: Trial, choice: Choice, json: bool, ran: bool) -> anyhow::Result<()> {
    if !ran {
        return Ok(trial.drop_changes()?);
    }
    let changes = trial.changes()?;
    if !json {
        show(&changes)?;
    }
    let keep = match choice {
        Choice::Keep => true,
        Choice::Drop => false,
        Choice::Ask => !changes.is_empty() && ask()?,
    };
    if keep {
        trial.keep()?;
    } else {
        trial.drop_changes()?;
    }
    if json {
        print_json(&changes, keep)?;
    } else if !changes.is_empty() {
        eprintln!("imgutil: the changes are {}", if keep { "kept" } else { "dropped" });
    }
    Ok(())
}

fn count(changes: &[Change], kind: Kind) -> usize {
    changes.iter().filter(|change| change.change == kind).count()
}

fn print_json(changes: &[Change], kept: bool) -> anyhow::Result<()> {
    let document = Document {
        changes,
        added: count(changes, Kind::Added),
        changed: count(changes, Kind::Changed),
        removed: count(changes, Kind::Removed),
        kept,
    };
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &document)?;
    writeln!(out)?;
    Ok(())
}

/// One line for each change, on standard error: standard output is the command's.
fn show(changes: &[Change]) -> io::Result<()> {
    let mut err = io::stderr().lock();
    for change in changes {
        writeln!(err, "{}", line(change))?;
    }
    writeln!(
        err,
        "imgutil: {} added, {} changed, {} removed",
        count(changes, Kind::Added),
        count(changes, Kind::Changed),
        count(changes, Kind::Removed)
    )
}

fn line(change: &Change) -> String {
    let path = printable(&change.path);
    match (&change.before, &change.after) {
        (None, Some(after)) => format!("+ {} {path}{}", after.mode, size(after)),
        (Some(before), None) => format!("- {} {path}{}", before.mode, size(before)),
        (Some(before), Some(after)) => {
            let mut notes = Vec::new();
            for word in &change.what {
                notes.push(match word.as_str() {
                    "content" if before.size != after.size => format!("{} -> {} bytes", before.size, after.size),
                    "mode" => format!("mode {} -> {}", before.mode, after.mode),
                    "owner" => format!("owner {}:{} -> {}:{}", before.uid, before.gid, after.uid, after.gid),
                    "type" => format!("{} -> {}", before.kind, after.kind),
                    word => word.to_owned(),
                });
            }
            format!("~ {} {path} ({})", after.mode, notes.join(", "))
        }
        (None, None) => path,
    }
}

fn size(state: &State) -> String {
    match (state.kind.as_str(), state.entries) {
        ("directory", Some(entries)) => format!("/ ({entries} entries, {} bytes)", state.size),
        ("directory", None) => "/".to_owned(),
        ("file", _) => format!(" ({} bytes)", state.size),
        (kind, _) => format!(" ({kind})"),
    }
}

/// Asks at the terminal. No terminal, or no answer: no.
fn ask() -> io::Result<bool> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(false);
    }
    loop {
        eprint!("Keep these changes? [y/N] ");
        let mut answer = String::new();
        if io::stdin().lock().read_line(&mut answer)? == 0 {
            return Ok(false);
        }
        match answer.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => return Ok(true),
            "" | "n" | "no" => return Ok(false),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_line() {
        let state = |kind: &str, mode: &str, size| State {
            kind: kind.to_owned(),
            mode: mode.to_owned(),
            uid: 0,
            gid: 0,
            size,
            entries: None,
        };
        let change = |change, before, after, what: &[&str]| Change {
            path: "/etc/a\nb".to_owned(),
            change,
            before,
            after,
            what: what.iter().map(|word| (*word).to_owned()).collect(),
        };
        let removed = State { entries: Some(3), ..state("directory", "0755", 9) };
        for (change, expected) in [
            (change(Kind::Added, None, Some(state("file", "0644", 5)), &[]), "+ 0644 /etc/a\\nb (5 bytes)"),
            (change(Kind::Added, None, Some(state("symlink", "0777", 0)), &[]), "+ 0777 /etc/a\\nb (symlink)"),
            (change(Kind::Removed, Some(removed), None, &[]), "- 0755 /etc/a\\nb/ (3 entries, 9 bytes)"),
            (
                change(
                    Kind::Changed,
                    Some(state("file", "0644", 5)),
                    Some(state("file", "0600", 7)),
                    &["content", "mode", "time"],
                ),
                "~ 0600 /etc/a\\nb (5 -> 7 bytes, mode 0644 -> 0600, time)",
            ),
        ] {
            assert_eq!(line(&change), expected);
        }
    }
}
