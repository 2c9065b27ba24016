//! `session`: a proof of the bound identity against a token.

use super::refusals::Subject;
use super::token::{self, Claims};
use super::{Channel, recorded};
use crate::content;
use crate::http::{Connection, Failure, Peer, parse};
use crate::late::Bound;
use crate::state::{Member, now};
use crate::store::records::{Evidence, Identity, NodeRecord};
use crate::store::{self, Command};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use axum::Json;
use axum::extract::{Extension, State};
use bytes::Bytes;
use moor_api::ids::{BootId, NodeId};
use moor_api::node::{PcrBank, Quote, SessionProof, SessionReply, SessionRequest, Stage};
use moor_api::problem::{Code, Problem};
use moor_api::proof::{Proof, Purpose};
use moor_tpm::{Bank, Expected, Public, QuoteError, Verified};
use std::sync::Arc;

/// Longest event log that is taken, in bytes.
const MAX_EVENT_LOG: usize = 512 << 10;

/// The digest that this connection's proof is over, made from what the member knows itself.
pub(super) fn proof_digest(
    member: &Member,
    channel: &Channel<'_>,
    purpose: Purpose,
    node: NodeId,
    boot: BootId,
    nonce: &[u8],
) -> [u8; 32] {
    Proof {
        purpose,
        collective: member.site.collective,
        member: member.identity.id,
        node,
        boot,
        nonce,
        session_public_key: channel.client_key,
        exporter: channel.exporter,
    }
    .digest()
}

pub(super) fn bank_of(bank: PcrBank) -> Bank {
    match bank {
        PcrBank::Sha256 => Bank::Sha256,
        PcrBank::Sha384 => Bank::Sha384,
    }
}

/// Checks a quote over `digest`.
pub(super) fn check_quote(
    ak: &Public,
    quote: &Quote,
    digest: &[u8; 32],
    bank: PcrBank,
) -> Result<Verified, QuoteError> {
    let values = quote.pcrs.iter().map(|(number, value)| (*number, value.0.clone())).collect();
    let expected = Expected { extra_data: digest, bank: bank_of(bank), pcrs: &super::hello::QUOTED_PCRS };
    moor_tpm::quote::verify(ak, &quote.attest.0, &quote.signature.0, &expected, &values)
}

/// Checks a soft key's signature over `digest`.
pub(super) fn check_signature(spki: &[u8], signature: &[u8], digest: &[u8; 32]) -> Result<(), Problem> {
    let point = super::enroll::p256_point(spki)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(digest, signature)
        .map_err(|_| Problem::new(Code::ProofInvalid, "the signature does not verify over this connection's proof"))
}

/// Keeps what a quote said. The event log is a blob: the record stays small.
pub(super) async fn evidence(member: &Arc<Member>, quote: &Quote, verified: &Verified) -> Result<Evidence, Failure> {
    let event_log = match &quote.event_log {
        None => None,
        Some(log) if log.0.len() > MAX_EVENT_LOG => {
            return Err(Problem::new(
                Code::BadRequest,
                format!("the event log is larger than {} KiB", MAX_EVENT_LOG >> 10),
            )
            .into());
        }
        Some(log) => {
            let (member, log) = (member.clone(), log.0.clone());
            let added = tokio::task::spawn_blocking(move || content::add(&member.config.blobs(), &log)).await;
            let added = added.map_err(anyhow::Error::from)?;
            Some(added.map_err(|error| anyhow::anyhow!("keeping an event log: {error}"))?)
        }
    };
    Ok(Evidence {
        pcrs: quote.pcrs.iter().map(|(number, value)| (*number, format!("{value:?}"))).collect(),
        event_log,
        reset_count: verified.reset_count,
        firmware_version: verified.firmware_version,
    })
}

pub(super) async fn session(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<SessionReply>, Failure> {
    let peer = &connection.peer;
    let request: SessionRequest = recorded(&member, peer, "POST session", &Subject::default(), parse(&body)).await?;
    let reply = open(&member, peer, &request).await;
    Ok(Json(recorded(&member, peer, "POST session", &Subject::node(request.node), reply).await?))
}

async fn open(member: &Arc<Member>, peer: &Peer, request: &SessionRequest) -> Result<SessionReply, Failure> {
    let channel = Channel::of(peer)?;
    member.fresh(Bound::Nodes)?;
    let node = member.node(&member.view()?, request.node)?;
    let node =
        node.ok_or_else(|| Problem::new(Code::UnknownNode, "there is no node with this id: begin with hello"))?;
    member.nonces.redeem(node.id, &request.nonce.0)?;
    let digest = proof_digest(member, &channel, Purpose::Session, node.id, request.boot, &request.nonce.0);
    let evidence = prove(member, &node, request, &digest).await?;
    let closed = node.boots.iter().any(|record| record.boot == request.boot && record.closed);
    match request.stage {
        Stage::Boot if closed => return Err(Problem::new(Code::StageClosed, store::closed(&node.name)).into()),
        Stage::Boot => {
            member.propose_for_node(Command::Boot { id: node.id, boot: request.boot, evidence }).await?;
        }
        // Whoever is in the run stage is done with the boot stage, also when his word of that was lost.
        Stage::Run if !closed => {
            member.propose_for_node(Command::CloseStage { id: node.id, boot: request.boot }).await?;
        }
        Stage::Run => {}
    }
    let expires = (now() + token::lifetime(request.stage)).min(member.token_end());
    let claims = Claims {
        collective: member.site.collective,
        incarnation: member.site.incarnation,
        member: member.identity.id,
        node: node.id,
        boot: request.boot,
        stage: request.stage,
        epoch: node.epoch,
        expires,
        key: token::thumbprint(channel.client_key),
    };
    tracing::info!("{peer}: {} is in its {:?} stage", node.name, request.stage);
    // Those of now: a token by older ones would be refused in a moment.
    member.ring()?;
    let keys = super::token_keys(member)?;
    Ok(SessionReply { token: token::mint(keys.token()?, &claims)?, expires, stage: request.stage })
}

/// Checks the proof by the bound identity, and no other. The method is pinned: a node that is known by its TPM has no other way in.
async fn prove(
    member: &Arc<Member>,
    node: &NodeRecord,
    request: &SessionRequest,
    digest: &[u8; 32],
) -> Result<Option<Evidence>, Failure> {
    let mismatch = |bound: &Identity, offered: &Identity| {
        Failure(Problem::new(Code::IdentityMismatch, store::mismatch(&node.name, bound, offered)))
    };
    let Some(bound) = &node.identity else {
        return Err(Problem::new(Code::NotArmed, store::not_armed(&node.name)).into());
    };
    match (bound, &request.proof) {
        (Identity::Tpm { ak_public, bank, .. }, SessionProof::Tpm { quote }) => {
            let ak = Public::parse(&ak_public.0)
                .map_err(|error| anyhow::anyhow!("the attestation key of {} in the store: {error}", node.name))?;
            let verified = check_quote(&ak, quote, digest, *bank).map_err(|error| match error {
                // Signed by a key that is not the node's: the machine has another TPM.
                QuoteError::Signature => mismatch(bound, bound),
                other => Failure(Problem::new(Code::ProofInvalid, other.to_string())),
            })?;
            if request.stage == Stage::Boot && !verified.pcr15_zero {
                let detail = format!(
                    "PCR 15 of {} is closed already (after kexec, or a second try): a cold reboot opens it",
                    node.name
                );
                return Err(Problem::new(Code::StageClosed, detail).into());
            }
            Ok(Some(evidence(member, quote, &verified).await?))
        }
        (Identity::Soft { public_key, .. }, SessionProof::Soft { signature }) => {
            check_signature(&public_key.0, &signature.0, digest).map_err(|_| mismatch(bound, bound))?;
            Ok(None)
        }
        (Identity::Tpm { .. }, SessionProof::Soft { .. }) => {
            Err(mismatch(bound, &Identity::Soft { public_key: moor_api::node::Base64::default(), unproven: false }))
        }
        (Identity::Soft { .. }, SessionProof::Tpm { .. }) => {
            let offered = Identity::Tpm {
                ek_public: moor_api::node::Base64::default(),
                ek_certificate: None,
                ak_public: moor_api::node::Base64::default(),
                bank: PcrBank::Sha256,
            };
            Err(mismatch(bound, &offered))
        }
    }
}
