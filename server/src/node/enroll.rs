//! `enroll` and `enroll/complete`: a key is bound to an armed node. A TPM has to show that the attestation key lives beside the
//! endorsement key (credential activation) and that it speaks over this very connection (a quote over the proof).

use super::refusals::Subject;
use super::session::{check_quote, check_signature, proof_digest};
use super::{Channel, recorded};
use crate::http::{Connection, Failure, Peer, parse};
use crate::state::{Member, now};
use crate::store::records::{Identity, NodeRecord};
use crate::store::{self, Command, Outcome};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::rand;
use axum::Json;
use axum::extract::{Extension, State};
use bytes::Bytes;
use moor_api::ids::{BootId, NodeId};
use moor_api::node::{Base64, EnrollComplete, EnrollMethod, EnrollReply, EnrollRequest, Enrolled, PcrBank};
use moor_api::problem::{Code, Problem};
use moor_api::proof::{EXPORTER_LENGTH, Purpose};
use moor_tpm::public::Key;
use moor_tpm::template::attribute;
use moor_tpm::{Public, QuoteError, credential, template};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;
use x509_parser::prelude::{FromDer as _, SubjectPublicKeyInfo, X509Certificate};
use x509_parser::public_key::PublicKey;
use zeroize::Zeroizing;

/// A TPM has this long to activate and to quote: slow ones take seconds for each.
const WINDOW: Duration = Duration::from_mins(2);
/// Enrolments that wait at a time.
const MAX_OPEN: usize = 4096;
/// The same of one node.
const MAX_OF_NODE: usize = 8;

/// An enrolment that waits for its TPM. No `Debug`.
struct Open {
    node: NodeId,
    boot: BootId,
    nonce: Base64,
    secret: Zeroizing<[u8; 32]>,
    identity: Identity,
    ak: Public,
    bank: PcrBank,
    client_key: Vec<u8>,
    exporter: [u8; EXPORTER_LENGTH],
    since: Instant,
}

/// Enrolments that wait.
#[derive(Default)]
pub struct Enrollments(Mutex<HashMap<Uuid, Open>>);

impl Enrollments {
    /// Adds one. A node has a few at a time, because anybody may begin one in its name; the oldest makes room.
    fn add(&self, open: Open) -> Result<Uuid, Problem> {
        // A thread that panicked here left the map whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, other| other.since.elapsed() < WINDOW);
        let own = all.iter().filter(|(_, other)| other.node == open.node);
        let (count, oldest) = (own.clone().count(), own.min_by_key(|(_, other)| other.since).map(|(id, _)| *id));
        if let Some(oldest) = oldest.filter(|_| count >= MAX_OF_NODE) {
            all.remove(&oldest);
        }
        if all.len() >= MAX_OPEN {
            return Err(Problem::new(Code::RateLimited, "too many enrolments are open: try again in a minute"));
        }
        let id = Uuid::new_v4();
        all.insert(id, open);
        Ok(id)
    }

    /// Takes one out, whatever comes of it.
    fn take(&self, id: Uuid) -> Option<Open> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&id).filter(|open| open.since.elapsed() < WINDOW)
    }

    fn node(&self, id: Uuid) -> Option<NodeId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id).map(|open| open.node)
    }
}

fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(Code::ProofInvalid, detail)
}

/// The uncompressed point of a P-256 `SubjectPublicKeyInfo`.
pub(crate) fn p256_point(spki: &[u8]) -> Result<Vec<u8>, Problem> {
    let (rest, parsed) =
        SubjectPublicKeyInfo::from_der(spki).map_err(|_| invalid("the public key is not a SubjectPublicKeyInfo"))?;
    let oids = (
        parsed.algorithm.algorithm.to_id_string(),
        parsed.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok()).map(|oid| oid.to_id_string()),
    );
    if !rest.is_empty() || oids != ("1.2.840.10045.2.1".into(), Some("1.2.840.10045.3.1.7".into())) {
        return Err(invalid("the public key is not on P-256"));
    }
    let point = parsed.subject_public_key.data;
    if point.len() != 65 || point[0] != 4 {
        return Err(invalid("the public key is not an uncompressed point"));
    }
    Ok(point.to_vec())
}

/// An endorsement key has to be one: only a restricted decryption key of the TPM itself activates credentials honestly.
fn check_ek(ek: &Public) -> Result<(), Problem> {
    let wanted = attribute::FIXED_TPM
        | attribute::FIXED_PARENT
        | attribute::SENSITIVE_DATA_ORIGIN
        | attribute::RESTRICTED
        | attribute::DECRYPT;
    if ek.attributes & wanted != wanted || ek.attributes & attribute::SIGN != 0 {
        return Err(invalid("the endorsement key has not the attributes of one"));
    }
    Ok(())
}

/// The certificate is recorded; here it only has to be of this key.
fn check_ek_certificate(certificate: &[u8], ek: &Public) -> Result<(), Problem> {
    let (_, certificate) = X509Certificate::from_der(certificate)
        .map_err(|_| invalid("the certificate of the endorsement key is no X.509 certificate"))?;
    let same = match (certificate.public_key().parsed(), &ek.key) {
        (Ok(PublicKey::RSA(rsa)), Key::Rsa { modulus, exponent, .. }) => {
            let trimmed = &rsa.modulus[rsa.modulus.iter().position(|byte| *byte != 0).unwrap_or(0)..];
            trimmed == modulus && rsa.try_exponent() == Ok(u64::from(*exponent))
        }
        (Ok(PublicKey::EC(point)), Key::Ecc { x, y, .. }) => {
            point.data() == [&[4], x.as_slice(), y.as_slice()].concat()
        }
        _ => false,
    };
    if same { Ok(()) } else { Err(invalid("the certificate is not that of the endorsement key")) }
}

pub(super) async fn enroll(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<EnrollReply>, Failure> {
    let peer = &connection.peer;
    let request: EnrollRequest = recorded(&member, peer, "POST enroll", &Subject::default(), parse(&body)).await?;
    let reply = begin(&member, peer, &request).await;
    if reply.is_ok() {
        // What follows comes over this connection.
        connection.asked.wait(WINDOW);
    }
    Ok(Json(recorded(&member, peer, "POST enroll", &Subject::node(request.node), reply).await?))
}

/// Whether this identity may be bound now. The store decides once more when it binds; here nobody learns more than he needs.
fn may_enroll(node: &NodeRecord, offered: &Identity) -> Result<(), Problem> {
    match &node.identity {
        Some(bound) if bound.same_holder(offered) => return Ok(()),
        Some(bound) if !bound.gives_way(offered, node.armed) => {
            return Err(Problem::new(Code::IdentityMismatch, store::mismatch(&node.name, bound, offered)));
        }
        _ => {}
    }
    if node.armed.is_open(now()) { Ok(()) } else { Err(Problem::new(Code::NotArmed, store::not_armed(&node.name))) }
}

async fn begin(member: &Member, peer: &Peer, request: &EnrollRequest) -> Result<EnrollReply, Failure> {
    let channel = Channel::of(peer)?;
    let node = member.view()?.node(request.node)?;
    let node =
        node.ok_or_else(|| Problem::new(Code::UnknownNode, "there is no node with this id: begin with hello"))?;
    member.nonces.redeem(node.id, &request.nonce.0)?;
    match &request.method {
        EnrollMethod::Soft { public_key, signature } => {
            let identity = Identity::Soft { public_key: public_key.clone(), unproven: false };
            may_enroll(&node, &identity)?;
            let digest = proof_digest(member, &channel, Purpose::Enroll, node.id, request.boot, &request.nonce.0);
            check_signature(&public_key.0, &signature.0, &digest)?;
            Ok(EnrollReply::Enrolled(bind(member, &node, identity, request.boot, "soft").await?))
        }
        EnrollMethod::Tpm { ek_public, ek_certificate, ak_public, bank } => {
            let identity = Identity::Tpm {
                ek_public: ek_public.clone(),
                ek_certificate: ek_certificate.clone(),
                ak_public: ak_public.clone(),
                bank: *bank,
            };
            may_enroll(&node, &identity)?;
            let ek = Public::parse(&ek_public.0).map_err(|error| invalid(format!("the endorsement key: {error}")))?;
            check_ek(&ek)?;
            if let Some(certificate) = ek_certificate {
                check_ek_certificate(&certificate.0, &ek)?;
            }
            let ak = Public::parse(&ak_public.0).map_err(|error| invalid(format!("the attestation key: {error}")))?;
            template::check_ak(&ak).map_err(|error| invalid(error.to_string()))?;
            let mut secret = Zeroizing::new([0; 32]);
            rand::fill(&mut *secret).map_err(|_| Problem::new(Code::Internal, "the member has no randomness"))?;
            let challenge = credential::make(&ek, &ak.name(), &secret)
                .map_err(|error| invalid(format!("the endorsement key: {error}")))?;
            let enrollment = member.enrollments.add(Open {
                node: node.id,
                boot: request.boot,
                nonce: request.nonce.clone(),
                secret,
                identity,
                ak,
                bank: *bank,
                client_key: channel.client_key.to_vec(),
                exporter: *channel.exporter,
                since: Instant::now(),
            })?;
            Ok(EnrollReply::Challenge {
                enrollment,
                credential: challenge.id_object.into(),
                secret: challenge.encrypted_secret.into(),
            })
        }
    }
}

async fn bind(
    member: &Member,
    node: &NodeRecord,
    identity: Identity,
    boot: BootId,
    method: &str,
) -> Result<Enrolled, Failure> {
    member
        .audit("enroll", serde_json::json!({ "node": node.id, "name": node.name, "method": method, "boot": boot }))
        .await?;
    let outcome = member.propose(Command::Bind { id: node.id, identity, boot, now: now() }).await?;
    let Outcome::Number(epoch) = outcome else {
        return Err(anyhow::anyhow!("binding {} gave no epoch", node.name).into());
    };
    tracing::info!("{} is enrolled ({method})", node.name);
    Ok(Enrolled { epoch, nonce: member.nonces.issue(node.id)? })
}

pub(super) async fn complete(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<Enrolled>, Failure> {
    let peer = &connection.peer;
    let call = "POST enroll/complete";
    let request: EnrollComplete = recorded(&member, peer, call, &Subject::default(), parse(&body)).await?;
    let subject = member.enrollments.node(request.enrollment).map(Subject::node).unwrap_or_default();
    let done = finish(&member, peer, &request).await;
    Ok(Json(recorded(&member, peer, call, &subject, done).await?))
}

async fn finish(member: &Member, peer: &Peer, request: &EnrollComplete) -> Result<Enrolled, Failure> {
    let channel = Channel::of(peer)?;
    let open = member.enrollments.take(request.enrollment);
    let open = open.ok_or_else(|| {
        invalid(format!("no such enrolment is open (they wait for {} s): begin again with hello", WINDOW.as_secs()))
    })?;
    if open.client_key != channel.client_key || open.exporter != *channel.exporter {
        return Err(invalid("the enrolment began on another connection: begin again with hello").into());
    }
    // Without the secret nothing else is looked at: it says that the key and the endorsement key are in one TPM.
    verify_slices_are_equal(&request.secret.0, &*open.secret)
        .map_err(|_| invalid("the TPM did not activate the credential: the keys are not in one TPM"))?;
    let digest = proof_digest(member, &channel, Purpose::Enroll, open.node, open.boot, &open.nonce.0);
    check_quote(&open.ak, &request.quote, &digest, open.bank)
        .map_err(|error: QuoteError| invalid(error.to_string()))?;
    let node = member
        .view()?
        .node(open.node)?
        .ok_or_else(|| Problem::new(Code::UnknownNode, "the node was removed meanwhile"))?;
    bind(member, &node, open.identity, open.boot, "tpm").await
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData as _};

    #[test]
    fn soft_keys_are_on_p256() {
        let good = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap().subject_public_key_info();
        assert_eq!(p256_point(&good).unwrap().len(), 65);
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let other = KeyPair::generate_for(algorithm).unwrap().subject_public_key_info();
            assert!(p256_point(&other).is_err());
        }
        assert!(p256_point(&good[..good.len() - 1]).is_err());
        assert!(p256_point(&[good.as_slice(), &[0]].concat()).is_err());
        assert!(p256_point(&[]).is_err());
    }
}
