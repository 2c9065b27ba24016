//! `moord join`: a new member's side of an invitation. What it gets (the authorities) comes over the connection that both sides
//! have proven, and lies in 0600 files before anything says that there is a member. Its own keys are made here, and
//! stay here; the collective's keys are in the store, encrypted to one of them.

use super::identity::Identity;
use super::invite::{Invitation, Side, Subject};
use super::voucher::{Acquaintance, Voucher};
use crate::authority::{self, KeyFiles};
use crate::config::Config;
use crate::secrets::UnwrapKey;
use crate::store::Level;
use crate::store::records::SiteRecord;
use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use moor_api::client::ClientError;
use moor_api::client::member::MemberConnection;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::MemberId;
use moor_api::node::Base64;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// The path of the call.
pub(super) const PATH: &str = "/member/v1/join";
/// Longest answer.
const MAX_ANSWER: usize = 1 << 20;
/// A member answers within this time.
const ANSWER: Duration = Duration::from_secs(30);

/// `POST join`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JoinRequest {
    pub(super) invite: Uuid,
    pub(super) member: MemberId,
    /// The new member's public key, DER `SubjectPublicKeyInfo`.
    pub(super) key: Base64,
    /// Public half of the key that the collective's keys are encrypted to for it.
    pub(super) unwrap: Base64,
    pub(super) urls: Vec<String>,
    pub(super) proof: Base64,
    /// The newest feature level that the guest's release knows.
    #[serde(default)]
    pub(super) level: Level,
}

/// Its answer. No `Debug`: it holds keys.
#[derive(Serialize, Deserialize)]
pub(super) struct JoinReply {
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) site: SiteRecord,
    /// Files of the key directory by name.
    pub(super) keys: KeyFiles,
    /// All members, as the one that answers knows them.
    pub(super) members: Vec<Acquaintance>,
    /// Those that were removed.
    #[serde(default)]
    pub(super) removed: Vec<MemberId>,
    /// What makes the new one known to members that lag behind.
    pub(super) introduction: Vec<Voucher>,
    pub(super) proof: Base64,
}

/// Joins the collective of the invitation; the member's state directory must be without one, unless that is to be set aside.
///
/// # Errors
/// The directory holds a member; no member of the collective is reached; the invitation is refused.
pub async fn join(
    config: &Config,
    invitation: &Invitation,
    addresses: Vec<String>,
    set_aside: bool,
) -> anyhow::Result<Identity> {
    config
        .make_member(set_aside, async |keys| {
            let own = (authority::create_member_key(keys)?.into(), UnwrapKey::create(keys)?);
            settle(config, keys, ask_any(config, invitation, &own).await?, addresses)
        })
        .await
}

/// Public halves of the keys that the new member has made.
type OwnKeys = (Base64, Base64);

async fn ask_any(config: &Config, invitation: &Invitation, own: &OwnKeys) -> anyhow::Result<(MemberId, JoinReply)> {
    let bundle = &invitation.bundle;
    let tls = Arc::new(member_tls_config(bundle, None)?);
    let mut last = None;
    for url in &bundle.members {
        let connected = MemberConnection::connect(url, bundle.collective, tls.clone(), ANSWER).await;
        match connected {
            Ok(connection) => {
                return ask(connection, config, invitation, own).await.with_context(|| format!("asking {url}"));
            }
            Err(error) => {
                tracing::warn!("{error}");
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) => Err(error).context(
            "no member of the invitation's collective is reached (after its authority was rotated or it was recovered, another invitation is needed: `moor \
             collective invite`)",
        ),
        None => bail!("the invitation names no member: make another with `moor collective invite`"),
    }
}

async fn ask(
    mut connection: MemberConnection,
    config: &Config,
    invitation: &Invitation,
    (key, unwrap): &OwnKeys,
) -> anyhow::Result<(MemberId, JoinReply)> {
    let (secret, member) = (invitation.secret()?, MemberId::random());
    let exporter = *connection.exporter();
    let subject = Subject {
        collective: invitation.bundle.collective,
        invite: invitation.id,
        member,
        key: &key.0,
        unwrap: &unwrap.0,
        exporter: &exporter,
    };
    let request = JoinRequest {
        invite: invitation.id,
        member,
        key: key.clone(),
        unwrap: unwrap.clone(),
        urls: config.urls.clone(),
        proof: subject.prove(&secret, Side::Guest).into(),
        level: config.level(),
    };
    let body = Bytes::from(serde_json::to_vec(&request)?);
    let answer = match connection.post(PATH, body, MAX_ANSWER).await {
        Ok(answer) => answer,
        Err(ClientError::Problem(problem)) => bail!("{problem}"),
        Err(error) => return Err(error.into()),
    };
    let reply: JoinReply = serde_json::from_slice(&answer).context("the answer is not understood")?;
    ensure!(
        subject.verify(&secret, Side::Host, &reply.proof.0),
        "the member does not show that it knows the invitation: nothing was taken from it"
    );
    let host = Acquaintance { id: connection.member(), key: connection.key().to_vec().into() };
    ensure!(reply.members.contains(&host), "the member that answers is none of those that it names");
    ensure!(reply.site.collective == invitation.bundle.collective, "the answer is of another collective");
    Ok((member, reply))
}

fn settle(
    config: &Config,
    keys: &Path,
    (id, reply): (MemberId, JoinReply),
    addresses: Vec<String>,
) -> anyhow::Result<Identity> {
    authority::import(keys, &reply.keys)?;
    config.make_store().context("making the store")?;
    let JoinReply { number, name, site, members: met, removed, introduction, .. } = reply;
    let identity = Identity { number, id, name, addresses, site, met, removed, introduction };
    // It comes last: where it exists, everything else does.
    identity.write(&config.identity())?;
    Ok(identity)
}
