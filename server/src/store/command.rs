//! Every change of the store, as data. A command carries all it needs (times, ids, random values), so that applying it gives the same
//! result on every member, whenever it is applied.

use super::authorities::AuthorityChange;
use super::late::Late;
use super::level::Level;
use super::records::{
    Armed, Evidence, Identity, ImageRecord, InviteRecord, KeyVersion, KeysRecord, MemberRecord, ProfileRecord,
    SiteRecord, TokenRecord, WrappedKey,
};
use crate::secrets::SealedSecret;
use moor_api::admin::{LogEvent, Refusal, StatusEvent};
use moor_api::deploy::Cidr;
use moor_api::ids::{BootId, DeploymentId, ImageDigest, MemberId, NodeId, NodeName, ProfileName};
use moor_api::node::Base64;
use moor_api::problem::Problem;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// A change. Variants and fields are only ever added: logs of an older version stay readable. What is added is of a new [`Level`], which
/// [`Command::level`] says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command")]
pub enum Command {
    /// The collective itself; once.
    Found {
        /// What it is.
        site: SiteRecord,
        /// Its first member.
        founder: MemberRecord,
        /// The keys.
        #[serde(default)]
        keys: KeysRecord,
    },
    /// A collective of one begins anew, from a backup or from what a survivor has: all who were members are none any more.
    Anew {
        /// The number that its membership gives it; that of the last member and one.
        number: u64,
        /// The only member.
        member: MemberRecord,
        /// All keys, for this member: with a new version, because those who were members have the others.
        #[serde(default)]
        keys: KeysRecord,
    },
    /// Somebody may become a member.
    Invite {
        /// Drawn by the proposer.
        id: Uuid,
        /// What it says.
        invite: InviteRecord,
        /// Unix seconds: those that have expired make room.
        now: u64,
    },
    /// Uses an invitation up; the outcome is the member's number.
    Join {
        /// Which invitation.
        invite: Uuid,
        /// Drawn by the member.
        member: MemberId,
        /// Its public key, DER `SubjectPublicKeyInfo`.
        #[serde(default)]
        key: Base64,
        /// Public half of the key that the collective's keys are encrypted to for it.
        #[serde(default)]
        unwrap: Base64,
        /// All versions of the keys, in order.
        #[serde(default)]
        keys: Vec<(u32, WrappedKey)>,
        /// Where it is reached.
        urls: Vec<String>,
        /// Unix seconds.
        now: u64,
        /// The newest level that its release knows.
        #[serde(default)]
        level: Level,
        /// The version of the trust bundle that it was given. From [`Level::AUTHORITIES`] on, unless it is the first.
        #[serde(default = "super::records::first", skip_serializing_if = "super::records::is_first")]
        trust: u64,
        /// The version of the SSH authorities. From [`Level::SSH_AUTHORITIES`] on, unless none was rotated.
        #[serde(default = "super::records::first", skip_serializing_if = "super::records::is_first")]
        ssh: u64,
    },
    /// A member is reached elsewhere.
    MoveMember {
        /// Which.
        number: u64,
        /// Where.
        urls: Vec<String>,
        /// Networks that it is near to. From [`Level::NEAR`] on.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        near: Vec<Cidr>,
    },
    /// A member runs another release than before.
    TellLevel {
        /// Which.
        number: u64,
        /// The newest level that its release knows.
        level: Level,
    },
    /// All members are able to a newer level: what is of it is proposed from now on.
    RaiseLevel {
        /// Which.
        level: Level,
    },
    /// A member votes, or votes no more.
    SetVoter {
        /// Which.
        number: u64,
        /// Whether it shall.
        voter: bool,
    },
    /// Removes a member.
    RemoveMember {
        /// Which.
        number: u64,
    },
    /// A new version of the collective's keys, for those who are members.
    RotateKeys {
        /// It.
        new: KeyVersion,
    },
    /// Secrets under the current version of the keys, in place of the same under an older one.
    Reseal {
        /// A bounded number of them.
        secrets: Vec<Resealed>,
    },
    /// Drops a version of the keys that nothing is under any more.
    DropKeys {
        /// Which.
        version: u32,
    },
    /// What becomes of the authorities, and who has acknowledged them.
    Authorities {
        /// What.
        change: AuthorityChange,
    },
    /// A new node.
    DefineNode {
        /// Drawn by the proposer.
        id: NodeId,
        /// Must be free.
        name: NodeName,
        /// Checked by the proposer.
        attributes: BTreeMap<String, String>,
    },
    /// Forgets a node and all that is kept of it.
    RemoveNode {
        /// Which.
        id: NodeId,
    },
    /// Changes attributes.
    SetAttributes {
        /// Which node.
        id: NodeId,
        /// New values.
        set: BTreeMap<String, String>,
        /// New secret values.
        secrets: BTreeMap<String, SealedSecret>,
        /// Names to clear.
        clear: Vec<String>,
    },
    /// Opens or closes the enrolment window.
    Arm {
        /// Which node.
        id: NodeId,
        /// How.
        armed: Armed,
    },
    /// Drops the identity and arms once.
    Rearm {
        /// Which node.
        id: NodeId,
    },
    /// Orders a deployment.
    Deploy {
        /// Which node.
        id: NodeId,
        /// Drawn by the proposer.
        deployment: DeploymentId,
        /// What to boot.
        profile: ProfileName,
        /// Unix milliseconds.
        time_ms: u64,
    },
    /// Binds an identity, if the node is armed at `now` or has the same one already; consumes `once`.
    Bind {
        /// Which node.
        id: NodeId,
        /// What proved itself.
        identity: Identity,
        /// In which boot.
        boot: BootId,
        /// Unix seconds.
        now: u64,
    },
    /// The boot stage of a boot begins: it takes what it boots, and the boot stages of all earlier boots end.
    Boot {
        /// Which node.
        id: NodeId,
        /// Which boot.
        boot: BootId,
        /// What its TPM said; none leaves what was there.
        evidence: Option<Evidence>,
    },
    /// Ends the boot stage of a boot.
    CloseStage {
        /// Which node.
        id: NodeId,
        /// Which boot.
        boot: BootId,
    },
    /// The node gets this image's key.
    Pin {
        /// Which node.
        id: NodeId,
        /// Which image.
        digest: ImageDigest,
    },
    /// A status report; taken once by sequence.
    Status {
        /// Which node.
        id: NodeId,
        /// Sequence in its boot; none: from the server.
        sequence: Option<u64>,
        /// The event.
        event: StatusEvent,
    },
    /// Output.
    Log {
        /// Which node.
        id: NodeId,
        /// The event.
        event: LogEvent,
    },
    /// A refusal, for `moor why`.
    Refuse {
        /// The nodes it belongs to.
        nodes: Vec<NodeId>,
        /// What else it is found under, where it belongs to no node: a UUID, MACs, an address.
        strangers: Vec<String>,
        /// What.
        refusal: Refusal,
    },
    /// A generation of an image.
    PutImage {
        /// It.
        image: ImageRecord,
    },
    /// Enough members hold an image: nodes are offered it from now on.
    OfferImage {
        /// Which.
        digest: ImageDigest,
    },
    /// A generation of a profile.
    PutProfile {
        /// It; its serial is set here.
        profile: ProfileRecord,
    },
    /// An administrator's token.
    PutToken {
        /// SHA-256 of the token, hexadecimal.
        hash: String,
        /// It.
        token: TokenRecord,
    },
    /// What a member did for a node while no majority answered.
    Late {
        /// The number of the member.
        member: u64,
        /// Its own count of such changes: what was taken is not taken again.
        number: u64,
        /// What.
        what: Late,
    },
    /// The next number of an SSH certificate.
    NextCertificate,
    /// A line of the audit log; chained to the one before.
    Audit {
        /// What happened, in JSON.
        entry: serde_json::Value,
    },
    /// A change, and before it its line of the audit log. The line is written also when the change is refused.
    Audited {
        /// What happened, in JSON.
        entry: serde_json::Value,
        /// The change.
        change: Box<Command>,
    },
}

/// The kind of record that a secret is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealedIn {
    /// An attribute of a node.
    Nodes,
    /// The key of an image.
    Images,
    /// A private file of a profile's newest generation.
    Profiles,
    /// The same of a generation, by its digest.
    Generations,
    /// An invitation.
    Invites,
}

/// A secret that is sealed anew. It is left alone if it is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resealed {
    /// The kind of record.
    pub within: SealedIn,
    /// Which record.
    pub key: String,
    /// Which field of it.
    pub field: String,
    /// What it was.
    pub before: SealedSecret,
    /// What it is to be.
    pub after: SealedSecret,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, with a number (epoch, serial).
    Number(u64),
    /// Not done; nothing was changed.
    Refused(Problem),
}

impl Command {
    /// Its kind, for logs: a command may hold secrets, sealed or not.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Found { .. } => "found",
            Self::Anew { .. } => "anew",
            Self::Invite { .. } => "invite",
            Self::Join { .. } => "join",
            Self::MoveMember { .. } => "move-member",
            Self::TellLevel { .. } => "tell-level",
            Self::RaiseLevel { .. } => "raise-level",
            Self::SetVoter { .. } => "set-voter",
            Self::RemoveMember { .. } => "remove-member",
            Self::RotateKeys { .. } => "rotate-keys",
            Self::Reseal { .. } => "reseal",
            Self::DropKeys { .. } => "drop-keys",
            Self::Authorities { change } => change.kind(),
            Self::DefineNode { .. } => "define-node",
            Self::RemoveNode { .. } => "remove-node",
            Self::SetAttributes { .. } => "set-attributes",
            Self::Arm { .. } => "arm",
            Self::Rearm { .. } => "rearm",
            Self::Deploy { .. } => "deploy",
            Self::Bind { .. } => "bind",
            Self::Boot { .. } => "boot",
            Self::CloseStage { .. } => "close-stage",
            Self::Pin { .. } => "pin",
            Self::Status { .. } => "status",
            Self::Log { .. } => "log",
            Self::Refuse { .. } => "refuse",
            Self::PutImage { .. } => "put-image",
            Self::OfferImage { .. } => "offer-image",
            Self::PutProfile { .. } => "put-profile",
            Self::PutToken { .. } => "put-token",
            Self::Late { .. } => "late",
            Self::NextCertificate => "next-certificate",
            Self::Audit { .. } => "audit",
            Self::Audited { change, .. } => change.kind(),
        }
    }

    /// Whether applying it touches a record or two, however many nodes there are.
    #[must_use]
    pub fn is_little(&self) -> bool {
        match self {
            Self::Audited { change, .. } => change.is_little(),
            Self::DefineNode { .. }
            | Self::SetAttributes { .. }
            | Self::Arm { .. }
            | Self::Rearm { .. }
            | Self::Boot { .. }
            | Self::CloseStage { .. }
            | Self::Status { .. }
            | Self::Log { .. }
            | Self::Audit { .. } => true,
            _ => false,
        }
    }

    /// The level that a release has to know to apply it, with the fields that it has. Once a release is out it stays the same.
    #[must_use]
    pub fn level(&self) -> Level {
        match self {
            Self::Audited { change, .. } => change.level(),
            Self::MoveMember { near, .. } if !near.is_empty() => Level::NEAR,
            Self::Join { ssh, .. } if *ssh > 1 => Level::SSH_AUTHORITIES,
            Self::Join { trust, .. } if *trust > 1 => Level::AUTHORITIES,
            Self::Authorities { change } => change.level(),
            Self::Found { .. }
            | Self::Anew { .. }
            | Self::Invite { .. }
            | Self::Join { .. }
            | Self::MoveMember { .. }
            | Self::TellLevel { .. }
            // Every release knows this much of it: whether the level rises, and for whom it is too high, is found when it is applied.
            | Self::RaiseLevel { .. }
            | Self::RotateKeys { .. }
            | Self::Reseal { .. }
            | Self::DropKeys { .. }
            | Self::SetVoter { .. }
            | Self::RemoveMember { .. }
            | Self::DefineNode { .. }
            | Self::RemoveNode { .. }
            | Self::SetAttributes { .. }
            | Self::Arm { .. }
            | Self::Rearm { .. }
            | Self::Deploy { .. }
            | Self::Bind { .. }
            | Self::Boot { .. }
            | Self::CloseStage { .. }
            | Self::Pin { .. }
            | Self::Status { .. }
            | Self::Log { .. }
            | Self::Refuse { .. }
            | Self::PutImage { .. }
            | Self::OfferImage { .. }
            | Self::PutProfile { .. }
            | Self::PutToken { .. }
            | Self::Late { .. }
            | Self::NextCertificate
            | Self::Audit { .. } => Level::FIRST,
        }
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind())
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Number(number) => write!(f, "done: {number}"),
            Self::Refused(problem) => write!(f, "refused: {problem}"),
        }
    }
}

#[cfg(test)]
mod tests;
