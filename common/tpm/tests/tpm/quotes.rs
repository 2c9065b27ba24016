//! DESIGN.md §4, "AK and quote": a quote is exactly what was asked for, and each deviation has its own answer.

use crate::forge::{Attestation, Forger, digest_of, put, qualified_name};
use crate::vectors::{self, bytes};
use moor_tpm::quote::verify;
use moor_tpm::{Bank, Expected, Public, QuoteError, TpmError};
use std::collections::BTreeMap;

const EXTRA_DATA: [u8; 32] = [0xAB; 32];
const PCRS: [u8; 3] = [0, 7, 15];

fn zeros() -> BTreeMap<u8, Vec<u8>> {
    PCRS.iter().map(|number| (*number, vec![0; 32])).collect()
}

fn expected() -> Expected<'static> {
    Expected { extra_data: &EXTRA_DATA, bank: Bank::Sha256, pcrs: &PCRS }
}

#[test]
fn a_quote_of_a_real_tpm_is_good() {
    let ak = Public::parse(&bytes(vectors::AK)).unwrap();
    let quote = verify(&ak, &bytes(vectors::ATTEST), &bytes(vectors::SIGNATURE), &expected(), &zeros()).unwrap();
    assert!(quote.pcr15_zero);
    assert_eq!((quote.reset_count, quote.restart_count, quote.firmware_version), (2, 0, 0x2019_1023_0016_3636));
}

#[test]
fn a_real_quote_over_two_banks_is_refused() {
    let ak = Public::parse(&bytes(vectors::AK)).unwrap();
    let result =
        verify(&ak, &bytes(vectors::ATTEST_TWO_BANKS), &bytes(vectors::SIGNATURE_TWO_BANKS), &expected(), &zeros());
    assert_eq!(result, Err(QuoteError::Selection));
}

/// The names of the key and its template are those of a good one; only the qualified name shows where it is.
#[test]
fn a_real_key_of_another_hierarchy_is_refused() {
    let ak = Public::parse(&bytes(vectors::OWNER_AK)).unwrap();
    let result = verify(&ak, &bytes(vectors::OWNER_ATTEST), &bytes(vectors::OWNER_SIGNATURE), &expected(), &zeros());
    assert_eq!(result, Err(QuoteError::Signer));
}

#[test]
fn every_flipped_bit_of_a_real_quote_is_noticed() {
    let ak = Public::parse(&bytes(vectors::AK)).unwrap();
    let (attest, signature) = (bytes(vectors::ATTEST), bytes(vectors::SIGNATURE));
    for bit in 0..attest.len() * 8 {
        let mut changed = attest.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(&ak, &changed, &signature, &expected(), &zeros()).is_err(), "bit {bit} of the attestation");
    }
    for bit in 0..signature.len() * 8 {
        let mut changed = signature.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(&ak, &attest, &changed, &expected(), &zeros()).is_err(), "bit {bit} of the signature");
    }
    for length in 0..attest.len() {
        assert!(verify(&ak, &attest[..length], &signature, &expected(), &zeros()).is_err(), "{length} bytes");
    }
}

/// One thing is changed in an attestation, and the signature is good.
#[test]
fn each_deviation_of_the_attestation_has_its_answer() {
    type Change = fn(&mut Attestation);
    let selection = |error: fn(&mut Attestation)| (error, QuoteError::Selection);
    let cases: Vec<(&str, (Change, QuoteError))> = vec![
        ("magic", (|a| a.magic = 0x4D4F_4F52, QuoteError::Magic(0x4D4F_4F52))),
        ("type: certify", (|a| a.kind = 0x8017, QuoteError::Type(0x8017))),
        ("type: time", (|a| a.kind = 0x8019, QuoteError::Type(0x8019))),
        ("extraData of another session", (|a| a.extra_data[0] ^= 1, QuoteError::ExtraData)),
        ("extraData that is longer", (|a| a.extra_data.push(0), QuoteError::ExtraData)),
        ("extraData that is shorter", (|a| a.extra_data.truncate(31), QuoteError::ExtraData)),
        ("no extraData", (|a| a.extra_data.clear(), QuoteError::ExtraData)),
        ("nothing selected", selection(|a| a.selection.clear())),
        ("an empty selection", selection(|a| a.selection[0].1 = vec![0, 0, 0])),
        ("PCR 15 missing", selection(|a| a.selection[0].1 = vec![0x81, 0, 0])),
        ("one PCR missing", selection(|a| a.selection[0].1 = vec![0x80, 0x80, 0])),
        ("one PCR more", selection(|a| a.selection[0].1 = vec![0x81, 0x80, 1])),
        ("PCR 16 instead of 15", selection(|a| a.selection[0].1 = vec![0x81, 0, 1])),
        ("another bank", selection(|a| a.selection[0].0 = 0x000C)),
        ("SHA-1", selection(|a| a.selection[0].0 = 0x0004)),
        ("two banks", selection(|a| a.selection.push((0x000C, vec![0, 0x80, 0])))),
        ("a second bank with nothing in it", selection(|a| a.selection.push((0x000C, vec![0, 0, 0])))),
        ("the bank twice", selection(|a| a.selection.push(a.selection[0].clone()))),
        ("a selection in parts", selection(|a| a.selection = vec![(0x0B, vec![0x81, 0, 0]), (0x0B, vec![0, 0x80, 0])])),
        ("seventeen banks", selection(|a| a.selection = vec![(0x000B, vec![0x81, 0x80, 0]); 17])),
        ("a bitmap that is too long", selection(|a| a.selection[0].1 = [&[0x81, 0x80][..], &[0; 30]].concat())),
        ("digest of other values", (|a| a.digest[0] ^= 1, QuoteError::Digest)),
        ("digest that is longer", (|a| a.digest.push(0), QuoteError::Digest)),
        ("no digest", (|a| a.digest.clear(), QuoteError::Digest)),
        ("no signer", (|a| a.signer.clear(), QuoteError::Signer)),
        ("another signer", (|a| a.signer[5] ^= 1, QuoteError::Signer)),
        ("bytes after the end", (|a| a.after.push(0), QuoteError::Malformed(TpmError::Trailing("attestation")))),
    ];
    let forger = Forger::new();
    let ak = forger.public();
    let good = Attestation::good(&ak, &EXTRA_DATA, &zeros());
    let judge = |attestation: &Attestation| {
        let attest = attestation.bytes();
        verify(&ak, &attest, &forger.sign(&attest), &expected(), &zeros())
    };
    assert!(judge(&good).is_ok(), "the forger's quote is good to begin with");
    // The same PCRs in a longer bitmap are the same PCRs.
    let mut longer = good.clone();
    longer.selection[0].1.push(0);
    assert!(judge(&longer).is_ok());
    for (name, (change, error)) in cases {
        let mut changed = good.clone();
        change(&mut changed);
        assert_eq!(judge(&changed), Err(error), "{name}");
    }
}

#[test]
fn keys_of_other_hierarchies_are_refused() {
    let forger = Forger::new();
    let ak = forger.public();
    for (name, hierarchy) in [("owner", 0x4000_0001), ("null", 0x4000_0007), ("platform", 0x4000_000C)] {
        let mut quote = Attestation::good(&ak, &EXTRA_DATA, &zeros());
        quote.signer = qualified_name(hierarchy, &ak);
        let attest = quote.bytes();
        assert_eq!(
            verify(&ak, &attest, &forger.sign(&attest), &expected(), &zeros()),
            Err(QuoteError::Signer),
            "{name}"
        );
    }
}

#[test]
fn another_key_is_refused() {
    let (forger, other) = (Forger::new(), Forger::new());
    let attest = Attestation::good(&forger.public(), &EXTRA_DATA, &zeros()).bytes();
    // Another TPM quotes rightly with its own key…
    let its = verify(&other.public(), &attest, &forger.sign(&attest), &expected(), &zeros());
    assert_eq!(its, Err(QuoteError::Signature));
    // …or claims to be this one.
    let claimed = verify(&forger.public(), &attest, &other.sign(&attest), &expected(), &zeros());
    assert_eq!(claimed, Err(QuoteError::Signature));
}

#[test]
fn values_that_the_node_tells_are_those_that_were_quoted() {
    type Change = fn(&mut BTreeMap<u8, Vec<u8>>);
    let forger = Forger::new();
    let ak = forger.public();
    let attest = Attestation::good(&ak, &EXTRA_DATA, &zeros()).bytes();
    let signature = forger.sign(&attest);
    let cases: [(&str, Change, QuoteError); 7] = [
        ("changed", |v| v.get_mut(&7).unwrap()[0] = 1, QuoteError::Digest),
        ("missing", |v| drop(v.remove(&7)), QuoteError::Values),
        ("one more", |v| drop(v.insert(3, vec![0; 32])), QuoteError::Values),
        ("of another PCR", |v| v.extend([(1, v[&0].clone())]), QuoteError::Values),
        ("too short", |v| v.get_mut(&15).unwrap().truncate(31), QuoteError::Values),
        ("of another bank", |v| v.values_mut().for_each(|value| value.resize(48, 0)), QuoteError::Values),
        ("none", BTreeMap::clear, QuoteError::Values),
    ];
    for (name, change, error) in cases {
        let mut values = zeros();
        change(&mut values);
        assert_eq!(verify(&ak, &attest, &signature, &expected(), &values), Err(error), "{name}");
    }
    // Bytes moved from one value to the next give the same digest: the lengths tell them apart.
    let mut moved = zeros();
    moved.insert(0, vec![0; 33]);
    moved.insert(7, vec![0; 31]);
    assert_eq!(digest_of(&moved), digest_of(&zeros()));
    assert_eq!(verify(&ak, &attest, &signature, &expected(), &moved), Err(QuoteError::Values));
}

#[test]
fn a_request_without_pcr_15_is_never_satisfied() {
    let forger = Forger::new();
    let ak = forger.public();
    let values: BTreeMap<u8, Vec<u8>> = [(0, vec![0; 32]), (7, vec![0; 32])].into();
    let mut quote = Attestation::good(&ak, &EXTRA_DATA, &values);
    quote.selection[0].1 = vec![0x81, 0, 0];
    let attest = quote.bytes();
    let expected = Expected { pcrs: &[0, 7], ..expected() };
    assert_eq!(verify(&ak, &attest, &forger.sign(&attest), &expected, &values), Err(QuoteError::NoStagePcr));
}

#[test]
fn a_closed_stage_shows() {
    let forger = Forger::new();
    let ak = forger.public();
    for (last, open) in [(0, true), (1, false), (0x80, false)] {
        let mut values = zeros();
        values.get_mut(&15).unwrap()[31] = last;
        let attest = Attestation::good(&ak, &EXTRA_DATA, &values).bytes();
        let verified = verify(&ak, &attest, &forger.sign(&attest), &expected(), &values).unwrap();
        assert_eq!(verified.pcr15_zero, open);
        assert_eq!((verified.reset_count, verified.restart_count), (7, 3));
    }
}

#[test]
fn the_sha384_bank_is_as_good() {
    let forger = Forger::new();
    let ak = forger.public();
    let values: BTreeMap<u8, Vec<u8>> = PCRS.iter().map(|number| (*number, vec![0; 48])).collect();
    let mut quote = Attestation::good(&ak, &EXTRA_DATA, &values);
    quote.selection[0].0 = 0x000C;
    let attest = quote.bytes();
    let expected = Expected { bank: Bank::Sha384, ..expected() };
    assert!(verify(&ak, &attest, &forger.sign(&attest), &expected, &values).unwrap().pcr15_zero);
}

#[test]
fn signatures_of_other_kinds_are_refused() {
    let forger = Forger::new();
    let ak = forger.public();
    let attest = Attestation::good(&ak, &EXTRA_DATA, &zeros()).bytes();
    let good = forger.sign(&attest);
    let with = |change: fn(&mut Vec<u8>)| {
        let mut changed = good.clone();
        change(&mut changed);
        verify(&ak, &attest, &changed, &expected(), &zeros())
    };
    assert_eq!(with(|s| s[1] = 0x14), Err(QuoteError::Algorithm), "RSASSA");
    assert_eq!(with(|s| s[1] = 0x1A), Err(QuoteError::Algorithm), "ECDAA");
    assert_eq!(with(|s| s[1] = 0x10), Err(QuoteError::Algorithm), "none");
    assert_eq!(with(|s| s[3] = 0x04), Err(QuoteError::Algorithm), "SHA-1");
    assert_eq!(with(|s| s[3] = 0x0C), Err(QuoteError::Algorithm), "SHA-384");
    assert_eq!(with(|s| s.push(0)), Err(QuoteError::Malformed(TpmError::Trailing("signature"))));
    assert_eq!(with(|s| s.truncate(s.len() - 1)), Err(QuoteError::Malformed(TpmError::Truncated("signature"))));
    let zero = [&good[..4], &[0; 4]].concat();
    assert_eq!(verify(&ak, &attest, &zero, &expected(), &zeros()), Err(QuoteError::Signature), "r and s are zero");
    let mut long = good[..4].to_vec();
    put(&mut long, &[0; 33]);
    put(&mut long, &[0; 32]);
    assert_eq!(verify(&ak, &attest, &long, &expected(), &zeros()), Err(QuoteError::Signature), "r is too long");
}

/// A TPM may leave leading zeros out of r and s.
#[test]
fn short_halves_of_a_signature_are_good() {
    let forger = Forger::new();
    let ak = forger.public();
    for round in 0_u32..4096 {
        let mut quote = Attestation::good(&ak, &EXTRA_DATA, &zeros());
        quote.extra_data[..4].copy_from_slice(&round.to_be_bytes());
        let attest = quote.bytes();
        let signature = forger.sign(&attest);
        let (r, s) = (&signature[6..38], &signature[40..72]);
        if r[0] != 0 && s[0] != 0 {
            continue;
        }
        let trim = |half: &[u8]| half[half.iter().position(|byte| *byte != 0).unwrap_or(half.len())..].to_vec();
        let mut short = signature[..4].to_vec();
        put(&mut short, &trim(r));
        put(&mut short, &trim(s));
        let extra_data: [u8; 32] = quote.extra_data.clone().try_into().unwrap();
        let expected = Expected { extra_data: &extra_data, ..expected() };
        assert!(verify(&ak, &attest, &short, &expected, &zeros()).is_ok());
        return;
    }
    panic!("no signature with a leading zero in 4096");
}
