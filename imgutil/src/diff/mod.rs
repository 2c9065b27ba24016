//! What differs between two images, or an image and a tree: packages, files, sizes.

mod side;
mod text;

pub use side::{Entry, Kind, Side};

use crate::sbom::database::Installed;
use anyhow::Result;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// All that differs. `a` is what was, `b` what is.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// Packages.
    pub packages: Packages,
    /// Files only in `b`.
    pub added: Vec<Named>,
    /// Files only in `a`.
    pub removed: Vec<Named>,
    /// Files that are in both, and differ.
    pub changed: Vec<Changed>,
    /// All of `a`.
    pub total_a: Total,
    /// All of `b`.
    pub total_b: Total,
}

/// Packages that differ.
#[derive(Debug, Default, Serialize)]
pub struct Packages {
    /// Only in `b`.
    pub added: Vec<Package>,
    /// Only in `a`.
    pub removed: Vec<Package>,
    /// In both, in other versions.
    pub changed: Vec<PackageChange>,
}

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// Its version.
    pub version: String,
}

/// A package in two versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageChange {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// Versions in `a` (several of a kernel, say).
    pub from: Vec<String>,
    /// Versions in `b`.
    pub to: Vec<String>,
}

/// A file with its name.
#[derive(Debug, Serialize)]
pub struct Named {
    /// From the root.
    #[serde(serialize_with = "crate::lossy::path")]
    pub path: PathBuf,
    /// What it is.
    #[serde(flatten)]
    pub entry: Entry,
}

/// A file that changed.
#[derive(Debug, Serialize)]
pub struct Changed {
    /// From the root.
    #[serde(serialize_with = "crate::lossy::path")]
    pub path: PathBuf,
    /// What of it: `type`, `size`, `content`, `mode`, `owner`, `target`, `device`, `xattrs`, `mtime`, `links` (which other names it has,
    /// of those that are in both).
    pub what: Vec<&'static str>,
    /// As it was.
    pub from: Entry,
    /// As it is.
    pub to: Entry,
}

/// Counts of a side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Names.
    pub files: u64,
    /// Bytes of regular files, each inode once.
    pub bytes: u64,
    /// Packages.
    pub packages: usize,
}

impl Difference {
    /// Compares two sides. Times count only if `times` is set: a rebuilt image has others everywhere.
    pub fn between(a: &mut Side, b: &mut Side, times: bool) -> Result<Self> {
        let mut difference = Self {
            packages: packages(&a.packages, &b.packages),
            added: Vec::new(),
            removed: Vec::new(),
            changed: Vec::new(),
            total_a: a.total(),
            total_b: b.total(),
        };
        let named = |path: &Path, entry: &Entry| Named { path: path.to_owned(), entry: entry.clone() };
        let (entries_a, entries_b) = (std::mem::take(&mut a.entries), std::mem::take(&mut b.entries));
        let common = |path: &&PathBuf| entries_b.contains_key(*path);
        let first_a = first_names(entries_a.keys().filter(common), &a.linked);
        let first_b = first_names(entries_a.keys().filter(common), &b.linked);
        for (path, from) in &entries_a {
            let Some(to) = entries_b.get(path) else {
                difference.removed.push(named(path, from));
                continue;
            };
            let mut what = from.compare(to, times);
            if first_a.get(path) != first_b.get(path) {
                what.push("links");
            }
            if what.is_empty() || !what.contains(&"size") {
                let is_other = from.kind == Kind::File && to.kind == Kind::File && a.hash(path)? != b.hash(path)?;
                if is_other {
                    what.push("content");
                }
            }
            if !what.is_empty() {
                difference.changed.push(Changed { path: path.clone(), what, from: from.clone(), to: to.clone() });
            }
        }
        let added = entries_b.iter().filter(|(path, _)| !entries_a.contains_key(*path));
        difference.added = added.map(|(path, entry)| named(path, entry)).collect();
        Ok(difference)
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packages.is_empty() && self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        text::of(self)
    }
}

/// Of each name of a file with several, the first of these names; `linked` says which file a name is of.
fn first_names<'a>(
    paths: impl Iterator<Item = &'a PathBuf>,
    linked: &HashMap<PathBuf, u64>,
) -> HashMap<&'a PathBuf, &'a PathBuf> {
    let mut firsts = HashMap::new();
    let mut names = HashMap::new();
    for path in paths {
        if let Some(file) = linked.get(path) {
            let first = *firsts.entry(*file).or_insert(path);
            // The first one is that of a file with one name, too.
            if first != path {
                names.insert(path, first);
            }
        }
    }
    names
}

impl Packages {
    fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

fn packages(a: &[Installed], b: &[Installed]) -> Packages {
    let versions = |packages: &[Installed]| {
        let mut versions: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
        for package in packages {
            versions.entry((package.name.clone(), package.arch.clone())).or_default().push(package.version.clone());
        }
        versions
    };
    let (a, b) = (versions(a), versions(b));
    let mut packages = Packages::default();
    let each = |key: &(String, String), versions: &[String], list: &mut Vec<Package>| {
        for version in versions {
            list.push(Package { name: key.0.clone(), arch: key.1.clone(), version: version.clone() });
        }
    };
    for (key, from) in &a {
        match b.get(key) {
            None => each(key, from, &mut packages.removed),
            Some(to) if to != from => packages.changed.push(PackageChange {
                name: key.0.clone(),
                arch: key.1.clone(),
                from: from.clone(),
                to: to.clone(),
            }),
            Some(_) => {}
        }
    }
    for (key, to) in b.iter().filter(|(key, _)| !a.contains_key(*key)) {
        each(key, to, &mut packages.added);
    }
    packages
}
