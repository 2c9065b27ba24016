//! The soft key: what a machine without a TPM proves itself by. A P-256 key in a file that only root reads.

use super::IdentityError;
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest file that can be a P-256 key in PKCS#8.
const MAX_FILE: usize = 1024;

/// A P-256 key. No `Debug`: it is a secret.
pub struct SoftKey {
    key: EcdsaKeyPair,
}

impl SoftKey {
    /// Reads the key at `path`, or makes one there.
    ///
    /// # Errors
    /// The file is readable by others, holds something else, or cannot be read or written.
    pub fn open(path: &Path) -> Result<Self, IdentityError> {
        match Self::read(path) {
            Err(IdentityError::SoftKey { cause, .. }) if cause.kind() == ErrorKind::NotFound => {
                Self::create(path)?;
                // Read back what is there: had another process made one meanwhile, that one counts.
                Self::read(path)
            }
            other => other,
        }
    }

    fn read(path: &Path) -> Result<Self, IdentityError> {
        let failed = |cause| error(path, "reading", cause);
        let bad = |reason| IdentityError::BadSoftKey { path: path.to_owned(), reason };
        // A link could lead to a file that somebody else may write.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(bad("it is not a regular file"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(bad("others may read or write it: remove it, so that a new key is made, and rearm the node"));
        }
        // Allocated at once: a buffer that grows leaves copies of the key behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
        file.take(MAX_FILE as u64).read_to_end(&mut bytes).map_err(failed)?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &bytes).map_err(|_| {
            bad("it holds no P-256 key in PKCS#8: remove it, so that a new key is made, and rearm the node")
        })?;
        Ok(Self { key })
    }

    /// Written beside and moved: the name never shows half a key, and never loses one that is there.
    fn create(path: &Path) -> Result<(), IdentityError> {
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| IdentityError::Crypto("making a soft key"))?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        // tempfile makes its files with mode 0600.
        let mut file = tempfile::Builder::new()
            .prefix(".soft-key.")
            .tempfile_in(&folder)
            .map_err(|cause| error(path, "making a file beside it", cause))?;
        file.write_all(key.as_ref()).map_err(|cause| error(path, "writing", cause))?;
        file.as_file().sync_all().map_err(|cause| error(path, "syncing", cause))?;
        match file.persist_noclobber(path) {
            Ok(_) => {}
            Err(failure) if failure.error.kind() == ErrorKind::AlreadyExists => return Ok(()),
            Err(failure) => return Err(error(path, "giving it its name", failure.error)),
        }
        File::open(&folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|cause| error(path, "syncing its folder", cause))
    }

    /// DER `SubjectPublicKeyInfo`.
    pub(super) fn public_key(&self) -> Result<Vec<u8>, IdentityError> {
        let der: PublicKeyX509Der<'_> =
            self.key.public_key().as_der().map_err(|_| IdentityError::Crypto("encoding the soft key's public half"))?;
        Ok(der.as_ref().to_vec())
    }

    /// ECDSA (ASN.1) with SHA-256 over a proof's digest.
    pub(super) fn sign(&self, digest: &[u8; 32]) -> Result<Vec<u8>, IdentityError> {
        let signature = self
            .key
            .sign(&SystemRandom::new(), digest)
            .map_err(|_| IdentityError::Crypto("signing with the soft key"))?;
        Ok(signature.as_ref().to_vec())
    }
}

fn error(path: &Path, doing: &'static str, cause: std::io::Error) -> IdentityError {
    IdentityError::SoftKey { path: path.to_owned(), doing, cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::process::Command;

    #[test]
    fn a_key_is_made_once_and_is_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("soft.key");
        let first = SoftKey::open(&path).unwrap().public_key().unwrap();
        let second = SoftKey::open(&path).unwrap().public_key().unwrap();
        assert_eq!(first, second);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        let other = SoftKey::open(&folder.path().join("other.key")).unwrap().public_key().unwrap();
        assert_ne!(first, other);
    }

    #[test]
    fn signatures_verify_also_for_openssl() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let key = SoftKey::open(&at("soft.key")).unwrap();
        let digest = [7; 32];
        let signature = key.sign(&digest).unwrap();
        let public = key.public_key().unwrap();
        assert!(UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &public).verify(&digest, &signature).is_ok());
        assert!(UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &public).verify(&[8; 32], &signature).is_err());
        for (name, bytes) in [("public.der", &public), ("signature", &signature), ("digest", &digest.to_vec())] {
            fs::write(at(name), bytes).unwrap();
        }
        let output = Command::new("openssl")
            .args(["dgst", "-sha256", "-keyform", "DER", "-verify"])
            .arg(at("public.der"))
            .arg("-signature")
            .args([at("signature"), at("digest")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn a_file_that_is_no_private_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let reason = |path: &Path| SoftKey::open(path).map(drop).unwrap_err().to_string();

        fs::write(at("garbage"), b"no key").unwrap();
        fs::set_permissions(at("garbage"), Permissions::from_mode(0o600)).unwrap();
        assert!(reason(&at("garbage")).contains("holds no P-256 key"), "{}", reason(&at("garbage")));

        SoftKey::open(&at("open")).unwrap();
        fs::set_permissions(at("open"), Permissions::from_mode(0o640)).unwrap();
        assert!(reason(&at("open")).contains("others may read"), "{}", reason(&at("open")));

        SoftKey::open(&at("target")).unwrap();
        symlink("target", at("link")).unwrap();
        assert!(reason(&at("link")).contains("reading"), "{}", reason(&at("link")));

        fs::create_dir(at("folder")).unwrap();
        assert!(reason(&at("folder")).contains("not a regular file"), "{}", reason(&at("folder")));
        assert!(reason(&at("absent/key")).contains("making a file beside it"), "{}", reason(&at("absent/key")));
    }

    #[test]
    fn of_two_that_make_it_at_once_one_wins_and_both_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("soft.key");
        let keys: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|_| scope.spawn(|| SoftKey::open(&path).unwrap().public_key().unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }
}
