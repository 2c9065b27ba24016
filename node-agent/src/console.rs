//! Lines for the person in front of the console. In the initramfs standard error is the console; under systemd it is the journal.

use std::io::Write as _;

/// Prints `moor-agent: WORD: SENTENCE` on one line, whatever the sentence holds.
pub fn say(word: &str, sentence: &str) {
    // A console that cannot be written to must not stop a boot.
    let _ = writeln!(std::io::stderr(), "moor-agent: {word}: {}", one_line(sentence));
}

/// `text` without line breaks and other control characters, so that what a server or a program said cannot forge lines.
#[must_use]
pub fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for part in text.split(|c: char| c.is_control()).filter(|part| !part.is_empty()) {
        if !out.is_empty() && !out.ends_with(' ') {
            out.push(' ');
        }
        out.push_str(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_stays_on_its_line() {
        assert_eq!(one_line("a\nmoor-agent: done: ready\r\n\x1b[2Jb"), "a moor-agent: done: ready [2Jb");
        assert_eq!(one_line(""), "");
    }
}
