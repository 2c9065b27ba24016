//! Tokens of nodes: who, which boot, which stage, until when, and on which key (RFC 8705: the thumbprint of the session key, which the
//! connection's client certificate proves). Signed by the token key; any member can check one.
//!
//! `moorn1.` BASE64URL(claims in JSON) `.` BASE64URL(Ed25519 over "moor/v1 token\0" ‖ claims). Opaque to nodes.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use moor_api::ids::{BootId, CollectiveId, MemberId, NodeId, Sha256Digest};
use moor_api::node::Stage;
use moor_api::trust::Incarnation;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// Says what it is and in which version.
const PREFIX: &str = "moorn1.";
/// Keeps signatures of tokens apart from all others of this key.
const LABEL: &[u8] = b"moor/v1 token\0";
/// Longest token that is looked at, in bytes.
const MAX_LENGTH: usize = 2048;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The collective.
    pub collective: CollectiveId,
    /// How often it began anew.
    #[serde(default, skip_serializing_if = "Incarnation::is_first")]
    pub incarnation: Incarnation,
    /// The member that issued it.
    pub member: MemberId,
    /// The node.
    pub node: NodeId,
    /// Its boot.
    pub boot: BootId,
    /// The stage of that boot.
    pub stage: Stage,
    /// The node's epoch when it was issued.
    pub epoch: u64,
    /// Unix seconds after which it is refused.
    pub expires: u64,
    /// SHA-256 of the session key's `SubjectPublicKeyInfo`.
    pub key: Sha256Digest,
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not a token at all, or not signed by this collective.
    #[error("the token is not one of this collective, or its keys were rotated since: open a new session")]
    Foreign,
    /// It says that it is one of this collective, and is not signed by the key of now: that was rotated since, or somebody made it up.
    #[error("the token is not one of this collective, or its keys were rotated since: open a new session")]
    Void(NodeId),
    /// By a member of another incarnation of the collective.
    #[error(
        "the token is of another incarnation of the collective, which was recovered or restored: open a new session"
    )]
    OtherIncarnation(NodeId),
    /// Too old.
    #[error("the token expired: open a new session")]
    Expired(NodeId),
    /// On a connection with another key.
    #[error("the token belongs to another session key than the one that this connection shows")]
    OtherKey(NodeId),
}

impl TokenError {
    /// The node it was issued to; of a void one, as it says itself.
    #[must_use]
    pub const fn node(self) -> Option<NodeId> {
        match self {
            Self::Foreign => None,
            Self::Void(node) | Self::OtherIncarnation(node) | Self::Expired(node) | Self::OtherKey(node) => Some(node),
        }
    }
}

/// Seconds that a token of this stage is good.
#[must_use]
pub const fn lifetime(stage: Stage) -> u64 {
    match stage {
        Stage::Boot => 3600,
        Stage::Run => 24 * 3600,
    }
}

/// The thumbprint of a session key.
#[must_use]
pub fn thumbprint(public_key: &[u8]) -> Sha256Digest {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, public_key).as_ref());
    Sha256Digest(out)
}

fn signed(claims: &[u8]) -> Vec<u8> {
    [LABEL, claims].concat()
}

/// Makes a token.
///
/// # Errors
/// Never, for claims that serialise.
pub fn mint(key: &Ed25519KeyPair, claims: &Claims) -> anyhow::Result<String> {
    let claims = serde_json::to_vec(claims)?;
    let signature = key.sign(&signed(&claims));
    Ok(format!("{PREFIX}{}.{}", BASE64.encode(&claims), BASE64.encode(signature)))
}

/// What a token says, if its signature is good.
fn signed_claims(public: &[u8], collective: CollectiveId, token: &str) -> Result<Claims, TokenError> {
    let foreign = TokenError::Foreign;
    if token.len() > MAX_LENGTH {
        return Err(foreign);
    }
    let (claims, signature) = token.strip_prefix(PREFIX).and_then(|rest| rest.split_once('.')).ok_or(foreign)?;
    let claims = BASE64.decode(claims).map_err(|_| foreign)?;
    let signature = BASE64.decode(signature).map_err(|_| foreign)?;
    let is_signed = UnparsedPublicKey::new(&ED25519, public).verify(&signed(&claims), &signature).is_ok();
    let claims: Claims = serde_json::from_slice(&claims).map_err(|_| foreign)?;
    if is_signed {
        Ok(claims)
    } else if claims.collective == collective {
        Err(TokenError::Void(claims.node))
    } else {
        Err(foreign)
    }
}

/// The token that came last over a connection, whose signature was good: it is not checked again with each call. All else about it is.
#[derive(Debug, Default)]
pub struct Known(Mutex<Option<Checked>>);

/// A token, the key that it was checked by, and what it says.
#[derive(Debug)]
struct Checked {
    token: String,
    public: Vec<u8>,
    claims: Claims,
}

impl Known {
    /// Whether there is one.
    #[must_use]
    pub fn is_some(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Reads a token that came over this connection, which has proven this client key.
    ///
    /// # Errors
    /// It is not good there and then.
    pub fn read(
        &self,
        public: &[u8],
        (collective, incarnation): (CollectiveId, Incarnation),
        token: &str,
        client_key: Option<&[u8]>,
        now: u64,
    ) -> Result<Claims, TokenError> {
        // What is there is replaced in one step.
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The key is rotated while connections stand.
        let known = last.as_ref().filter(|known| known.token == token && known.public == public);
        let known = known.map(|known| known.claims.clone());
        let claims = if let Some(claims) = known {
            claims
        } else {
            let claims = signed_claims(public, collective, token)?;
            *last = Some(Checked { token: token.to_owned(), public: public.to_vec(), claims: claims.clone() });
            claims
        };
        if claims.collective != collective {
            return Err(TokenError::Foreign);
        }
        if claims.incarnation != incarnation {
            return Err(TokenError::OtherIncarnation(claims.node));
        }
        if now >= claims.expires {
            return Err(TokenError::Expired(claims.node));
        }
        if client_key.map(thumbprint) != Some(claims.key) {
            return Err(TokenError::OtherKey(claims.node));
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::KeyPair as _;

    const KEY: &[u8] = b"a session key";

    fn read(
        public: &[u8],
        collective: CollectiveId,
        token: &str,
        client_key: Option<&[u8]>,
        now: u64,
    ) -> Result<Claims, TokenError> {
        Known::default().read(public, (collective, Incarnation::FIRST), token, client_key, now)
    }

    fn claims(collective: CollectiveId) -> Claims {
        Claims {
            collective,
            incarnation: Incarnation::FIRST,
            member: MemberId::random(),
            node: NodeId::random(),
            boot: BootId::random(),
            stage: Stage::Boot,
            epoch: 7,
            expires: 1000,
            key: thumbprint(KEY),
        }
    }

    #[test]
    fn a_token_is_good_until_it_expires_and_on_its_key_alone() {
        let key = Ed25519KeyPair::generate().unwrap();
        let public = key.public_key().as_ref();
        let collective = CollectiveId::random();
        let claims = claims(collective);
        let node = claims.node;
        let token = mint(&key, &claims).unwrap();
        assert_eq!(read(public, collective, &token, Some(KEY), 999), Ok(claims));
        assert_eq!(read(public, collective, &token, Some(KEY), 1000), Err(TokenError::Expired(node)));
        assert_eq!(read(public, collective, &token, Some(b"another key"), 999), Err(TokenError::OtherKey(node)));
        assert_eq!(read(public, collective, &token, None, 999), Err(TokenError::OtherKey(node)));
        assert_eq!(read(public, CollectiveId::random(), &token, Some(KEY), 999), Err(TokenError::Foreign));
        let other = Ed25519KeyPair::generate().unwrap();
        let by_the_other = |collective| read(other.public_key().as_ref(), collective, &token, Some(KEY), 999);
        assert_eq!(by_the_other(collective), Err(TokenError::Void(node)), "its node is none that nobody knows");
        assert_eq!(by_the_other(CollectiveId::random()), Err(TokenError::Foreign));
    }

    #[test]
    fn a_token_is_of_one_incarnation() {
        let key = Ed25519KeyPair::generate().unwrap();
        let public = key.public_key().as_ref();
        let collective = CollectiveId::random();
        let (first, second) = (Incarnation::FIRST, Incarnation::FIRST.next());
        for (of, other) in [(first, second), (second, first)] {
            let claims = Claims { incarnation: of, ..claims(collective) };
            let token = mint(&key, &claims).unwrap();
            let read = |at| Known::default().read(public, (collective, at), &token, Some(KEY), 999);
            assert_eq!(read(other), Err(TokenError::OtherIncarnation(claims.node)));
            assert_eq!(read(of), Ok(claims));
        }
    }

    #[test]
    fn a_token_that_is_known_is_judged_anew() {
        let key = Ed25519KeyPair::generate().unwrap();
        let public = key.public_key().as_ref();
        let collective = CollectiveId::random();
        let claims = claims(collective);
        let token = mint(&key, &claims).unwrap();
        let known = Known::default();
        let read = |token: &str, collective, key, now| {
            known.read(public, (collective, Incarnation::FIRST), token, Some(key), now)
        };
        for _ in 0..2 {
            assert_eq!(read(&token, collective, KEY, 999), Ok(claims.clone()));
            assert_eq!(read(&token, collective, KEY, 1000), Err(TokenError::Expired(claims.node)));
            assert_eq!(read(&token, collective, b"another key", 999), Err(TokenError::OtherKey(claims.node)));
            assert_eq!(read(&token, CollectiveId::random(), KEY, 999), Err(TokenError::Foreign));
        }
        // One that is not good takes no place of one that is, and gets none of its rights.
        let changed = format!("{token}A");
        assert_eq!(read(&changed, collective, KEY, 999), Err(TokenError::Void(claims.node)));
        assert_eq!(read(&token[..token.len() - 1], collective, KEY, 999), Err(TokenError::Foreign));
        let other = Claims { node: NodeId::random(), ..claims.clone() };
        let second = mint(&key, &other).unwrap();
        assert_eq!(read(&second, collective, KEY, 999), Ok(other));
        assert_eq!(read(&token, collective, KEY, 999), Ok(claims.clone()));
        // Also by the key that signs tokens now.
        let rotated = Ed25519KeyPair::generate().unwrap();
        let of = (collective, Incarnation::FIRST);
        let by_the_new = known.read(rotated.public_key().as_ref(), of, &token, Some(KEY), 999);
        assert_eq!(by_the_new, Err(TokenError::Void(claims.node)));
        assert_eq!(read(&token, collective, KEY, 999), Ok(claims));
    }

    #[test]
    fn a_changed_token_is_none() {
        let key = Ed25519KeyPair::generate().unwrap();
        let collective = CollectiveId::random();
        let token = mint(&key, &claims(collective)).unwrap();
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            if changed != token {
                let read = read(key.public_key().as_ref(), collective, &changed, Some(KEY), 0);
                assert!(matches!(read, Err(TokenError::Foreign | TokenError::Void(_))), "{at}: {read:?}");
            }
        }
        for bad in ["", "moorn1.", "moorn1..", "moorn2.a.b", &"x".repeat(5000)] {
            assert_eq!(
                read(key.public_key().as_ref(), collective, bad, Some(KEY), 0),
                Err(TokenError::Foreign),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_signature_of_something_else_is_no_token() {
        let key = Ed25519KeyPair::generate().unwrap();
        let collective = CollectiveId::random();
        let claims = claims(collective);
        let body = serde_json::to_vec(&claims).unwrap();
        let token = format!("{PREFIX}{}.{}", BASE64.encode(&body), BASE64.encode(key.sign(&body)));
        let read = read(key.public_key().as_ref(), collective, &token, Some(KEY), 0);
        assert_eq!(read, Err(TokenError::Void(claims.node)));
    }
}
