//! `TPMT_PUBLIC`: the public area of a key, and its name.

use crate::wire::Reader;
use crate::{TpmError, alg};
use aws_lc_rs::digest;

/// `TPM_ECC_NIST_P256`.
pub const P256: u16 = 0x0003;
/// `TPM_ECC_NIST_P384`.
pub const P384: u16 = 0x0004;

/// The public area of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    /// Hash of the name: [`alg::SHA256`] or [`alg::SHA384`].
    pub name_alg: u16,
    /// `TPMA_OBJECT`.
    pub attributes: u32,
    /// Policy digest.
    pub policy: Vec<u8>,
    /// Key and its parameters.
    pub key: Key,
    bytes: Vec<u8>,
}

/// The key itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// RSA.
    Rsa {
        /// Key bits of the AES cipher of a storage key; `None`: no cipher.
        aes_bits: Option<u16>,
        /// Signing scheme, [`alg::NULL`] for a storage key.
        scheme: u16,
        /// Modulus, big-endian.
        modulus: Vec<u8>,
        /// Exponent.
        exponent: u32,
    },
    /// An elliptic curve.
    Ecc {
        /// As for RSA.
        aes_bits: Option<u16>,
        /// As for RSA.
        scheme: u16,
        /// Hash of the scheme; 0 where it has none.
        scheme_hash: u16,
        /// [`P256`] or [`P384`].
        curve: u16,
        /// X, big-endian, padded to the curve's length.
        x: Vec<u8>,
        /// Y.
        y: Vec<u8>,
    },
}

/// Bytes of a coordinate.
pub(crate) fn coordinate_length(curve: u16) -> Result<usize, TpmError> {
    match curve {
        P256 => Ok(32),
        P384 => Ok(48),
        other => Err(TpmError::Unsupported { what: "curve", value: u32::from(other) }),
    }
}

fn padded(bytes: &[u8], length: usize) -> Result<Vec<u8>, TpmError> {
    if bytes.len() > length {
        return Err(TpmError::Key("a coordinate is longer than the curve's"));
    }
    let mut out = vec![0; length - bytes.len()];
    out.extend_from_slice(bytes);
    Ok(out)
}

/// `TPMT_SYM_DEF_OBJECT`: AES in CFB mode, or none.
fn symmetric(reader: &mut Reader<'_>) -> Result<Option<u16>, TpmError> {
    match reader.u16()? {
        alg::NULL => Ok(None),
        alg::AES => {
            let bits = reader.u16()?;
            let mode = reader.u16()?;
            if mode != alg::CFB || !matches!(bits, 128 | 256) {
                return Err(TpmError::Unsupported { what: "cipher mode", value: u32::from(mode) });
            }
            Ok(Some(bits))
        }
        other => Err(TpmError::Unsupported { what: "cipher", value: u32::from(other) }),
    }
}

/// A scheme and, where it has one, its hash.
fn scheme(reader: &mut Reader<'_>) -> Result<(u16, u16), TpmError> {
    let scheme = reader.u16()?;
    let hash = if scheme == alg::NULL { 0 } else { reader.u16()? };
    Ok((scheme, hash))
}

impl Public {
    /// Parses a `TPMT_PUBLIC` of an RSA-2048 to 4096, P-256 or P-384 key.
    ///
    /// # Errors
    /// Truncated, trailing bytes, or a key of another kind.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new(bytes, "public area");
        let kind = reader.u16()?;
        let name_alg = reader.u16()?;
        if !matches!(name_alg, alg::SHA256 | alg::SHA384) {
            return Err(TpmError::Unsupported { what: "name hash", value: u32::from(name_alg) });
        }
        let attributes = reader.u32()?;
        let policy = reader.sized()?.to_vec();
        let key = match kind {
            alg::RSA => {
                let aes_bits = symmetric(&mut reader)?;
                let (scheme, _) = scheme(&mut reader)?;
                let bits = reader.u16()?;
                let exponent = match reader.u32()? {
                    0 => 65_537,
                    other => other,
                };
                let modulus = reader.sized()?.to_vec();
                if !matches!(bits, 2048 | 3072 | 4096) || modulus.len() * 8 != usize::from(bits) {
                    return Err(TpmError::Key("its modulus has neither 2048, 3072 nor 4096 bits"));
                }
                Key::Rsa { aes_bits, scheme, modulus, exponent }
            }
            alg::ECC => {
                let aes_bits = symmetric(&mut reader)?;
                let (scheme, scheme_hash) = scheme(&mut reader)?;
                let curve = reader.u16()?;
                let length = coordinate_length(curve)?;
                let kdf = reader.u16()?;
                if kdf != alg::NULL {
                    return Err(TpmError::Unsupported { what: "key derivation", value: u32::from(kdf) });
                }
                let x = padded(reader.sized()?, length)?;
                let y = padded(reader.sized()?, length)?;
                Key::Ecc { aes_bits, scheme, scheme_hash, curve, x, y }
            }
            other => return Err(TpmError::Unsupported { what: "key type", value: u32::from(other) }),
        };
        reader.end()?;
        Ok(Self { name_alg, attributes, policy, key, bytes: bytes.to_vec() })
    }

    /// The wire bytes it was parsed from.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The key's name: hash algorithm, then the hash of the public area (Part 1, 16 "Names").
    #[must_use]
    pub fn name(&self) -> Vec<u8> {
        let algorithm = if self.name_alg == alg::SHA384 { &digest::SHA384 } else { &digest::SHA256 };
        let mut out = self.name_alg.to_be_bytes().to_vec();
        out.extend_from_slice(digest::digest(algorithm, &self.bytes).as_ref());
        out
    }

    /// The key as the bit string of an X.509 `SubjectPublicKeyInfo`: PKCS#1 `RSAPublicKey`, or an uncompressed point. An endorsement
    /// certificate is this key's if its subject's key has these bits (its algorithm may be `rsaEncryption` or `RSAES-OAEP`).
    #[must_use]
    pub fn key_bits(&self) -> Vec<u8> {
        match &self.key {
            Key::Rsa { modulus, exponent, .. } => crate::der::rsa_public_key(modulus, *exponent),
            Key::Ecc { x, y, .. } => uncompressed(x, y),
        }
    }
}

/// An uncompressed point (SEC 1, 2.3.3).
pub(crate) fn uncompressed(x: &[u8], y: &[u8]) -> Vec<u8> {
    let mut out = vec![4];
    out.extend_from_slice(x);
    out.extend_from_slice(y);
    out
}
