//! One module per subcommand: its arguments and the few lines that call the library and print.

pub mod build;
pub mod capture;
mod cli;
pub mod diff;
pub mod exec;
pub mod inspect;
pub mod list;
pub mod pack;
pub mod prune;
pub mod sbom;
pub mod test;
pub mod unpack;
pub mod verify;
mod warnings;

pub use cli::Cli;

use crate::scrub::LeftOut;

/// An error and its causes as one line that a terminal can take: a cause that a message before it has named is not said twice, and control characters (a file name may have any) are escaped.
#[must_use]
pub fn error_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    if error.chain().any(is_full_disk) {
        line.push_str("; make room there, or choose another place");
    }
    printable(&line)
}

/// Whether a cause is a file system without room.
pub(crate) fn is_full_disk(cause: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind;
    let kind = match (cause.downcast_ref::<std::io::Error>(), cause.downcast_ref::<rustix::io::Errno>()) {
        (Some(error), _) => error.kind(),
        (None, Some(error)) => error.kind(),
        (None, None) => return false,
    };
    matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Says on standard error which of the user's patterns are of no use: a mistyped one leaves in what was to be left out.
pub(crate) fn warn_of_unmatched(left_out: &LeftOut) {
    if !left_out.unmatched.is_empty() {
        let patterns: Vec<String> = left_out.unmatched.iter().map(|pattern| printable(pattern)).collect();
        eprintln!("imgutil: warning: patterns that match nothing: {}", patterns.join(" "));
    }
}

/// Text with its control characters escaped.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};
    use std::io;

    #[test]
    fn errors_are_one_line_without_repetition() {
        let error = anyhow!("No space left").context("writing: No space left").context("cannot pack 'a\nb\u{1b}[31m'");
        assert_eq!(super::error_line(&error), "cannot pack 'a\\nb\\u{1b}[31m': writing: No space left");
        let error = anyhow!("no header").context("cannot read 'a': no header; decompress it first");
        assert_eq!(super::error_line(&error), "cannot read 'a': no header; decompress it first");
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        for error in [
            Err::<(), _>(io::Error::from_raw_os_error(28)).context("cannot write 'a'").unwrap_err(),
            Err::<(), _>(rustix::io::Errno::NOSPC).context("cannot write 'a'").unwrap_err(),
        ] {
            let line = super::error_line(&error);
            assert!(line.starts_with("cannot write 'a': No space left on device"), "{line}");
            assert!(line.ends_with("; make room there, or choose another place"), "{line}");
        }
        let other = Err::<(), _>(io::Error::from_raw_os_error(2)).context("cannot write 'a'").unwrap_err();
        assert!(!super::error_line(&other).contains("room"));
    }
}
