//! Nonces: {member id, node id, time, random} under a MAC, good for 60 s, once, at the member that gave them out. The MAC key lives as
//! long as the process: a restart makes every nonce invalid, which costs a node one more hello.

use aws_lc_rs::{hmac, rand};
use moor_api::ids::{MemberId, NodeId};
use moor_api::node::Base64;
use moor_api::problem::{Code, Problem};
use moor_api::proof::NONCE_LENGTH;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Seconds that a nonce is good.
const LIFETIME: u64 = 60;
/// Bytes before the MAC.
const BODY: usize = NONCE_LENGTH - 32;
/// Where the time is.
const TIME: usize = 32;
/// Where the random bytes are.
const RANDOM: usize = 40;

/// Nonces of one member. No `Debug`.
pub struct Nonces {
    member: MemberId,
    key: hmac::Key,
    /// Times are counted from here: nobody can set this clock.
    start: Instant,
    /// Used ones with the time of their issue, so that they can be forgotten when they are too old anyway.
    used: Mutex<BTreeSet<(u64, [u8; 16])>>,
}

impl Nonces {
    /// None yet.
    ///
    /// # Errors
    /// No randomness.
    pub fn new(member: MemberId) -> anyhow::Result<Self> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &rand::SystemRandom::new())
            .map_err(|_| anyhow::anyhow!("making the key of nonces: no randomness"))?;
        Ok(Self { member, key, start: Instant::now(), used: Mutex::default() })
    }

    /// One for `node`.
    ///
    /// # Errors
    /// No randomness.
    pub fn issue(&self, node: NodeId) -> Result<Base64, Problem> {
        self.issue_at(node, self.start.elapsed().as_secs())
    }

    fn issue_at(&self, node: NodeId, now: u64) -> Result<Base64, Problem> {
        let mut nonce = Vec::with_capacity(NONCE_LENGTH);
        nonce.extend_from_slice(self.member.as_bytes());
        nonce.extend_from_slice(node.as_bytes());
        nonce.extend_from_slice(&now.to_be_bytes());
        let mut random = [0; 16];
        rand::fill(&mut random).map_err(|_| Problem::new(Code::Internal, "the member has no randomness"))?;
        nonce.extend_from_slice(&random);
        let mac = hmac::sign(&self.key, &nonce);
        nonce.extend_from_slice(mac.as_ref());
        Ok(Base64(nonce))
    }

    /// Uses one up.
    ///
    /// # Errors
    /// [`Code::ProofInvalid`]: not one of ours, another node's, too old, or used before.
    pub fn redeem(&self, node: NodeId, nonce: &[u8]) -> Result<(), Problem> {
        self.redeem_at(node, nonce, self.start.elapsed().as_secs())
    }

    fn redeem_at(&self, node: NodeId, nonce: &[u8], now: u64) -> Result<(), Problem> {
        let bad = |why: &str| Err(Problem::new(Code::ProofInvalid, format!("the nonce {why}: begin again with hello")));
        if nonce.len() != NONCE_LENGTH {
            return bad("has another length than a nonce has");
        }
        let (body, mac) = nonce.split_at(BODY);
        if hmac::verify(&self.key, body, mac).is_err() {
            return bad("is not one that this member gave out since it was started");
        }
        if body[..16] != *self.member.as_bytes() || body[16..TIME] != *node.as_bytes() {
            return bad("was given to another node");
        }
        let (mut time, mut random) = ([0; 8], [0; 16]);
        time.copy_from_slice(&body[TIME..RANDOM]);
        random.copy_from_slice(&body[RANDOM..]);
        let issued = u64::from_be_bytes(time);
        if now.saturating_sub(issued) > LIFETIME {
            return bad("is older than 60 s");
        }
        // A thread that panicked here had at most inserted one.
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = now.saturating_sub(LIFETIME);
        *used = used.split_off(&(oldest, [0; 16]));
        if !used.insert((issued, random)) {
            return bad("was used before");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_good_once_for_its_node_and_a_minute() {
        let nonces = Nonces::new(MemberId::random()).unwrap();
        let node = NodeId::random();
        let says = |result: Result<(), Problem>| result.unwrap_err().detail;

        let nonce = nonces.issue_at(node, 100).unwrap();
        assert!(says(nonces.redeem_at(NodeId::random(), &nonce.0, 100)).contains("another node"));
        nonces.redeem_at(node, &nonce.0, 160).unwrap();
        assert!(says(nonces.redeem_at(node, &nonce.0, 160)).contains("used before"));

        let nonce = nonces.issue_at(node, 100).unwrap();
        assert!(says(nonces.redeem_at(node, &nonce.0, 161)).contains("older"));

        for at in [0, 20, TIME, RANDOM, NONCE_LENGTH - 1] {
            let mut changed = nonces.issue_at(node, 100).unwrap().0;
            changed[at] ^= 1;
            assert!(nonces.redeem_at(node, &changed, 100).is_err(), "byte {at}");
        }
        assert!(nonces.redeem_at(node, &nonce.0[1..], 100).is_err());

        let other = Nonces::new(nonces.member).unwrap();
        assert!(says(other.redeem_at(node, &nonces.issue_at(node, 0).unwrap().0, 0)).contains("since it was started"));
    }

    #[test]
    fn used_nonces_are_forgotten_when_they_are_too_old() {
        let nonces = Nonces::new(MemberId::random()).unwrap();
        let node = NodeId::random();
        for now in 0..1000 {
            nonces.redeem_at(node, &nonces.issue_at(node, now).unwrap().0, now).unwrap();
        }
        assert!(nonces.used.lock().unwrap().len() <= 62);
    }
}
