//! Bytes from anybody: parsers answer, and never panic.

use crate::vectors::{self, bytes};
use moor_tpm::quote::verify;
use moor_tpm::{Bank, Expected, Public, content, credential, template};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A real structure with a few bytes changed reaches deeper than noise does.
fn damaged(vector: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let good = bytes(vector);
    let length = good.len();
    let changes = prop::collection::vec((0..length, any::<u8>()), 0..6);
    (Just(good), changes, 0..=length, prop::collection::vec(any::<u8>(), 0..4)).prop_map(
        |(mut good, changes, cut, tail)| {
            for (place, byte) in changes {
                good[place] = byte;
            }
            // Cut in one case of two.
            if cut % 2 == 0 {
                good.truncate(cut);
            }
            good.extend(tail);
            good
        },
    )
}

fn noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..400)
}

fn public_area() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        noise(),
        damaged(vectors::AK),
        damaged(vectors::EK_RSA2048),
        damaged(vectors::EK_P256),
        damaged(vectors::EK_P384)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_public_area_is_parsed_or_refused(area in public_area()) {
        if let Ok(public) = Public::parse(&area) {
            // Whatever is accepted can be used, and is the same when it comes again.
            prop_assert_eq!(public.as_bytes(), &area[..]);
            prop_assert_eq!(&Public::parse(public.as_bytes()).unwrap(), &public);
            let _ = template::check_ak(&public);
            let _ = (public.name(), public.key_bits());
            let _ = credential::make(&public, &public.name(), &[1; 32]);
        }
    }

    #[test]
    fn a_quote_is_judged_or_refused(
        attest in prop_oneof![noise(), damaged(vectors::ATTEST), damaged(vectors::ATTEST_TWO_BANKS)],
        signature in prop_oneof![noise(), damaged(vectors::SIGNATURE)],
        values in prop::collection::btree_map(any::<u8>(), prop::collection::vec(any::<u8>(), 0..50), 0..5),
    ) {
        let ak = Public::parse(&bytes(vectors::AK)).unwrap();
        let expected = Expected { extra_data: &[0xAB; 32], bank: Bank::Sha256, pcrs: &[0, 7, 15] };
        let zeros: BTreeMap<u8, Vec<u8>> = [0, 7, 15].into_iter().map(|number| (number, vec![0; 32])).collect();
        let good = attest == bytes(vectors::ATTEST) && signature == bytes(vectors::SIGNATURE);
        prop_assert_eq!(verify(&ak, &attest, &signature, &expected, &zeros).is_ok(), good);
        // Behind the signature nothing is parsed, so that a good one is tried with every attestation too.
        prop_assert!(verify(&ak, &attest, &bytes(vectors::SIGNATURE), &expected, &values).is_err());
    }

    #[test]
    fn a_sized_buffer_is_taken_or_refused(buffer in noise()) {
        if let Ok(inner) = content(&buffer, "buffer") {
            prop_assert_eq!(inner.len() + 2, buffer.len());
        }
    }
}
