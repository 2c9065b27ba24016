//! A signer that is no TPM: it signs any attestation, so that each deviation can be tried with a signature that is good.

use aws_lc_rs::digest::{self, SHA256};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use moor_tpm::{Public, template};
use std::collections::BTreeMap;

/// `TPM_RH_ENDORSEMENT`.
pub(crate) const ENDORSEMENT: u32 = 0x4000_000B;

pub(crate) struct Forger(EcdsaKeyPair);

impl Forger {
    pub(crate) fn new() -> Self {
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &SystemRandom::new()).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref()).unwrap())
    }

    /// Its key, dressed up as an attestation key.
    pub(crate) fn public(&self) -> Public {
        let template = template::ak();
        let mut bytes = template[..template.len() - 4].to_vec();
        for coordinate in self.0.public_key().as_ref()[1..].chunks(32) {
            put(&mut bytes, coordinate);
        }
        Public::parse(&bytes).unwrap()
    }

    /// `TPMT_SIGNATURE` over it.
    pub(crate) fn sign(&self, attest: &[u8]) -> Vec<u8> {
        let fixed = self.0.sign(&SystemRandom::new(), attest).unwrap();
        let mut out = vec![0x00, 0x18, 0x00, 0x0B];
        for half in fixed.as_ref().chunks(32) {
            put(&mut out, half);
        }
        out
    }
}

/// Appends a sized buffer.
pub(crate) fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
    out.extend_from_slice(bytes);
}

/// An attestation with every field open.
#[derive(Clone)]
pub(crate) struct Attestation {
    pub(crate) magic: u32,
    pub(crate) kind: u16,
    pub(crate) signer: Vec<u8>,
    pub(crate) extra_data: Vec<u8>,
    pub(crate) selection: Vec<(u16, Vec<u8>)>,
    pub(crate) digest: Vec<u8>,
    pub(crate) after: Vec<u8>,
}

impl Attestation {
    /// A good quote by `ak` over PCRs 0, 7 and 15.
    pub(crate) fn good(ak: &Public, extra_data: &[u8], values: &BTreeMap<u8, Vec<u8>>) -> Self {
        Self {
            magic: 0xFF54_4347,
            kind: 0x8018,
            signer: qualified_name(ENDORSEMENT, ak),
            extra_data: extra_data.to_vec(),
            selection: vec![(0x000B, vec![0x81, 0x80, 0x00])],
            digest: digest_of(values),
            after: Vec::new(),
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_be_bytes().to_vec();
        out.extend_from_slice(&self.kind.to_be_bytes());
        put(&mut out, &self.signer);
        put(&mut out, &self.extra_data);
        // Clock, reset and restart counts, safe, firmware version.
        out.extend_from_slice(&1234_u64.to_be_bytes());
        out.extend_from_slice(&7_u32.to_be_bytes());
        out.extend_from_slice(&3_u32.to_be_bytes());
        out.push(1);
        out.extend_from_slice(&0x2019_1023_0016_3636_u64.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.selection.len()).unwrap().to_be_bytes());
        for (bank, bitmap) in &self.selection {
            out.extend_from_slice(&bank.to_be_bytes());
            out.push(u8::try_from(bitmap.len()).unwrap());
            out.extend_from_slice(bitmap);
        }
        put(&mut out, &self.digest);
        out.extend_from_slice(&self.after);
        out
    }
}

/// As Part 1 says in "Names".
pub(crate) fn qualified_name(hierarchy: u32, key: &Public) -> Vec<u8> {
    let hashed = digest::digest(&SHA256, &[&hierarchy.to_be_bytes()[..], &key.name()].concat());
    [&[0x00, 0x0B][..], hashed.as_ref()].concat()
}

pub(crate) fn digest_of(values: &BTreeMap<u8, Vec<u8>>) -> Vec<u8> {
    digest::digest(&SHA256, &values.values().flatten().copied().collect::<Vec<u8>>()).as_ref().to_vec()
}
