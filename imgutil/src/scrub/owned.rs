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
const FILE: u64 = 16 << 20;

impl Owned {
    /// Reads what dpkg and RPM know. A tree without either owns nothing.
    pub fn read(root: BorrowedFd<'_>) -> Result<Self> {
        let mut sums = HashMap::new();
        for name in in_root::list(root, "var/lib/dpkg/info")?.iter().filter(|name| name.ends_with(".md5sums")) {
            let list = in_root::read(root, &format!("var/lib/dpkg/info/{name}"), LIST)?.unwrap_or_default();
            sums.extend(list.lines().filter_map(|line| {
                let (sum, path) = line.split_once("  ")?;
                let mut bytes = [0; 16];
                hex::decode_to_slice(sum, &mut bytes).ok()?;
                Some((path.as_bytes().to_vec(), Sum::Md5(bytes)))
            }));
        }
        let tree = database::TreeFiles::new(root);
        database::rpm_files(&tree, |path, sum| {
            sums.insert(path.strip_prefix(b"/").unwrap_or(path).to_vec(), Sum::Sha256(sum));
        })?;
        Ok(Self { sums })
    }

    /// Whether `path` (from the root) belongs to a package and has the bytes that the package gave it.
    pub(crate) fn is_unchanged(&self, root: BorrowedFd<'_>, path: &Path) -> Result<bool> {
        let path = path.strip_prefix("/").unwrap_or(path);
        // dpkg lists /lib/x where a merged tree has /usr/lib/x.
        let bytes = path.as_os_str().as_bytes();
        let unmerged = bytes.strip_prefix(b"usr/").unwrap_or(bytes);
        let Some(sum) = self.sums.get(bytes).or_else(|| self.sums.get(unmerged)) else { return Ok(false) };
        let Some(path) = path.to_str() else { return Ok(false) };
        let Some(file) = in_root::open(root, path)? else { return Ok(false) };
        let mut contents = Vec::new();
        file.take(FILE).read_to_end(&mut contents)?;
        Ok(match sum {
            Sum::Md5(sum) => super::md5::md5(&contents) == *sum,
            Sum::Sha256(sum) => digest::digest(&digest::SHA256, &contents).as_ref() == sum,
        })
    }
}
