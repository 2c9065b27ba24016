//! `/admin/v1`: what `moor`, `imgutil` and other programs say to a member, over the unix socket (peer credentials) or HTTPS
//! (an administrator's token). Errors are [`crate::problem::Problem`]. `RANGE` is a noderange, percent-encoded.
//!
//! | Call | Body → answer |
//! |---|---|
//! | `GET site` | [`SiteInfo`] |
//! | `GET nodes?range=RANGE` (none: all) | list of [`NodeView`] |
//! | `POST nodes` | [`DefineNodes`] → [`Changed`] |
//! | `POST nodes/remove` | [`RangeRequest`] → [`Changed`] |
//! | `POST nodes/set` | [`SetAttributes`] → [`Changed`] |
//! | `POST nodes/arm` | [`ArmRequest`] → [`Changed`] |
//! | `POST nodes/rearm` | [`RangeRequest`] of one node → [`Changed`]: drops its identity, raises the epoch |
//! | `POST nodes/deploy` | [`DeployRequest`] → [`Changed`] |
//! | `GET status?range=RANGE&history=true&watch=true` | newline-delimited JSON of [`StatusEvent`]: the last of each node (`history`: all, oldest first); with `watch` it goes on |
//! | `GET why/NODE` | [`Why`]; `NODE` is a node's name, a UUID or a MAC (for machines that nobody knows) |
//! | `GET log/NODE` | newline-delimited JSON of [`LogEvent`] |
//! | `PUT blobs` | bytes → [`BlobAdded`] |
//! | `GET images`, `POST images` | list of [`ImageView`]; [`ImportImage`] → [`ImageView`] |
//! | `GET profiles`, `POST profiles` | list of [`ProfileView`]; [`CreateProfile`] → [`ProfileView`] |
//! | `POST profiles/NAME/publish` | empty → [`ProfileView`] |
//! | `GET profiles/NAME/boot` | [`BootFiles`] |
//! | `GET content` | [`ContentView`] |
//! | `POST tokens` (socket only) | [`TokenRequest`] → [`TokenCreated`] |
//! | `GET collective` | [`CollectiveView`] |
//! | `POST collective/invite` (socket only) | [`InviteRequest`] → [`Invited`] |
//! | `POST collective/replace` (socket only) | [`ReplaceRequest`] → [`Invited`] |
//! | `POST collective/{promote,demote,remove}` | [`MemberRequest`] → empty |
//! | `POST collective/rotate-key` | empty → [`KeysRotated`] |
//! | `GET authority` | [`AuthorityView`] |
//! | `POST authority/rotate` | empty → [`AuthorityRotated`] |
//! | `POST authority/cancel` | empty → [`AuthorityCancelled`] |
//! | `POST authority/retire` | [`RetireRequest`] → [`AuthorityRetired`] |
//! | `POST authority/{ssh-host,ssh-user}/{rotate,retire}` | as for that of certificates |
//! | `POST backup` (socket only, but for a redacted one) | [`BackupRequest`] → the backup |
//!
//! `GET /public/images/DIGEST` (ranges) and `GET /public/boot/PROFILE/{kernel,initramfs,site.cpio}` (and [`BOOT_LOADERS`]) need no token.

mod authority;
mod collective;

pub use authority::{
    AuthorityCancelled, AuthorityInfo, AuthorityKind, AuthorityRetired, AuthorityRotated, AuthorityState,
    AuthorityView, MemberTrust, RetireRequest, SshAuthorityInfo, SshRole, UnknownKind,
};
pub use collective::{
    BACKUP_MAGIC, BackupRequest, CollectiveMember, CollectiveView, ContentBlob, ContentView, InviteRequest, Invited,
    KeysRotated, MAX_UNREADABLE, MIN_PASSPHRASE, MemberRequest, ReplaceRequest, UnreadableSecret,
};

use crate::ids::{
    BootId, CollectiveId, DeploymentId, HwAddr, ImageDigest, ImageName, MemberId, NodeId, NodeName, ProfileName,
    Sha256Digest,
};
use crate::node::{Base64, MemberEndpoint};
use crate::problem::Problem;
use crate::trust::SiteBundle;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Header of an answer that may be out of date, because no majority of the members answers: why, in a few words.
pub const STALE: &str = "mooring-stale";

/// The collective as an administrator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteInfo {
    /// Version of the server.
    pub version: String,
    /// The collective.
    pub collective: CollectiveId,
    /// Its name.
    pub name: String,
    /// The member that answers.
    pub member: MemberId,
    /// All members.
    pub members: Vec<MemberEndpoint>,
    /// What the boot payload carries.
    pub bundle: SiteBundle,
    /// The `@cert-authority` lines for an administrator's `known_hosts`: two while one authority takes the place of another.
    pub known_hosts: Vec<String>,
}

/// Defines nodes; attributes are common to all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefineNodes {
    /// A noderange, evaluated purely (no look-ups).
    pub range: String,
    /// `category.attribute` to value.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
}

/// A range of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeRequest {
    /// Which nodes.
    pub range: String,
}

/// Sets or clears attributes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAttributes {
    /// Which nodes.
    pub range: String,
    /// New values. Values of `secret.*`, `crypted.*` and `custom.nodesecret.*` are never returned.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Names to clear.
    #[serde(default)]
    pub clear: Vec<String>,
}

impl std::fmt::Debug for SetAttributes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&String> = self.set.keys().collect();
        f.debug_struct("SetAttributes")
            .field("range", &self.range)
            .field("set", &names)
            .field("clear", &self.clear)
            .finish()
    }
}

/// Opens or closes the window in which nodes may enrol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmRequest {
    /// Which nodes.
    pub range: String,
    /// `once`, `continuous`, an RFC 3339 time until which it is open, or empty to disarm.
    pub until: String,
}

/// Orders a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployRequest {
    /// Which nodes.
    pub range: String,
    /// What they are to boot.
    pub profile: ProfileName,
}

/// Which nodes a change touched, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Their names.
    pub nodes: Vec<NodeName>,
    /// Nodes the change was refused for, with the reason.
    #[serde(default)]
    pub refused: BTreeMap<NodeName, Problem>,
}

/// A node as an administrator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Attributes; secret ones as `********`.
    pub attributes: BTreeMap<String, String>,
    /// How it is trusted.
    pub trust: TrustState,
    /// The image generation it last booted.
    #[serde(default)]
    pub pin: Option<ImageDigest>,
}

/// A node's identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrustState {
    /// None yet.
    Unenrolled,
    /// A TPM's attestation key is bound.
    Tpm,
    /// A soft key is bound.
    Soft,
    /// A soft key that was bound under continuous arming: it proves nothing but the machine's addresses.
    Unproven,
}

/// A change of state, with its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusEvent {
    /// The node.
    pub node: NodeName,
    /// The boot that reported it; absent when the server itself changed the state.
    #[serde(default)]
    pub boot: Option<BootId>,
    /// The state.
    pub state: String,
    /// A sentence.
    #[serde(default)]
    pub detail: String,
    /// When the server took it, Unix milliseconds.
    pub time_ms: u64,
    /// Milliseconds since the node's kernel started.
    #[serde(default)]
    pub uptime_ms: u64,
    /// Figures.
    #[serde(default)]
    pub figures: BTreeMap<String, u64>,
}

/// A piece of a node's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEvent {
    /// When, Unix milliseconds.
    pub time_ms: u64,
    /// `pre`, `post`, `firstboot`, `onboot` or `agent`.
    pub phase: String,
    /// Text.
    pub text: String,
}

/// Why a node does not boot, or what it did last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// What was asked for.
    pub subject: String,
    /// The node, when it is one.
    #[serde(default)]
    pub node: Option<NodeName>,
    /// Its state now.
    #[serde(default)]
    pub state: Option<StatusEvent>,
    /// Seconds since its last heartbeat, at whichever member; absent where none is known.
    #[serde(default)]
    pub heard: Option<u64>,
    /// Refusals, newest first, at most 50; kept over restarts.
    pub refusals: Vec<Refusal>,
    /// What an administrator should do, in sentences; empty when all is well.
    pub advice: Vec<String>,
}

/// One refusal to answer or to give something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// When, Unix milliseconds.
    pub time_ms: u64,
    /// From where (address and port).
    pub peer: String,
    /// Which call.
    pub call: String,
    /// What the machine said of itself, where it did.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Its hardware addresses.
    #[serde(default)]
    pub macs: Vec<HwAddr>,
    /// The reason, as the node was told.
    pub problem: Problem,
    /// How many equal ones came in a row.
    pub count: u64,
}

/// Bytes that a member holds now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobAdded {
    /// SHA-256 of the bytes.
    pub blob: Sha256Digest,
    /// How many.
    pub size: u64,
}

/// Puts an image into the catalogue as a new generation of its name. The blobs were added before.
#[derive(Clone, Serialize, Deserialize)]
pub struct ImportImage {
    /// Name; its lineage must match the generations that are there.
    pub name: ImageName,
    /// The sealed file.
    pub image: Sha256Digest,
    /// Its key (64 hexadecimal digits); absent for a plain image.
    #[serde(default)]
    pub key: Option<String>,
    /// Detached signatures (`FILE.moor.sig`).
    #[serde(default)]
    pub signatures: Option<Base64>,
    /// The kernel to boot it with.
    pub kernel: Sha256Digest,
    /// The initramfs.
    pub initramfs: Sha256Digest,
    /// The distribution's signed boot loaders, by one of [`BOOT_LOADERS`]: none, or shim and GRUB of an architecture.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub boot_loaders: BTreeMap<String, Sha256Digest>,
}

/// Names of shim and GRUB, by which shim looks for GRUB beside itself (UEFI Secure Boot): for x86-64, and for 64-bit Arm.
pub const BOOT_LOADERS: [[&str; 2]; 2] = [["shimx64.efi", "grubx64.efi"], ["shimaa64.efi", "grubaa64.efi"]];

impl std::fmt::Debug for ImportImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImportImage").field("name", &self.name).field("image", &self.image).finish_non_exhaustive()
    }
}

/// A generation of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// Name.
    pub name: ImageName,
    /// Header hash.
    pub digest: ImageDigest,
    /// Lineage.
    pub lineage: Uuid,
    /// Serial in the lineage.
    pub serial: u64,
    /// When it was sealed, Unix seconds.
    pub created: u64,
    /// Size of the sealed file in bytes.
    pub size: u64,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Kernel version, from the metadata.
    #[serde(default)]
    pub kernel_version: Option<String>,
    /// Operating system, from the metadata.
    #[serde(default)]
    pub os: Option<String>,
    /// Nodes pinned to it.
    pub pins: u64,
}

/// Makes the working directory of a new profile from a shipped one, or from another one that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateProfile {
    /// Its name.
    pub name: ProfileName,
    /// The image it boots; need not exist yet.
    pub image: ImageName,
    /// The profile to start from.
    pub template: String,
}

/// A profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileView {
    /// Name.
    pub name: ProfileName,
    /// The published generation that nodes get; absent before the first publish.
    #[serde(default)]
    pub generation: Option<Sha256Digest>,
    /// Counts publishes.
    pub serial: u64,
    /// When it was published, Unix seconds.
    pub published: u64,
    /// The image it boots.
    #[serde(default)]
    pub image: Option<ImageDigest>,
    /// Whether the working directory differs from the generation.
    pub modified: bool,
}

/// What a boot loader needs of a profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFiles {
    /// Blob of the kernel, at `/public/boot/PROFILE/kernel`.
    pub kernel: Sha256Digest,
    /// Blob of the image's initramfs, at `…/initramfs`; the site cpio (`…/site.cpio`) follows it.
    pub initramfs: Sha256Digest,
    /// Kernel command line.
    pub command_line: String,
    /// Blobs of shim and GRUB, at `…/NAME`, where the image brought them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub boot_loaders: BTreeMap<String, Sha256Digest>,
}

/// A new administrator's token for the HTTPS side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// For whom, shown in the audit log.
    pub name: String,
    /// How long it is good, in seconds.
    pub lifetime: u64,
}

/// Shown once; the member keeps a hash.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// The token.
    pub token: String,
    /// Unix seconds.
    pub expires: u64,
}

impl std::fmt::Debug for TokenCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenCreated(.., expires {})", self.expires)
    }
}

/// A deployment that the server opened for a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Its id.
    pub id: DeploymentId,
    /// What is to boot.
    pub profile: ProfileName,
}
