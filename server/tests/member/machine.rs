//! A machine that boots: the node's side of the protocol, with a soft key.

use crate::support::{Member, TIMEOUT};
use anyhow::Context as _;
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use moor_api::client::ClientError;
use moor_api::client::node::NodeConnection;
use moor_api::client::session::SessionKey;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::{BootId, MemberId, NodeId};
use moor_api::node::{
    EnrollMethod, EnrollReply, EnrollRequest, Hello, HelloReply, KnownNode, NextStep, SessionProof, SessionReply,
    SessionRequest, Stage, StatusReport,
};
use moor_api::proof::{Proof, Purpose};
use moor_api::trust::SiteBundle;
use moord::node::token::{Claims, thumbprint};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// A machine with a soft key.
pub(crate) struct Machine {
    pub(crate) uuid: Uuid,
    pub(crate) key: EcdsaKeyPair,
    pub(crate) boot: BootId,
    pub(crate) session: SessionKey,
    pub(crate) bundle: SiteBundle,
    url: String,
}

pub(crate) fn soft_key() -> anyhow::Result<EcdsaKeyPair> {
    EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).context("making a key")
}

impl Machine {
    /// What it says of its boot.
    pub(crate) fn report(&self, sequence: u64, state: &str) -> StatusReport {
        StatusReport {
            boot: self.boot,
            sequence,
            state: state.into(),
            detail: String::new(),
            uptime_ms: 1234,
            figures: BTreeMap::new(),
        }
    }

    /// What a good token for its boot says.
    pub(crate) fn claims(&self, member: MemberId, node: NodeId, epoch: u64) -> Claims {
        Claims {
            collective: self.bundle.collective,
            incarnation: self.bundle.incarnation,
            member,
            node,
            boot: self.boot,
            stage: Stage::Boot,
            epoch,
            expires: moord::state::now() + 60,
            key: thumbprint(&self.session.public_key()),
        }
    }

    pub(crate) async fn new(member: &Member) -> anyhow::Result<Self> {
        let bundle = member.site().await?.bundle;
        Ok(Self {
            uuid: Uuid::new_v4(),
            key: soft_key()?,
            boot: BootId::random(),
            session: SessionKey::generate()?,
            bundle,
            url: member.url(),
        })
    }

    /// From now on it asks this member.
    pub(crate) fn asks(&mut self, member: &Member) {
        self.url = member.url();
    }

    /// Power cycle: another boot, another session key.
    pub(crate) fn reboot(&mut self) -> anyhow::Result<()> {
        self.boot = BootId::random();
        self.session = SessionKey::generate()?;
        Ok(())
    }

    pub(crate) async fn connect_with(&self, session: &SessionKey) -> Result<NodeConnection, ClientError> {
        let config = Arc::new(member_tls_config(&self.bundle, Some(session))?);
        let mut connection = NodeConnection::connect(&self.url, self.bundle.collective, config, TIMEOUT).await?;
        connection.set_request_id(&self.boot.to_string());
        Ok(connection)
    }

    pub(crate) async fn connect(&self) -> Result<NodeConnection, ClientError> {
        self.connect_with(&self.session).await
    }

    pub(crate) fn hello(&self) -> Hello {
        Hello {
            agent_version: "0.1.0".into(),
            capabilities: vec!["soft-key".into()],
            uuid: Some(self.uuid),
            serial: None,
            macs: Vec::new(),
            arch: "x86_64".into(),
            boot: self.boot,
        }
    }

    /// Who it is; the member must know it.
    pub(crate) async fn known(&self, connection: &mut NodeConnection) -> anyhow::Result<KnownNode> {
        let reply: HelloReply = connection.hello(&self.hello()).await?;
        reply.node.with_context(|| format!("refused: {:?}", reply.refusal))
    }

    pub(crate) fn sign(
        &self,
        connection: &NodeConnection,
        purpose: Purpose,
        node: NodeId,
        nonce: &[u8],
    ) -> anyhow::Result<Vec<u8>> {
        let digest = Proof {
            purpose,
            collective: self.bundle.collective,
            member: connection.member(),
            node,
            boot: self.boot,
            nonce,
            session_public_key: &self.session.public_key(),
            exporter: connection.exporter(),
        }
        .digest();
        Ok(self.key.sign(&SystemRandom::new(), &digest).context("signing")?.as_ref().to_vec())
    }

    pub(crate) fn enroll_request(
        &self,
        connection: &NodeConnection,
        known: &KnownNode,
    ) -> anyhow::Result<EnrollRequest> {
        let public: PublicKeyX509Der<'_> = self.key.public_key().as_der().context("encoding a key")?;
        let signature = self.sign(connection, Purpose::Enroll, known.id, &known.nonce.0)?.into();
        let method = EnrollMethod::Soft { public_key: public.as_ref().to_vec().into(), signature };
        Ok(EnrollRequest { node: known.id, boot: self.boot, nonce: known.nonce.clone(), method })
    }

    pub(crate) fn session_request(
        &self,
        connection: &NodeConnection,
        node: NodeId,
        nonce: &[u8],
        stage: Stage,
    ) -> anyhow::Result<SessionRequest> {
        let signature = self.sign(connection, Purpose::Session, node, nonce)?.into();
        Ok(SessionRequest {
            node,
            boot: self.boot,
            nonce: nonce.to_vec().into(),
            stage,
            proof: SessionProof::Soft { signature },
        })
    }

    /// hello, enrolment where the member asks for it, session; the token is in use.
    pub(crate) async fn log_in(&self, connection: &mut NodeConnection, stage: Stage) -> anyhow::Result<SessionReply> {
        let known = self.known(connection).await?;
        let nonce = if known.next == NextStep::Enroll {
            match connection.enroll(&self.enroll_request(connection, &known)?).await? {
                EnrollReply::Enrolled(enrolled) => enrolled.nonce,
                EnrollReply::Challenge { .. } => anyhow::bail!("a challenge for a soft key"),
            }
        } else {
            known.nonce
        };
        let reply = connection.session(&self.session_request(connection, known.id, &nonce.0, stage)?).await?;
        connection.set_token(&reply.token)?;
        Ok(reply)
    }
}
