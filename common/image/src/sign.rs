//! Detached signatures: `FILE.moor.sig`. The image itself stays the same to the byte, whoever signs it, and however often.

use crate::error::ImageError;
use crate::hash::sha256;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use ssh_key::{HashAlg, LineEnding, PrivateKey};

/// Namespace of the SSHSIG (`ssh-keygen -Y verify -n moor-image`).
pub const SSHSIG_NAMESPACE: &str = "moor-image";

/// Most signatures that a file may hold.
const MAX_SIGNATURES: usize = 64;

/// An Ed25519 public key that is trusted to sign images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// Names the key: the first 16 bytes of SHA-256("key" ‖ key).
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&sha256(&[b"key", &self.0])[..16]);
        id
    }

    /// From an `ssh-ed25519 AAAA… comment` line.
    ///
    /// # Errors
    /// Not a key, or of another type.
    pub fn from_openssh(line: &str) -> Result<Self, ImageError> {
        let error = |why: String| {
            ImageError::SigningKey(format!("'{}' is not an ssh-ed25519 public key: {why}", shorten(line)))
        };
        let key = ssh_key::PublicKey::from_openssh(line.trim()).map_err(|e| error(e.to_string()))?;
        let key = key.key_data().ed25519().ok_or_else(|| error("it is of another type".into()))?;
        Ok(Self(key.0))
    }

    /// All keys of a text with one key per line; empty lines and lines that begin with `#` are passed over.
    ///
    /// # Errors
    /// A line that is no key; no key at all.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, ImageError> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys = lines.map(Self::from_openssh).collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(ImageError::SigningKey("no ssh-ed25519 public key in it".into())) } else { Ok(keys) }
    }
}

fn shorten(line: &str) -> String {
    line.chars().take(60).collect()
}

/// A builder's key. No `Debug`.
pub struct SigningKey {
    ssh: PrivateKey,
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// From an OpenSSH private key file without a passphrase.
    ///
    /// # Errors
    /// Not a key, encrypted, or of another type.
    pub fn from_openssh(text: &[u8]) -> Result<Self, ImageError> {
        let error = |why: &str| {
            ImageError::SigningKey(format!(
                "not a usable signing key: {why}; make one with `ssh-keygen -t ed25519 -N ''`"
            ))
        };
        let ssh = PrivateKey::from_openssh(text).map_err(|e| error(&e.to_string()))?;
        if ssh.is_encrypted() {
            return Err(error("it has a passphrase"));
        }
        let key = ssh.key_data().ed25519().ok_or_else(|| error("it is not of type ssh-ed25519"))?;
        let pair = Ed25519KeyPair::from_seed_and_public_key(key.private.as_ref(), key.public.as_ref())
            .map_err(|_| error("its two halves do not belong together"))?;
        Ok(Self { ssh, pair })
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(bytes)
    }
}

/// The text that the SSHSIG is over.
#[must_use]
pub fn sshsig_message(digest: &[u8; 32]) -> String {
    format!("{}\n", hex::encode(digest))
}

fn message(digest: &[u8; 32]) -> [u8; 50] {
    let mut out = [0; 50];
    out[..18].copy_from_slice(b"moor/v1 signature\0");
    out[18..].copy_from_slice(digest);
    out
}

/// One signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    key_id: String,
    signature: String,
    sshsig: String,
}

/// The content of `FILE.moor.sig`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignatureFile {
    version: u32,
    signatures: Vec<Entry>,
}

impl Default for SignatureFile {
    fn default() -> Self {
        Self { version: 1, signatures: Vec::new() }
    }
}

impl SignatureFile {
    /// Parses it.
    ///
    /// # Errors
    /// Not of this shape, or too many signatures.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let file: Self = serde_json::from_slice(bytes).map_err(|error| ImageError::SignatureFile(error.to_string()))?;
        if file.version != 1 {
            return Err(ImageError::SignatureFile(format!("version {} is not known", file.version)));
        }
        if file.signatures.len() > MAX_SIGNATURES {
            return Err(ImageError::SignatureFile(format!("more than {MAX_SIGNATURES} signatures")));
        }
        Ok(file)
    }

    /// Canonical bytes with a newline.
    ///
    /// # Errors
    /// Never, for values of this type.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ImageError> {
        let mut bytes =
            serde_json_canonicalizer::to_vec(self).map_err(|error| ImageError::SignatureFile(error.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Adds a signature; one by the same key is replaced.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn sign(&mut self, digest: &[u8; 32], key: &SigningKey) -> Result<(), ImageError> {
        let key_id = hex::encode(key.public().id());
        let signature = hex::encode(key.pair.sign(&message(digest)).as_ref());
        let sshsig = key
            .ssh
            .sign(SSHSIG_NAMESPACE, HashAlg::Sha512, sshsig_message(digest).as_bytes())
            .and_then(|signature| signature.to_pem(LineEnding::LF))
            .map_err(|_| ImageError::Crypto("signing"))?;
        self.signatures.retain(|entry| entry.key_id != key_id);
        self.signatures.push(Entry { key_id, signature, sshsig });
        Ok(())
    }

    /// Adds the signatures of another file, as far as there is room: while an image is replaced, its signature file vouches for both.
    pub fn add_all(&mut self, other: Self) {
        self.signatures.extend(other.signatures);
        self.signatures.truncate(MAX_SIGNATURES);
    }

    /// Whether one of `trusted` signed `digest`.
    #[must_use]
    pub fn is_signed_by(&self, digest: &[u8; 32], trusted: &[PublicKey]) -> bool {
        trusted.iter().any(|key| {
            let id = hex::encode(key.id());
            self.signatures.iter().filter(|entry| entry.key_id == id).any(|entry| {
                hex::decode(&entry.signature)
                    .is_ok_and(|bytes| UnparsedPublicKey::new(&ED25519, key.0).verify(&message(digest), &bytes).is_ok())
            })
        })
    }

    /// The SSHSIG texts, for `ssh-keygen -Y verify`.
    pub fn sshsigs(&self) -> impl Iterator<Item = &str> {
        self.signatures.iter().map(|entry| entry.sshsig.as_str())
    }

    /// Hexadecimal ids of the keys that signed.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.signatures.iter().map(|entry| entry.key_id.as_str())
    }
}
