//! Sessions by a TPM that a member refuses. The member and the TPM are real.

use crate::attempt::{Attempt, WITHOUT_STAGE, armed, refused};
use crate::member::{Member, Visit, tpm};
use crate::raw;
use crate::swtpm::{Made, Swtpm};
use moor_api::ids::BootId;
use moor_api::node::{PcrBank, Quote, SessionProof, Stage};
use moor_api::problem::Code;
use moor_api::proof::Purpose;
use std::time::Duration;
use uuid::Uuid;

const SESSION: &str = "POST session";

/// A node that is bound to this TPM.
async fn enrolled(member: &Member, chip: &Swtpm) -> Uuid {
    let (_, uuid) = armed(member, 1).await;
    let mut visit = Visit::to(member, uuid, BootId::random()).await;
    let mut identity = tpm(chip);
    let known = visit.known(&identity).await;
    visit.enroll(&mut identity, &known).await.unwrap();
    uuid
}

/// A proof with one thing changed: of this attempt, by this TPM, with the quote of the session before and the digest that is due.
type Deviation = fn(&Attempt, &Swtpm, &Quote, [u8; 32]) -> SessionProof;

/// What is changed, and the code and the reason of the refusal.
const PROOFS: [(&str, Deviation, Code, &str); 9] = [
    (
        "the quote of the session before",
        |_, _, earlier, _| SessionProof::Tpm { quote: earlier.clone() },
        Code::ProofInvalid,
        "extraData is for another session",
    ),
    (
        "a quote for an enrolment",
        |attempt, chip, _, _| {
            let digest = attempt.digest(Purpose::Enroll, &attempt.known.nonce);
            SessionProof::Tpm { quote: attempt.quote(chip, digest) }
        },
        Code::ProofInvalid,
        "extraData is for another session",
    ),
    (
        "a quote of another boot",
        |attempt, chip, _, _| {
            let digest = attempt.digest_of_boot(Purpose::Session, &attempt.known.nonce, BootId::random());
            SessionProof::Tpm { quote: attempt.quote(chip, digest) }
        },
        Code::ProofInvalid,
        "extraData is for another session",
    ),
    (
        "a selection without PCR 15",
        |_, chip, _, digest| SessionProof::Tpm { quote: raw::quote(chip, digest, PcrBank::Sha256, &WITHOUT_STAGE) },
        Code::ProofInvalid,
        "does not select exactly the PCRs",
    ),
    (
        "a selection of PCR 15 alone",
        |_, chip, _, digest| SessionProof::Tpm { quote: raw::quote(chip, digest, PcrBank::Sha256, &[15]) },
        Code::ProofInvalid,
        "does not select exactly the PCRs",
    ),
    (
        "a value that the TPM did not quote",
        |attempt, chip, _, digest| {
            let mut quote = attempt.quote(chip, digest);
            quote.pcrs.get_mut(&0).unwrap().0[31] = 1;
            SessionProof::Tpm { quote }
        },
        Code::ProofInvalid,
        "not those that the TPM quoted",
    ),
    (
        "a bit of the signature",
        |attempt, chip, _, digest| {
            let mut quote = attempt.quote(chip, digest);
            *quote.signature.0.last_mut().unwrap() ^= 1;
            SessionProof::Tpm { quote }
        },
        Code::IdentityMismatch,
        "n1",
    ),
    (
        "a bit of what was signed",
        |attempt, chip, _, digest| {
            let mut quote = attempt.quote(chip, digest);
            // The clock, which nothing else looks at: behind magic, type, signer and extraData.
            let at = 4 + 2 + (2 + 34) + (2 + 32);
            quote.attest.0[at] ^= 1;
            SessionProof::Tpm { quote }
        },
        Code::IdentityMismatch,
        "n1",
    ),
    (
        "a signature by no TPM at all",
        |_, _, _, _| SessionProof::Soft { signature: vec![1; 70].into() },
        Code::IdentityMismatch,
        "n1",
    ),
];

#[tokio::test(flavor = "current_thread")]
async fn a_session_with_one_thing_changed_is_refused() {
    let (member, chip) = (Member::start(), Swtpm::new(Made::default()));
    let uuid = enrolled(&member, &chip).await;

    // The control, whose quote is replayed afterwards.
    let mut attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
    let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
    let earlier = attempt.quote(&chip, digest);
    attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote: earlier.clone() }).await.unwrap();
    let again = attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote: earlier.clone() }).await;
    refused(&member, "n1", "the same once more", again, (SESSION, Code::ProofInvalid, "was used before")).await;

    for (what, change, code, says) in PROOFS {
        // Equal refusals of one node are written every two seconds.
        tokio::time::sleep(Duration::from_millis(2100)).await;
        let mut attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
        let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
        let proof = change(&attempt, &chip, &earlier, digest);
        let result = attempt.session(&nonce, Stage::Boot, proof).await;
        refused(&member, "n1", what, result, (SESSION, code, says)).await;
    }

    // A quote of another connection of the same boot, as a man in the middle would pass it on.
    let boot = BootId::random();
    let victim = Attempt::of(&member, &chip, uuid, boot).await;
    let mut attacker = Attempt::of(&member, &chip, uuid, boot).await;
    let nonce = attacker.known.nonce.clone();
    let quote = victim.quote(&chip, victim.digest(Purpose::Session, &nonce));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let result = attacker.session(&nonce, Stage::Boot, SessionProof::Tpm { quote }).await;
    let expected = (SESSION, Code::ProofInvalid, "extraData is for another session or connection");
    refused(&member, "n1", "a quote of another connection", result, expected).await;
}

#[tokio::test(flavor = "current_thread")]
async fn no_boot_stage_opens_once_pcr_15_is_closed_also_when_the_member_was_never_told() {
    let member = Member::start();
    let mut chip = Swtpm::new(Made { banks: "sha256,sha384", ..Made::default() });
    let uuid = enrolled(&member, &chip).await;
    let boot = BootId::random();
    Visit::to(&member, uuid, boot).await.log_in(&mut tpm(&chip), Stage::Boot).await.unwrap();

    // The OS has started: PCR 15 is closed, in one bank only. That the member has not heard `stage-closed` changes nothing.
    chip.tool(&format!("tpm2_pcrextend 15:sha256={}", "ab".repeat(32)));
    let mut attempt = Attempt::of(&member, &chip, uuid, boot).await;
    let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
    let quote = attempt.quote(&chip, digest);
    let result = attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote }).await;
    let expected = (SESSION, Code::StageClosed, "PCR 15 of n1 is closed already");
    refused(&member, "n1", "the same boot", result, expected).await;

    // Nor does it help to say that it is zero…
    let mut attempt = Attempt::of(&member, &chip, uuid, boot).await;
    let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
    let mut quote = attempt.quote(&chip, digest);
    quote.pcrs.get_mut(&15).unwrap().0.fill(0);
    let result = attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote }).await;
    let expected = (SESSION, Code::ProofInvalid, "not those that the TPM quoted");
    refused(&member, "n1", "a value of zero that is not so", result, expected).await;

    // …or to quote a bank where it is, or to call it another boot (kexec).
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let mut attempt = Attempt::of(&member, &chip, uuid, boot).await;
    let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
    let quote = raw::quote(&chip, digest, PcrBank::Sha384, &attempt.known.quote.pcrs);
    let result = attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote }).await;
    let expected = (SESSION, Code::ProofInvalid, "does not select exactly the PCRs");
    refused(&member, "n1", "the bank that is open", result, expected).await;
    let mut attempt = Attempt::of(&member, &chip, uuid, BootId::random()).await;
    let (nonce, digest) = (attempt.known.nonce.clone(), attempt.digest(Purpose::Session, &attempt.known.nonce));
    let quote = attempt.quote(&chip, digest);
    let result = attempt.session(&nonce, Stage::Boot, SessionProof::Tpm { quote }).await;
    let expected = (SESSION, Code::StageClosed, "PCR 15 of n1 is closed already");
    refused(&member, "n1", "another boot", result, expected).await;

    // The run stage is open to it, and a power cycle opens the boot stage again.
    Visit::to(&member, uuid, boot).await.log_in(&mut tpm(&chip), Stage::Run).await.unwrap();
    chip.reset();
    Visit::to(&member, uuid, BootId::random()).await.log_in(&mut tpm(&chip), Stage::Boot).await.unwrap();
}
