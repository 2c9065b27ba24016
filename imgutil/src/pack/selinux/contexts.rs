//! A policy's `file_contexts`: which label a path gets (`selabel_file(5)`), as libselinux 3.4 to 3.7 decides it, without its library.
//!
//! A line is a regular expression over the whole path, perhaps a type of file, and a context. The last line that matches counts, but
//! one without special characters beats all that have some. Before that, beginnings of paths are replaced (`file_contexts.subs`,
//! then `file_contexts.subs_dist`).

use anyhow::{Context as _, Result, bail};
use regex_automata::nfa::thompson::backtrack::{BoundedBacktracker, Cache, Config};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};
use rustix::fs::FileType;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// Names of directories in a stem, at most: `/usr/lib`. More would make the lists shorter and the look-ups more.
const STEM: usize = 2;

/// What a policy says of files.
#[derive(Default)]
pub(super) struct Contexts {
    specs: Vec<Spec>,
    /// Specs by the directories that all paths they match begin with, in order.
    stems: HashMap<Vec<u8>, Vec<usize>>,
    substitutions: Vec<(Vec<u8>, Vec<u8>)>,
    distribution_substitutions: Vec<(Vec<u8>, Vec<u8>)>,
    cache: RefCell<Option<Cache>>,
}

struct Spec {
    /// What every path begins with that it matches.
    prefix: Vec<u8>,
    rest: Rest,
    kind: Option<FileType>,
    /// `None`: `<<none>>`.
    context: Option<Rc<str>>,
    has_meta: bool,
}

/// What may follow the prefix.
enum Rest {
    Nothing,
    /// `(/.*)?`, the most common of all.
    AnythingBelow,
    Expression {
        text: String,
        line: String,
        compiled: OnceCell<BoundedBacktracker>,
    },
}

impl Contexts {
    /// Puts a policy together from the texts of its files, in this order: `file_contexts`, `.homedirs`, `.local`.
    pub(super) fn parse(files: &[(String, String)], subs: &str, subs_dist: &str) -> Result<Self> {
        let mut specs = Vec::new();
        for (name, text) in files {
            for (number, line) in (1..).zip(text.lines()) {
                if let Some(spec) = spec(line).with_context(|| format!("in '{name}', line {number}"))? {
                    specs.push(spec);
                }
            }
        }
        // Exact paths after all others; otherwise the order stays.
        specs.sort_by_key(|spec| !spec.has_meta);
        let mut contexts = Self {
            specs,
            substitutions: substitutions(subs),
            distribution_substitutions: substitutions(subs_dist),
            ..Self::default()
        };
        for (index, spec) in contexts.specs.iter().enumerate() {
            contexts.stems.entry(stems(&spec.prefix).last().unwrap_or_default().to_vec()).or_default().push(index);
        }
        Ok(contexts)
    }

    /// The context of a path, which begins with a slash and does not end in one. `None`: it gets no label.
    pub(super) fn lookup(&self, path: &[u8], kind: FileType) -> Result<Option<Rc<str>>> {
        let replaced = substitute(&self.substitutions, path);
        let path = replaced.as_deref().unwrap_or(path);
        let replaced = substitute(&self.distribution_substitutions, path);
        let path = replaced.as_deref().unwrap_or(path);
        let mut best: Option<usize> = None;
        for stem in stems(path) {
            for index in self.stems.get(stem).into_iter().flatten().rev() {
                if best.is_some_and(|best| best > *index) {
                    break;
                }
                if self.matches(&self.specs[*index], path, kind)? {
                    best = Some(*index);
                    break;
                }
            }
        }
        Ok(best.and_then(|best| self.specs[best].context.clone()))
    }

    fn matches(&self, spec: &Spec, path: &[u8], kind: FileType) -> Result<bool> {
        if spec.kind.is_some_and(|wanted| wanted != kind) || !path.starts_with(&spec.prefix) {
            return Ok(false);
        }
        let rest = &path[spec.prefix.len()..];
        match &spec.rest {
            Rest::Nothing => Ok(rest.is_empty()),
            Rest::AnythingBelow => Ok(rest.is_empty() || rest[0] == b'/'),
            Rest::Expression { text, line, compiled } => {
                let expression = if let Some(expression) = compiled.get() {
                    expression
                } else {
                    let new = compile(text).with_context(|| format!("in the line '{line}' of the policy"))?;
                    compiled.get_or_init(|| new)
                };
                let mut cache = self.cache.borrow_mut();
                let cache = cache.get_or_insert_with(|| expression.create_cache());
                cache.reset(expression);
                let input = Input::new(path).anchored(Anchored::Yes);
                let matched = expression.try_is_match(cache, input);
                matched.with_context(|| format!("a path is too long for the line '{line}' of the policy"))
            }
        }
    }
}

fn compile(text: &str) -> Result<BoundedBacktracker> {
    BoundedBacktracker::builder()
        .configure(Config::new().visited_capacity(2 << 20))
        .syntax(syntax::Config::new().unicode(false).utf8(false).dot_matches_new_line(true))
        .build(&format!(r"\A(?:{text})\z"))
        .map_err(|error| anyhow::anyhow!("it is not understood: {error}"))
}

/// One line; `None` for an empty one or a comment.
fn spec(line: &str) -> Result<Option<Spec>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (expression, kind, context) = match fields[..] {
        [expression, context] => (expression, None, context),
        [expression, kind, context] => (expression, Some(kind), context),
        _ => bail!("'{line}' has not two or three fields"),
    };
    let kind = match kind {
        None => None,
        Some("--") => Some(FileType::RegularFile),
        Some("-d") => Some(FileType::Directory),
        Some("-l") => Some(FileType::Symlink),
        Some("-c") => Some(FileType::CharacterDevice),
        Some("-b") => Some(FileType::BlockDevice),
        Some("-p") => Some(FileType::Fifo),
        Some("-s") => Some(FileType::Socket),
        Some(other) => bail!("'{other}' is no type of file"),
    };
    let (prefix, rest) = split(expression);
    let rest = match rest {
        "" => Rest::Nothing,
        "(/.*)?" => Rest::AnythingBelow,
        _ => Rest::Expression { text: expression.to_owned(), line: line.to_owned(), compiled: OnceCell::new() },
    };
    let has_meta = !matches!(rest, Rest::Nothing);
    let context = (context != "<<none>>").then(|| Rc::from(context));
    Ok(Some(Spec { prefix, rest, kind, context, has_meta }))
}

/// The literal beginning of an expression, and what follows it.
fn split(expression: &str) -> (Vec<u8>, &str) {
    if has_top_level_alternative(expression) {
        return (Vec::new(), expression);
    }
    let (mut prefix, mut rest) = (Vec::new(), expression);
    // Where the last literal began: a `?` behind it takes it back.
    let mut before = (0, expression);
    while let Some(first) = rest.chars().next() {
        let here = (prefix.len(), rest);
        match first {
            '?' | '*' | '{' => {
                prefix.truncate(before.0);
                return (prefix, before.1);
            }
            '.' | '^' | '$' | '+' | '|' | '[' | '(' | ')' => return (prefix, rest),
            '\\' => {
                // An escaped letter or digit is a class; only punctuation stands for itself.
                let Some(escaped) = rest[1..].chars().next().filter(char::is_ascii_punctuation) else {
                    return (prefix, rest);
                };
                prefix.extend_from_slice(escaped.encode_utf8(&mut [0; 4]).as_bytes());
                rest = &rest[1 + escaped.len_utf8()..];
            }
            literal => {
                prefix.extend_from_slice(literal.encode_utf8(&mut [0; 4]).as_bytes());
                rest = &rest[literal.len_utf8()..];
            }
        }
        before = here;
    }
    (prefix, rest)
}

/// Whether there is a `|` outside of all parentheses: then the beginning says nothing of the rest.
fn has_top_level_alternative(expression: &str) -> bool {
    let (mut depth, mut escaped, mut class) = (0_u32, false, false);
    for byte in expression.bytes() {
        if std::mem::take(&mut escaped) {
            continue;
        }
        match byte {
            b'\\' => escaped = true,
            b'[' => class = true,
            b']' => class = false,
            b'(' if !class => depth += 1,
            b')' if !class => depth = depth.saturating_sub(1),
            b'|' if !class && depth == 0 => return true,
            _ => {}
        }
    }
    false
}

/// The directories that a path begins with, from none to [`STEM`] of them. A name that may go on is none.
fn stems(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    std::iter::once(0).chain(slashes.take(STEM)).map(|end| &path[..end])
}

/// Pairs of a substitution file; the last line goes first.
fn substitutions(text: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let pairs = text.lines().filter(|line| !line.trim_start().starts_with('#')).filter_map(|line| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?.as_bytes().to_vec(), fields.next()?.as_bytes().to_vec()))
    });
    let mut pairs: Vec<_> = pairs.collect();
    pairs.reverse();
    pairs
}

fn substitute(pairs: &[(Vec<u8>, Vec<u8>)], path: &[u8]) -> Option<Vec<u8>> {
    pairs.iter().find_map(|(from, to)| {
        let rest = path.strip_prefix(from.as_slice()).filter(|rest| rest.is_empty() || rest[0] == b'/')?;
        let rest = if to == b"/" { rest.strip_prefix(b"/").unwrap_or(rest) } else { rest };
        Some([to, rest].concat())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contexts(text: &str, subs: &str, dist: &str) -> Contexts {
        Contexts::parse(&[("file_contexts".into(), text.into())], subs, dist).expect("parses")
    }

    #[test]
    fn the_last_match_counts_but_exact_paths_beat_expressions() {
        use FileType::{CharacterDevice as Char, Directory as Dir, RegularFile as File};
        let policy = contexts(
            "# comment\n/.*  sys:default\n/etc/exact  --  sys:exact\n/etc(/.*)?  sys:etc\n/etc/.*\\.conf  --  sys:conf\n\
             /usr/lib/[^/]*/x?  sys:lib\n/run/.*  <<none>>\n/a|/b/c  sys:either\n/dev/tty[0-9]+  -c  sys:tty\n",
            "/local /etc\n",
            "/lib /usr/lib\n/usr/lib64 /usr/lib\n/root2 /\n",
        );
        for (path, kind, wanted) in [
            ("/x", File, Some("sys:default")),
            ("/etc", Dir, Some("sys:etc")),
            ("/etcetera", File, Some("sys:default")),
            ("/etc/exact", File, Some("sys:exact")),
            ("/etc/exact", Dir, Some("sys:etc")),
            ("/etc/a.conf", File, Some("sys:conf")),
            ("/etc/aXconf", File, Some("sys:etc")),
            ("/etc/new\nline.conf", File, Some("sys:conf")),
            ("/usr/lib/d/x", File, Some("sys:lib")),
            ("/usr/lib/d/", File, Some("sys:lib")),
            ("/lib/d/x", File, Some("sys:lib")),
            ("/usr/lib64/d/x", File, Some("sys:lib")),
            ("/local/a.conf", File, Some("sys:conf")),
            ("/root2/etc/exact", File, Some("sys:exact")),
            ("/run/x", File, None),
            ("/a", File, Some("sys:either")),
            ("/b/c", File, Some("sys:either")),
            ("/dev/tty12", Char, Some("sys:tty")),
            ("/dev/tty12", File, Some("sys:default")),
        ] {
            assert_eq!(policy.lookup(path.as_bytes(), kind).expect("looks up").as_deref(), wanted, "{path} {kind:?}");
        }
    }

    #[test]
    fn what_is_no_policy_is_named() {
        for line in ["/only-one-field", "/a -x sys:c", "/a -- b c"] {
            assert!(Contexts::parse(&[("f".into(), line.into())], "", "").is_err(), "{line}");
        }
        let policy = contexts("/(?!x).*  sys:a\n", "", "");
        let error = policy.lookup(b"/b", FileType::RegularFile).expect_err("is not understood");
        assert!(format!("{error:#}").contains("(?!x)"), "{error:#}");
    }
}
