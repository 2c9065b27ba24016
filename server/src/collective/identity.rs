//! Who this member is: `store/member.json`, written once by `moord init` or `moord join`.

use super::voucher::{Acquaintance, Voucher};
use crate::files;
use crate::store::records::SiteRecord;
use anyhow::Context as _;
use moor_api::ids::MemberId;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The member and its collective.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Identity {
    /// Its number in the collective; never given twice.
    pub number: u64,
    /// Its id, as its certificate says.
    pub id: MemberId,
    /// Its name.
    pub name: String,
    /// Further addresses and names of its certificate (`--address`).
    #[serde(default)]
    pub addresses: Vec<String>,
    /// The collective, as it was when the member came to it.
    pub site: SiteRecord,
    /// The members of then: it believes these until it has the records of all.
    #[serde(default)]
    pub met: Vec<Acquaintance>,
    /// Those that had been removed then: nobody's word makes members of them.
    #[serde(default)]
    pub removed: Vec<MemberId>,
    /// What it shows to a member that has not heard of it; none: it founded the collective.
    #[serde(default)]
    pub introduction: Vec<Voucher>,
}

impl Identity {
    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        files::write(path, &text, 0o600).with_context(|| format!("writing '{}'", path.display()))
    }

    /// Reads it.
    ///
    /// # Errors
    /// It is not there, or damaged.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("reading '{}'", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("'{}' is damaged", path.display()))
    }
}

/// A member's name: letters, digits, `.`, `-`, `_`; at most 64, as a host name has.
///
/// # Errors
/// It is none.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let good = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    anyhow::ensure!(
        good && !name.is_empty() && name.len() <= 64 && !name.starts_with('-'),
        "'{}' is not a member's name: up to 64 letters, digits, '.', '-' and '_'",
        crate::http::clean(name, 80)
    );
    Ok(())
}
