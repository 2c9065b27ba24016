//! Enrolments by a TPM that a member refuses. The member and the TPMs are real.

use crate::attempt::{Answer, Attempt, WITHOUT_STAGE, armed, refused, trust};
use crate::member::Member;
use crate::raw;
use crate::swtpm::{Made, Swtpm};
use moor_agent::identity::tpm::Keys;
use moor_api::admin::TrustState;
use moor_api::ids::BootId;
use moor_api::node::{PcrBank, Quote};
use moor_api::problem::Code;
use moor_api::proof::Purpose;
use std::time::Duration;

const ENROLL: &str = "POST enroll";
const COMPLETE: &str = "POST enroll/complete";

#[tokio::test(flavor = "current_thread")]
async fn keys_that_are_not_those_of_one_tpm_get_no_challenge() {
    let (member, chip, other) = (Member::start(), Swtpm::new(Made::default()), Swtpm::new(Made::default()));
    let good = raw::open(&chip).keys(None).unwrap();
    let others = raw::open(&other).keys(None).unwrap();
    assert!(good.ek_certificate.is_some(), "a TPM with a certificate");
    let mut damaged = good.ek_certificate.clone().unwrap();
    damaged.truncate(40);
    let cases = [
        (
            "the certificate of another TPM's endorsement key",
            Keys { ek_certificate: others.ek_certificate.clone(), ..good.clone() },
            "the certificate is not that of the endorsement key",
        ),
        (
            "another TPM's endorsement key under this one's certificate",
            Keys { ek_public: others.ek_public.clone(), ..good.clone() },
            "the certificate is not that of the endorsement key",
        ),
        (
            "half a certificate",
            Keys { ek_certificate: Some(damaged), ..good.clone() },
            "the certificate of the endorsement key is no X.509 certificate",
        ),
        (
            "a signing key in place of the endorsement key",
            Keys { ek_public: good.ak_public.clone(), ek_certificate: None, ..good.clone() },
            "the endorsement key has not the attributes of one",
        ),
        (
            "a storage key that may leave its TPM in place of the endorsement key",
            Keys { ek_public: raw::duplicable_key(&chip), ek_certificate: None, ..good.clone() },
            "the endorsement key has not the attributes of one",
        ),
        (
            "an attestation key that signs foreign data",
            Keys { ak_public: raw::unrestricted_key(&chip), ..good.clone() },
            "the attestation key signs foreign data",
        ),
        (
            "an endorsement key in place of the attestation key",
            Keys { ak_public: good.ek_public.clone(), ..good.clone() },
            "the attestation key",
        ),
    ];
    for (number, (what, keys, says)) in cases.into_iter().enumerate() {
        let (name, uuid) = armed(&member, number).await;
        let mut attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
        let result = attempt.begin(&keys).await.map(|(enrollment, _)| enrollment);
        refused(&member, &name, what, result, (ENROLL, Code::ProofInvalid, says)).await;
    }
    // The control: nothing is changed.
    let (_, uuid) = armed(&member, 99).await;
    Attempt::of(&member, &chip, uuid, BootId::random()).await.begin(&good).await.unwrap();
}

/// What stands at hand for a changed answer: this TPM, another one, and the quote of an enrolment before this one.
struct Hand<'a> {
    attempt: &'a Attempt,
    chip: &'a Swtpm,
    other: &'a Swtpm,
    earlier: &'a Quote,
}

impl Hand<'_> {
    fn digest(&self) -> [u8; 32] {
        self.attempt.digest(Purpose::Enroll, &self.attempt.known.nonce)
    }
}

/// One thing that is changed in an answer to a challenge.
type Change = fn(&mut Answer, &Hand<'_>);

/// What is changed, and what the member says to it.
const ANSWERS: [(&str, Change, &str); 12] = [
    ("a bit of the secret", |answer, _| answer.secret[7] ^= 1, "did not activate the credential"),
    ("no secret", |answer, _| answer.secret.clear(), "did not activate the credential"),
    ("a secret that was guessed", |answer, _| answer.secret = vec![0; 32], "did not activate the credential"),
    (
        "the quote of an enrolment before",
        |answer, hand| answer.quote = hand.earlier.clone(),
        "extraData is for another session",
    ),
    (
        "a quote over another nonce",
        |answer, hand| {
            let mut nonce = hand.attempt.known.nonce.clone();
            nonce.0[40] ^= 1;
            answer.quote = hand.attempt.quote(hand.chip, hand.attempt.digest(Purpose::Enroll, &nonce));
        },
        "extraData is for another session",
    ),
    (
        "a quote for a session",
        |answer, hand| {
            let digest = hand.attempt.digest(Purpose::Session, &hand.attempt.known.nonce);
            answer.quote = hand.attempt.quote(hand.chip, digest);
        },
        "extraData is for another session",
    ),
    (
        "another TPM's quote",
        |answer, hand| answer.quote = hand.attempt.quote(hand.other, hand.digest()),
        "not signed by the node's attestation key",
    ),
    (
        "a selection without PCR 15",
        |answer, hand| answer.quote = raw::quote(hand.chip, hand.digest(), PcrBank::Sha256, &WITHOUT_STAGE),
        "does not select exactly the PCRs",
    ),
    (
        "a selection of PCR 15 alone",
        |answer, hand| answer.quote = raw::quote(hand.chip, hand.digest(), PcrBank::Sha256, &[15]),
        "does not select exactly the PCRs",
    ),
    (
        "a selection in another bank than the one announced",
        |answer, hand| {
            let pcrs = &hand.attempt.known.quote.pcrs;
            answer.quote = raw::quote(hand.chip, hand.digest(), PcrBank::Sha384, pcrs);
        },
        "does not select exactly the PCRs",
    ),
    (
        "a value that the TPM did not quote",
        |answer, _| answer.quote.pcrs.get_mut(&7).unwrap().0[0] ^= 1,
        "not those that the TPM quoted",
    ),
    (
        "a bit of the signature",
        |answer, _| *answer.quote.signature.0.last_mut().unwrap() ^= 1,
        "not signed by the node's attestation key",
    ),
];

#[tokio::test(flavor = "current_thread")]
async fn an_enrolment_with_one_thing_changed_is_refused() {
    let member = Member::start();
    let (chip, other) = (Swtpm::new(Made { banks: "sha256,sha384", ..Made::default() }), Swtpm::new(Made::default()));
    let keys = raw::open(&chip).keys(None).unwrap();
    assert_eq!(keys.bank, PcrBank::Sha256);

    // The quote of an enrolment that was given up.
    let (_, uuid) = armed(&member, 98).await;
    let attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
    let earlier = attempt.quote(&chip, attempt.digest(Purpose::Enroll, &attempt.known.nonce));

    for (number, (what, change, says)) in ANSWERS.into_iter().enumerate() {
        let (name, uuid) = armed(&member, number).await;
        let mut attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
        let (enrollment, challenge) = attempt.begin(&keys).await.unwrap();
        let secret = raw::open(&chip).activate(&challenge).unwrap().to_vec();
        let quote = attempt.quote(&chip, attempt.digest(Purpose::Enroll, &attempt.known.nonce));
        let mut answer = Answer { secret, quote };
        change(&mut answer, &Hand { attempt: &attempt, chip: &chip, other: &other, earlier: &earlier });
        let result = attempt.complete(enrollment, answer).await;
        refused(&member, &name, what, result, (COMPLETE, Code::ProofInvalid, says)).await;
        assert_eq!(trust(&member, &name).await, TrustState::Unenrolled, "{what}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_enrolment_ends_on_the_connection_that_it_began_on_and_once() {
    let (member, chip) = (Member::start(), Swtpm::new(Made::default()));
    let keys = raw::open(&chip).keys(None).unwrap();
    for (number, moves) in [true, false].into_iter().enumerate() {
        let (name, uuid) = armed(&member, number).await;
        let boot = BootId::random();
        let mut attempt = Attempt::of(&member, &chip, uuid, boot).await;
        let (enrollment, challenge) = attempt.begin(&keys).await.unwrap();
        let secret = raw::open(&chip).activate(&challenge).unwrap().to_vec();
        let answer = |attempt: &Attempt| {
            let digest = attempt.digest(Purpose::Enroll, &attempt.known.nonce);
            Answer { secret: secret.clone(), quote: attempt.quote(&chip, digest) }
        };
        if moves {
            // Everything is right but for the connection: the challenge was for somebody else's.
            let mut elsewhere = Attempt::of(&member, &chip, uuid, boot).await;
            elsewhere.known.nonce = attempt.known.nonce.clone();
            let result = elsewhere.complete(enrollment, answer(&elsewhere)).await;
            let expected = (COMPLETE, Code::ProofInvalid, "began on another connection");
            refused(&member, &name, "another connection", result, expected).await;
            assert_eq!(trust(&member, &name).await, TrustState::Unenrolled);
        } else {
            // The control: nothing is changed.
            attempt.complete(enrollment, answer(&attempt)).await.unwrap();
            assert_eq!(trust(&member, &name).await, TrustState::Tpm);
        }
        // The challenge is used up, whatever came of it. Nobody knows any more whose it was.
        let again = attempt.complete(enrollment, answer(&attempt)).await;
        let expected = (COMPLETE, Code::ProofInvalid, "no such enrolment is open");
        refused(&member, "127.0.0.1", "a second time", again, expected).await;
        // Equal refusals are written every two seconds.
        tokio::time::sleep(Duration::from_millis(2100)).await;
    }
}
