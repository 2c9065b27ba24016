//! How a member is known to one whose records lag behind: it shows a chain of vouchers. Whoever lets a member in signs for its key, by its
//! own; so the chain leads from a member that nobody here has heard of to one that everybody has. A certificate would not do: every member
//! can issue it, also one that was removed.

use anyhow::Context as _;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::node::Base64;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Vouchers of a chain. A member is let in by one that was let in before: only who was away while so many came one by another knows nobody
/// in it.
const MAX_CHAIN: usize = 16;

/// A member and its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acquaintance {
    /// Its id.
    pub id: MemberId,
    /// Its public key, DER `SubjectPublicKeyInfo`.
    pub key: Base64,
}

/// A member's word that another one is a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voucher {
    /// Who is.
    pub member: Acquaintance,
    /// Who says so.
    pub by: MemberId,
    /// By its key: ECDSA on P-256 with SHA-256, in DER.
    pub signature: Base64,
}

/// How a member is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// It is one, with this key.
    Present(Base64),
    /// It was one.
    Removed,
    /// Never heard of.
    Not,
}

fn message(collective: CollectiveId, member: &Acquaintance) -> Vec<u8> {
    let key = digest(&SHA256, &member.key.0);
    // All parts have a fixed length.
    let label: &[u8] = b"moor/v1 member voucher\0";
    [label, collective.as_bytes(), member.id.as_bytes(), key.as_ref()].concat()
}

impl Voucher {
    fn is_signed_by(&self, key: &Base64, collective: CollectiveId) -> bool {
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.0);
        key.verify(&message(collective, &self.member), &self.signature.0).is_ok()
    }
}

/// The chain of a member that is let in: `own` is the chain of the one that lets it in, `host`, whose key is in the directory `keys`.
///
/// # Errors
/// The key is missing or damaged.
pub fn extend(
    own: &[Voucher],
    host: MemberId,
    keys: &Path,
    collective: CollectiveId,
    member: Acquaintance,
) -> anyhow::Result<Vec<Voucher>> {
    let signature = crate::authority::sign_as_member(keys, &message(collective, &member)).context("vouching")?;
    let mut chain = vec![Voucher { member, by: host, signature: signature.into() }];
    chain.extend(own.iter().take(MAX_CHAIN - 1).cloned());
    Ok(chain)
}

/// Whether `chain` leads from `member` to one that is a member as far as it is known here. The first in it of whom anything is known
/// decides: who was removed introduces nobody.
#[must_use]
pub fn introduces(
    chain: &[Voucher],
    collective: CollectiveId,
    member: &Acquaintance,
    known: impl Fn(MemberId) -> Known,
) -> bool {
    let mut wanted = member;
    for (at, voucher) in chain.iter().take(MAX_CHAIN).enumerate() {
        if voucher.member != *wanted {
            return false;
        }
        match known(voucher.by) {
            Known::Present(key) => return voucher.is_signed_by(&key, collective),
            Known::Removed => return false,
            Known::Not => {}
        }
        let Some(next) = chain.get(at + 1) else { return false };
        if next.member.id != voucher.by || !voucher.is_signed_by(&next.member.key, collective) {
            return false;
        }
        wanted = &next.member;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::create_member_key;

    struct Somebody {
        dir: tempfile::TempDir,
        member: Acquaintance,
        chain: Vec<Voucher>,
    }

    const COLLECTIVE: CollectiveId = CollectiveId::from_bytes([9; 16]);

    fn let_in(host: Option<&Somebody>) -> Somebody {
        let dir = tempfile::tempdir().unwrap();
        let key = create_member_key(dir.path()).unwrap().into();
        let member = Acquaintance { id: MemberId::random(), key };
        let by =
            |host: &Somebody| extend(&host.chain, host.member.id, host.dir.path(), COLLECTIVE, member.clone()).unwrap();
        Somebody { chain: host.map(by).unwrap_or_default(), dir, member }
    }

    fn is_introduced(chain: &[Voucher], member: &Acquaintance, known: &[(&Somebody, bool)]) -> bool {
        introduces(chain, COLLECTIVE, member, |id| match known.iter().find(|(somebody, _)| somebody.member.id == id) {
            Some((somebody, true)) => Known::Present(somebody.member.key.clone()),
            Some((_, false)) => Known::Removed,
            None => Known::Not,
        })
    }

    #[test]
    fn a_chain_leads_to_whoever_is_known_first_and_that_one_decides() {
        let a = let_in(None);
        let b = let_in(Some(&a));
        let c = let_in(Some(&b));
        let d = let_in(Some(&c));
        for known in [&a, &b, &c] {
            assert!(is_introduced(&d.chain, &d.member, &[(known, true)]));
            assert!(!is_introduced(&d.chain, &d.member, &[(known, false)]), "who was removed introduces nobody");
        }
        assert!(!is_introduced(&d.chain, &d.member, &[(&a, true), (&b, false)]), "also not through the one before");
        assert!(is_introduced(&d.chain, &d.member, &[(&a, false), (&b, true)]), "he was one when he let b in");
        assert!(!is_introduced(&d.chain, &d.member, &[]));
        assert!(!is_introduced(&[], &d.member, &[(&a, true)]));
    }

    #[test]
    fn a_chain_that_is_another_s_altered_or_out_of_order_is_none() {
        let a = let_in(None);
        let b = let_in(Some(&a));
        let c = let_in(Some(&b));
        let stranger = let_in(None);
        let known = [(&a, true)];
        assert!(is_introduced(&c.chain, &c.member, &known));
        assert!(!is_introduced(&c.chain, &stranger.member, &known), "another's chain");
        let disguised = Acquaintance { id: c.member.id, ..stranger.member.clone() };
        assert!(!is_introduced(&c.chain, &disguised, &known), "another key under the same id");
        // Who signs by a key of his own in the name of a member.
        let forged = extend(&[], a.member.id, stranger.dir.path(), COLLECTIVE, stranger.member.clone()).unwrap();
        assert!(!is_introduced(&forged, &stranger.member, &known));
        let through = extend(&b.chain, b.member.id, stranger.dir.path(), COLLECTIVE, stranger.member.clone());
        assert!(!is_introduced(&through.unwrap(), &stranger.member, &known));
        let elsewhere = extend(&[], a.member.id, a.dir.path(), CollectiveId::random(), stranger.member.clone());
        assert!(!is_introduced(&elsewhere.unwrap(), &stranger.member, &known), "of another collective");
        let mut reversed = c.chain.clone();
        reversed.reverse();
        assert!(!is_introduced(&reversed, &c.member, &known));
        assert!(!is_introduced(&c.chain[..1], &c.member, &known), "cut");
        assert!(!is_introduced(&c.chain[1..], &c.member, &known), "its beginning is missing");
    }

    #[test]
    fn a_chain_is_bounded() {
        let first = let_in(None);
        let second = let_in(Some(&first));
        let mut last = let_in(Some(&second));
        for _ in 0..MAX_CHAIN {
            last = let_in(Some(&last));
        }
        assert_eq!(last.chain.len(), MAX_CHAIN);
        assert!(!is_introduced(&last.chain, &last.member, &[(&first, true)]));
        let near = last.chain[MAX_CHAIN - 1].by;
        assert!(near != first.member.id && near != second.member.id);
    }
}
