//! A passphrase, as people give it: in a file, on standard input, or typed at a terminal that does not show it. Never as an argument, which
//! everybody on the machine can read.

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{self, BufRead as _, IsTerminal as _, Read, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest passphrase, in bytes.
const MAX: usize = 4096;

/// There is no passphrase.
#[derive(Debug, thiserror::Error)]
pub enum PassphraseError {
    /// The file cannot be read.
    #[error("reading the passphrase from '{}': {cause}", file.display())]
    Read {
        /// Which; `-` is standard input.
        file: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Others can read it.
    #[error("'{path}' can be read by others than its owner: `chmod 600 '{path}'`", path = .0.display())]
    Exposed(PathBuf),
    /// It is empty, or no text, or longer than any is.
    #[error("'{}' holds no passphrase: one line of text, of at most {MAX} bytes", .0.display())]
    Unusable(PathBuf),
    /// Nobody to ask.
    #[error(
        "there is no terminal to ask for the passphrase: `--passphrase-file FILE` names a file that holds it ('-': standard input)"
    )]
    NoTerminal,
    /// The terminal failed.
    #[error("asking for the passphrase: {0}")]
    Terminal(io::Error),
    /// Two that are to be the same are not.
    #[error("the two passphrases are not the same")]
    Differ,
}

/// Reads it from a file that only its owner can read; `-` is standard input. The end of its line is not part of it.
///
/// # Errors
/// There is none.
pub fn read(file: &Path) -> Result<Zeroizing<String>, PassphraseError> {
    let failed = |cause| PassphraseError::Read { file: file.to_owned(), cause };
    // Longer than any passphrase from the start, so that growing leaves no copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX + 3));
    let limit = MAX as u64 + 3;
    if file == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        let open = File::open(file).map_err(failed)?;
        if open.metadata().map_err(failed)?.mode() & 0o077 != 0 {
            return Err(PassphraseError::Exposed(file.to_owned()));
        }
        open.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    }
    line(&bytes).ok_or_else(|| PassphraseError::Unusable(file.to_owned()))
}

/// The only line of a text.
fn line(bytes: &[u8]) -> Option<Zeroizing<String>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    let is_one = !text.is_empty() && text.len() <= MAX && !text.contains('\n');
    is_one.then(|| Zeroizing::new(text.to_owned()))
}

/// Asks on the terminal.
///
/// # Errors
/// Standard input is none; the answer is empty.
pub fn ask(question: &str) -> Result<Zeroizing<String>, PassphraseError> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(PassphraseError::NoTerminal);
    }
    let failed = PassphraseError::Terminal;
    eprint!("{question}");
    io::stderr().flush().map_err(failed)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX + 3));
    let answer = {
        let _hidden = Hidden::new().map_err(failed)?;
        stdin.lock().take(MAX as u64 + 3).read_until(b'\n', &mut bytes)
    };
    // The end of the line was not shown either.
    eprintln!();
    answer.map_err(failed)?;
    line(&bytes).ok_or_else(|| PassphraseError::Unusable("-".into()))
}

/// Asks twice, for one that is new.
///
/// # Errors
/// As [`ask`]; the two are not the same.
pub fn ask_new(question: &str) -> Result<Zeroizing<String>, PassphraseError> {
    let first = ask(question)?;
    if *ask("Once more: ")? == *first { Ok(first) } else { Err(PassphraseError::Differ) }
}

/// The terminal does not show what is typed, until this goes.
struct Hidden(Termios);

impl Hidden {
    fn new() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // Nobody is left to tell; a terminal that is gone shows nothing.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_one_line() {
        let said = |text: &str| line(text.as_bytes()).map(|line| line.to_string());
        for (text, expected) in [
            ("secret", Some("secret")),
            ("two words\n", Some("two words")),
            (" kept \r\n", Some(" kept ")),
            ("", None),
            ("\n", None),
            ("a\nb\n", None),
            ("a\n\n", None),
        ] {
            assert_eq!(said(text).as_deref(), expected, "{text:?}");
        }
        assert!(line(&[0xff]).is_none());
        assert!(said(&"x".repeat(MAX)).is_some() && said(&"x".repeat(MAX + 1)).is_none());
    }
}
