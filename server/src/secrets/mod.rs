//! Secrets at rest: AES-256-GCM under the collective's data key, bound to the place they belong to, so that a ciphertext cannot be
//! moved to another record.
//!
//! The data key has versions, and with each comes a key that signs nodes' tokens. A version is in the store, encrypted to each member by HPKE
//! (RFC 9180) under a key that the member alone has, in a 0600 file: so it lasts as long as what is sealed under it, reaches members that were
//! away like any other change, and nobody else.

mod keyring;

pub use keyring::{Keyring, UnwrapKey};
/// All that is encrypted to somebody's key is so by this.
pub(crate) use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE;

use crate::store::records::{KeyVersion, KeysRecord, MemberRecord, WrappedKey};
use anyhow::Context as _;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::rand;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use moor_api::admin::{AuthorityKind, SshRole};
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::node::Base64;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke as _, HpkePublicKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of one key.
const KEY: usize = 32;
/// What is encrypted by HPKE: one is never taken for the other.
const INFO: &[u8] = b"moor/v1 collective keys";
const AUTHORITY: &[u8] = b"moor/v1 authority";
const SSH_HOST_AUTHORITY: &[u8] = b"moor/v1 ssh host authority";
const SSH_USER_AUTHORITY: &[u8] = b"moor/v1 ssh user authority";

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

impl SealedSecret {
    /// The version of the data key that it is under.
    #[must_use]
    pub fn key_version(&self) -> u32 {
        self.key_version
    }

    /// Characters that it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.ciphertext.len()
    }
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

/// What is authenticated with a version that is encrypted to a member.
fn bound_to(collective: CollectiveId, member: MemberId, version: u32) -> Vec<u8> {
    // All parts have a fixed length.
    [&collective.as_bytes()[..], member.as_bytes(), &version.to_le_bytes()].concat()
}

/// One version. No `Debug`.
pub struct Version {
    bytes: Zeroizing<[u8; 2 * KEY]>,
    data: LessSafeKey,
    token: Ed25519KeyPair,
}

impl Version {
    /// A new one.
    ///
    /// # Errors
    /// No randomness.
    pub fn draw() -> anyhow::Result<Self> {
        let mut bytes = Zeroizing::new([0; 2 * KEY]);
        rand::fill(&mut *bytes).context("making the collective's keys")?;
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: Zeroizing<[u8; 2 * KEY]>) -> anyhow::Result<Self> {
        let (data, token) = bytes.split_at(KEY);
        let data = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, data).context("setting up the data key")?);
        let token = Ed25519KeyPair::from_seed_unchecked(token)
            .map_err(|error| anyhow::anyhow!("the token key is not usable: {error}"))?;
        Ok(Self { bytes, data, token })
    }

    /// Encrypts it to a member, by the public half of its key.
    ///
    /// # Errors
    /// That is no such key.
    pub fn wrap(
        &self,
        version: u32,
        collective: CollectiveId,
        member: MemberId,
        public: &Base64,
    ) -> anyhow::Result<WrappedKey> {
        let (aad, to) = (bound_to(collective, member, version), HpkePublicKey(public.0.clone()));
        let sealed = SUITE.seal(INFO, &aad, &*self.bytes, &to);
        let (EncapsulatedSecret(encapsulated), ciphertext) =
            sealed.with_context(|| format!("encrypting the collective's keys to member {member}"))?;
        Ok(WrappedKey { encapsulated: encapsulated.into(), ciphertext: ciphertext.into() })
    }

    /// The same to each of these members.
    ///
    /// # Errors
    /// One has no such key.
    pub fn wrap_for<'a>(
        &self,
        version: u32,
        collective: CollectiveId,
        members: impl IntoIterator<Item = &'a MemberRecord>,
    ) -> anyhow::Result<KeyVersion> {
        let wrap = |member: &MemberRecord| {
            let wrapped = self.wrap(version, collective, member.id, &member.unwrap);
            Ok((member.id, wrapped.with_context(|| format!("member {} has no usable key", member.name))?))
        };
        let wrapped: anyhow::Result<_> = members.into_iter().map(wrap).collect();
        Ok(KeyVersion { version, wrapped: wrapped? })
    }
}

fn info(kind: AuthorityKind) -> &'static [u8] {
    match kind {
        AuthorityKind::X509 => AUTHORITY,
        AuthorityKind::Ssh(SshRole::Host) => SSH_HOST_AUTHORITY,
        AuthorityKind::Ssh(SshRole::User) => SSH_USER_AUTHORITY,
    }
}

/// Encrypts the keys of authority `number` of this kind to each of these members, by the public half of its key.
///
/// # Errors
/// One has no such key.
pub fn wrap_authority<'a>(
    keys: &[u8],
    kind: AuthorityKind,
    number: u32,
    collective: CollectiveId,
    members: impl IntoIterator<Item = &'a MemberRecord>,
) -> anyhow::Result<BTreeMap<MemberId, WrappedKey>> {
    let wrap = |member: &MemberRecord| {
        let (aad, to) = (bound_to(collective, member.id, number), HpkePublicKey(member.unwrap.0.clone()));
        let sealed = SUITE.seal(info(kind), &aad, keys, &to);
        let (EncapsulatedSecret(encapsulated), ciphertext) =
            sealed.with_context(|| format!("member {} has no usable key", member.name))?;
        Ok((member.id, WrappedKey { encapsulated: encapsulated.into(), ciphertext: ciphertext.into() }))
    };
    members.into_iter().map(wrap).collect()
}

/// Versions of the collective's keys, as they are carried in a backup: hexadecimal. No `Debug`; what it held is wiped.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Carried(BTreeMap<u32, String>);

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.values_mut().for_each(Zeroize::zeroize);
    }
}

/// All versions that something may be under. No `Debug`.
#[derive(Clone)]
pub struct Ring {
    collective: CollectiveId,
    versions: BTreeMap<u32, Arc<Version>>,
    /// The one that secrets are sealed under. It is not among the versions where the member has no part in it.
    current: u32,
}

impl Ring {
    /// The keys of a new collective: version 1.
    ///
    /// # Errors
    /// No randomness.
    pub fn first(collective: CollectiveId) -> anyhow::Result<Self> {
        let mut ring = Self { collective, versions: BTreeMap::new(), current: 0 };
        ring.draw()?;
        Ok(ring)
    }

    /// Adds a new version, which is the current one from now on.
    ///
    /// # Errors
    /// No randomness.
    pub fn draw(&mut self) -> anyhow::Result<()> {
        self.current += 1;
        self.versions.insert(self.current, Arc::new(Version::draw()?));
        Ok(())
    }

    /// The keys of a collective that begins anew with `member` alone: those that are here, and a new version of them, which is the current one. Versions
    /// of `before` that are not here stay as they are: something may be under them, and nothing else could ever open it.
    ///
    /// # Errors
    /// No randomness; the member has no usable key.
    pub fn begin_anew(mut self, member: &MemberRecord, before: &KeysRecord) -> anyhow::Result<KeysRecord> {
        // Its number is one that no version had.
        self.current = self.current.max(before.current().unwrap_or(0));
        self.draw()?;
        let mut keys = self.record_for(member)?;
        keys.versions.extend(before.versions.iter().filter(|version| !self.has(version.version)).cloned());
        keys.versions.sort_unstable_by_key(|version| version.version);
        Ok(keys)
    }

    /// All versions, encrypted to this one member.
    ///
    /// # Errors
    /// It has no usable key.
    pub fn record_for(&self, member: &MemberRecord) -> anyhow::Result<KeysRecord> {
        let wrap = |(version, keys): (&u32, &Arc<Version>)| keys.wrap_for(*version, self.collective, [member]);
        Ok(KeysRecord { versions: self.versions.iter().map(wrap).collect::<anyhow::Result<_>>()? })
    }

    /// The same by version, for a member that comes to the others.
    ///
    /// # Errors
    /// `public` is no such key.
    pub fn wrap_all(&self, member: MemberId, public: &Base64) -> anyhow::Result<BTreeMap<u32, WrappedKey>> {
        let wrap = |(version, keys): (&u32, &Arc<Version>)| {
            Ok((*version, keys.wrap(*version, self.collective, member, public)?))
        };
        self.versions.iter().map(wrap).collect()
    }

    /// For a backup.
    #[must_use]
    pub fn carry(&self) -> Carried {
        Carried(self.versions.iter().map(|(version, keys)| (*version, hex::encode(&keys.bytes[..]))).collect())
    }

    /// Out of a backup.
    ///
    /// # Errors
    /// It holds no keys.
    pub fn carried(carried: &Carried, collective: CollectiveId) -> anyhow::Result<Self> {
        let mut versions = BTreeMap::new();
        for (version, text) in &carried.0 {
            let mut bytes = Zeroizing::new([0; 2 * KEY]);
            hex::decode_to_slice(text, &mut *bytes).context("the collective's keys are damaged")?;
            versions.insert(*version, Arc::new(Version::from_bytes(bytes)?));
        }
        let current = *versions.keys().last().context("there are no keys of the collective in it")?;
        Ok(Self { collective, versions, current })
    }

    /// Whether this version is in it.
    #[must_use]
    pub fn has(&self, version: u32) -> bool {
        self.versions.contains_key(&version)
    }

    fn current(&self) -> anyhow::Result<&Version> {
        let current = self.versions.get(&self.current);
        current.map(Arc::as_ref).with_context(|| match self.current {
            0 => "this member has no keys yet: it has just joined, and has heard of nobody".to_owned(),
            version => format!("this member has no part in version {version} of the collective's keys"),
        })
    }

    /// Signs nodes' tokens.
    ///
    /// # Errors
    /// This member does not have the keys.
    pub fn token(&self) -> anyhow::Result<&Ed25519KeyPair> {
        Ok(&self.current()?.token)
    }

    /// Checks nodes' tokens.
    ///
    /// # Errors
    /// This member does not have the keys.
    pub fn token_public(&self) -> anyhow::Result<&[u8]> {
        Ok(self.token()?.public_key().as_ref())
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

    /// Encrypts, under the current version.
    ///
    /// # Errors
    /// This member does not have it; no randomness.
    pub fn seal(&self, place: Place<'_>, plaintext: &[u8]) -> anyhow::Result<SealedSecret> {
        let mut nonce = [0; 12];
        rand::fill(&mut nonce).context("making a nonce")?;
        let mut data = plaintext.to_vec();
        let keys = self.current()?;
        keys.data
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(self.additional(place)), &mut data)
            .context("encrypting a secret")?;
        Ok(SealedSecret { key_version: self.current, nonce: hex::encode(nonce), ciphertext: hex::encode(data) })
    }

    /// Decrypts.
    ///
    /// # Errors
    /// A version that this member does not have, another key, another place, or changed bytes.
    pub fn open_secret(&self, place: Place<'_>, secret: &SealedSecret) -> anyhow::Result<Zeroizing<Vec<u8>>> {
        let keys = self.versions.get(&secret.key_version).with_context(|| {
            format!("a secret is under version {} of the data key, which this member does not have", secret.key_version)
        })?;
        let mut nonce = [0; 12];
        hex::decode_to_slice(&secret.nonce, &mut nonce).context("the secret's nonce is damaged")?;
        let mut data = Zeroizing::new(hex::decode(&secret.ciphertext).context("the secret is damaged")?);
        let length = keys
            .data
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

    const PLACE: Place<'_> = Place { table: "images", id: "a", field: "dek" };

    #[test]
    fn a_secret_opens_only_in_its_place() {
        let collective = CollectiveId::random();
        let ring = Ring::first(collective).unwrap();
        let sealed = ring.seal(PLACE, b"secret").unwrap();
        assert_eq!(&*ring.open_secret(PLACE, &sealed).unwrap(), b"secret");
        for other in [Place { table: "nodes", ..PLACE }, Place { id: "b", ..PLACE }, Place { field: "x", ..PLACE }] {
            assert!(ring.open_secret(other, &sealed).is_err(), "{other:?}");
        }
        let foreign = Ring::carried(&ring.carry(), CollectiveId::random()).unwrap();
        assert!(foreign.open_secret(PLACE, &sealed).is_err());
        assert!(!serde_json::to_string(&sealed).unwrap().contains("secret\""));
    }

    #[test]
    fn a_new_version_opens_what_was_sealed_before_and_the_old_one_nothing_of_after() {
        let collective = CollectiveId::random();
        let mut ring = Ring::first(collective).unwrap();
        let before = ring.seal(PLACE, b"secret").unwrap();
        let old = Ring::carried(&ring.carry(), collective).unwrap();
        ring.draw().unwrap();
        assert_ne!(old.token_public().unwrap(), ring.token_public().unwrap());
        assert_eq!(&*ring.open_secret(PLACE, &before).unwrap(), b"secret");
        let after = ring.seal(PLACE, &ring.open_secret(PLACE, &before).unwrap()).unwrap();
        assert_eq!((before.key_version(), after.key_version()), (1, 2));
        assert_eq!(&*ring.open_secret(PLACE, &after).unwrap(), b"secret");
        let error = old.open_secret(PLACE, &after).unwrap_err().to_string();
        assert!(error.contains("version 2 of the data key, which this member does not have"), "{error}");
        // Also where it is called the old one.
        let renamed = SealedSecret { key_version: 1, ..after };
        assert!(old.open_secret(PLACE, &renamed).is_err());
        let back = Ring::carried(&ring.carry(), collective).unwrap();
        assert_eq!(back.seal(PLACE, b"x").unwrap().key_version(), 2);
        assert_eq!(&*back.open_secret(PLACE, &before).unwrap(), b"secret");
    }
}
