//! Secrets at rest: AES-256-GCM under the collective's data key, bound to the place they belong to, so that a ciphertext cannot be
//! moved to another record. The data key is in a 0600 file of the member.

use crate::files;
use anyhow::Context as _;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::rand;
use moor_api::ids::CollectiveId;
use serde::{Deserialize, Serialize};
use std::path::Path;
use zeroize::Zeroizing;

/// An encrypted secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSecret {
    /// Which data key.
    key_version: u32,
    /// 96 random bits, hexadecimal.
    nonce: String,
    /// Ciphertext and tag, hexadecimal.
    ciphertext: String,
}

/// Where a secret belongs; part of what is authenticated.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Table of the store.
    pub table: &'a str,
    /// Record.
    pub id: &'a str,
    /// Field.
    pub field: &'a str,
}

/// The data key. No `Debug`.
pub struct DataKey {
    key: LessSafeKey,
    version: u32,
    collective: CollectiveId,
}

impl DataKey {
    /// Makes a new one at `path` (0600).
    ///
    /// # Errors
    /// No randomness; the file cannot be written.
    pub fn create(path: &Path) -> anyhow::Result<()> {
        let mut bytes = Zeroizing::new([0; 32]);
        rand::fill(&mut *bytes).context("making the data key")?;
        let text = Zeroizing::new(format!("{}\n", hex::encode(*bytes)));
        files::write(path, text.as_bytes(), 0o600).with_context(|| format!("writing '{}'", path.display()))
    }

    /// Reads it.
    ///
    /// # Errors
    /// The file is not there or not a key.
    pub fn open(path: &Path, collective: CollectiveId) -> anyhow::Result<Self> {
        let text =
            Zeroizing::new(std::fs::read_to_string(path).with_context(|| format!("reading '{}'", path.display()))?);
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(text.trim_end(), &mut *bytes)
            .with_context(|| format!("'{}' is not a data key", path.display()))?;
        let key = UnboundKey::new(&AES_256_GCM, &*bytes).context("setting up the data key")?;
        Ok(Self { key: LessSafeKey::new(key), version: 1, collective })
    }

    fn additional(&self, place: Place<'_>) -> Vec<u8> {
        let mut data = self.collective.as_bytes().to_vec();
        for part in [place.table, place.id, place.field] {
            // Lengths keep "ab"+"c" apart from "a"+"bc".
            data.extend_from_slice(&(part.len() as u64).to_le_bytes());
            data.extend_from_slice(part.as_bytes());
        }
        data
    }

    /// Encrypts.
    ///
    /// # Errors
    /// No randomness.
    pub fn seal(&self, place: Place<'_>, plaintext: &[u8]) -> anyhow::Result<SealedSecret> {
        let mut nonce = [0; 12];
        rand::fill(&mut nonce).context("making a nonce")?;
        let mut data = plaintext.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(self.additional(place)), &mut data)
            .context("encrypting a secret")?;
        Ok(SealedSecret { key_version: self.version, nonce: hex::encode(nonce), ciphertext: hex::encode(data) })
    }

    /// Decrypts.
    ///
    /// # Errors
    /// Another key, another place, or changed bytes.
    pub fn open_secret(&self, place: Place<'_>, secret: &SealedSecret) -> anyhow::Result<Zeroizing<Vec<u8>>> {
        anyhow::ensure!(
            secret.key_version == self.version,
            "the secret is under data key {}, this is {}",
            secret.key_version,
            self.version
        );
        let mut nonce = [0; 12];
        hex::decode_to_slice(&secret.nonce, &mut nonce).context("the secret's nonce is damaged")?;
        let mut data = Zeroizing::new(hex::decode(&secret.ciphertext).context("the secret is damaged")?);
        let length = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(self.additional(place)), &mut data)
            .map_err(|_| {
                anyhow::anyhow!("the secret '{}' of {} '{}' does not decrypt", place.field, place.table, place.id)
            })?
            .len();
        data.truncate(length);
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_only_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        DataKey::create(&path).unwrap();
        let collective = CollectiveId::random();
        let key = DataKey::open(&path, collective).unwrap();
        let place = Place { table: "images", id: "a", field: "dek" };
        let sealed = key.seal(place, b"secret").unwrap();
        assert_eq!(&*key.open_secret(place, &sealed).unwrap(), b"secret");
        for other in [Place { table: "nodes", ..place }, Place { id: "b", ..place }, Place { field: "x", ..place }] {
            assert!(key.open_secret(other, &sealed).is_err(), "{other:?}");
        }
        let foreign = DataKey::open(&path, CollectiveId::random()).unwrap();
        assert!(foreign.open_secret(place, &sealed).is_err());
        assert!(!serde_json::to_string(&sealed).unwrap().contains("secret\""));
    }
}
