//! Which files came with a package, and whether they still are what the package had.

use crate::in_root;
use crate::sbom::database;
use anyhow::Result;
use aws_lc_rs::digest;
use std::collections::HashMap;
use std::io::Read as _;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Sums of files, by path without the leading slash.
#[derive(Debug, Default)]
pub struct Owned {
    sums: HashMap<Vec<u8>, Sum>,
}

/// What a package's database knows of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sum {
    /// dpkg.
    Md5([u8; 16]),
    /// RPM since 2009.
    Sha256([u8; 32]),
}

/// A list of sums of one package: 100,000 files have 10 MB.
const LIST: u64 = 64 << 20;
/// The largest file that is compared.
pub(crate) const FILE: u64 = 16 << 20;

impl Owned {
    /// From the lines `SUM  PATH` that dpkg keeps and RPM can be asked for, with MD5 or SHA-256 sums. Others are passed over.
    pub(crate) fn from_lines(text: &str) -> Self {
        let mut owned = Self::default();
        for line in text.lines() {
            owned.add(line);
        }
        owned
    }

    fn add(&mut self, line: &str) {
        let Some((sum, path)) = line.split_once("  ") else { return };
        let (mut md5, mut sha256) = ([0; 16], [0; 32]);
        let sum = if hex::decode_to_slice(sum, &mut md5).is_ok() {
            Sum::Md5(md5)
        } else if hex::decode_to_slice(sum, &mut sha256).is_ok() {
            Sum::Sha256(sha256)
        } else {
            return;
        };
        self.sums.insert(path.strip_prefix('/').unwrap_or(path).as_bytes().to_vec(), sum);
    }

    /// Reads what dpkg and RPM know. A tree without either owns nothing.
    pub fn read(root: BorrowedFd<'_>) -> Result<Self> {
        let mut owned = Self::default();
        for name in in_root::list(root, "var/lib/dpkg/info")?.iter().filter(|name| name.ends_with(".md5sums")) {
            let list = in_root::read(root, &format!("var/lib/dpkg/info/{name}"), LIST)?.unwrap_or_default();
            list.lines().for_each(|line| owned.add(line));
        }
        let tree = database::TreeFiles::new(root);
        database::rpm_files(&tree, |path, sum| {
            owned.sums.insert(path.strip_prefix(b"/").unwrap_or(path).to_vec(), Sum::Sha256(sum));
        })?;
        Ok(owned)
    }

    /// Whether `path` (from the root) belongs to a package and has the bytes that the package gave it.
    pub(crate) fn is_unchanged(&self, root: BorrowedFd<'_>, path: &Path) -> Result<bool> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let (Some(_), Some(name)) = (self.sum(path), path.to_str()) else { return Ok(false) };
        let Some(file) = in_root::open(root, name)? else { return Ok(false) };
        let mut contents = Vec::new();
        file.take(FILE).read_to_end(&mut contents)?;
        Ok(self.ships(path, &contents))
    }

    /// Whether a package gave the file at `path` (from the root) these bytes.
    pub(crate) fn ships(&self, path: &Path, contents: &[u8]) -> bool {
        match self.sum(path) {
            Some(Sum::Md5(sum)) => super::md5::md5(contents) == *sum,
            Some(Sum::Sha256(sum)) => digest::digest(&digest::SHA256, contents).as_ref() == sum,
            None => false,
        }
    }

    fn sum(&self, path: &Path) -> Option<&Sum> {
        let bytes = path.strip_prefix("/").unwrap_or(path).as_os_str().as_bytes();
        // dpkg lists /lib/x where a merged tree has /usr/lib/x.
        self.sums.get(bytes).or_else(|| self.sums.get(bytes.strip_prefix(b"usr/").unwrap_or(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_package_ships_is_known_by_its_bytes() {
        let owned = Owned::from_lines(
            "5d41402abc4b2a76b9719d911017c592  lib/a\n\
             2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824  /etc/b\n\
             \x20 /a/directory/of/an/rpm\nnonsense\n",
        );
        for (path, contents, expected) in [
            ("/lib/a", "hello", true),
            ("/usr/lib/a", "hello", true),
            ("/lib/a", "changed", false),
            ("/etc/b", "hello", true),
            ("/etc/b", "changed", false),
            ("/etc/c", "hello", false),
            ("/a/directory/of/an/rpm", "", false),
        ] {
            assert_eq!(owned.ships(Path::new(path), contents.as_bytes()), expected, "{path} {contents}");
        }
    }
}
