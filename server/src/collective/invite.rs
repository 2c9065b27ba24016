//! Invitations. One is a text that the administrator carries to the new member: where the collective is, what its certificates end in,
//! and a secret. The secret itself is never sent: each side shows that it has it, in a proof over the TLS connection's exporter, so that
//! what somebody records of the exchange, or relays over a connection of his own, is of no use.

use anyhow::{Context as _, bail, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::proof::EXPORTER_LENGTH;
use moor_api::trust::SiteBundle;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

/// What an invitation begins with, so that people and scanners for secrets know one.
const PREFIX: &str = "moori_";
/// Longest text of an invitation.
const MAX_TEXT: usize = 64 << 10;
/// Bytes of the secret.
pub const SECRET: usize = 32;

/// The content of an invitation. No `Debug`: it holds the secret.
#[derive(Serialize, Deserialize)]
pub struct Invitation {
    /// Its id.
    pub id: Uuid,
    /// Name of the member to be.
    pub name: String,
    /// The collective and its authority's certificates.
    pub bundle: SiteBundle,
    secret: String,
}

impl Drop for Invitation {
    fn drop(&mut self) {
        use zeroize::Zeroize as _;
        self.secret.zeroize();
    }
}

impl Invitation {
    /// A new one, and its secret for the store.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(name: String, bundle: SiteBundle) -> anyhow::Result<(Self, Zeroizing<Vec<u8>>)> {
        let mut secret = Zeroizing::new(vec![0; SECRET]);
        aws_lc_rs::rand::fill(&mut secret).context("making an invitation")?;
        Ok((Self { id: Uuid::new_v4(), name, bundle, secret: hex::encode(&*secret) }, secret))
    }

    /// As text.
    ///
    /// # Errors
    /// Never, for one that was made.
    pub fn to_text(&self) -> anyhow::Result<Zeroizing<String>> {
        let json = Zeroizing::new(serde_json::to_vec(self)?);
        Ok(Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&*json))))
    }

    /// From text; white space around it and line ends in it do not matter.
    ///
    /// # Errors
    /// It is none, or damaged.
    pub fn from_text(text: &str) -> anyhow::Result<Self> {
        ensure!(text.len() <= MAX_TEXT, "this is no invitation: it is longer than {MAX_TEXT} characters");
        let text: Zeroizing<String> = Zeroizing::new(text.split_ascii_whitespace().collect());
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            bail!(
                "this is no invitation: it begins with '{PREFIX}' (`moor collective invite NAME` on a member makes one)"
            );
        };
        let damaged = "the invitation is damaged: copy all of it";
        let json = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).context(damaged)?);
        serde_json::from_slice(&json).context(damaged)
    }

    /// The secret.
    ///
    /// # Errors
    /// The invitation is damaged.
    pub fn secret(&self) -> anyhow::Result<Zeroizing<Vec<u8>>> {
        let secret = Zeroizing::new(hex::decode(&self.secret).context("the invitation is damaged: copy all of it")?);
        ensure!(secret.len() == SECRET, "the invitation is damaged: copy all of it");
        Ok(secret)
    }
}

/// Who proves that he has the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Who joins.
    Guest,
    /// Who lets him in.
    Host,
}

/// What a proof is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The collective.
    pub collective: CollectiveId,
    /// The invitation.
    pub invite: Uuid,
    /// The member that joins.
    pub member: MemberId,
    /// Its public key, DER `SubjectPublicKeyInfo`.
    pub key: &'a [u8],
    /// Public half of the key that the collective's keys are encrypted to for it.
    pub unwrap: &'a [u8],
    /// Exporter value of the connection.
    pub exporter: &'a [u8; EXPORTER_LENGTH],
}

impl Subject<'_> {
    fn message(&self, side: Side) -> Vec<u8> {
        let label: &[u8] = match side {
            Side::Guest => b"moor/v1 join guest\0",
            Side::Host => b"moor/v1 join host\0",
        };
        let (key, unwrap) = (digest(&SHA256, self.key), digest(&SHA256, self.unwrap));
        // All parts have a fixed length.
        let ids: [&[u8]; 3] = [self.collective.as_bytes(), self.invite.as_bytes(), self.member.as_bytes()];
        [label, &ids.concat(), self.exporter, key.as_ref(), unwrap.as_ref()].concat()
    }

    /// The proof of one side.
    #[must_use]
    pub fn prove(&self, secret: &[u8], side: Side) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        hmac::sign(&key, &self.message(side)).as_ref().to_vec()
    }

    /// Whether it is the proof of that side, in constant time.
    #[must_use]
    pub fn verify(&self, secret: &[u8], side: Side, proof: &[u8]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        hmac::verify(&key, &self.message(side), proof).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::trust::Incarnation;

    fn bundle() -> SiteBundle {
        SiteBundle {
            version: 1,
            collective: CollectiveId::random(),
            name: "site".into(),
            roots: vec!["PEM".into()],
            members: vec!["https://10.0.0.1".into()],
            ssh_host_authorities: Vec::new(),
            built: 1,
            incarnation: Incarnation::FIRST,
        }
    }

    #[test]
    fn an_invitation_reads_back_and_a_damaged_one_is_refused() {
        let (invitation, secret) = Invitation::new("m2".into(), bundle()).unwrap();
        let text = invitation.to_text().unwrap();
        let folded: String =
            text.as_bytes().chunks(60).flat_map(|line| [line, b"\n"].concat()).map(char::from).collect();
        let back = Invitation::from_text(&folded).unwrap();
        assert_eq!((back.id, &*back.name, &back.bundle), (invitation.id, "m2", &invitation.bundle));
        assert_eq!(*back.secret().unwrap(), *secret);
        for bad in [&text[..text.len() - 3], &text[1..], "", "moori_", "moora_00"] {
            let error = format!("{:#}", Invitation::from_text(bad).err().expect(bad));
            assert!(error.contains("invitation"), "{error}");
            assert!(!error.contains(&hex::encode(&*secret)));
        }
    }

    #[test]
    fn a_proof_is_good_for_its_side_member_and_connection_only() {
        let (invitation, secret) = Invitation::new("m2".into(), bundle()).unwrap();
        let exporter = [7; EXPORTER_LENGTH];
        let subject = Subject {
            collective: invitation.bundle.collective,
            invite: invitation.id,
            member: MemberId::random(),
            key: b"a key",
            unwrap: b"another one",
            exporter: &exporter,
        };
        let proof = subject.prove(&secret, Side::Guest);
        assert!(subject.verify(&secret, Side::Guest, &proof));
        assert!(!subject.verify(&secret, Side::Host, &proof));
        assert!(!subject.verify(&[0; SECRET], Side::Guest, &proof));
        assert!(!Subject { exporter: &[8; EXPORTER_LENGTH], ..subject }.verify(&secret, Side::Guest, &proof));
        assert!(!Subject { member: MemberId::random(), ..subject }.verify(&secret, Side::Guest, &proof));
        assert!(!Subject { key: b"another", ..subject }.verify(&secret, Side::Guest, &proof));
        assert!(!Subject { unwrap: b"another", ..subject }.verify(&secret, Side::Guest, &proof));
        assert!(!Subject { invite: Uuid::new_v4(), ..subject }.verify(&secret, Side::Guest, &proof));
        assert!(!subject.verify(&secret, Side::Guest, &proof[1..]));
    }
}
