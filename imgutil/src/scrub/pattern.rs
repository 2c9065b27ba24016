//! Patterns of paths, matched on the way down a tree: each directory carries only the patterns that can still match below it.
//!
//! As in rsync: `*`, `?` and `[...]` stay within a name, `**` crosses directories, a leading `/` ties a pattern to the root of the
//! tree (otherwise it matches at any depth), a trailing `/` means directories only, `\` takes a meaning away.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Why a line is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{pattern}' is no pattern: {why}")]
pub struct PatternError {
    pattern: String,
    why: &'static str,
}

/// Several patterns that are matched together.
#[derive(Debug, Default)]
pub(crate) struct Patterns {
    patterns: Vec<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    segments: Vec<Segment>,
    directories_only: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Segment {
    /// `**`: any number of names, also none.
    AnyDepth,
    /// A name without special characters.
    Name(Vec<u8>),
    /// A name with some.
    Glob(Vec<Token>),
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    Any,
    Star,
    Class { negated: bool, ranges: Vec<(u8, u8)> },
}

/// Which patterns can match an entry of one directory, and by which of their parts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place(Vec<(u32, u32)>);

impl Patterns {
    /// Adds a pattern. Its index is that of the call.
    pub(crate) fn add(&mut self, text: &[u8]) -> Result<(), PatternError> {
        let error = |why| PatternError { pattern: String::from_utf8_lossy(text).into_owned(), why };
        let (mut rest, mut segments) = (text, Vec::new());
        let directories_only = rest.ends_with(b"/");
        if directories_only {
            rest = &rest[..rest.len() - 1];
        }
        match rest.strip_prefix(b"/") {
            Some(rooted) => rest = rooted,
            None => segments.push(Segment::AnyDepth),
        }
        for part in rest.split(|byte| *byte == b'/') {
            match part {
                b"" => return Err(error("a name is empty")),
                b"." | b".." => return Err(error("'.' and '..' are not names in a tree")),
                // Twice the same is the same, and matching need not try both.
                b"**" if segments.last() == Some(&Segment::AnyDepth) => {}
                b"**" => segments.push(Segment::AnyDepth),
                part => segments.push(segment(part).map_err(error)?),
            }
        }
        self.patterns.push(Pattern { segments, directories_only });
        Ok(())
    }

    /// The place of the root's entries.
    pub(crate) fn root(&self) -> Place {
        let mut place = Place::default();
        for (index, pattern) in (0..).zip(&self.patterns) {
            pattern.reach(index, 0, &mut place);
        }
        place
    }

    /// Whether a pattern matches the file at `path`, or a directory that it is in.
    pub(crate) fn matches_path(&self, path: &Path) -> bool {
        self.match_of(path).is_some()
    }

    /// The first pattern that matches the file at `path`, or a directory that it is in.
    pub(crate) fn match_of(&self, path: &Path) -> Option<usize> {
        let (mut place, mut matched) = (self.root(), Vec::new());
        let names: Vec<&[u8]> =
            path.as_os_str().as_bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect();
        for (index, name) in names.iter().enumerate() {
            place = self.step(&place, name, index + 1 < names.len(), &mut matched);
            if let Some(first) = matched.first() {
                return Some(*first);
            }
        }
        None
    }

    /// Looks at one entry: the patterns that match it (in order), and the place of what is below it.
    pub(crate) fn step(&self, place: &Place, name: &[u8], is_directory: bool, matched: &mut Vec<usize>) -> Place {
        let mut below = Place::default();
        matched.clear();
        for (index, at) in &place.0 {
            let pattern = &self.patterns[*index as usize];
            let segments = &pattern.segments;
            let (here, is_last) = (&segments[*at as usize], *at as usize + 1 == segments.len());
            if *here == Segment::AnyDepth {
                // It takes this name and may take more.
                if is_directory {
                    pattern.reach(*index, *at, &mut below);
                }
                if is_last && (is_directory || !pattern.directories_only) {
                    push(matched, *index);
                }
            } else if here.matches(name) {
                if is_last && (is_directory || !pattern.directories_only) {
                    push(matched, *index);
                } else if !is_last && is_directory {
                    pattern.reach(*index, *at + 1, &mut below);
                }
            }
        }
        matched.sort_unstable();
        below
    }
}

fn push(matched: &mut Vec<usize>, index: u32) {
    let index = index as usize;
    if !matched.contains(&index) {
        matched.push(index);
    }
}

impl Place {
    fn add(&mut self, index: u32, at: u32) {
        if !self.0.contains(&(index, at)) {
            self.0.push((index, at));
        }
    }
}

impl Pattern {
    /// From here on part `at` is looked for; `**` may also stand for nothing.
    fn reach(&self, index: u32, at: u32, place: &mut Place) {
        place.add(index, at);
        if self.segments.get(at as usize) == Some(&Segment::AnyDepth) && (at as usize) + 1 < self.segments.len() {
            self.reach(index, at + 1, place);
        }
    }
}

impl Segment {
    fn matches(&self, name: &[u8]) -> bool {
        match self {
            Self::AnyDepth => true,
            Self::Name(wanted) => wanted == name,
            Self::Glob(tokens) => glob(tokens, name),
        }
    }
}

/// One name of a pattern.
fn segment(part: &[u8]) -> Result<Segment, &'static str> {
    let (mut tokens, mut rest) = (Vec::new(), part);
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        tokens.push(match first {
            b'*' => {
                if tokens.last() == Some(&Token::Star) {
                    continue;
                }
                Token::Star
            }
            b'?' => Token::Any,
            b'[' => class(&mut rest)?,
            b'\\' => {
                let (escaped, after) = rest.split_first().ok_or("it ends in a backslash")?;
                rest = after;
                Token::Byte(*escaped)
            }
            0 => return Err("a name has no zero byte"),
            byte => Token::Byte(*byte),
        });
    }
    let plain: Option<Vec<u8>> =
        tokens.iter().map(|token| if let Token::Byte(byte) = token { Some(*byte) } else { None }).collect();
    Ok(plain.map_or(Segment::Glob(tokens), Segment::Name))
}

/// What stands between brackets; `rest` begins behind the opening one.
fn class(rest: &mut &[u8]) -> Result<Token, &'static str> {
    let negated = matches!(rest.first(), Some(b'!' | b'^'));
    if negated {
        *rest = &rest[1..];
    }
    let (mut ranges, mut first) = (Vec::new(), true);
    loop {
        let (low, after) = rest.split_first().ok_or("a bracket is not closed")?;
        *rest = after;
        if *low == b']' && !first {
            return Ok(Token::Class { negated, ranges });
        }
        first = false;
        match *rest {
            [b'-', high, ..] if *high != b']' => {
                ranges.push((*low, *high));
                *rest = &rest[2..];
            }
            _ => ranges.push((*low, *low)),
        }
    }
}

/// Whether a whole name fits. A star that fits too little is tried with one byte more, and only the last star is: so the time is
/// at most the product of the lengths.
fn glob(tokens: &[Token], name: &[u8]) -> bool {
    let (mut at, mut position) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while position < name.len() {
        match tokens.get(at) {
            Some(Token::Star) => {
                star = Some((at + 1, position));
                at += 1;
                continue;
            }
            Some(token) if token.matches(name[position]) => {
                at += 1;
                position += 1;
                continue;
            }
            _ => {}
        }
        let Some((after, from)) = star else { return false };
        (at, position) = (after, from + 1);
        star = Some((after, from + 1));
    }
    tokens[at..].iter().all(|token| *token == Token::Star)
}

impl Token {
    fn matches(&self, byte: u8) -> bool {
        match self {
            Self::Byte(wanted) => *wanted == byte,
            Self::Any | Self::Star => true,
            Self::Class { negated, ranges } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&byte)) != *negated
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a pattern matches a path (with a slash at its end: a directory).
    fn matches(pattern: &str, path: &str) -> bool {
        let mut patterns = Patterns::default();
        patterns.add(pattern.as_bytes()).expect("a pattern");
        let (path, is_directory) = path.strip_suffix('/').map_or((path, false), |path| (path, true));
        let names: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let (mut place, mut matched) = (patterns.root(), Vec::new());
        for (index, name) in names.iter().enumerate() {
            let last = index + 1 == names.len();
            place = patterns.step(&place, name.as_bytes(), !last || is_directory, &mut matched);
        }
        matched == [0]
    }

    #[test]
    fn patterns_match_as_they_do_in_rsync() {
        for (pattern, good, bad) in [
            ("/etc/passwd", &["/etc/passwd"][..], &["/etc/passwd-", "/x/etc/passwd", "/etc", "/etc/passwd/x"][..]),
            ("passwd", &["/passwd", "/etc/passwd", "/a/b/passwd/"], &["/passwd2", "/passwd/x"]),
            ("/var/log/*", &["/var/log/a", "/var/log/a/"], &["/var/log", "/var/log/a/b", "/var/logs/a"]),
            ("/var/log/**", &["/var/log/a", "/var/log/a/b/c"], &["/var/log/", "/var/lo"]),
            ("/a/**/z", &["/a/z", "/a/b/z", "/a/b/c/z"], &["/a/zz", "/z", "/a/b"]),
            ("**/.ssh/id_*", &["/.ssh/id_rsa", "/home/u/.ssh/id_x"], &["/.ssh/x/id_rsa", "/id_rsa"]),
            ("/tmp/", &["/tmp/"], &["/tmp", "/a/tmp/"]),
            ("*.o", &["/x.o", "/a/.o", "/a/b.o/"], &["/x.oo", "/xo"]),
            ("[a-c]?[!x]", &["/b.y"], &["/aax", "/dab", "/aa"]),
            ("[]x]", &["/]", "/x"], &["/y"]),
            (r"\*", &["/*"], &["/a"]),
            ("a*b*c", &["/abc", "/aXbYbc", "/abbcc"], &["/ab", "/acb"]),
            ("usr/share", &["/usr/share/", "/x/usr/share"], &["/share", "/usr/x/share"]),
        ] {
            for path in good {
                assert!(matches(pattern, path), "{pattern} should match {path}");
            }
            for path in bad {
                assert!(!matches(pattern, path), "{pattern} should not match {path}");
            }
        }
        for pattern in ["", "/", "a//b", "../x", "a/./b", "[abc", "x\\"] {
            assert!(Patterns::default().add(pattern.as_bytes()).is_err(), "{pattern:?}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = "a*".repeat(100) + "b";
        assert!(!matches(&pattern, &("/".to_owned() + &"a".repeat(255))));
        let deep = "**/a/".repeat(40) + "b";
        assert!(!matches(&deep, &"/a".repeat(300)));
    }
}
