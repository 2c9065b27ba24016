//! Sessions whose secrets do not cross the bus: salted by a key of the null hierarchy, with encrypted parameters, and with responses
//! authenticated (`audit` makes commands without authorisation take part).
//!
//! The salt key is a P-256 storage key that the TPM draws anew at each reset, as the kernel does for its own sessions. The endorsement
//! key would do as well, but making one takes an RSA-only TPM up to half a minute, and it is wanted at enrolment only.

use super::super::IdentityError;
use super::super::error::{Doing as _, wrong};
use super::keys::Endorsement;
use tss_esapi::Context;
use tss_esapi::attributes::{ObjectAttributesBuilder, SessionAttributesBuilder};
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Digest, DigestList, EccPoint, EccScheme, KeyDerivationFunctionScheme, Nonce, Public, PublicBuilder,
    PublicEccParametersBuilder, SymmetricDefinition, SymmetricDefinitionObject,
};

const DOING: &str = "starting a session";

/// Runs `work` with a session set for its commands, and ends the session whatever comes of it.
pub(super) fn salted<T>(
    context: &mut Context,
    work: impl FnOnce(&mut Context, AuthSession) -> Result<T, IdentityError>,
) -> Result<T, IdentityError> {
    let salt = salt_key(context)?;
    let started = start(context, Some(salt), SessionType::Hmac, HashingAlgorithm::Sha256);
    let flushed = context.flush_context(salt.into()).doing(DOING);
    let session = started?;
    let result = flushed.and_then(|()| context.execute_with_session(Some(session), |context| work(context, session)));
    let ended = context.flush_context(SessionHandle::from(session).into()).doing("ending a session");
    let value = result?;
    ended?;
    Ok(value)
}

fn start(
    context: &mut Context,
    salt: Option<KeyHandle>,
    kind: SessionType,
    hash: HashingAlgorithm,
) -> Result<AuthSession, IdentityError> {
    let session = context
        .execute_without_session(|context| {
            context.start_auth_session(salt, None, None, kind, SymmetricDefinition::AES_128_CFB, hash)
        })
        .doing(DOING)?
        .ok_or_else(|| wrong(DOING, "it gave none"))?;
    let mut attributes = SessionAttributesBuilder::new().with_continue_session(true);
    if kind == SessionType::Hmac {
        // The library leaves out what a command has no parameter for.
        attributes = attributes.with_decrypt(true).with_encrypt(true).with_audit(true);
    }
    let (attributes, mask) = attributes.build();
    context.tr_sess_set_attributes(session, attributes, mask).doing(DOING)?;
    Ok(session)
}

/// A primary key of the null hierarchy: restricted decryption on P-256.
fn salt_key(context: &mut Context) -> Result<KeyHandle, IdentityError> {
    const DOING: &str = "making a key for sessions";
    let public = salt_template().doing(DOING)?;
    // The null hierarchy has an empty password, and nothing of this command is secret.
    let made = context.execute_with_session(Some(AuthSession::Password), |context| {
        context.create_primary(Hierarchy::Null, public, None, None, None, None)
    });
    Ok(made.doing(DOING)?.key_handle)
}

fn salt_template() -> tss_esapi::Result<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_decrypt(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(
            PublicEccParametersBuilder::new()
                .with_symmetric(SymmetricDefinitionObject::AES_128_CFB)
                .with_ecc_scheme(EccScheme::Null)
                .with_curve(EccCurve::NistP256)
                .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
                .with_is_decryption_key(true)
                .with_restricted(true)
                .build()?,
        )
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// Runs a command whose second handle is the endorsement key: the key is used by policy, the first handle by the session.
pub(super) fn with_endorsement_policy<T>(
    context: &mut Context,
    session: AuthSession,
    endorsement: &Endorsement,
    work: impl FnOnce(&mut Context) -> Result<T, IdentityError>,
) -> Result<T, IdentityError> {
    let policy = start(context, None, SessionType::Policy, endorsement.kind.hash())?;
    let result = satisfy(context, session, policy, endorsement)
        .and_then(|()| context.execute_with_sessions((Some(session), Some(policy), None), work));
    let ended = context.flush_context(SessionHandle::from(policy).into()).doing("ending a session");
    let value = result?;
    ended?;
    Ok(value)
}

/// Shows that the endorsement hierarchy's password is known (it is empty), which is what the key's policy asks for.
fn satisfy(
    context: &mut Context,
    session: AuthSession,
    policy: AuthSession,
    endorsement: &Endorsement,
) -> Result<(), IdentityError> {
    const DOING: &str = "showing the endorsement key's policy";
    let policy = PolicySession::try_from(policy).doing(DOING)?;
    context
        .execute_with_session(Some(session), |context| {
            context.policy_secret(
                policy,
                AuthHandle::Endorsement,
                Nonce::default(),
                Digest::default(),
                Nonce::default(),
                None,
            )
        })
        .doing(DOING)?;
    if let Some(branches) = endorsement.kind.policy_branches() {
        let mut list = DigestList::new();
        for branch in branches {
            list.add(Digest::try_from(branch.as_slice()).doing(DOING)?).doing(DOING)?;
        }
        context.execute_without_session(|context| context.policy_or(policy, list)).doing(DOING)?;
    }
    Ok(())
}
