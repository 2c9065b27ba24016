//! What the store keeps, as records. They are serialised as JSON: self-describing, so that a later version reads them.

use super::authorities::NodeTrust;
use super::level::Level;
use super::raft::Peer;
use crate::secrets::SealedSecret;
use moor_api::admin::Refusal;
use moor_api::deploy::{Cidr, OnFailure, Overlay, PhaseName, RootMode};
use moor_api::ids::{
    BootId, CollectiveId, DeploymentId, ImageDigest, ImageName, MemberId, NodeId, NodeName, ProfileName, Sha256Digest,
};
use moor_api::node::{Base64, PcrBank};
use moor_api::trust::Incarnation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The collective.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SiteRecord {
    /// Its id.
    pub collective: CollectiveId,
    /// Its name.
    pub name: String,
    /// Version of the trust bundle.
    pub bundle_version: u64,
    /// When the collective was made, Unix seconds.
    pub created: u64,
    /// How often it began anew. From [`Level::INCARNATIONS`] on, unless it is the first.
    #[serde(default, skip_serializing_if = "Incarnation::is_first")]
    pub incarnation: Incarnation,
}

/// A member, by its number. The membership of the store follows these records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Its id, as its certificate says.
    pub id: MemberId,
    /// Its public key, DER `SubjectPublicKeyInfo`; who shows another one is not this member. Empty: nobody is.
    #[serde(default)]
    pub key: Base64,
    /// Public half of the key that the collective's keys are encrypted to for it: X25519, 32 bytes.
    #[serde(default)]
    pub unwrap: Base64,
    /// Its name; no two that are present have the same.
    pub name: String,
    /// Where nodes and members reach it: `https://ADDRESS:PORT`.
    pub urls: Vec<String>,
    /// Whether it votes.
    pub voter: bool,
    /// The invitation it came by; none: it founded the collective.
    #[serde(default)]
    pub invite: Option<Uuid>,
    /// It is a member no more, and never again under this number.
    #[serde(default)]
    pub removed: bool,
    /// The number of the member whose place it takes: that one is removed once this one holds its place.
    #[serde(default)]
    pub replaces: Option<u64>,
    /// The newest level that its release knows, as it said itself when it was started last.
    #[serde(default)]
    pub level: Level,
    /// Networks that it is near to: nodes in them are sent to it before others. From [`Level::NEAR`] on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub near: Vec<Cidr>,
    /// The version of the trust bundle that it has taken up. From [`Level::AUTHORITIES`] on, as the next.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub trust: u64,
    /// The authority that its certificate is from.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub shows: u32,
}

/// What counts from one on, before anything was counted.
pub(super) fn first<T: From<u8>>() -> T {
    1.into()
}

/// Nothing is written then: a record is what it was before this was counted.
pub(super) fn is_first<T: From<u8> + PartialEq>(value: &T) -> bool {
    *value == first()
}

impl MemberRecord {
    /// The only member of a collective that begins. It has said nothing of its level yet.
    #[must_use]
    pub fn only(key: Base64, unwrap: Base64, name: String, urls: Vec<String>) -> Self {
        Self {
            id: MemberId::random(),
            key,
            unwrap,
            name,
            urls,
            voter: true,
            invite: None,
            removed: false,
            replaces: None,
            level: Level::FIRST,
            near: Vec::new(),
            trust: 1,
            shows: 1,
        }
    }

    /// As the membership names it.
    #[must_use]
    pub fn peer(&self) -> Peer {
        Peer { id: self.id, key: self.key.clone(), name: self.name.clone(), urls: self.urls.clone() }
    }
}

/// A version of the collective's keys, encrypted to one member by HPKE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// The encapsulated key.
    pub encapsulated: Base64,
    /// What was encrypted.
    pub ciphertext: Base64,
}

/// A version of the collective's keys: what secrets are sealed under, and what signs nodes' tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyVersion {
    /// Counts from 1 on; never given twice.
    pub version: u32,
    /// For each member that has a part in it.
    pub wrapped: BTreeMap<MemberId, WrappedKey>,
}

/// All versions that something may be under.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysRecord {
    /// In order; the last is the one that secrets are sealed under.
    pub versions: Vec<KeyVersion>,
}

impl KeysRecord {
    /// The version that secrets are sealed under; none before the collective was made.
    #[must_use]
    pub fn current(&self) -> Option<u32> {
        self.versions.last().map(|version| version.version)
    }
}

/// An invitation that was not used yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteRecord {
    /// Name of the member to be.
    pub name: String,
    /// Whether it will vote.
    pub voter: bool,
    /// Until when it is good, Unix seconds.
    pub expires: u64,
    /// The number of the member whose place the new one takes.
    #[serde(default)]
    pub replaces: Option<u64>,
    /// What the invitation proves itself by.
    pub secret: SealedSecret,
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Immutable id.
    pub id: NodeId,
    /// Name.
    pub name: NodeName,
    /// Attributes that are no secrets.
    pub attributes: BTreeMap<String, String>,
    /// Secret attributes.
    #[serde(default)]
    pub secrets: BTreeMap<String, SealedSecret>,
    /// Its identity.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Raised at each binding and each drop; tokens of another epoch are refused.
    #[serde(default)]
    pub epoch: u64,
    /// Whether it may enrol.
    #[serde(default)]
    pub armed: Armed,
    /// The order it carries out.
    #[serde(default)]
    pub deployment: Option<Order>,
    /// The image generation it last got the key of.
    #[serde(default)]
    pub pin: Option<ImageDigest>,
    /// Its last boots, newest last, at most [`MAX_BOOTS`], and among them the newest that came to its end.
    #[serde(default)]
    pub boots: Vec<BootRecord>,
    /// Which trust bundle it has, where there is a choice. From [`Level::AUTHORITIES`] on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<NodeTrust>,
}

/// Boots that are remembered for each node.
pub const MAX_BOOTS: usize = 16;

/// One boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BootRecord {
    /// Its id.
    pub boot: BootId,
    /// Whether its boot stage is over.
    pub closed: bool,
    /// The last status report that was taken.
    pub sequence: Option<u64>,
    /// What it boots: taken when its boot stage begins, so that a publish in between cannot mix two generations.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// What the TPM said of it.
    #[serde(default)]
    pub evidence: Option<Evidence>,
    /// Whether it came to its end.
    #[serde(default)]
    pub booted: bool,
}

/// The state that a node reports at the end of its boot.
pub const BOOTED: &str = "booted";

impl BootRecord {
    /// One of which nothing is known yet.
    #[must_use]
    pub fn new(boot: BootId, closed: bool) -> Self {
        Self { boot, closed, sequence: None, plan: None, evidence: None, booted: false }
    }
}

impl NodeRecord {
    /// What the newest boot booted that came to its end.
    #[must_use]
    pub fn last_booted(&self) -> Option<&Plan> {
        self.boots.iter().rev().filter(|record| record.booted).find_map(|record| record.plan.as_ref())
    }

    /// Makes room for another boot. The newest that came to its end stays: it is what the node goes back to without a majority.
    pub fn forget_oldest_boot(&mut self) {
        if self.boots.len() < MAX_BOOTS {
            return;
        }
        let kept = self.boots.iter().rposition(|record| record.booted && record.plan.is_some());
        self.boots.remove(usize::from(kept == Some(0)));
    }
}

/// What one boot boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The order.
    pub deployment: DeploymentId,
    /// The profile.
    pub profile: ProfileName,
    /// Its generation.
    pub generation: Sha256Digest,
}

/// What a quote and the event log beside it said; recorded, not judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// PCR numbers and values, hexadecimal. Pairs, because serde reads no numbers as keys inside a tagged enum, which commands are.
    pub pcrs: Vec<(u8, String)>,
    /// Blob of the firmware's event log.
    #[serde(default)]
    pub event_log: Option<Sha256Digest>,
    /// TPM resets so far.
    pub reset_count: u32,
    /// Version of the TPM's firmware.
    pub firmware_version: u64,
}

/// An order to deploy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// Its id.
    pub id: DeploymentId,
    /// What to boot.
    pub profile: ProfileName,
}

/// When a node may enrol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Armed {
    /// Not.
    #[default]
    No,
    /// One enrolment.
    Once,
    /// Each boot.
    Continuous,
    /// Until this time, Unix seconds.
    Until(u64),
}

impl Armed {
    /// Whether the window is open at `now` (Unix seconds).
    #[must_use]
    pub fn is_open(self, now: u64) -> bool {
        match self {
            Self::No => false,
            Self::Once | Self::Continuous => true,
            Self::Until(end) => now < end,
        }
    }
}

/// What proves that a machine is the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Identity {
    /// A TPM's attestation key.
    Tpm {
        /// `TPMT_PUBLIC` of the endorsement key: it is the TPM.
        ek_public: Base64,
        /// Its certificate, where there is one; recorded.
        #[serde(default)]
        ek_certificate: Option<Base64>,
        /// `TPMT_PUBLIC` of the attestation key.
        ak_public: Base64,
        /// The bank of its quotes.
        bank: PcrBank,
    },
    /// A key in a file.
    Soft {
        /// DER `SubjectPublicKeyInfo`.
        public_key: Base64,
        /// Bound under continuous arming: whoever came with the node's addresses. Set when it is bound.
        #[serde(default)]
        unproven: bool,
    },
}

impl Identity {
    /// Whether two identities are of the same machine: the same TPM, or the same key.
    #[must_use]
    pub fn same_holder(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tpm { ek_public: a, ak_public: b, .. }, Self::Tpm { ek_public: c, ak_public: d, .. }) => {
                a == c && b == d
            }
            (Self::Soft { public_key: a, .. }, Self::Soft { public_key: b, .. }) => a == b,
            _ => false,
        }
    }

    /// Whether a machine with `other` may take its place without being dropped by name: one that keeps no key and is armed
    /// continuously has a new one at each boot. A key that was proven is held by whoever has it.
    #[must_use]
    pub fn gives_way(&self, other: &Self, armed: Armed) -> bool {
        self.is_unproven() && matches!(other, Self::Soft { .. }) && armed == Armed::Continuous
    }

    /// Whether it says no more than that the machine knows the node's addresses.
    #[must_use]
    pub fn is_unproven(&self) -> bool {
        matches!(self, Self::Soft { unproven: true, .. })
    }
}

/// A generation of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Name.
    pub name: ImageName,
    /// Header hash.
    pub digest: ImageDigest,
    /// Blob of the sealed file.
    pub blob: Sha256Digest,
    /// Size of the sealed file.
    pub size: u64,
    /// Lineage.
    pub lineage: Uuid,
    /// Serial.
    pub serial: u64,
    /// When it was sealed, Unix seconds.
    pub created: u64,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Its key.
    #[serde(default)]
    pub key: Option<SealedSecret>,
    /// Detached signatures.
    #[serde(default)]
    pub signatures: Option<Base64>,
    /// Blob of the kernel.
    pub kernel: Sha256Digest,
    /// Blob of the initramfs.
    pub initramfs: Sha256Digest,
    /// Blobs of shim and GRUB, by name.
    #[serde(default)]
    pub boot_loaders: BTreeMap<String, Sha256Digest>,
    /// From the metadata.
    #[serde(default)]
    pub kernel_version: Option<String>,
    /// From the metadata.
    #[serde(default)]
    pub os: Option<String>,
    /// Whether so many members have held it that nodes may be offered it. Once it is, it stays.
    #[serde(default = "offered")]
    pub offered: bool,
}

/// Images of before there was a choice.
fn offered() -> bool {
    true
}

/// A profile and its published generation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfileRecord {
    /// Name.
    pub name: ProfileName,
    /// Digest of the generation's manifest.
    pub generation: Sha256Digest,
    /// Counts publishes.
    pub serial: u64,
    /// When, Unix seconds.
    pub published: u64,
    /// What was published.
    pub manifest: Manifest,
}

/// A generation of a profile: everything a node may get of it, by digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The image.
    pub image: ImageDigest,
    /// How the root comes.
    pub root: RootMode,
    /// The overlay.
    pub overlay: Overlay,
    /// What nodes do when their boot has failed.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// Kernel arguments of the profile.
    pub kernel_arguments: String,
    /// Signers of which one must have signed the image.
    pub signers: Vec<String>,
    /// Whether a node without a proven identity gets secrets.
    pub allow_unproven: bool,
    /// Lines for root's `authorized_keys`.
    pub authorized_keys: Vec<String>,
    /// Scripts by phase, in order: name and blob.
    pub scripts: BTreeMap<PhaseName, Vec<(String, Sha256Digest)>>,
    /// Files by path: blob.
    pub files: BTreeMap<String, Sha256Digest>,
    /// Private files by path: encrypted, in the record.
    pub private: BTreeMap<String, SealedSecret>,
}

/// An administrator's token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenRecord {
    /// For whom.
    pub name: String,
    /// Unix seconds.
    pub expires: u64,
}

/// Refusals of one subject, newest last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Refusals {
    /// At most [`MAX_REFUSALS`].
    pub list: Vec<Refusal>,
}

/// Refusals that are kept for each subject.
pub const MAX_REFUSALS: usize = 50;

/// Status events that are kept for each node.
pub const MAX_EVENTS: usize = 500;

/// Log events that are kept for each node.
pub const MAX_LOGS: usize = 500;

/// Bytes of log that are kept for each node: the list is one record, rewritten whole.
pub const MAX_LOG_BYTES: usize = 512 << 10;

/// Machines that nobody knows, whose refusals are kept.
pub const MAX_STRANGERS: usize = 1000;
