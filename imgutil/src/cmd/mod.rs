//! One module per subcommand: its arguments and the few lines that call the library and print.

pub mod build;
pub mod exec;
pub mod inspect;
pub mod pack;
pub mod unpack;
pub mod verify;

/// An error and its causes as one line that a terminal can take: a cause that the message before it ends with is not said
/// twice, and control characters (a file name may have any) are escaped.
#[must_use]
pub fn error_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    printable(&line)
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
    use anyhow::anyhow;

    #[test]
    fn errors_are_one_line_without_repetition() {
        let error = anyhow!("No space left").context("writing: No space left").context("cannot pack 'a\nb\u{1b}[31m'");
        assert_eq!(super::error_line(&error), "cannot pack 'a\\nb\\u{1b}[31m': writing: No space left");
    }
}
