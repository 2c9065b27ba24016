//! A machine that takes each step of the node API by itself, so that a test can change one thing of an enrolment or a session that is
//! good otherwise, and what a refusal has to be: that `moor why` gives the same reason as the answer did is part of it.

use crate::member::{Member, Visit, tpm};
use crate::raw;
use crate::swtpm::Swtpm;
use moor_agent::identity::tpm::{Challenge, Keys, QuoteRequest};
use moor_api::admin::TrustState;
use moor_api::client::ClientError;
use moor_api::ids::BootId;
use moor_api::node::{
    Base64, EnrollComplete, EnrollMethod, EnrollReply, EnrollRequest, Enrolled, KnownNode, Quote, SessionProof,
    SessionReply, SessionRequest, Stage,
};
use moor_api::problem::Code;
use moor_api::proof::{Proof, Purpose};
use std::fmt::Debug;
use uuid::Uuid;

/// What a member asks for, less PCR 15.
pub(crate) const WITHOUT_STAGE: [u8; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14];

/// A machine that is known to the member, on a connection of its own, and takes each step of the API by itself.
pub(crate) struct Attempt {
    visit: Visit,
    pub(crate) known: KnownNode,
}

impl Attempt {
    pub(crate) async fn of(member: &Member, chip: &Swtpm, uuid: Uuid, boot: BootId) -> Self {
        let mut visit = Visit::to(member, uuid, boot).await;
        let known = visit.known(&tpm(chip)).await;
        Self { visit, known }
    }

    /// What has to be signed on this connection for this nonce.
    pub(crate) fn digest(&self, purpose: Purpose, nonce: &Base64) -> [u8; 32] {
        self.digest_of_boot(purpose, nonce, self.visit.boot)
    }

    pub(crate) fn digest_of_boot(&self, purpose: Purpose, nonce: &Base64, boot: BootId) -> [u8; 32] {
        Proof {
            purpose,
            collective: self.visit.bundle.collective,
            member: self.visit.connection.member(),
            node: self.known.id,
            boot,
            nonce: &nonce.0,
            session_public_key: &self.visit.key.public_key(),
            exporter: self.visit.connection.exporter(),
        }
        .digest()
    }

    /// A quote as the member wants it, over this digest.
    pub(crate) fn quote(&self, chip: &Swtpm, digest: [u8; 32]) -> Quote {
        let request =
            QuoteRequest { digest, bank: self.known.quote.bank, pcrs: self.known.quote.pcrs.clone(), event_log: false };
        raw::open(chip).quote(&request).unwrap()
    }

    pub(crate) async fn begin(&mut self, keys: &Keys) -> Result<(Uuid, Challenge), ClientError> {
        let keys = keys.clone();
        let method = EnrollMethod::Tpm {
            ek_public: keys.ek_public.into(),
            ek_certificate: keys.ek_certificate.map(Base64),
            ak_public: keys.ak_public.into(),
            bank: keys.bank,
        };
        let (node, boot, nonce) = (self.known.id, self.visit.boot, self.known.nonce.clone());
        match self.visit.connection.enroll(&EnrollRequest { node, boot, nonce, method }).await? {
            EnrollReply::Challenge { enrollment, credential, secret } => {
                Ok((enrollment, Challenge { credential: credential.0, secret: secret.0 }))
            }
            other @ EnrollReply::Enrolled(_) => panic!("no challenge for a TPM: {other:?}"),
        }
    }

    pub(crate) async fn complete(&mut self, enrollment: Uuid, answer: Answer) -> Result<Enrolled, ClientError> {
        let request = EnrollComplete { enrollment, secret: answer.secret.into(), quote: answer.quote };
        self.visit.connection.enroll_complete(&request).await
    }

    pub(crate) async fn session(
        &mut self,
        nonce: &Base64,
        stage: Stage,
        proof: SessionProof,
    ) -> Result<SessionReply, ClientError> {
        let (node, boot, nonce) = (self.known.id, self.visit.boot, nonce.clone());
        self.visit.connection.session(&SessionRequest { node, boot, nonce, stage, proof }).await
    }
}

/// What a machine answers to a challenge.
pub(crate) struct Answer {
    pub(crate) secret: Vec<u8>,
    pub(crate) quote: Quote,
}

/// The answer is a refusal with this status, code and reason, in one line, and `moor why` says the same.
pub(crate) async fn refused<T: Debug>(
    member: &Member,
    node: &str,
    what: &str,
    result: Result<T, ClientError>,
    (call, code, says): (&str, Code, &str),
) {
    let problem = match result {
        Err(ClientError::Problem(problem)) => problem,
        other => panic!("{what}: not refused: {other:?}"),
    };
    assert_eq!((problem.status, problem.code), (403, code), "{what}: {problem}");
    assert!(problem.detail.contains(says) && !problem.detail.contains('\n'), "{what}: {problem}");
    let why = member.admin().await.why(node).await.unwrap();
    assert!(
        why.refusals.iter().any(|refusal| refusal.call == call && refusal.problem == problem),
        "{what}: `moor why` does not say '{problem}': {why:?}"
    );
}

pub(crate) async fn trust(member: &Member, node: &str) -> TrustState {
    member.admin().await.nodes(Some(node)).await.unwrap()[0].trust
}

/// A node for one case: equal refusals of one node are counted, not written, so that each case has a node of its own.
pub(crate) async fn armed(member: &Member, number: usize) -> (String, Uuid) {
    let (name, uuid) = (format!("n{number}"), Uuid::new_v4());
    member.define(&name, uuid).await;
    member.arm(&name).await;
    (name, uuid)
}
