//! Platform configuration registers: reading them, and closing the boot stage by PCR 15.

use super::super::IdentityError;
use super::super::error::{Doing as _, wrong};
use aws_lc_rs::digest;
use moor_api::node::PcrBank;
use moor_tpm::Bank;
use moor_tpm::quote::STAGE_PCR;
use std::collections::BTreeMap;
use tss_esapi::Context;
use tss_esapi::constants::CapabilityType;
use tss_esapi::handles::PcrHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::structures::{CapabilityData, Digest, DigestValues, PcrSelectionList, PcrSelectionListBuilder, PcrSlot};

/// Last PCR of a PC Client TPM.
pub(super) const MAX: u8 = 23;

/// Values that one `TPM2_PCR_Read` returns at most (Part 2, `TPML_DIGEST`).
const PER_READ: usize = 8;

/// Most banks that are asked for: the limit of the structure.
const MAX_BANKS: u32 = 16;

/// What is extended to close the boot stage, hashed with each bank's algorithm.
const CLOSED: &[u8] = b"moor/v1 stage closed";

/// The hash of a bank as the TPM library names it.
pub(super) fn algorithm(bank: PcrBank) -> HashingAlgorithm {
    match bank {
        PcrBank::Sha256 => HashingAlgorithm::Sha256,
        PcrBank::Sha384 => HashingAlgorithm::Sha384,
    }
}

/// The bank as the member's checks name it.
pub(super) fn bank(bank: PcrBank) -> Bank {
    match bank {
        PcrBank::Sha256 => Bank::Sha256,
        PcrBank::Sha384 => Bank::Sha384,
    }
}

fn slot(number: u8) -> Result<PcrSlot, IdentityError> {
    PcrSlot::try_from(1_u32.checked_shl(u32::from(number)).unwrap_or(0)).doing("selecting PCRs")
}

/// A selection in one bank.
pub(super) fn selection(bank: HashingAlgorithm, numbers: &[u8]) -> Result<PcrSelectionList, IdentityError> {
    let slots = numbers.iter().map(|number| slot(*number)).collect::<Result<Vec<_>, _>>()?;
    PcrSelectionListBuilder::new().with_selection(bank, &slots).build().doing("selecting PCRs")
}

/// Banks in which PCR 15 exists. A TPM lists inactive banks too, with nothing selected in them.
pub(super) fn active_banks(context: &mut Context) -> Result<Vec<HashingAlgorithm>, IdentityError> {
    const DOING: &str = "asking for its PCR banks";
    let (data, _) = context
        .execute_without_session(|context| context.get_capability(CapabilityType::AssignedPcr, 0, MAX_BANKS))
        .doing(DOING)?;
    let CapabilityData::AssignedPcr(selections) = data else { return Err(wrong(DOING, "it answers something else")) };
    let stage = slot(STAGE_PCR)?;
    let banks: Vec<_> = selections
        .get_selections()
        .iter()
        .filter(|selection| selection.is_selected(stage))
        .map(tss_esapi::structures::PcrSelection::hashing_algorithm)
        .collect();
    if banks.is_empty() {
        return Err(wrong(DOING, "no bank is active: activate one in the firmware's set-up"));
    }
    Ok(banks)
}

/// Values of one bank, by number.
pub(super) fn read(
    context: &mut Context,
    bank: HashingAlgorithm,
    numbers: &[u8],
) -> Result<BTreeMap<u8, Vec<u8>>, IdentityError> {
    const DOING: &str = "reading PCRs";
    let mut values = BTreeMap::new();
    for part in numbers.chunks(PER_READ) {
        let asked = selection(bank, part)?;
        let (_, given, digests) = context.pcr_read(asked.clone()).doing(DOING)?;
        // A TPM may return less than was asked, and says so in the selection.
        if given != asked || digests.len() != part.len() {
            return Err(wrong(DOING, format!("it does not give all of {part:?} in its {bank:?} bank")));
        }
        values.extend(part.iter().copied().zip(digests.value().iter().map(|digest| digest.value().to_vec())));
    }
    Ok(values)
}

fn stage(context: &mut Context, bank: HashingAlgorithm) -> Result<Vec<u8>, IdentityError> {
    read(context, bank, &[STAGE_PCR])?.remove(&STAGE_PCR).ok_or_else(|| wrong("reading PCR 15", "it gave none"))
}

fn is_zero(value: &[u8]) -> bool {
    value.iter().all(|byte| *byte == 0)
}

/// Whether PCR 15 differs from zero in any bank.
pub(super) fn is_closed(context: &mut Context, banks: &[HashingAlgorithm]) -> Result<bool, IdentityError> {
    for bank in banks {
        if !is_zero(&stage(context, *bank)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The hash of a bank in software; `None` for the one that the library lacks (SM3).
fn hash(bank: HashingAlgorithm) -> Option<&'static digest::Algorithm> {
    Some(match bank {
        HashingAlgorithm::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        HashingAlgorithm::Sha256 => &digest::SHA256,
        HashingAlgorithm::Sha384 => &digest::SHA384,
        HashingAlgorithm::Sha512 => &digest::SHA512,
        HashingAlgorithm::Sha3_256 => &digest::SHA3_256,
        HashingAlgorithm::Sha3_384 => &digest::SHA3_384,
        HashingAlgorithm::Sha3_512 => &digest::SHA3_512,
        HashingAlgorithm::Sm3_256 | HashingAlgorithm::Null => return None,
    })
}

/// What is extended into a bank: any digest of the right length closes it.
fn event(bank: HashingAlgorithm) -> Vec<u8> {
    // SM3-256 has digests of 32 bytes as well.
    digest::digest(hash(bank).unwrap_or(&digest::SHA256), CLOSED).as_ref().to_vec()
}

/// Whether a bank's PCR 15 is what it must be after the extension: hash(old ‖ event), or, where that cannot be computed, anything
/// else than before and than zero.
fn is_extended(bank: HashingAlgorithm, before: &[u8], after: &[u8]) -> bool {
    match hash(bank) {
        Some(hash) => {
            let mut context = digest::Context::new(hash);
            context.update(before);
            context.update(&event(bank));
            context.finish().as_ref() == after
        }
        None => after != before && !is_zero(after),
    }
}

/// Extends PCR 15 in all banks by one command, reads back and compares.
pub(super) fn close(context: &mut Context, banks: &[HashingAlgorithm]) -> Result<(), IdentityError> {
    const DOING: &str = "closing the boot stage (PCR 15)";
    let before = banks.iter().map(|bank| stage(context, *bank)).collect::<Result<Vec<_>, _>>()?;
    let mut events = DigestValues::new();
    for bank in banks {
        events.set(*bank, Digest::try_from(event(*bank)).doing(DOING)?);
    }
    context.pcr_extend(PcrHandle::Pcr15, events).doing(DOING)?;
    for (bank, before) in banks.iter().zip(before) {
        if !is_extended(*bank, &before, &stage(context, *bank)?) {
            return Err(wrong(DOING, format!("its {bank:?} bank does not show the value that it must have now")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_of_sha256_is_fixed() {
        // printf 'moor/v1 stage closed' | sha256sum
        assert_eq!(
            hex::encode(event(HashingAlgorithm::Sha256)),
            "19221aa155cad7d3ecaf3261bb59a4bf9ea9f382213cfab5fe51a6df9f7fd33d"
        );
    }

    #[test]
    fn events_have_the_length_of_their_bank() {
        for (bank, length) in [
            (HashingAlgorithm::Sha1, 20),
            (HashingAlgorithm::Sha256, 32),
            (HashingAlgorithm::Sha384, 48),
            (HashingAlgorithm::Sha512, 64),
            (HashingAlgorithm::Sm3_256, 32),
            (HashingAlgorithm::Sha3_256, 32),
            (HashingAlgorithm::Sha3_384, 48),
            (HashingAlgorithm::Sha3_512, 64),
        ] {
            assert_eq!(event(bank).len(), length, "{bank:?}");
        }
    }

    #[test]
    fn a_value_that_did_not_change_as_it_must_is_noticed() {
        let before = [0; 32];
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&before);
        context.update(&event(HashingAlgorithm::Sha256));
        let after = context.finish();
        assert!(is_extended(HashingAlgorithm::Sha256, &before, after.as_ref()));
        assert!(!is_extended(HashingAlgorithm::Sha256, &before, &before), "not extended");
        assert!(!is_extended(HashingAlgorithm::Sha256, &before, &[1; 32]), "extended with something else");
        assert!(!is_extended(HashingAlgorithm::Sha256, &[1; 32], after.as_ref()), "from another value");
        assert!(is_extended(HashingAlgorithm::Sm3_256, &before, &[1; 32]));
        assert!(!is_extended(HashingAlgorithm::Sm3_256, &before, &before));
        assert!(!is_extended(HashingAlgorithm::Sm3_256, &[1; 32], &before), "zero is open");
    }
}
