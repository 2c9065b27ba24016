//! Who this node is, and how it proves it (DESIGN.md §4): by a TPM 2.0 where there is one, else by a soft key.
//!
//! [`enroll`] binds the identity to the node at a member, [`session`] turns a proof into a token. Both tie what they sign to the TLS
//! connection, the member, the boot and the session key ([`moor_api::proof::Proof`]).

mod error;
mod quiet;
pub mod soft;
pub mod tpm;

pub use error::IdentityError;
pub use quiet::silence_libtss2;

use moor_api::client::node::NodeConnection;
use moor_api::client::session::SessionKey;
use moor_api::ids::{BootId, CollectiveId};
use moor_api::node::{
    Base64, EnrollComplete, EnrollMethod, EnrollReply, EnrollRequest, Enrolled, KnownNode, NextStep, SessionProof,
    SessionReply, SessionRequest, Stage,
};
use moor_api::proof::{Proof, Purpose};
use soft::SoftKey;
use std::path::Path;
use std::time::Duration;
use tpm::{Challenge, QuoteRequest, TpmIdentity};
use zeroize::Zeroize as _;

/// What proves this node. No `Debug`: a soft key is a secret.
pub enum Identity {
    /// A key in the TPM that never leaves it.
    Tpm(TpmIdentity),
    /// A key in a file.
    Soft(SoftKey),
}

impl Identity {
    /// The TPM where there is one, else the soft key at `soft_key` (made if absent, 0600). Where the firmware announces a TPM 2.0, its
    /// driver is waited for up to `wait`. Blocking.
    ///
    /// # Errors
    /// A TPM that is announced and does not appear, or does not work: a machine with a TPM never falls back to a soft key. The soft key
    /// cannot be read or made.
    pub fn open(soft_key: &Path, wait: Duration) -> Result<Self, IdentityError> {
        match tpm::device::wait_for(Path::new("/"), wait)? {
            Some(device) => Ok(Self::Tpm(TpmIdentity::open_device(&device)?)),
            None => Ok(Self::Soft(SoftKey::open(soft_key)?)),
        }
    }

    /// The word for `hello`: `tpm2` or `soft-key`.
    #[must_use]
    pub fn capabilities(&self) -> Vec<String> {
        vec![if self.is_tpm() { "tpm2" } else { "soft-key" }.to_owned()]
    }

    /// Whether it is a TPM.
    #[must_use]
    pub fn is_tpm(&self) -> bool {
        matches!(self, Self::Tpm(_))
    }

    /// Extends PCR 15 in every active bank and reads back that it changed as it must (no-op for a soft key). Blocking.
    ///
    /// # Errors
    /// The TPM failed: the boot must not go on.
    pub fn close_boot_stage(&mut self) -> Result<(), IdentityError> {
        match self {
            Self::Tpm(tpm) => tpm.close_boot_stage(),
            Self::Soft(_) => Ok(()),
        }
    }

    /// Whether PCR 15 is closed already in any bank: after kexec, or at a second try. Only a cold reboot opens it. `false` for a soft
    /// key. Blocking.
    ///
    /// # Errors
    /// The TPM failed.
    pub fn is_closed(&mut self) -> Result<bool, IdentityError> {
        match self {
            Self::Tpm(tpm) => tpm.is_closed(),
            Self::Soft(_) => Ok(false),
        }
    }
}

/// Enrols this node on this connection: binds the identity to `known`. The reply carries the nonce for [`session`].
///
/// # Errors
/// The member refused, the connection broke, or the TPM failed.
pub async fn enroll(
    connection: &mut NodeConnection,
    identity: &mut Identity,
    collective: CollectiveId,
    known: &KnownNode,
    boot: BootId,
    session: &SessionKey,
) -> Result<Enrolled, IdentityError> {
    let proof = proof(Purpose::Enroll, connection, collective, known, &known.nonce, boot, session);
    let request = |method| EnrollRequest { node: known.id, boot, nonce: known.nonce.clone(), method };
    match identity {
        Identity::Soft(key) => {
            let method =
                EnrollMethod::Soft { public_key: key.public_key()?.into(), signature: key.sign(&proof)?.into() };
            match connection.enroll(&request(method)).await? {
                EnrollReply::Enrolled(enrolled) => Ok(enrolled),
                EnrollReply::Challenge { .. } => Err(IdentityError::Answer("a TPM's challenge for a soft key".into())),
            }
        }
        Identity::Tpm(tpm) => {
            let pinned = known.quote.bank;
            let keys = tpm.blocking(move |tpm| tpm.keys(pinned)).await?;
            let bank = keys.bank;
            let method = EnrollMethod::Tpm {
                ek_public: keys.ek_public.into(),
                ek_certificate: keys.ek_certificate.map(Base64),
                ak_public: keys.ak_public.into(),
                bank,
            };
            let (enrollment, challenge) = match connection.enroll(&request(method)).await? {
                EnrollReply::Enrolled(enrolled) => return Ok(enrolled),
                EnrollReply::Challenge { enrollment, credential, secret } => {
                    (enrollment, Challenge { credential: credential.0, secret: secret.0 })
                }
            };
            let request =
                QuoteRequest { digest: proof, bank: Some(bank), pcrs: known.quote.pcrs.clone(), event_log: true };
            let (mut secret, quote) =
                tpm.blocking(move |tpm| Ok((tpm.activate(&challenge)?, tpm.quote(&request)?))).await?;
            let mut complete = EnrollComplete { enrollment, secret: Base64(std::mem::take(&mut *secret)), quote };
            let answer = connection.enroll_complete(&complete).await;
            complete.secret.0.zeroize();
            Ok(answer?)
        }
    }
}

/// Proves this node on this connection with `nonce` (from hello, [`Enrolled`] or the last reply) and returns the token.
///
/// # Errors
/// As [`enroll`]; the node is enrolled by another method than this machine has.
#[allow(clippy::too_many_arguments)] // a proof has that many inputs; agreed with the state machine that calls it
pub async fn session(
    connection: &mut NodeConnection,
    identity: &mut Identity,
    collective: CollectiveId,
    known: &KnownNode,
    nonce: &Base64,
    boot: BootId,
    stage: Stage,
    session: &SessionKey,
) -> Result<SessionReply, IdentityError> {
    match (&identity, known.next) {
        (Identity::Soft(_), NextStep::SessionTpm) => return Err(IdentityError::NoTpm(known.name.to_string())),
        (Identity::Tpm(_), NextStep::SessionSoft) => return Err(IdentityError::NoSoftKey(known.name.to_string())),
        _ => {}
    }
    let digest = proof(Purpose::Session, connection, collective, known, nonce, boot, session);
    let proof = match identity {
        Identity::Soft(key) => SessionProof::Soft { signature: key.sign(&digest)?.into() },
        Identity::Tpm(tpm) => {
            // The log does not change after the boot stage, and the member has it from there.
            let event_log = stage == Stage::Boot;
            let request = QuoteRequest { digest, bank: known.quote.bank, pcrs: known.quote.pcrs.clone(), event_log };
            SessionProof::Tpm { quote: tpm.blocking(move |tpm| tpm.quote(&request)).await? }
        }
    };
    let request = SessionRequest { node: known.id, boot, nonce: nonce.clone(), stage, proof };
    Ok(connection.session(&request).await?)
}

/// The digest of the proof on this connection.
fn proof(
    purpose: Purpose,
    connection: &NodeConnection,
    collective: CollectiveId,
    known: &KnownNode,
    nonce: &Base64,
    boot: BootId,
    session: &SessionKey,
) -> [u8; 32] {
    Proof {
        purpose,
        collective,
        member: connection.member(),
        node: known.id,
        boot,
        nonce: &nonce.0,
        session_public_key: &session.public_key(),
        exporter: connection.exporter(),
    }
    .digest()
}
