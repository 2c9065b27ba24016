//! Package names near an unknown one, from the lists that apt has fetched into the tree.

use std::io::{BufRead, BufReader};
use std::path::Path;

/// So many are offered.
const OFFERED: usize = 3;

/// The names most like `name` in the package lists of `root`, the best first. None if the lists are not readable: this only
/// helps an error along.
pub(super) fn near(root: &Path, name: &str) -> Vec<String> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let Ok(lists) = std::fs::read_dir(root.join("var/lib/apt/lists")) else { return Vec::new() };
    for list in lists.flatten().filter(|list| list.file_name().to_string_lossy().ends_with("_Packages")) {
        let Ok(file) = std::fs::File::open(list.path()) else { continue };
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            if let Some(known) = line.strip_prefix("Package: ")
                && let Some(distance) = distance(name, known)
                && !found.iter().any(|(_, name)| name == known)
            {
                found.push((distance, known.to_owned()));
            }
        }
    }
    found.sort();
    found.into_iter().take(OFFERED).map(|(_, name)| name).collect()
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
        let root = tempfile::tempdir().unwrap();
        let lists = root.path().join("var/lib/apt/lists");
        std::fs::create_dir_all(&lists).unwrap();
        let text = "Package: vim\nVersion: 1\n\nPackage: openssh-server\n\nPackage: openssh-client\n\nPackage: zsh\n";
        std::fs::write(lists.join("mirror_dists_x_main_binary-amd64_Packages"), text).unwrap();
        assert_eq!(near(root.path(), "vmi"), Vec::<String>::new(), "two changes of three letters are another word");
        assert_eq!(near(root.path(), "vimm"), ["vim"]);
        assert_eq!(near(root.path(), "opensshserver"), ["openssh-server"]);
        assert_eq!(near(root.path(), "nothing-like-it"), Vec::<String>::new());
        assert_eq!(near(Path::new("/no/such"), "vim"), Vec::<String>::new());
    }
}
