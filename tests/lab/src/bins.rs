//! Where the programs under test are.

use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};

/// Paths of the built programs. `make` builds them before it starts a test.
#[derive(Debug, Clone)]
pub struct Bins {
    /// Cargo's output folder, `target/debug`.
    pub dir: PathBuf,
    /// The workspace.
    pub workspace: PathBuf,
}

impl Bins {
    /// Finds them beside the running test or program.
    ///
    /// # Errors
    /// One of them is not built; the error says how to.
    pub fn find() -> anyhow::Result<Self> {
        let workspace =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().context("finding the workspace")?;
        let program = std::env::current_exe().context("finding this program")?;
        let mut dir = program.parent().context("this program has no folder")?;
        if dir.ends_with("deps") {
            dir = dir.parent().context("deps has no parent")?;
        }
        let bins = Self { dir: dir.to_owned(), workspace };
        for name in ["imgutil", "moor", "moord", "moor-agent"] {
            if !bins.path(name).exists() {
                bail!("'{}' is not built: run `make build`", bins.path(name).display());
            }
        }
        if !bins.static_tether().exists() {
            bail!("'{}' is not built: run `make build`", bins.static_tether().display());
        }
        Ok(bins)
    }

    /// A program.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The static `moor-tether` for images.
    #[must_use]
    pub fn static_tether(&self) -> PathBuf {
        self.dir.join("static/moor-tether")
    }

    /// A folder under `target` for what is worth keeping between runs (root trees).
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.dir.join("lab")
    }
}
