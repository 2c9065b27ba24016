//! Which packages a tree has, read from the databases of dpkg and RPM, whichever are there. Both are parsed here: the tree may come
//! from elsewhere, and its builder need not have RPM.

mod bdb;
mod deb;
mod ndb;
mod rpm;
mod sqlite;

use crate::in_root;
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::os::fd::BorrowedFd;

/// A database has at most so many bytes.
const DATABASE: u64 = 1 << 30;

/// Files of a tree, wherever the tree is.
pub trait Files {
    /// The bytes of a regular file, at most `limit`; `None` if there is none. Links are followed inside of the tree.
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>>;
    /// The names in a directory, sorted; none if there is no such directory.
    fn list(&self, path: &str) -> Result<Vec<String>>;
}

/// Files below an open directory.
pub struct TreeFiles<'a>(BorrowedFd<'a>);

impl<'a> TreeFiles<'a> {
    /// Of the tree behind `root`.
    #[must_use]
    pub fn new(root: BorrowedFd<'a>) -> Self {
        Self(root)
    }
}

impl Files for TreeFiles<'_> {
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        use std::io::Read as _;
        let Some(file) = in_root::open(self.0, path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).with_context(|| format!("cannot read '{path}' in the tree"))?;
        Ok(Some(bytes))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        in_root::list(self.0, path)
    }
}

/// Whose package it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum System {
    /// dpkg.
    Deb,
    /// RPM.
    Rpm,
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Installed {
    /// Its name.
    pub name: String,
    /// Its version, with epoch (where it has one) and release.
    pub version: String,
    /// Its architecture, in the words of its system.
    pub arch: String,
    /// Whose.
    pub system: System,
    /// The source package, if the database names it.
    pub source: Option<String>,
    /// Who made it.
    pub supplier: Option<String>,
    /// Its licence as an SPDX expression, where that is known.
    pub license: Option<String>,
    /// Where it comes from.
    pub homepage: Option<String>,
}

/// All installed packages, sorted.
pub fn installed(files: &dyn Files) -> Result<Vec<Installed>> {
    let mut packages = deb::installed(files)?;
    for header in rpm::headers(files)? {
        packages.extend(rpm::Header::parse(&header).and_then(|header| header.package()));
    }
    packages.sort_unstable();
    packages.dedup();
    Ok(packages)
}

/// Calls with each file of an RPM package that has a SHA-256: its path from the root, and the sum.
pub(crate) fn rpm_files(files: &dyn Files, mut take: impl FnMut(&[u8], [u8; 32])) -> Result<()> {
    for header in rpm::headers(files)? {
        if let Some(header) = rpm::Header::parse(&header) {
            header.files(&mut take);
        }
    }
    Ok(())
}
