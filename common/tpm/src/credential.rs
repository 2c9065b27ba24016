//! `TPM2_MakeCredential` in software: a secret that only the TPM with this endorsement key can read, and only if it also holds the
//! attestation key of this name (Part 1, 24 "Credential Protection", and its annexes B.10.4 and C.6.4).

use crate::der;
use crate::public::{Key, P256, P384, Public, coordinate_length, uncompressed};
use crate::wire::put_sized;
use crate::{TpmError, alg};
use aws_lc_rs::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey};
use aws_lc_rs::cipher::{AES_128, AES_256, EncryptionContext, StreamingEncryptingKey, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OaepPublicEncryptingKey, PublicEncryptingKey};
use aws_lc_rs::{digest, hmac, rand};
use zeroize::Zeroizing;

/// What the TPM is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// `TPM2B_ID_OBJECT`.
    pub id_object: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`.
    pub encrypted_secret: Vec<u8>,
}

/// A hash algorithm in the three shapes that are needed.
#[derive(Clone, Copy)]
struct Hash {
    digest: &'static digest::Algorithm,
    hmac: hmac::Algorithm,
}

fn hash_of(algorithm: u16) -> Result<Hash, TpmError> {
    match algorithm {
        alg::SHA256 => Ok(Hash { digest: &digest::SHA256, hmac: hmac::HMAC_SHA256 }),
        alg::SHA384 => Ok(Hash { digest: &digest::SHA384, hmac: hmac::HMAC_SHA384 }),
        other => Err(TpmError::Unsupported { what: "hash", value: u32::from(other) }),
    }
}

/// `KDFa` (Part 1, 11.4.10.2): counter mode with HMAC; `bits` is at most the length of one hash in our uses.
fn kdf_a(hash: Hash, key: &[u8], label: &[u8], context_u: &[u8], bits: u32) -> Zeroizing<Vec<u8>> {
    let key = hmac::Key::new(hash.hmac, key);
    let wanted = bits.div_ceil(8) as usize;
    let mut out = Zeroizing::new(Vec::with_capacity(wanted));
    let mut counter = 1_u32;
    while out.len() < wanted {
        let mut context = hmac::Context::with_key(&key);
        context.update(&counter.to_be_bytes());
        context.update(label);
        context.update(&[0]);
        context.update(context_u);
        context.update(&bits.to_be_bytes());
        out.extend_from_slice(context.sign().as_ref());
        counter += 1;
    }
    out.truncate(wanted);
    out
}

/// `KDFe` (Part 1, 11.4.10.3): counter mode with a hash over the shared x coordinate.
fn kdf_e(hash: Hash, z: &[u8], label: &[u8], party_u: &[u8], party_v: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut context = digest::Context::new(hash.digest);
    // One round: as many bits are wanted as the hash has.
    context.update(&1_u32.to_be_bytes());
    context.update(z);
    context.update(label);
    context.update(&[0]);
    context.update(party_u);
    context.update(party_v);
    Zeroizing::new(context.finish().as_ref().to_vec())
}

/// Makes a challenge for the holder of `ek` and of a key named `ak_name`.
///
/// # Errors
/// The endorsement key is not a storage key of a supported kind.
pub fn make(ek: &Public, ak_name: &[u8], secret: &[u8; 32]) -> Result<Challenge, TpmError> {
    let hash = hash_of(ek.name_alg)?;
    let (seed, encrypted_seed, aes_bits) = match &ek.key {
        Key::Rsa { aes_bits, modulus, exponent, .. } => {
            let (seed, encrypted) = rsa_seed(ek.name_alg, hash, modulus, *exponent)?;
            (seed, encrypted, *aes_bits)
        }
        Key::Ecc { aes_bits, curve, x, y, .. } => {
            let (seed, encrypted) = ecc_seed(hash, *curve, x, y)?;
            (seed, encrypted, *aes_bits)
        }
    };
    let aes_bits = aes_bits.ok_or(TpmError::Key("the endorsement key has no cipher: it is no storage key"))?;

    // The credential as a TPM2B, encrypted under a key that depends on the name of the attestation key.
    let mut credential = Vec::new();
    put_sized(&mut credential, secret)?;
    let key = kdf_a(hash, &seed, b"STORAGE", ak_name, u32::from(aes_bits));
    let identity = encrypt_cfb(&key, &credential)?;

    let hash_bits = u32::try_from(hash.digest.output_len() * 8).map_err(|_| TpmError::TooLong)?;
    let mac_key = kdf_a(hash, &seed, b"INTEGRITY", &[], hash_bits);
    let mut mac = hmac::Context::with_key(&hmac::Key::new(hash.hmac, &mac_key));
    mac.update(&identity);
    mac.update(ak_name);

    let mut object = Vec::new();
    put_sized(&mut object, mac.sign().as_ref())?;
    object.extend_from_slice(&identity);
    let mut id_object = Vec::new();
    put_sized(&mut id_object, &object)?;
    let mut encrypted_secret = Vec::new();
    put_sized(&mut encrypted_secret, &encrypted_seed)?;
    Ok(Challenge { id_object, encrypted_secret })
}

type Seed = (Zeroizing<Vec<u8>>, Vec<u8>);

/// A random seed under OAEP with the label "IDENTITY" (with its terminating zero).
fn rsa_seed(name_alg: u16, hash: Hash, modulus: &[u8], exponent: u32) -> Result<Seed, TpmError> {
    let mut seed = Zeroizing::new(vec![0; hash.digest.output_len()]);
    rand::fill(&mut seed).map_err(|_| TpmError::Crypto("making a seed"))?;
    let key = PublicEncryptingKey::from_der(&der::rsa_spki(modulus, exponent))
        .map_err(|_| TpmError::Key("the endorsement key is not a valid RSA key"))?;
    let key = OaepPublicEncryptingKey::new(key).map_err(|_| TpmError::Crypto("setting up OAEP"))?;
    let algorithm = if name_alg == alg::SHA384 { &OAEP_SHA384_MGF1SHA384 } else { &OAEP_SHA256_MGF1SHA256 };
    let mut out = vec![0; key.ciphertext_size()];
    let length = key
        .encrypt(algorithm, &seed, &mut out, Some(b"IDENTITY\0"))
        .map_err(|_| TpmError::Crypto("encrypting by OAEP"))?
        .len();
    out.truncate(length);
    Ok((seed, out))
}

/// An ephemeral key; the seed is derived from what it shares with the endorsement key.
fn ecc_seed(hash: Hash, curve: u16, x: &[u8], y: &[u8]) -> Result<Seed, TpmError> {
    let algorithm = match curve {
        P256 => &agreement::ECDH_P256,
        P384 => &agreement::ECDH_P384,
        other => return Err(TpmError::Unsupported { what: "curve", value: u32::from(other) }),
    };
    let length = coordinate_length(curve)?;
    let ephemeral = EphemeralPrivateKey::generate(algorithm, &rand::SystemRandom::new())
        .map_err(|_| TpmError::Crypto("making an ephemeral key"))?;
    let public = ephemeral.compute_public_key().map_err(|_| TpmError::Crypto("making an ephemeral key"))?;
    let point = public.as_ref();
    let (own_x, own_y) = (&point[1..=length], &point[1 + length..]);
    let peer = UnparsedPublicKey::new(algorithm, uncompressed(x, y));
    let seed =
        agreement::agree_ephemeral(ephemeral, peer, TpmError::Key("the endorsement key is not on its curve"), |z| {
            Ok(kdf_e(hash, z, b"IDENTITY", own_x, x))
        })?;
    let mut encoded = Vec::new();
    put_sized(&mut encoded, own_x)?;
    put_sized(&mut encoded, own_y)?;
    Ok((seed, encoded))
}

fn encrypt_cfb(key: &[u8], data: &[u8]) -> Result<Vec<u8>, TpmError> {
    let failed = |_| TpmError::Crypto("encrypting the credential");
    let algorithm = if key.len() == 32 { &AES_256 } else { &AES_128 };
    let key = UnboundCipherKey::new(algorithm, key).map_err(failed)?;
    // The protection of credentials fixes the vector to zero: each key is used once.
    let vector = EncryptionContext::Iv128(FixedLength::from([0; 16]));
    let mut cipher = StreamingEncryptingKey::less_safe_cfb128(key, vector).map_err(failed)?;
    let mut out = vec![0; data.len() + 16];
    let mut written = cipher.update(data, &mut out).map_err(failed)?.written().len();
    let (_, last) = cipher.finish(&mut out[written..]).map_err(failed)?;
    written += last.written().len();
    out.truncate(written);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(length: u8) -> Vec<u8> {
        (0..length).collect()
    }

    fn hash(algorithm: u16) -> Hash {
        hash_of(algorithm).unwrap()
    }

    /// Expected values by Python's hmac and hashlib.
    #[test]
    fn key_derivation_gives_the_known_answers() {
        let name = [&[0x00, 0x0B][..], &[0x11; 32]].concat();
        for (algorithm, key, label, context, bits, wanted) in [
            (alg::SHA256, 32, &b"STORAGE"[..], &name[..], 128, "4b6977df7782a6d0312cc5f537456667"),
            (
                alg::SHA256,
                32,
                b"INTEGRITY",
                &[],
                256,
                "bacf689f634ece301e1f1b15b072d9c87db6a69585db42b1a0cb8f73ebe2692e",
            ),
            (
                alg::SHA384,
                48,
                b"STORAGE",
                &name,
                256,
                "e14c57415278912f0fb5b68a8bd0a43923f59bdab550f1f0c24d1091668620e7",
            ),
            (
                alg::SHA384,
                48,
                b"INTEGRITY",
                &[],
                384,
                "f33d1615c2266b2fa774ff368d6ce3af9d8c0b4227e57eb3e28b810755366e9a668857315ae51d8d7cfac92bb0485639",
            ),
        ] {
            assert_eq!(hex::encode(kdf_a(hash(algorithm), &range(key), label, context, bits)), wanted);
        }
        for (algorithm, length, wanted) in [
            (alg::SHA256, 32, "f59da144d928b82a7aceb16c1dbc3c5b0588ef575d1baefaade7131ba5f2c6a5"),
            (
                alg::SHA384,
                48,
                "a76fb6010fb8fed02afc60ccd48d86c98317315508b4144e7ab35396516c011466e217194b21be47e57e3ddc3743f950",
            ),
        ] {
            let (z, u, v) = (vec![0x22; length], vec![0x33; length], vec![0x44; length]);
            assert_eq!(hex::encode(kdf_e(hash(algorithm), &z, b"IDENTITY", &u, &v)), wanted);
        }
    }

    /// Expected values by `openssl enc -aes-128-cfb` and `-aes-256-cfb`.
    #[test]
    fn encryption_gives_the_known_answers() {
        let data = [&[0x00, 0x20][..], &[b'0'; 32]].concat();
        for (key, wanted) in [
            (16, "c6810b07b7bf6bb25f7fb15291f8e8494e6b07d88aa1dc0dbc4d1a17465e357d8348"),
            (32, "f2b030861a79afe099c3aa5aed1e47b0194312196dff1ec3688d360b1960f8b085d7"),
        ] {
            assert_eq!(hex::encode(encrypt_cfb(&range(key), &data).unwrap()), wanted);
        }
    }
}
