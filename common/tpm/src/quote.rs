//! Checking a quote: what the TPM signed has to be exactly what was asked for.

use crate::public::{Key, Public, uncompressed};
use crate::wire::Reader;
use crate::{TpmError, alg};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use std::collections::BTreeMap;

/// First word of everything that a TPM itself signs.
const TPM_GENERATED: u32 = 0xFF54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const ATTEST_QUOTE: u16 = 0x8018;
/// `TPM_RH_ENDORSEMENT`: the name of the endorsement hierarchy.
const ENDORSEMENT_HIERARCHY: u32 = 0x4000_000B;
/// The PCR that closes the boot stage.
pub const STAGE_PCR: u8 = 15;

/// A PCR bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bank {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
}

impl Bank {
    /// Its algorithm number.
    #[must_use]
    pub const fn alg(self) -> u16 {
        match self {
            Self::Sha256 => alg::SHA256,
            Self::Sha384 => alg::SHA384,
        }
    }

    /// Bytes of a value.
    #[must_use]
    pub const fn length(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Digest of the proof.
    pub extra_data: &'a [u8; 32],
    /// The bank pinned at enrolment.
    pub bank: Bank,
    /// PCRs, ascending, with 15.
    pub pcrs: &'a [u8],
}

/// What a good quote says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Whether PCR 15 is zero: nothing closed the boot stage yet.
    pub pcr15_zero: bool,
    /// TPM resets: grows at each power cycle.
    pub reset_count: u32,
    /// Restarts (resume) since then.
    pub restart_count: u32,
    /// Vendor's version of the TPM's firmware.
    pub firmware_version: u64,
}

/// How a quote deviates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    /// A structure does not parse.
    #[error("the quote is malformed: {0}")]
    Malformed(#[from] TpmError),
    /// Not made by a TPM.
    #[error("the quote was not made by a TPM (its magic is {0:#010x})")]
    Magic(u32),
    /// Another attestation.
    #[error("the attestation is of type {0:#06x}, not a quote")]
    Type(u16),
    /// By a key elsewhere in the TPM.
    #[error("the quote was not made by a primary key of the TPM's endorsement hierarchy")]
    Signer,
    /// For another session.
    #[error("the quote's extraData is for another session or connection")]
    ExtraData,
    /// Other PCRs or banks.
    #[error("the quote does not select exactly the PCRs that were asked for, in exactly one bank")]
    Selection,
    /// The request itself lacks PCR 15.
    #[error("the quote has to select PCR 15")]
    NoStagePcr,
    /// Values and selection differ.
    #[error("the PCR values are not those of the selection")]
    Values,
    /// Values and digest differ.
    #[error("the PCR values are not those that the TPM quoted")]
    Digest,
    /// Another algorithm.
    #[error("the quote is not signed by ECDSA with SHA-256")]
    Algorithm,
    /// Not by this key.
    #[error("the quote is not signed by the node's attestation key")]
    Signature,
}

/// Checks a quote (`TPMS_ATTEST`, `TPMT_SIGNATURE`) by `ak` over `expected`, with the PCR values as the node tells them.
///
/// # Errors
/// The first deviation.
pub fn verify(
    ak: &Public,
    attest: &[u8],
    signature: &[u8],
    expected: &Expected<'_>,
    values: &BTreeMap<u8, Vec<u8>>,
) -> Result<Verified, QuoteError> {
    if !expected.pcrs.contains(&STAGE_PCR) {
        return Err(QuoteError::NoStagePcr);
    }
    let quote = Attest::parse(attest)?;
    if verify_slices_are_equal(quote.extra_data, expected.extra_data).is_err() {
        return Err(QuoteError::ExtraData);
    }
    if quote.selection != [(expected.bank.alg(), expected.pcrs.to_vec())] {
        return Err(QuoteError::Selection);
    }
    if !values.keys().copied().eq(expected.pcrs.iter().copied())
        || values.values().any(|value| value.len() != expected.bank.length())
    {
        return Err(QuoteError::Values);
    }
    // The digest is by the hash of the signing scheme, over the values in ascending order.
    let mut context = digest::Context::new(&digest::SHA256);
    for value in values.values() {
        context.update(value);
    }
    if context.finish().as_ref() != quote.digest {
        return Err(QuoteError::Digest);
    }
    check_signature(ak, attest, signature)?;
    // After the signature: a quote by another TPM is first of all that.
    if quote.signer != qualified_name(ak) {
        return Err(QuoteError::Signer);
    }
    Ok(Verified {
        pcr15_zero: values.get(&STAGE_PCR).is_some_and(|value| value.iter().all(|byte| *byte == 0)),
        reset_count: quote.reset_count,
        restart_count: quote.restart_count,
        firmware_version: quote.firmware_version,
    })
}

/// The qualified name of a primary key of the endorsement hierarchy (Part 1, 16 "Names"): it says where in the TPM the key is, which
/// the key's own name does not.
fn qualified_name(ak: &Public) -> Vec<u8> {
    // The template fixes SHA-256 as the hash of the name.
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&ENDORSEMENT_HIERARCHY.to_be_bytes());
    context.update(&ak.name());
    let mut out = ak.name_alg.to_be_bytes().to_vec();
    out.extend_from_slice(context.finish().as_ref());
    out
}

/// `TPMS_ATTEST` with a quote in it.
struct Attest<'a> {
    signer: &'a [u8],
    extra_data: &'a [u8],
    reset_count: u32,
    restart_count: u32,
    firmware_version: u64,
    selection: Vec<(u16, Vec<u8>)>,
    digest: &'a [u8],
}

impl<'a> Attest<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, QuoteError> {
        let mut reader = Reader::new(bytes, "attestation");
        let magic = reader.u32()?;
        if magic != TPM_GENERATED {
            return Err(QuoteError::Magic(magic));
        }
        let kind = reader.u16()?;
        if kind != ATTEST_QUOTE {
            return Err(QuoteError::Type(kind));
        }
        let signer = reader.sized()?;
        let extra_data = reader.sized()?;
        let _clock = reader.u64()?;
        let reset_count = reader.u32()?;
        let restart_count = reader.u32()?;
        let _safe = reader.u8()?;
        let firmware_version = reader.u64()?;
        let count = reader.u32()?;
        // A TPM has a handful of banks; more is no quote of ours.
        if count > 16 {
            return Err(QuoteError::Selection);
        }
        let mut selection = Vec::new();
        for _ in 0..count {
            let bank = reader.u16()?;
            let size = reader.u8()?;
            // A PC Client TPM has 24 PCRs, thus 3 bytes; 31 bytes keep every number within a byte.
            if size > 31 {
                return Err(QuoteError::Selection);
            }
            let bitmap = reader.take(usize::from(size))?;
            let pcrs = (0..size * 8).filter(|pcr| bitmap[usize::from(pcr / 8)] & (1 << (pcr % 8)) != 0);
            selection.push((bank, pcrs.collect()));
        }
        let digest = reader.sized()?;
        reader.end()?;
        Ok(Self { signer, extra_data, reset_count, restart_count, firmware_version, selection, digest })
    }
}

/// ECDSA over the attestation, `TPMT_SIGNATURE` on the wire.
fn check_signature(ak: &Public, attest: &[u8], signature: &[u8]) -> Result<(), QuoteError> {
    let Key::Ecc { x, y, .. } = &ak.key else { return Err(QuoteError::Algorithm) };
    let mut reader = Reader::new(signature, "signature");
    if reader.u16()? != alg::ECDSA || reader.u16()? != alg::SHA256 {
        return Err(QuoteError::Algorithm);
    }
    let (r, s) = (reader.sized()?, reader.sized()?);
    reader.end()?;
    let mut fixed = [0; 64];
    for (part, slot) in [(r, 0), (s, 32)] {
        if part.len() > 32 {
            return Err(QuoteError::Signature);
        }
        fixed[slot + 32 - part.len()..slot + 32].copy_from_slice(part);
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, uncompressed(x, y))
        .verify(attest, &fixed)
        .map_err(|_| QuoteError::Signature)
}
