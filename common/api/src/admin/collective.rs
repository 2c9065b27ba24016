//! What is said of the members themselves: who they are, who comes and goes, who holds which content, and backups of what they agree about.

use crate::backup_key::Recipient;
use crate::deploy::Cidr;
use crate::ids::{MemberId, Sha256Digest};
use crate::trust::Incarnation;
use serde::{Deserialize, Serialize};

/// The collective, as one member sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveView {
    /// The member that answers.
    pub number: u64,
    /// The leader, if this member knows one.
    pub leader: Option<u64>,
    /// Term of the leader's election.
    pub term: u64,
    /// Newest entry of the answering member's log.
    pub last: u64,
    /// Newest entry that it has applied.
    pub applied: u64,
    /// Whether a majority answers, as far as this member can tell.
    pub majority: bool,
    /// The feature level: what is newer is not used yet, because a member's release may not know it.
    pub level: u32,
    /// How often the collective began anew: it was recovered or restored.
    #[serde(default, skip_serializing_if = "Incarnation::is_first")]
    pub incarnation: Incarnation,
    /// All members, by number.
    pub members: Vec<CollectiveMember>,
    /// Invitations that were not used: name, and until when (Unix seconds).
    pub invitations: Vec<(String, u64)>,
    /// Versions of the collective's keys that secrets are under; the last is the one for new ones.
    #[serde(default)]
    pub keys: Vec<u32>,
    /// Secrets that do not open, the first [`MAX_UNREADABLE`] of them: an older version of the keys is kept for each.
    #[serde(default)]
    pub unreadable: Vec<UnreadableSecret>,
}

/// Secrets that do not open are named up to so many.
pub const MAX_UNREADABLE: usize = 100;

/// A secret that does not open, and so cannot be sealed under newer keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadableSecret {
    /// What it is, for people.
    pub of: String,
    /// The version of the collective's keys that it is under, which is kept for it.
    pub version: u32,
    /// What to do about it.
    pub remedy: String,
}

/// The collective's keys were rotated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysRotated {
    /// The version of the new ones.
    pub version: u32,
}

/// A member of the collective.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveMember {
    /// Its number.
    pub number: u64,
    /// Its id.
    pub id: MemberId,
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub urls: Vec<String>,
    /// Whether it votes now.
    pub votes: bool,
    /// Whether it is to vote: it does once it has caught up.
    pub voter: bool,
    /// How far its log is; known where the leader answers.
    pub last: Option<u64>,
    /// The newest feature level that its release knows, as it said when it was started last.
    pub level: u32,
    /// Networks that it is near to.
    pub near: Vec<Cidr>,
}

/// Asks for an invitation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteRequest {
    /// Name of the member to be.
    pub name: String,
    /// Whether it will vote.
    pub voter: bool,
    /// For how many seconds it is good.
    pub lifetime: u64,
}

/// Asks for an invitation to take another member's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplaceRequest {
    /// Name or number of the member that goes. It is removed once the new one holds its place.
    pub member: String,
    /// Name of the member to be; it may be the same.
    pub name: String,
    /// For how many seconds it is good.
    pub lifetime: u64,
}

/// Characters that the passphrase of a backup has at least: who has the file may try as many as he likes.
pub const MIN_PASSPHRASE: usize = 12;

/// What an encrypted backup begins with. A member of an earlier release, which knows no recipients, sends a redacted one instead.
pub const BACKUP_MAGIC: [u8; 8] = *b"\x89MOORBK\n";

/// Asks for a backup: under a passphrase or to recipients; neither: it is redacted. No `Debug`; the passphrase is wiped.
#[derive(Default, Serialize, Deserialize)]
pub struct BackupRequest {
    /// What the backup is encrypted under.
    #[serde(default)]
    pub passphrase: Option<String>,
    /// Whom it is encrypted to, at most [`MAX_RECIPIENTS`](crate::backup_key::MAX_RECIPIENTS).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recipients: Vec<Recipient>,
    /// Where no majority answers, make one of what the member holds: it may not be the newest, and says so.
    #[serde(default)]
    pub without_majority: bool,
}

impl Drop for BackupRequest {
    fn drop(&mut self) {
        use zeroize::Zeroize as _;
        self.passphrase.zeroize();
    }
}

/// An invitation. It is a secret until it is used.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invited {
    /// What the new member is given.
    pub invitation: String,
    /// Until when it is good, Unix seconds.
    pub expires: u64,
}

/// Names a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRequest {
    /// Its name, or its number.
    pub member: String,
    /// Also where those that vote then would have no majority that answers.
    #[serde(default)]
    pub force: bool,
}

/// Which member has which content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentView {
    /// So many members hold an image before nodes are offered it.
    pub copies: u64,
    /// Names of the members.
    pub members: Vec<String>,
    /// Those that did not answer: what they have is not known.
    pub silent: Vec<String>,
    /// All content that records name.
    pub blobs: Vec<ContentBlob>,
}

/// One blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentBlob {
    /// Its SHA-256.
    pub blob: Sha256Digest,
    /// What it is.
    pub of: String,
    /// Names of the members that have it.
    pub members: Vec<String>,
    /// For the blob of an image: whether nodes are offered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered: Option<bool>,
}
