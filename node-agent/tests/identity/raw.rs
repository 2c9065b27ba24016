//! The TPM as a program of somebody else uses it: keys and quotes that our agent makes none of.

use crate::swtpm::Swtpm;
use moor_agent::identity::tpm::TpmIdentity;
use moor_api::node::{HexBytes, PcrBank, Quote};
use moor_tpm::alg;
use moor_tpm::public::P256;
use moor_tpm::template::{self, attribute};
use tss_esapi::Context;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{Data, PcrSelectionListBuilder, PcrSlot, Public, SignatureScheme};
use tss_esapi::traits::{Marshall as _, UnMarshall as _};

/// The attestation key's template, but for keys that sign whatever they are given.
fn unrestricted() -> Vec<u8> {
    let mut template = template::ak();
    template[4..8].copy_from_slice(&(template::AK_ATTRIBUTES & !attribute::RESTRICTED).to_be_bytes());
    template
}

/// The template of a storage key on P-256, with AES-128 in CFB, that may leave its TPM: a copy of it in software activates whatever it
/// is given.
fn duplicable() -> Vec<u8> {
    let attributes = attribute::SENSITIVE_DATA_ORIGIN
        | attribute::USER_WITH_AUTH
        | attribute::NO_DA
        | attribute::RESTRICTED
        | attribute::DECRYPT;
    let mut out = Vec::new();
    out.extend_from_slice(&[alg::ECC.to_be_bytes(), alg::SHA256.to_be_bytes()].concat());
    out.extend_from_slice(&attributes.to_be_bytes());
    // Empty policy, the cipher, no scheme, the curve, no key derivation, an empty point.
    for half in [0, alg::AES, 128, alg::CFB, alg::NULL, P256, alg::NULL, 0, 0] {
        out.extend_from_slice(&half.to_be_bytes());
    }
    out
}

/// A real key of this TPM, as `TPMT_PUBLIC`.
fn key(chip: &Swtpm, template: &[u8]) -> Vec<u8> {
    let mut context = Context::new(chip.transport()).unwrap();
    let template = Public::unmarshall(template).unwrap();
    context.execute_with_session(Some(AuthSession::Password), |context| {
        let made = context.create_primary(Hierarchy::Endorsement, template, None, None, None, None).unwrap();
        context.flush_context(made.key_handle.into()).unwrap();
        made.out_public.marshall().unwrap()
    })
}

/// A signing key that would sign foreign data.
pub(crate) fn unrestricted_key(chip: &Swtpm) -> Vec<u8> {
    key(chip, &unrestricted())
}

/// A storage key that may leave its TPM.
pub(crate) fn duplicable_key(chip: &Swtpm) -> Vec<u8> {
    key(chip, &duplicable())
}

/// A quote by the attestation key over any selection, with values told that are zero: those of a TPM where nothing was measured.
pub(crate) fn quote(chip: &Swtpm, digest: [u8; 32], bank: PcrBank, pcrs: &[u8]) -> Quote {
    let mut context = Context::new(chip.transport()).unwrap();
    let (hash, length) = match bank {
        PcrBank::Sha256 => (HashingAlgorithm::Sha256, 32),
        PcrBank::Sha384 => (HashingAlgorithm::Sha384, 48),
    };
    let slots: Vec<_> = pcrs.iter().map(|number| PcrSlot::try_from(1_u32 << number).unwrap()).collect();
    let selection = PcrSelectionListBuilder::new().with_selection(hash, &slots).build().unwrap();
    let template = Public::unmarshall(&template::ak()).unwrap();
    let data = Data::try_from(digest.as_slice()).unwrap();
    context.execute_with_session(Some(AuthSession::Password), |context| {
        let made = context.create_primary(Hierarchy::Endorsement, template, None, None, None, None).unwrap();
        let (attest, signature) = context.quote(made.key_handle, data, SignatureScheme::Null, selection).unwrap();
        context.flush_context(made.key_handle.into()).unwrap();
        Quote {
            attest: attest.marshall().unwrap().into(),
            signature: signature.marshall().unwrap().into(),
            pcrs: pcrs.iter().map(|number| (*number, HexBytes(vec![0; length]))).collect(),
            event_log: None,
        }
    })
}

/// The identity, for one step: swtpm serves one client at a time.
pub(crate) fn open(chip: &Swtpm) -> TpmIdentity {
    TpmIdentity::open(chip.transport()).unwrap()
}
