//! A member's way to the collective's keys: its own key, in a 0600 file, and what the store has for that.

use super::{INFO, KEY, Ring, SUITE, Version, bound_to, info};
use crate::files;
use crate::store::records::{KeyVersion, KeysRecord, WrappedKey};
use anyhow::{Context as _, ensure};
use aws_lc_rs::agreement::{PrivateKey, X25519};
use moor_api::admin::AuthorityKind;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::node::Base64;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke as _, HpkePrivateKey};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use zeroize::{Zeroize as _, Zeroizing};

/// The file of the key that versions are encrypted to.
const UNWRAP_KEY: &str = "unwrap.key";

/// The key of a member that versions are encrypted to. No `Debug`.
pub struct UnwrapKey(HpkePrivateKey);

impl UnwrapKey {
    /// Makes that of a new member in its key directory `dir`; returns its public half.
    ///
    /// # Errors
    /// No randomness; the directory is not writable.
    pub fn create(dir: &Path) -> anyhow::Result<Base64> {
        let (public, private) = SUITE.generate_key_pair().context("making the member's key")?;
        let text = Zeroizing::new(format!("{}\n", hex::encode(private.secret_bytes())));
        let path = dir.join(UNWRAP_KEY);
        files::write(&path, text.as_bytes(), 0o600).with_context(|| format!("writing '{}'", path.display()))?;
        Ok(Base64(public.0))
    }

    /// Reads it.
    ///
    /// # Errors
    /// It is not there, or no key.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(UNWRAP_KEY);
        let read = std::fs::read_to_string(&path).with_context(|| format!("reading '{}'", path.display()));
        let text = Zeroizing::new(read?);
        let bytes = hex::decode(text.trim_end()).ok().filter(|bytes| bytes.len() == KEY);
        let bytes = bytes.with_context(|| format!("'{}' is not a member's key", path.display()))?;
        Ok(Self(HpkePrivateKey::from(bytes)))
    }
}

/// What of the record a member's ring was made of: versions, and how each is encrypted to it.
type Of = Vec<(u32, Option<WrappedKey>)>;

/// A member's way to the keys in the store. No `Debug`.
pub struct Keyring {
    key: UnwrapKey,
    member: MemberId,
    collective: CollectiveId,
    opened: RwLock<(Of, Arc<Ring>)>,
}

impl Keyring {
    /// With the key in the directory `dir`; it has no version yet.
    ///
    /// # Errors
    /// The key is missing or damaged.
    pub fn open(dir: &Path, collective: CollectiveId, member: MemberId) -> anyhow::Result<Self> {
        let ring = Ring { collective, versions: BTreeMap::new(), current: 0 };
        let opened = RwLock::new((Vec::new(), Arc::new(ring)));
        Ok(Self { key: UnwrapKey::open(dir)?, member, collective, opened })
    }

    /// Public half of the member's key.
    ///
    /// # Errors
    /// The key is not usable.
    pub fn public(&self) -> anyhow::Result<Base64> {
        let private = PrivateKey::from_private_key(&X25519, self.key.0.secret_bytes())
            .map_err(|error| anyhow::anyhow!("the member's key is not usable: {error}"))?;
        Ok(private.compute_public_key().context("the member's key")?.as_ref().to_vec().into())
    }

    /// The versions as they were when the record was looked at last.
    #[must_use]
    pub fn ring(&self) -> Arc<Ring> {
        // Whoever panicked here had at most replaced it.
        self.opened.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// The versions that a record holds. One that this member has no part in is left out.
    ///
    /// # Errors
    /// One that is encrypted to it does not open.
    pub fn refresh(&self, record: &KeysRecord) -> anyhow::Result<Arc<Ring>> {
        let mine = |version: &KeyVersion| (version.version, version.wrapped.get(&self.member).cloned());
        let of: Of = record.versions.iter().map(mine).collect();
        let before = {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            if opened.0 == of {
                return Ok(opened.1.clone());
            }
            opened.1.clone()
        };
        let mut versions = BTreeMap::new();
        for (version, wrapped) in &of {
            if let Some(known) = before.versions.get(version) {
                versions.insert(*version, known.clone());
            } else if let Some(wrapped) = wrapped {
                versions.insert(*version, Arc::new(self.unwrap(*version, wrapped)?));
            }
        }
        let current = of.last().map_or(0, |(version, _)| *version);
        let ring = Arc::new(Ring { collective: self.collective, versions, current });
        *self.opened.write().unwrap_or_else(PoisonError::into_inner) = (of, ring.clone());
        Ok(ring)
    }

    /// The versions of a record that this member opens. The others are left out, also where they should open: for who goes on with what there is.
    #[must_use]
    pub fn openable(&self, record: &KeysRecord) -> Ring {
        let open = |version: &KeyVersion| {
            let opened = self.unwrap(version.version, version.wrapped.get(&self.member)?).ok()?;
            Some((version.version, Arc::new(opened)))
        };
        let versions = record.versions.iter().filter_map(open).collect();
        Ring { collective: self.collective, versions, current: record.current().unwrap_or(0) }
    }

    /// What [`wrap_authority`](super::wrap_authority) encrypted of authority `number` of this kind. A member that went on alone had another id before, and
    /// the same key.
    ///
    /// # Errors
    /// None of it is for this member, or is what it says.
    pub fn open_authority(
        &self,
        kind: AuthorityKind,
        number: u32,
        wrapped: &BTreeMap<MemberId, WrappedKey>,
    ) -> anyhow::Result<Zeroizing<Vec<u8>>> {
        let opened = wrapped.iter().find_map(|(member, wrapped)| {
            let from = EncapsulatedSecret(wrapped.encapsulated.0.clone());
            let aad = bound_to(self.collective, *member, number);
            SUITE.open(&from, info(kind), &aad, &wrapped.ciphertext.0, &self.key.0).ok()
        });
        let opened = opened.map(Zeroizing::new);
        opened.with_context(|| format!("{kind} authority {number} does not open by this member's key"))
    }

    fn unwrap(&self, version: u32, wrapped: &WrappedKey) -> anyhow::Result<Version> {
        let from = EncapsulatedSecret(wrapped.encapsulated.0.clone());
        let aad = bound_to(self.collective, self.member, version);
        let opened = SUITE.open(&from, INFO, &aad, &wrapped.ciphertext.0, &self.key.0);
        let mut plain = opened.map_err(|_| {
            anyhow::anyhow!("version {version} of the collective's keys does not open by this member's key")
        })?;
        let mut bytes = Zeroizing::new([0; 2 * KEY]);
        let is_whole = plain.len() == bytes.len();
        if is_whole {
            bytes.copy_from_slice(&plain);
        }
        plain.zeroize();
        ensure!(is_whole, "version {version} of the collective's keys has another length");
        Version::from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Place;
    use crate::store::records::MemberRecord;

    const PLACE: Place<'_> = Place { table: "images", id: "a", field: "dek" };

    struct Somebody {
        dir: tempfile::TempDir,
        record: MemberRecord,
    }

    fn somebody() -> Somebody {
        let dir = tempfile::tempdir().unwrap();
        let unwrap = UnwrapKey::create(dir.path()).unwrap();
        let record =
            MemberRecord { unwrap, ..MemberRecord::only(vec![1].into(), Base64::default(), String::new(), Vec::new()) };
        Somebody { dir, record }
    }

    #[test]
    fn a_version_opens_for_those_it_was_encrypted_to_and_in_its_place() {
        let collective = CollectiveId::random();
        let (a, b) = (somebody(), somebody());
        let ring = Ring::first(collective).unwrap();
        let sealed = ring.seal(PLACE, b"secret").unwrap();
        let record = ring.record_for(&a.record).unwrap();
        let keyring = |of: &Somebody| Keyring::open(of.dir.path(), collective, of.record.id).unwrap();
        let ours = keyring(&a);
        assert_eq!(ours.public().unwrap(), a.record.unwrap);
        assert!(ours.ring().seal(PLACE, b"x").is_err(), "it has none yet");
        assert_eq!(&*ours.refresh(&record).unwrap().open_secret(PLACE, &sealed).unwrap(), b"secret");
        // Nothing for b is in it.
        let error = keyring(&b).refresh(&record).unwrap().seal(PLACE, b"x").unwrap_err().to_string();
        assert!(error.contains("no part in version 1"), "{error}");
        // What is for a does not open for b, nor as another version, nor in another collective.
        let wrapped = record.versions[0].wrapped[&a.record.id].clone();
        let moved = |version, id| KeysRecord {
            versions: vec![KeyVersion { version, wrapped: [(id, wrapped.clone())].into() }],
        };
        assert!(keyring(&b).refresh(&moved(1, b.record.id)).is_err());
        assert!(keyring(&a).refresh(&moved(2, a.record.id)).is_err());
        let elsewhere = Keyring::open(a.dir.path(), CollectiveId::random(), a.record.id).unwrap();
        assert!(elsewhere.refresh(&record).is_err());
        // Who comes later is given all of them, and takes them as soon as they are there.
        let theirs = keyring(&b);
        theirs.refresh(&record).unwrap();
        let mut both = record;
        let given = ring.wrap_all(b.record.id, &b.record.unwrap).unwrap();
        both.versions[0].wrapped.insert(b.record.id, given[&1].clone());
        assert_eq!(&*theirs.refresh(&both).unwrap().open_secret(PLACE, &sealed).unwrap(), b"secret");
    }

    #[test]
    fn who_goes_on_alone_keeps_the_keys_that_it_does_not_open() {
        let collective = CollectiveId::random();
        let (a, b, new) = (somebody(), somebody(), somebody());
        let mut ring = Ring::first(collective).unwrap();
        let first = ring.seal(PLACE, b"first").unwrap();
        let mut before = ring.record_for(&a.record).unwrap();
        ring.draw().unwrap();
        let second = ring.seal(PLACE, b"second").unwrap();
        // Version 1 is for a alone; version 2 for both, but what is there for b does not open; version 3 as it should be.
        before.versions.extend(ring.record_for(&a.record).unwrap().versions.pop());
        let other = before.versions[0].wrapped[&a.record.id].clone();
        before.versions[1].wrapped.insert(b.record.id, other);
        ring.draw().unwrap();
        let third = ring.seal(PLACE, b"third").unwrap();
        before.versions.extend(ring.record_for(&b.record).unwrap().versions.pop());
        let theirs = Keyring::open(b.dir.path(), collective, b.record.id).unwrap();
        assert!(theirs.refresh(&before).is_err());
        // The same keys under another id.
        let anew = MemberRecord { unwrap: b.record.unwrap.clone(), ..new.record };
        let after = theirs.openable(&before).begin_anew(&anew, &before).unwrap();
        assert_eq!(after.versions.iter().map(|version| version.version).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(after.versions[..2], before.versions[..2]);
        let ring = Keyring::open(b.dir.path(), collective, anew.id).unwrap().refresh(&after).unwrap();
        assert_eq!(&*ring.open_secret(PLACE, &third).unwrap(), b"third");
        assert_eq!(ring.seal(PLACE, b"x").unwrap().key_version(), 4);
        assert!(ring.open_secret(PLACE, &first).is_err() && ring.open_secret(PLACE, &second).is_err());
        // Who had a part in them has it still.
        let ours = Keyring::open(a.dir.path(), collective, a.record.id).unwrap().refresh(&after).unwrap();
        assert_eq!(&*ours.open_secret(PLACE, &first).unwrap(), b"first");
        assert_eq!(&*ours.open_secret(PLACE, &second).unwrap(), b"second");
    }

    #[test]
    fn an_authority_opens_for_those_it_was_encrypted_to_and_under_its_number() {
        use crate::secrets::wrap_authority;
        let collective = CollectiveId::random();
        let (a, b, c) = (somebody(), somebody(), somebody());
        let wrapped = wrap_authority(b"keys", AuthorityKind::X509, 2, collective, [&a.record, &b.record]).unwrap();
        let keyring = |of: &Somebody, id| Keyring::open(of.dir.path(), collective, id).unwrap();
        for member in [&a, &b] {
            assert_eq!(
                &**keyring(member, member.record.id).open_authority(AuthorityKind::X509, 2, &wrapped).unwrap(),
                b"keys"
            );
        }
        assert_eq!(
            &**keyring(&a, MemberId::random()).open_authority(AuthorityKind::X509, 2, &wrapped).unwrap(),
            b"keys",
            "by another id"
        );
        let error = keyring(&c, c.record.id).open_authority(AuthorityKind::X509, 2, &wrapped).unwrap_err().to_string();
        assert!(error.contains("authority 2 does not open by this member's key"), "{error}");
        assert!(keyring(&a, a.record.id).open_authority(AuthorityKind::X509, 3, &wrapped).is_err(), "another number");
        let other = AuthorityKind::Ssh(moor_api::admin::SshRole::User);
        assert!(keyring(&a, a.record.id).open_authority(other, 2, &wrapped).is_err(), "another kind");
        let moved = [(b.record.id, wrapped[&a.record.id].clone())].into();
        assert!(
            keyring(&a, a.record.id).open_authority(AuthorityKind::X509, 2, &moved).is_err(),
            "in another member's place"
        );
        let elsewhere = Keyring::open(a.dir.path(), CollectiveId::random(), a.record.id).unwrap();
        assert!(elsewhere.open_authority(AuthorityKind::X509, 2, &wrapped).is_err());
    }
}
