//! Noderange: which nodes (REFERENCE.md). Strictly left to right: `,` joins, `-` in front excludes, `@` intersects.

use moor_api::ids::NodeName;
use moor_api::problem::{Code, Problem};
use std::collections::BTreeSet;

/// Most nodes that one range names.
const MAX_NODES: usize = 100_000;

/// Longest text of a range, in bytes.
const MAX_TEXT: usize = 64 << 10;
/// Most brackets of one part: a name of 63 characters has no room for more.
const MAX_BRACKETS: usize = 20;

/// What evaluation asks.
pub trait Lookup {
    /// All nodes, in order of their names.
    fn all(&self) -> Vec<NodeName>;
    /// Whether there is such a node.
    fn exists(&self, name: &str) -> bool;
    /// Members of a group; `None`: no such group.
    fn group(&self, name: &str) -> Option<Vec<NodeName>>;
}

fn bad(detail: String) -> Problem {
    Problem::new(Code::BadRequest, detail)
}

/// Splits at `,` outside of brackets; each part with its column (from 1).
fn parts(text: &str) -> Result<Vec<(usize, &str)>, Problem> {
    if text.len() > MAX_TEXT {
        return Err(bad(format!("a noderange has at most {} KiB: name a group instead", MAX_TEXT >> 10)));
    }
    let (mut out, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (at, character) in text.char_indices() {
        match character {
            '[' => depth += 1,
            ']' => depth -= 1,
            ',' if depth == 0 => {
                out.push((start + 1, &text[start..at]));
                start = at + 1;
            }
            _ => {}
        }
        if !(0..=1).contains(&depth) {
            return Err(bad(format!("noderange '{text}', column {}: brackets do not match", at + 1)));
        }
    }
    if depth != 0 {
        return Err(bad(format!("noderange '{text}': a bracket is not closed")));
    }
    out.push((start + 1, &text[start..]));
    Ok(out)
}

/// Expands `n[1-3,7]` and `n1-n4` to names, without look-ups.
fn expand(text: &str) -> Result<Vec<String>, String> {
    let too_many = || format!("it names more than {MAX_NODES} nodes");
    if text.matches('[').count() > MAX_BRACKETS {
        return Err(format!("it has more than {MAX_BRACKETS} brackets"));
    }
    if let Some((head, rest)) = text.split_once('[') {
        let (inner, tail) = rest.split_once(']').ok_or("a bracket is not closed")?;
        let mut numbers = Vec::new();
        for piece in inner.split(',') {
            let (range, step) = match piece.split_once(':').filter(|(range, _)| range.contains('-')) {
                Some((range, step)) => {
                    (range, step.parse::<u64>().ok().filter(|step| *step > 0).ok_or("a step is a number from 1")?)
                }
                None => (piece, 1),
            };
            match range.split_once(['-', ':']) {
                Some((first, last)) => numbers.extend(count(first, last, step)?),
                None => numbers.extend(count(range, range, 1)?),
            }
            if numbers.len() > MAX_NODES {
                return Err(too_many());
            }
        }
        let tails = expand(tail)?;
        if numbers.len().saturating_mul(tails.len()) > MAX_NODES {
            return Err(too_many());
        }
        return Ok(numbers
            .iter()
            .flat_map(|number| tails.iter().map(move |tail| format!("{head}{number}{tail}")))
            .collect());
    }
    for separator in ["..", ":", "-"] {
        if let Some((first, last)) = text.split_once(separator)
            && let (Some((head, low)), Some((other, high))) = (split_number(first), split_number(last))
            && head == other
        {
            return Ok(count(low, high, 1)?.into_iter().map(|number| format!("{head}{number}")).collect());
        }
    }
    Ok(vec![text.to_owned()])
}

/// A name that ends in a number.
fn split_number(text: &str) -> Option<(&str, &str)> {
    let digits = text.len() - text.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    (digits > 0).then(|| text.split_at(text.len() - digits))
}

fn count(first: &str, last: &str, step: u64) -> Result<Vec<String>, String> {
    let number = |text: &str| -> Result<u64, String> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("'{text}' is not a number"));
        }
        text.parse().map_err(|_| format!("'{text}' is too large"))
    };
    let (low, high) = (number(first)?, number(last)?);
    let padded = (first.len() > 1 && first.starts_with('0')) || (last.len() > 1 && last.starts_with('0'));
    if padded && first.len() != last.len() {
        return Err(format!("'{first}' and '{last}' are not padded alike"));
    }
    if low > high {
        return Err(format!("'{first}' to '{last}' descends"));
    }
    if (high - low) / step >= MAX_NODES as u64 {
        return Err(format!("it names more than {MAX_NODES} nodes"));
    }
    let width = if padded { first.len() } else { 0 };
    Ok((low..=high).step_by(usize::try_from(step).unwrap_or(usize::MAX)).map(|n| format!("{n:0width$}")).collect())
}

fn name(text: &str) -> Result<NodeName, String> {
    text.parse().map_err(|error: moor_api::ids::InvalidId| error.to_string())
}

/// Names for nodes that are to be made: no look-ups, no exclusions.
///
/// # Errors
/// The part at fault, with its column.
pub fn evaluate_pure(text: &str) -> Result<Vec<NodeName>, Problem> {
    let (mut out, mut seen) = (Vec::new(), BTreeSet::new());
    for (column, part) in parts(text)? {
        let at = |why: String| bad(format!("noderange '{text}', column {column}: '{part}': {why}"));
        for item in expand(part.trim()).map_err(at)? {
            let name = name(&item).map_err(at)?;
            if seen.insert(name.clone()) {
                out.push(name);
            }
        }
        if out.len() > MAX_NODES {
            return Err(at(format!("with those before it, it names more than {MAX_NODES} nodes")));
        }
    }
    Ok(out)
}

/// Nodes that exist, in the order the range names them.
///
/// # Errors
/// The part at fault, with its column: an unknown name, a range that descends.
pub fn evaluate(text: &str, lookup: &dyn Lookup) -> Result<Vec<NodeName>, Problem> {
    let mut out: Vec<NodeName> = Vec::new();
    for (index, (column, part)) in parts(text)?.into_iter().enumerate() {
        let at = |why: String| bad(format!("noderange '{text}', column {column}: '{part}': {why}"));
        let part = part.trim();
        // A leading exclusion means everything but, as xCAT takes it.
        let (exclude, body) = match part.strip_prefix('-') {
            Some(body) if !lookup.exists(part) => (true, body),
            _ => (false, part),
        };
        if exclude && index == 0 {
            out = lookup.all();
        }
        let mut pieces = body.split('@');
        let mut set = resolve(pieces.next().unwrap_or_default(), lookup).map_err(at)?;
        for piece in pieces {
            let other: BTreeSet<NodeName> = resolve(piece, lookup).map_err(at)?.into_iter().collect();
            set.retain(|name| other.contains(name));
        }
        if exclude {
            let set: BTreeSet<NodeName> = set.into_iter().collect();
            out.retain(|name| !set.contains(name));
        } else {
            let seen: BTreeSet<NodeName> = out.iter().cloned().collect();
            out.extend(set.into_iter().filter(|name| !seen.contains(name)));
        }
    }
    Ok(out)
}

fn resolve(text: &str, lookup: &dyn Lookup) -> Result<Vec<NodeName>, String> {
    if text.is_empty() {
        return Err("a name is missing".into());
    }
    // A node of that whole name first: hyphens are allowed in names.
    if lookup.exists(text) {
        return Ok(vec![name(text)?]);
    }
    let mut out = Vec::new();
    for item in expand(text)? {
        if lookup.exists(&item) {
            out.push(name(&item)?);
        } else if let Some(members) = lookup.group(&item) {
            out.extend(members);
        } else {
            return Err(format!("no node or group '{item}'"));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    fn names(list: &[&str]) -> Vec<NodeName> {
        list.iter().map(|name| name.parse().unwrap()).collect()
    }

    impl Lookup for Fixed {
        fn all(&self) -> Vec<NodeName> {
            names(&["login-1", "n1", "n2", "n3", "n4", "n10"])
        }
        fn exists(&self, name: &str) -> bool {
            self.all().iter().any(|node| node.as_str() == name)
        }
        fn group(&self, name: &str) -> Option<Vec<NodeName>> {
            match name {
                "everything" => Some(self.all()),
                "rack1" => Some(names(&["n1", "n2"])),
                "rack2" => Some(names(&["n2", "n3", "n4"])),
                _ => None,
            }
        }
    }

    #[test]
    fn ranges_are_evaluated_from_left_to_right() {
        for (text, expected) in [
            ("n1", &["n1"][..]),
            ("n1,n2", &["n1", "n2"]),
            ("n2,n1,n2", &["n2", "n1"]),
            ("n1-n3", &["n1", "n2", "n3"]),
            ("n1:n3", &["n1", "n2", "n3"]),
            ("n1..n3", &["n1", "n2", "n3"]),
            ("n[1-3]", &["n1", "n2", "n3"]),
            ("n[1,3]", &["n1", "n3"]),
            ("n[1-4:3]", &["n1", "n4"]),
            ("rack1,-n2", &["n1"]),
            ("-n1", &["login-1", "n2", "n3", "n4", "n10"]),
            ("rack1@rack2", &["n2"]),
            ("rack[1-2]", &["n1", "n2", "n2", "n3", "n4"]),
            ("login-1", &["login-1"]),
        ] {
            let mut expected = names(expected);
            if text == "rack[1-2]" {
                expected = names(&["n1", "n2", "n2", "n3", "n4"]);
            }
            assert_eq!(evaluate(text, &Fixed).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_column() {
        for (text, says) in [
            ("n1,nope", "column 4: 'nope': no node or group 'nope'"),
            ("n3-n1", "descends"),
            ("n[1-", "not closed"),
            ("n]1[", "do not match"),
            ("", "missing"),
            ("n[a]", "not a number"),
            ("n[01-100]", "padded"),
        ] {
            let error = evaluate(text, &Fixed).unwrap_err().detail;
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    /// Neither memory nor stack is the asker's to use up.
    #[test]
    fn what_is_too_large_is_refused() {
        let many = |piece: &str, times: usize| vec![piece; times].join(",");
        for (text, says) in [
            (format!("n{}", "[1]".repeat(20_000)), "brackets"),
            (format!("n[{}]", many("1-100000", 5_000)), "more than 100000"),
            (format!("n[1-100000],m[1-100000],{}", many("o[1-100000]", 1_000)), "more than 100000"),
            (many("n1", 30_000), "64 KiB"),
        ] {
            for error in [evaluate_pure(&text).unwrap_err(), evaluate(&text, &Fixed).unwrap_err()] {
                let known = error.detail.contains("no node or group") && says == "more than 100000";
                assert!(error.detail.contains(says) || known, "{error}");
            }
        }
    }

    #[test]
    fn new_names_need_no_look_up() {
        assert_eq!(evaluate_pure("r[1-2]u[01-02]").unwrap(), names(&["r1u01", "r1u02", "r2u01", "r2u02"]));
        assert_eq!(evaluate_pure("n[008-010]").unwrap(), names(&["n008", "n009", "n010"]));
        assert!(evaluate_pure("n[1-999999999]").is_err());
        assert_eq!(evaluate_pure("n[1-100000],n[1-5]").unwrap().len(), MAX_NODES);
        assert!(evaluate_pure("a b").is_err());
    }
}
