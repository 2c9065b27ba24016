//! Which X.509 authorities this member has taken up: `authorities.json` in the key directory. It is written after the keys of a new authority
//! and before those of an old one go, so that whenever the member ends, what it names is there. Without the file there is the first alone.

use super::x509::{FILES, name_of};
use crate::files;
use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file.
pub(super) const FILE: &str = "authorities.json";
/// More are never trusted at a time.
const MAX: usize = 8;

/// What a member has taken up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The version of the trust bundle that has these roots.
    pub version: u64,
    /// Numbers of the authorities whose certificates are good, oldest first.
    pub trusted: Vec<u32>,
    /// The one that this member's certificate is from: one of them.
    pub issuing: u32,
}

impl Default for Held {
    fn default() -> Self {
        Self { version: 1, trusted: vec![1], issuing: 1 }
    }
}

impl Held {
    /// Reads it.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_text(&text).with_context(|| format!("'{}'", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("reading '{}'", path.display())),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let path = dir.join(FILE);
        files::write(&path, self.to_text()?.as_bytes(), 0o644).with_context(|| format!("writing '{}'", path.display()))
    }

    pub(super) fn to_text(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(super) fn from_text(text: &str) -> anyhow::Result<Self> {
        let held: Self = serde_json::from_str(text).context("it does not say which authorities there are")?;
        ensure!(
            held.trusted.len() <= MAX && held.trusted.contains(&held.issuing) && !held.trusted.contains(&0),
            "it names no authority that certificates could be from"
        );
        Ok(held)
    }

    /// Names of the files that members share.
    pub(super) fn files(&self) -> Vec<String> {
        self.trusted.iter().flat_map(|number| FILES.iter().map(move |(name, _)| name_of(*number, name))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back_and_what_names_no_authority_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Held::read(dir.path()).unwrap(), Held::default());
        let held = Held { version: 3, trusted: vec![1, 2], issuing: 2 };
        held.write(dir.path()).unwrap();
        assert_eq!(Held::read(dir.path()).unwrap(), held);
        for bad in [
            "",
            "{}",
            r#"{"version":1,"trusted":[],"issuing":1}"#,
            r#"{"version":1,"trusted":[2],"issuing":1}"#,
            r#"{"version":1,"trusted":[0],"issuing":0}"#,
            r#"{"version":1,"trusted":[1,2,3,4,5,6,7,8,9],"issuing":1}"#,
        ] {
            std::fs::write(dir.path().join(FILE), bad).unwrap();
            let error = format!("{:#}", Held::read(dir.path()).unwrap_err());
            assert!(error.contains(FILE), "{error}");
        }
    }
}
