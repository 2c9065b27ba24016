//! The identity against real TPMs (swtpm), with tpm2-tools and openssl as independent judges.
#![allow(clippy::unwrap_used)] // tests and their helpers

mod attempt;
mod bus;
mod enrolments;
mod member;
#[path = "../../../tests/port.rs"]
mod port;
mod raw;
mod rotation;
mod sessions;
mod ssh_rotation;
mod swtpm;

use bus::Bus;
use moor_agent::identity::IdentityError;
use moor_agent::identity::tpm::{Challenge, Keys, QuoteRequest, TpmIdentity};
use moor_api::node::{PcrBank, Quote};
use moor_tpm::public::{Key, P256, P384};
use moor_tpm::quote::{self, Expected, QuoteError};
use moor_tpm::{Bank, Public, Verified, credential, template};
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use swtpm::{Made, Swtpm, good, write};

const SECRET: [u8; 32] = [0x5A; 32];
const ROUNDS: u8 = 20;
const PCRS: [u8; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 11, 15];

fn open(tpm: &Swtpm) -> TpmIdentity {
    TpmIdentity::open(tpm.transport()).unwrap()
}

/// What a member does with the keys of an enrolment.
fn challenge(keys: &Keys, secret: &[u8; 32]) -> Challenge {
    let ek = Public::parse(&keys.ek_public).unwrap();
    let ak = Public::parse(&keys.ak_public).unwrap();
    template::check_ak(&ak).unwrap();
    let made = credential::make(&ek, &ak.name(), secret).unwrap();
    Challenge { credential: made.id_object, secret: made.encrypted_secret }
}

fn request(digest: [u8; 32]) -> QuoteRequest {
    QuoteRequest { digest, bank: None, pcrs: PCRS.to_vec(), event_log: false }
}

/// What a member does with a quote.
fn judge(keys: &Keys, quote: &Quote, digest: &[u8; 32]) -> Result<Verified, QuoteError> {
    let bank = if keys.bank == PcrBank::Sha384 { Bank::Sha384 } else { Bank::Sha256 };
    let expected = Expected { extra_data: digest, bank, pcrs: &PCRS };
    let values: BTreeMap<u8, Vec<u8>> = quote.pcrs.iter().map(|(number, value)| (*number, value.0.clone())).collect();
    let ak = Public::parse(&keys.ak_public).unwrap();
    quote::verify(&ak, &quote.attest.0, &quote.signature.0, &expected, &values)
}

fn pcr15(tpm: &Swtpm, bank: &str) -> String {
    let text = tpm.tool(&format!("tpm2_pcrread {bank}:15"));
    text.rsplit("0x").next().unwrap().trim().to_lowercase()
}

#[test]
fn enrol_quote_close_and_boot_again() {
    let mut tpm = Swtpm::new(Made::default());
    let mut identity = open(&tpm);
    let keys = identity.keys(None).unwrap();
    assert_eq!(keys.bank, PcrBank::Sha256);
    assert_eq!(*identity.activate(&challenge(&keys, &SECRET)).unwrap(), SECRET);

    assert!(!identity.is_closed().unwrap());
    let first = identity.quote(&request([1; 32])).unwrap();
    let before = judge(&keys, &first, &[1; 32]).unwrap();
    assert!(before.pcr15_zero);
    assert_eq!(judge(&keys, &first, &[2; 32]), Err(QuoteError::ExtraData));

    identity.close_boot_stage().unwrap();
    assert!(identity.is_closed().unwrap());
    let closed = identity.quote(&request([3; 32])).unwrap();
    assert!(!judge(&keys, &closed, &[3; 32]).unwrap().pcr15_zero);
    // sha256(32 zero bytes ‖ sha256("moor/v1 stage closed"))
    let event = hex::decode(sha("256", b"moor/v1 stage closed")).unwrap();
    assert_eq!(hex::encode(&closed.pcrs[&15].0), sha("256", &[&[0; 32][..], &event].concat()));

    // Another program, or a second try, finds it closed.
    drop(identity);
    assert!(open(&tpm).is_closed().unwrap());

    tpm.reset();
    let mut identity = open(&tpm);
    assert!(!identity.is_closed().unwrap());
    assert_eq!(identity.keys(None).unwrap(), keys, "the same keys at every boot");
    let again = identity.quote(&request([4; 32])).unwrap();
    let after = judge(&keys, &again, &[4; 32]).unwrap();
    assert!(after.pcr15_zero);
    assert!(after.reset_count > before.reset_count);
}

/// A digest by coreutils.
fn sha(bits: &str, data: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("data"), data);
    let output = good(Command::new(format!("sha{bits}sum")).arg(folder.path().join("data")));
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn the_fastest_certified_endorsement_key_is_taken() {
    // As made by swtpm_setup: RSA-2048 and P-384, both certified.
    let tpm = Swtpm::new(Made::default());
    check_endorsement(&tpm, Some("P-384"));
    // A maker that certified RSA only, as many did.
    tpm.tool("tpm2_nvread -C p -o p384.der 0x1c00016");
    tpm.tool("tpm2_nvundefine -C p 0x1c00016");
    check_endorsement(&tpm, Some("RSA-2048"));
    // A certificate of another TPM's key is not sent as this one's.
    let other = Swtpm::new(Made::default());
    other.tool("tpm2_nvread -C p -o p384.der 0x1c00016");
    fs::copy(other.file("p384.der"), tpm.file("other.der")).unwrap();
    plant(&tpm, "other.der", 0);
    check_endorsement(&tpm, Some("RSA-2048"));
    // Padding after a certificate is cut off.
    tpm.tool("tpm2_nvundefine -C p 0x1c00016");
    plant(&tpm, "p384.der", 100);
    check_endorsement(&tpm, Some("P-384"));
    // None at all: the fastest key there is.
    check_endorsement(&Swtpm::new(Made { certified: false, ..Made::default() }), None);
}

/// Puts a certificate at the place of the P-384 one.
fn plant(tpm: &Swtpm, name: &str, padding: usize) {
    let mut bytes = fs::read(tpm.file(name)).unwrap();
    bytes.resize(bytes.len() + padding, 0xFF);
    write(&tpm.file("planted.der"), &bytes);
    let attributes = "ownerread|authread|no_da|ppwrite|ppread|platformcreate";
    tpm.tool(&format!("tpm2_nvdefine -C p -s {} -a {attributes} 0x1c00016", bytes.len()));
    tpm.tool("tpm2_nvwrite -C p -i planted.der 0x1c00016");
}

/// Enrols and compares key, certificate and activated secret; `certified` names the kind of a certified key.
fn check_endorsement(tpm: &Swtpm, certified: Option<&str>) {
    let mut identity = open(tpm);
    let keys = identity.keys(None).unwrap();
    let ek = Public::parse(&keys.ek_public).unwrap();
    match (&ek.key, certified) {
        (Key::Rsa { modulus, .. }, Some("RSA-2048")) => assert_eq!(modulus.len(), 256),
        (Key::Ecc { curve, .. }, Some("P-384")) => assert_eq!(*curve, P384),
        (Key::Ecc { curve, .. }, None) => assert_eq!(*curve, P256),
        (other, wanted) => panic!("{other:?} instead of {wanted:?}"),
    }
    assert_eq!(keys.ek_certificate.is_some(), certified.is_some());
    if let Some(certificate) = &keys.ek_certificate {
        write(&tpm.file("ek.der"), certificate);
        let file = tpm.file("ek.der");
        let pem = good(Command::new("openssl").args(["x509", "-inform", "DER", "-noout", "-pubkey", "-in"]).arg(&file))
            .stdout;
        write(&tpm.file("ek.pem"), &pem);
        let file = tpm.file("ek.pem");
        let spki = good(Command::new("openssl").args(["pkey", "-pubin", "-outform", "DER", "-in"]).arg(&file)).stdout;
        assert!(spki.ends_with(&ek.key_bits()), "the certificate is of this key");
    }
    assert_eq!(*identity.activate(&challenge(&keys, &SECRET)).unwrap(), SECRET, "{certified:?}");
}

#[test]
fn another_tpm_has_other_keys_and_cannot_take_a_challenge() {
    let (one, two) = (Swtpm::new(Made::default()), Swtpm::new(Made::default()));
    let (mut first, mut second) = (open(&one), open(&two));
    let (keys, others) = (first.keys(None).unwrap(), second.keys(None).unwrap());
    assert_ne!(keys.ak_public, others.ak_public);
    assert_ne!(keys.ek_public, others.ek_public);

    let failure = |result: Result<_, IdentityError>| match result.map(|_: zeroize::Zeroizing<Vec<u8>>| ()) {
        Err(IdentityError::Tpm { doing, .. }) => assert!(doing.contains("activating"), "{doing}"),
        other => panic!("{other:?}"),
    };
    failure(second.activate(&challenge(&keys, &SECRET)));
    // For this endorsement key, but another attestation key.
    let mixed = Keys { ak_public: others.ak_public.clone(), ..keys.clone() };
    failure(first.activate(&challenge(&mixed, &SECRET)));
    // A bit on the way.
    let mut damaged = challenge(&keys, &SECRET);
    *damaged.credential.last_mut().unwrap() ^= 1;
    failure(first.activate(&damaged));
    damaged.credential.pop();
    failure(first.activate(&damaged));
    // Its own still works after all that.
    assert_eq!(*first.activate(&challenge(&keys, &SECRET)).unwrap(), SECRET);
    // A quote of the other one is not its own.
    let quote = second.quote(&request([1; 32])).unwrap();
    assert_eq!(judge(&keys, &quote, &[1; 32]), Err(QuoteError::Signature));
}

/// `TPM_CC_PCR_Read`, `TPM_CC_PCR_Extend`, `TPM_CC_Quote`, `TPM_CC_ActivateCredential`.
const COMMANDS: [u32; 4] = [0x17E, 0x182, 0x158, 0x147];
/// `TPM_ST_SESSIONS`.
const WITH_SESSIONS: u16 = 0x8002;

#[test]
fn who_listens_on_the_bus_learns_no_secret_and_every_command_is_authenticated() {
    let tpm = Swtpm::new(Made::default());
    let bus = Bus::of(&tpm);
    let mut identity = TpmIdentity::open(bus.transport()).unwrap();
    let keys = identity.keys(None).unwrap();
    assert_eq!(*identity.activate(&challenge(&keys, &SECRET)).unwrap(), SECRET);
    identity.close_boot_stage().unwrap();
    let quote = identity.quote(&request([0xAB; 32])).unwrap();
    drop(identity);
    assert!(!bus.heard(&SECRET), "the activated secret");
    assert!(!bus.heard(&[0xAB; 32]), "a parameter that is encrypted like it");
    assert!(bus.heard(&quote.pcrs[&15].0), "what cannot be encrypted is heard, so the listener works");
    for command in COMMANDS {
        let tags = bus.tags(command);
        assert!(!tags.is_empty() && tags.iter().all(|tag| *tag == WITH_SESSIONS), "{command:#x}: {tags:x?}");
    }
}

/// Coordinates and shared secrets with leading zeros come once in 256 times each: a few rounds here, a thousand when it was written.
#[test]
fn challenges_are_activated_however_their_numbers_fall() {
    for certified in [true, false] {
        let tpm = Swtpm::new(Made { certified, ..Made::default() });
        let mut identity = open(&tpm);
        let keys = identity.keys(None).unwrap();
        for round in 0..ROUNDS {
            let secret = [round; 32];
            assert_eq!(*identity.activate(&challenge(&keys, &secret)).unwrap(), secret, "round {round}");
        }
    }
}

#[test]
fn every_active_bank_is_closed() {
    let tpm = Swtpm::new(Made { banks: "sha1,sha256,sha384,sha512", ..Made::default() });
    let mut identity = open(&tpm);
    identity.close_boot_stage().unwrap();
    drop(identity);
    for (bank, bits, length) in [("sha1", "1", 20), ("sha256", "256", 32), ("sha384", "384", 48), ("sha512", "512", 64)]
    {
        let event = hex::decode(sha(bits, b"moor/v1 stage closed")).unwrap();
        assert_eq!(pcr15(&tpm, bank), sha(bits, &[&vec![0; length][..], &event].concat()), "{bank}");
    }
}

#[test]
fn one_bank_that_is_closed_counts() {
    let tpm = Swtpm::new(Made { banks: "sha1,sha256,sha384", ..Made::default() });
    assert!(!open(&tpm).is_closed().unwrap());
    tpm.tool(&format!("tpm2_pcrextend 15:sha384={}", "ab".repeat(48)));
    assert!(open(&tpm).is_closed().unwrap());
    // Closing extends from whatever is there.
    open(&tpm).close_boot_stage().unwrap();
}

#[test]
fn a_tpm_without_sha256_uses_sha384() {
    let tpm = Swtpm::new(Made { banks: "sha384", ..Made::default() });
    let mut identity = open(&tpm);
    let keys = identity.keys(None).unwrap();
    assert_eq!(keys.bank, PcrBank::Sha384);
    let quote = identity.quote(&request([1; 32])).unwrap();
    assert!(judge(&keys, &quote, &[1; 32]).unwrap().pcr15_zero);
    let pinned =
        identity.quote(&QuoteRequest { bank: Some(PcrBank::Sha256), ..request([1; 32]) }).unwrap_err().to_string();
    assert!(pinned.contains("is not active any more"), "{pinned}");
}

#[test]
fn requests_that_no_member_makes_are_refused() {
    let tpm = Swtpm::new(Made::default());
    let mut identity = open(&tpm);
    for pcrs in [&[][..], &[0, 1, 2], &[15, 0], &[0, 0, 15], &[15, 24]] {
        let error = identity.quote(&QuoteRequest { pcrs: pcrs.to_vec(), ..request([1; 32]) }).unwrap_err();
        assert!(matches!(error, IdentityError::Answer(_)), "{pcrs:?}: {error}");
    }
    // All that a TPM has are good.
    let all: Vec<u8> = (0..24).collect();
    assert_eq!(identity.quote(&QuoteRequest { pcrs: all, ..request([1; 32]) }).unwrap().pcrs.len(), 24);
}

#[test]
fn nothing_stays_loaded_in_the_tpm() {
    let tpm = Swtpm::new(Made::default());
    let mut identity = open(&tpm);
    // More of everything than a TPM without a resource manager has room for.
    for round in 0..8 {
        let keys = identity.keys(None).unwrap();
        identity.activate(&challenge(&keys, &[round; 32])).unwrap();
        identity.quote(&request([round; 32])).unwrap();
        identity.is_closed().unwrap();
        identity.close_boot_stage().unwrap();
    }
    drop(identity);
    for kind in ["handles-transient", "handles-loaded-session", "handles-saved-session"] {
        assert_eq!(tpm.tool(&format!("tpm2_getcap {kind}")), "", "{kind}");
    }
}

#[test]
fn clearing_the_tpm_keeps_the_identity() {
    let tpm = Swtpm::new(Made::default());
    let keys = open(&tpm).keys(None).unwrap();
    tpm.tool("tpm2_clear -c p");
    assert_eq!(open(&tpm).keys(None).unwrap(), keys);
}

#[test]
fn a_password_on_the_endorsement_hierarchy_is_named() {
    let tpm = Swtpm::new(Made::default());
    tpm.tool("tpm2_changeauth -c e password");
    let error = open(&tpm).keys(None).unwrap_err().to_string();
    assert!(error.contains("endorsement hierarchy has a password"), "{error}");
    // Closing needs no key of that hierarchy.
    open(&tpm).close_boot_stage().unwrap();
}

#[test]
fn a_quote_satisfies_tpm2_tools() {
    let tpm = Swtpm::new(Made::default());
    let mut identity = open(&tpm);
    let keys = identity.keys(None).unwrap();
    let quote = identity.quote(&request([0xAB; 32])).unwrap();
    drop(identity);
    // tpm2_print reads a TPM2B_PUBLIC or a TPMT_PUBLIC and writes PEM.
    write(&tpm.file("ak.pub"), &keys.ak_public);
    let pem = tpm.tool("tpm2_print -t TPMT_PUBLIC -f pem ak.pub");
    write(&tpm.file("ak.pem"), pem.as_bytes());
    write(&tpm.file("attest"), &quote.attest.0);
    write(&tpm.file("signature"), &quote.signature.0);
    tpm.tool(&format!("tpm2_checkquote -u ak.pem -m attest -s signature -q {}", "ab".repeat(32)));
    // And the values are those that the tool reads.
    let listed = tpm.tool("tpm2_pcrread sha256:0,1,2,3,4,5,6,7,11,15").to_lowercase();
    for value in quote.pcrs.values() {
        assert!(listed.contains(&hex::encode(&value.0)), "{listed}");
    }
}

#[test]
fn a_credential_made_by_tpm2_tools_is_activated() {
    let tpm = Swtpm::new(Made::default());
    let mut identity = open(&tpm);
    let keys = identity.keys(None).unwrap();
    let sized = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    write(&tpm.file("ek.pub"), &sized(&keys.ek_public));
    write(&tpm.file("secret"), &SECRET);
    let name = hex::encode(Public::parse(&keys.ak_public).unwrap().name());
    good(
        Command::new("tpm2_makecredential")
            .args(["-T", "none", "-u", "ek.pub", "-s", "secret", "-n", &name, "-o", "made"])
            .current_dir(tpm.file("")),
    );
    // Magic and version, then the two sized buffers.
    let made = fs::read(tpm.file("made")).unwrap();
    assert_eq!(made[..8], [0xBA, 0xDC, 0xC0, 0xDE, 0, 0, 0, 1]);
    let length = 2 + usize::from(u16::from_be_bytes([made[8], made[9]]));
    let challenge = Challenge { credential: made[8..8 + length].to_vec(), secret: made[8 + length..].to_vec() };
    assert_eq!(*identity.activate(&challenge).unwrap(), SECRET);
}

#[test]
fn a_tpm_that_does_not_answer_is_an_error_in_one_line() {
    let tpm = Swtpm::new(Made::default());
    let transport = tpm.transport();
    drop(tpm);
    let error = TpmIdentity::open(transport).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("TPM: opening it: ") && !error.contains('\n'), "{error}");
    let error = TpmIdentity::open_device(std::path::Path::new("/dev/absent")).map(drop).unwrap_err().to_string();
    assert_eq!(error, "TPM: opening the device: '/dev/absent': No such file or directory (os error 2)");
}
