//! Package names near an unknown one.

use std::collections::BTreeSet;

/// So many are offered.
const OFFERED: usize = 3;

/// The names among `known` most like `name`, the best first.
pub(super) fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let found: BTreeSet<(usize, &str)> =
        known.into_iter().filter_map(|known| Some((distance(name, known)?, known))).collect();
    found.into_iter().take(OFFERED).map(|(_, name)| name.to_owned()).collect()
}

/// Insertions, deletions and changes from `a` to `b`; `None` if more than a third of the name.
fn distance(a: &str, b: &str) -> Option<usize> {
    let limit = (a.len() / 3).clamp(1, 3);
    if a.len().abs_diff(b.len()) > limit {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    Some(row[b.len()]).filter(|distance| *distance <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_find_their_package() {
        let known = ["vim", "openssh-server", "openssh-client", "zsh", "vim"];
        assert_eq!(near("vmi", known), Vec::<String>::new(), "two changes of three letters are another word");
        assert_eq!(near("vimm", known), ["vim"]);
        assert_eq!(near("opensshserver", known), ["openssh-server"]);
        assert_eq!(near("nothing-like-it", known), Vec::<String>::new());
    }
}
