//! Public areas: parsing what a TPM says, the names of keys, the template of the attestation key, and who can be challenged.

use crate::forge::Forger;
use crate::vectors::{self, bytes};
use moor_tpm::public::{Key, P256, P384};
use moor_tpm::template::{AK_ATTRIBUTES, ak, attribute, check_ak};
use moor_tpm::{Public, TpmError, alg, content, credential};

#[test]
fn what_a_real_tpm_says_of_its_keys_is_understood() {
    let rsa = Public::parse(&bytes(vectors::EK_RSA2048)).unwrap();
    let Key::Rsa { aes_bits: Some(128), scheme: alg::NULL, modulus, exponent: 65_537 } = &rsa.key else {
        panic!("{rsa:?}")
    };
    assert_eq!((rsa.name_alg, modulus.len(), rsa.policy.len()), (alg::SHA256, 256, 32));
    for (vector, wanted_curve, hash, bits, length) in
        [(vectors::EK_P256, P256, alg::SHA256, 128, 32), (vectors::EK_P384, P384, alg::SHA384, 256, 48)]
    {
        let ek = Public::parse(&bytes(vector)).unwrap();
        let Key::Ecc { aes_bits, scheme: alg::NULL, curve, x, y, .. } = &ek.key else { panic!("{ek:?}") };
        assert_eq!(
            (*aes_bits, *curve, ek.name_alg, x.len(), y.len()),
            (Some(bits), wanted_curve, hash, length, length)
        );
        assert_eq!(ek.key_bits().len(), 1 + 2 * length);
        assert_eq!(ek.as_bytes(), bytes(vector));
    }
}

#[test]
fn a_name_is_what_the_tpm_computes() {
    assert_eq!(Public::parse(&bytes(vectors::AK)).unwrap().name(), bytes(vectors::AK_NAME));
    assert_eq!(Public::parse(&bytes(vectors::EK_P384)).unwrap().name().len(), 2 + 48);
}

#[test]
fn a_real_attestation_key_is_of_the_template() {
    let key = bytes(vectors::AK);
    check_ak(&Public::parse(&key).unwrap()).unwrap();
    // It is the template with the point filled in.
    assert_eq!(key[..key.len() - 2 * 34], ak()[..ak().len() - 4]);
}

#[test]
fn endorsement_keys_are_no_attestation_keys() {
    for vector in [vectors::EK_RSA2048, vectors::EK_P256, vectors::EK_P384] {
        assert!(matches!(check_ak(&Public::parse(&bytes(vector)).unwrap()), Err(TpmError::Template(_))));
    }
}

/// A public area with every field of an elliptic curve key open.
struct Area {
    name_alg: u16,
    attributes: u32,
    policy: Vec<u8>,
    symmetric: Vec<u16>,
    scheme: Vec<u16>,
    curve: u16,
    coordinate: usize,
}

impl Area {
    fn template() -> Self {
        Self {
            name_alg: alg::SHA256,
            attributes: AK_ATTRIBUTES,
            policy: Vec::new(),
            symmetric: vec![alg::NULL],
            scheme: vec![alg::ECDSA, alg::SHA256],
            curve: P256,
            coordinate: 32,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = [alg::ECC.to_be_bytes(), self.name_alg.to_be_bytes()].concat();
        out.extend_from_slice(&self.attributes.to_be_bytes());
        crate::forge::put(&mut out, &self.policy);
        for half in self.symmetric.iter().chain(&self.scheme).chain(&[self.curve, alg::NULL]) {
            out.extend_from_slice(&half.to_be_bytes());
        }
        crate::forge::put(&mut out, &vec![1; self.coordinate]);
        crate::forge::put(&mut out, &vec![2; self.coordinate]);
        out
    }

    fn check(&self) -> Result<(), TpmError> {
        check_ak(&Public::parse(&self.bytes())?)
    }
}

#[test]
fn each_deviation_from_the_template_is_named() {
    type Change = fn(&mut Area);
    let cases: Vec<(&str, Change)> = vec![
        ("may leave its TPM", |a| a.attributes &= !attribute::FIXED_TPM),
        ("may change its parent", |a| a.attributes &= !attribute::FIXED_PARENT),
        ("was not made by the TPM", |a| a.attributes &= !attribute::SENSITIVE_DATA_ORIGIN),
        ("signs foreign data", |a| a.attributes &= !attribute::RESTRICTED),
        ("does not sign", |a| a.attributes &= !attribute::SIGN),
        ("decrypts", |a| a.attributes |= attribute::DECRYPT),
        ("other attributes", |a| a.attributes &= !attribute::USER_WITH_AUTH),
        ("other attributes", |a| a.attributes &= !attribute::NO_DA),
        ("other attributes", |a| a.attributes |= 1 << 2),  // stClear
        ("other attributes", |a| a.attributes |= 1 << 7),  // adminWithPolicy
        ("other attributes", |a| a.attributes |= 1 << 11), // encryptedDuplication
        ("other attributes", |a| a.attributes |= 1 << 31), // reserved
        ("a name that is not by SHA-256", |a| a.name_alg = alg::SHA384),
        ("has a policy", |a| a.policy = vec![0; 32]),
        ("has a cipher", |a| a.symmetric = vec![alg::AES, 128, alg::CFB]),
        ("does not sign by ECDSA", |a| a.scheme = vec![alg::NULL]),
        ("does not sign by ECDSA", |a| a.scheme = vec![alg::ECDSA, alg::SHA384]),
        ("does not sign by ECDSA", |a| a.scheme = vec![0x001B, alg::SHA256]), // SM2
        ("not on P-256", |a| (a.curve, a.coordinate) = (P384, 48)),
    ];
    assert_eq!(Area::template().check(), Ok(()));
    for (wanted, change) in cases {
        let mut area = Area::template();
        change(&mut area);
        let error = area.check().unwrap_err();
        assert!(matches!(error, TpmError::Template(_)) && error.to_string().contains(wanted), "{wanted}: {error}");
    }
}

#[test]
fn public_areas_that_are_none_are_refused() {
    type Change = fn(&mut Vec<u8>);
    let unsupported = |what, value| TpmError::Unsupported { what, value };
    let cases: Vec<(&str, Change, TpmError)> = vec![
        ("empty", Vec::clear, TpmError::Truncated("public area")),
        ("cut", |b| b.truncate(b.len() - 1), TpmError::Truncated("public area")),
        ("longer", |b| b.push(0), TpmError::Trailing("public area")),
        ("a keyed hash", |b| b[1] = 0x08, unsupported("key type", 8)),
        ("SHA-1 names", |b| b[3] = 0x04, unsupported("name hash", 4)),
        ("another curve", |b| b[17] = 0x10, unsupported("curve", 0x10)),
        ("a key derivation", |b| b[19] = 0x20, unsupported("key derivation", 0x20)),
    ];
    let good = bytes(vectors::AK);
    for (name, change, error) in cases {
        let mut changed = good.clone();
        change(&mut changed);
        assert_eq!(Public::parse(&changed), Err(error), "{name}");
    }
    // A size in front (TPM2B_PUBLIC) is not part of a TPMT_PUBLIC.
    let sized = [&[0, 90][..], &good].concat();
    assert!(Public::parse(&sized).is_err());
    // Coordinates are as long as the curve's at most, and shorter ones are padded.
    let mut area = Area { coordinate: 33, ..Area::template() };
    assert!(matches!(Public::parse(&area.bytes()), Err(TpmError::Key(_))));
    area.coordinate = 31;
    let Key::Ecc { x, .. } = Public::parse(&area.bytes()).unwrap().key else { panic!() };
    assert_eq!(x, [&[0][..], &[1; 31]].concat());
}

#[test]
fn a_challenge_is_different_each_time_and_has_its_sizes() {
    let name = bytes(vectors::AK_NAME);
    for (vector, integrity, seed) in
        [(vectors::EK_RSA2048, 32, 256), (vectors::EK_P256, 32, 2 * 34), (vectors::EK_P384, 48, 2 * 50)]
    {
        let ek = Public::parse(&bytes(vector)).unwrap();
        let one = credential::make(&ek, &name, &[1; 32]).unwrap();
        let two = credential::make(&ek, &name, &[1; 32]).unwrap();
        assert_ne!(one, two);
        assert_eq!(content(&one.id_object, "credential").unwrap().len(), 2 + integrity + 2 + 32);
        assert_eq!(content(&one.encrypted_secret, "secret").unwrap().len(), seed);
        assert!(!one.id_object.windows(32).any(|window| window == [1; 32]), "the secret is not in the clear");
    }
}

#[test]
fn only_a_storage_key_can_be_challenged() {
    let name = bytes(vectors::AK_NAME);
    let signing = credential::make(&Forger::new().public(), &name, &[1; 32]);
    assert!(matches!(signing, Err(TpmError::Key(_))), "{signing:?}");
    // A point that is not on the curve (of a storage key).
    let mut off = bytes(vectors::EK_P256);
    *off.last_mut().unwrap() ^= 1;
    let off = credential::make(&Public::parse(&off).unwrap(), &name, &[1; 32]);
    assert!(matches!(off, Err(TpmError::Key(_))), "{off:?}");
    // A modulus that is none.
    let mut even = bytes(vectors::EK_RSA2048);
    let length = even.len();
    even[length - 256..].fill(0);
    let even = credential::make(&Public::parse(&even).unwrap(), &name, &[1; 32]);
    assert!(matches!(even, Err(TpmError::Key(_))), "{even:?}");
}

#[test]
fn a_sized_buffer_is_as_long_as_it_says() {
    assert_eq!(content(&[0, 2, 7, 8], "x"), Ok(&[7, 8][..]));
    assert_eq!(content(&[0, 0], "x"), Ok(&[][..]));
    assert_eq!(content(&[0, 3, 7, 8], "x"), Err(TpmError::Truncated("x")));
    assert_eq!(content(&[0, 1, 7, 8], "x"), Err(TpmError::Trailing("x")));
    assert_eq!(content(&[0], "x"), Err(TpmError::Truncated("x")));
}
