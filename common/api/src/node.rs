//! `/node/v1`: what a node says to a member (DESIGN.md §4). TLS 1.3 only. Errors are [`crate::problem::Problem`].
//!
//! | Call | Body → answer |
//! |---|---|
//! | `POST hello` | [`Hello`] → [`HelloReply`] |
//! | `POST enroll` | [`EnrollRequest`] → [`EnrollReply`] |
//! | `POST enroll/complete` | [`EnrollComplete`] → [`Enrolled`] |
//! | `POST session` | [`SessionRequest`] → [`SessionReply`] |
//! | `GET config` | [`crate::deploy::DeployDocument`] |
//! | `GET image` | [`ImageOffer`] (boot stage) |
//! | `POST image/key` | [`KeyRequest`] → [`KeyEnvelope`] (boot stage) |
//! | `GET files/PATH`, `GET scripts/PHASE/PATH` | bytes; `private/` in boot stage only |
//! | `POST ssh/host-certificates` | [`HostCertificateRequest`] → [`HostCertificates`] |
//! | `GET ssh/trust` | [`SshTrust`] |
//! | `POST status` | [`StatusReport`] → 204 |
//! | `POST log` | [`LogReport`] → 204 |
//! | `POST stage-closed` | [`StageClosed`] → 204; ends the boot stage of this boot |
//! | `POST heartbeat` | [`Heartbeat`] → [`HeartbeatReply`] |
//! | `POST trace` | [`TraceReport`] → 204; what the root read of its image |
//! | `GET attributes` | map of the node's own attributes |
//!
//! `enroll`, `session` and all calls with a token go over a connection whose client certificate is the session key's (RFC 8705);
//! the token is sent as `Authorization: Bearer TOKEN`. Bytes in JSON are standard base64 with padding ([`Base64`]).

pub use crate::bytes::{Base64, HexBytes};

use crate::deploy::{PhaseName, RootMode};
use crate::ids::{BootId, CollectiveId, HwAddr, ImageDigest, ImageName, MemberId, NodeId, NodeName, Sha256Digest};
use crate::problem::Problem;
use crate::trust::SiteBundle;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Longest JSON body of a call, in bytes; the event log is the largest part.
pub const MAX_BODY: usize = 1 << 20;

/// Most MAC addresses in a hello.
pub const MAX_MACS: usize = 64;

/// What anybody may say: which machine is this?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the agent.
    pub agent_version: String,
    /// What it can do, in words ("tpm2", "tethered"); unknown words are ignored.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// SMBIOS system UUID in canonical text; absent where the firmware has none.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// SMBIOS serial number.
    #[serde(default)]
    pub serial: Option<String>,
    /// Hardware addresses of its interfaces.
    #[serde(default)]
    pub macs: Vec<HwAddr>,
    /// Architecture as `uname -m` says it.
    pub arch: String,
    /// This boot.
    pub boot: BootId,
}

/// The member's answer to a hello. A machine that is unknown or refused gets the reason; `moor why` shows the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The collective.
    pub collective: CollectiveId,
    /// The member that answers.
    pub member: MemberId,
    /// Who the machine is, when it is known.
    #[serde(default)]
    pub node: Option<KnownNode>,
    /// Why it can't go on, when it can't.
    #[serde(default)]
    pub refusal: Option<Problem>,
    /// All members, for the rest of the boot: in the order in which the machine is to try them, where it is known.
    pub members: Vec<MemberEndpoint>,
    /// The member's clock, Unix seconds.
    pub time: u64,
}

/// A known machine and what it may do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownNode {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// What to do next.
    pub next: NextStep,
    /// Good for one enrolment or session within 60 s at this member ([`crate::proof::NONCE_LENGTH`] bytes).
    pub nonce: Base64,
    /// What a quote has to select.
    pub quote: PcrRequest,
}

/// What the member expects of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NextStep {
    /// It is armed: enrol by TPM, or by a soft key where there is no TPM.
    Enroll,
    /// It is enrolled by TPM.
    SessionTpm,
    /// It is enrolled by a soft key.
    SessionSoft,
}

/// A PCR selection: exactly this, in exactly one bank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcrRequest {
    /// The bank pinned at enrolment; absent before: the node's choice, SHA-256 preferred.
    #[serde(default)]
    pub bank: Option<PcrBank>,
    /// PCR numbers, ascending, always with 15.
    pub pcrs: Vec<u8>,
}

/// A PCR bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PcrBank {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
}

/// Where a member is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberEndpoint {
    /// The member.
    pub id: MemberId,
    /// `https://ADDRESS:PORT`, nearest first, no path.
    pub urls: Vec<String>,
}

/// A request for an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrollRequest {
    /// The node, from hello.
    pub node: NodeId,
    /// This boot.
    pub boot: BootId,
    /// The nonce from hello.
    pub nonce: Base64,
    /// By which method.
    pub method: EnrollMethod,
}

/// Keys a node brings. TPM structures are in the wire format of the TPM library specification, part 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum EnrollMethod {
    /// TPM 2.0: the member answers with a credential that only this TPM can activate.
    Tpm {
        /// `TPMT_PUBLIC` of the endorsement key.
        ek_public: Base64,
        /// Its X.509 certificate (DER), where the TPM has one.
        #[serde(default)]
        ek_certificate: Option<Base64>,
        /// `TPMT_PUBLIC` of the attestation key.
        ak_public: Base64,
        /// The PCR bank of all quotes to come.
        bank: PcrBank,
    },
    /// A P-256 key in a file: bound at once.
    Soft {
        /// DER `SubjectPublicKeyInfo`.
        public_key: Base64,
        /// ECDSA (ASN.1) with SHA-256 over the enrolment proof's digest.
        signature: Base64,
    },
}

/// The answer to an enrolment request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum EnrollReply {
    /// Activate this, then complete.
    Challenge {
        /// Names the open enrolment.
        enrollment: Uuid,
        /// `TPM2B_ID_OBJECT` as it goes into `TPM2_ActivateCredential` (with its size field).
        credential: Base64,
        /// `TPM2B_ENCRYPTED_SECRET` (with its size field).
        secret: Base64,
    },
    /// The key is bound (soft key, or the same TPM again within the window).
    Enrolled(Enrolled),
}

/// The proof that the TPM activated the credential and that the key is its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrollComplete {
    /// From the challenge.
    pub enrollment: Uuid,
    /// The activated secret.
    pub secret: Base64,
    /// A quote by the attestation key over the enrolment proof's digest (same nonce, same connection).
    pub quote: Quote,
}

/// The identity is bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// Raised at each binding; tokens of an older epoch are refused.
    pub epoch: u64,
    /// A new nonce, for the session that follows.
    pub nonce: Base64,
}

/// A TPM quote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quote {
    /// `TPMS_ATTEST`.
    pub attest: Base64,
    /// `TPMT_SIGNATURE`.
    pub signature: Base64,
    /// The quoted values, by PCR number.
    #[serde(deserialize_with = "numbered")]
    pub pcrs: BTreeMap<u8, HexBytes>,
    /// The firmware's event log, where there is one (at most 512 KiB; recorded).
    #[serde(default)]
    pub event_log: Option<Base64>,
}

/// The keys of a JSON object are text, and inside a tagged enum ([`SessionProof`]) serde does not make numbers of it.
fn numbered<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u8, HexBytes>, D::Error> {
    let values = BTreeMap::<String, HexBytes>::deserialize(deserializer)?.into_iter();
    values.map(|(key, value)| Ok((key.parse().map_err(serde::de::Error::custom)?, value))).collect()
}

/// The part of a boot: before the operating system's own init runs, and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// May ask for secrets and the image key. PCR 15 is zero.
    Boot,
    /// May ask for the rest. PCR 15 is closed.
    Run,
}

/// A request for a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRequest {
    /// The node.
    pub node: NodeId,
    /// This boot.
    pub boot: BootId,
    /// The nonce from hello, from [`Enrolled`] or from the last [`SessionReply`].
    pub nonce: Base64,
    /// Which stage the token is for.
    pub stage: Stage,
    /// The proof over [`crate::proof::Purpose::Session`].
    pub proof: SessionProof,
}

/// How the node proves itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum SessionProof {
    /// A quote by the enrolled attestation key.
    Tpm {
        /// Its extraData is the proof's digest.
        quote: Quote,
    },
    /// A signature by the enrolled soft key.
    Soft {
        /// ECDSA (ASN.1) with SHA-256 over the proof's digest.
        signature: Base64,
    },
}

/// A token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReply {
    /// Opaque to the node; good only over connections with the session key's certificate.
    pub token: String,
    /// Unix seconds after which it is refused.
    pub expires: u64,
    /// Its stage.
    pub stage: Stage,
}

impl std::fmt::Debug for SessionReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionReply(.., {:?}, expires {})", self.stage, self.expires)
    }
}

/// What root image to boot and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// Its name.
    pub name: ImageName,
    /// Header hash: the node pins it.
    pub digest: ImageDigest,
    /// Size of the sealed file in bytes.
    pub size: u64,
    /// Lineage id the header must show.
    pub lineage: Uuid,
    /// Smallest serial that is accepted.
    pub minimum_serial: u64,
    /// `ssh-ed25519 …` lines; not empty: one of them must have signed the image.
    #[serde(default)]
    pub signers: Vec<String>,
    /// Detached signature file (`FILE.moor.sig`), where there is one.
    #[serde(default)]
    pub signatures: Option<Base64>,
    /// Full URLs of the image at all members, in the order in which this node is to try them; all that have it serve the same bytes.
    pub urls: Vec<String>,
    /// Whether those URLs want the token (plain images do).
    pub token_required: bool,
    /// How to use it.
    pub root: RootMode,
    /// Chunks that earlier boots of this image read, in their order: worth fetching before they are asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefetch: Vec<u64>,
}

/// A request for an image key. The member records it and proposes the node's pin with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRequest {
    /// The image.
    pub digest: ImageDigest,
}

/// A wrapped image key (DESIGN.md §3, "envelopes").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyEnvelope {
    /// How it is wrapped.
    #[serde(rename = "type")]
    pub kind: EnvelopeKind,
    /// For whom.
    pub recipient: NodeId,
    /// First 16 bytes of SHA-256("moor/v1 key-id" ‖ DEK), as in the header.
    pub key_id: HexBytes,
    /// Nonce of the wrapping; empty for `plain`.
    pub nonce: Base64,
    /// The DEK, wrapped; for `plain` the 32 bytes themselves, which only the TLS connection protects.
    pub wrapped: Base64,
}

/// Types of key envelopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnvelopeKind {
    /// Not wrapped: inside TLS to a proven node only.
    Plain,
    /// Under the collective's data key: at rest on members.
    ClusterKey,
    /// Under a TPM credential of the recipient.
    TpmCredential,
}

/// Host keys made on the node, to be certified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCertificateRequest {
    /// `ssh-ed25519 AAAA…` lines, at most 8.
    pub public_keys: Vec<String>,
}

/// Host certificates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCertificates {
    /// `ssh-ed25519-cert-v01@openssh.com AAAA…` lines, in the order of the request. Principals: the node's names and addresses.
    pub certificates: Vec<String>,
    /// When to come again, Unix seconds.
    pub renew_after: u64,
    /// Version of the SSH authorities by which the one was chosen that signed them.
    #[serde(default = "first_version")]
    pub version: u64,
}

/// Members of before the SSH authorities were rotated know one version, and do not say so.
pub(crate) fn first_version() -> u64 {
    1
}

/// What the node's sshd trusts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshTrust {
    /// `@cert-authority * ssh-ed25519 …` lines for `ssh_known_hosts`.
    pub known_hosts: Vec<String>,
    /// Host names for `shosts.equiv`: users on these hosts log in by host-based authentication.
    pub shosts: Vec<String>,
    /// Lines for root's `authorized_keys`.
    pub authorized_keys: Vec<String>,
    /// Public keys of the user certificate authorities, for `TrustedUserCAKeys`.
    #[serde(default)]
    pub user_authorities: Vec<String>,
    /// Version of the SSH authorities that this is of.
    #[serde(default = "first_version")]
    pub version: u64,
}

/// A change of the node's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// This boot.
    pub boot: BootId,
    /// Counts up within a boot, so that a report sent twice is taken once.
    pub sequence: u64,
    /// A word: `image`, `mount`, `switch-root`, `booted`, `failed`…
    pub state: String,
    /// A sentence for people; the reason where it failed.
    #[serde(default)]
    pub detail: String,
    /// Milliseconds since the kernel started (`CLOCK_BOOTTIME`).
    pub uptime_ms: u64,
    /// Figures that belong to it (`image.bytes_fetched` = 81788928), for `moor status` and the demo.
    #[serde(default)]
    pub figures: BTreeMap<String, u64>,
}

/// Output of a phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogReport {
    /// This boot.
    pub boot: BootId,
    /// The phase it belongs to; absent: the agent itself.
    #[serde(default)]
    pub phase: Option<PhaseName>,
    /// Text, at most 64 KiB.
    pub text: String,
}

/// The boot stage of this boot is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageClosed {
    /// This boot.
    pub boot: BootId,
}

/// The node is alive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// This boot.
    pub boot: BootId,
    /// Version of the trust bundle that it holds.
    pub trust_version: u64,
    /// Version of the SSH authorities that it has taken up: it trusts those, and its host certificates are of that version or a newer one. 0: it
    /// takes none up while it runs.
    #[serde(default)]
    pub ssh_version: u64,
}

/// What the root read of its image while the node booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceReport {
    /// This boot.
    pub boot: BootId,
    /// The image.
    pub digest: ImageDigest,
    /// Chunks, in the order of their first read; at most [`MAX_TRACE`].
    pub chunks: Vec<u64>,
}

/// Most chunks of a trace.
pub const MAX_TRACE: usize = 20_000;

/// What changed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// Seconds until the next one.
    pub interval: u32,
    /// Version of the members' trust bundle.
    pub trust_version: u64,
    /// Version of the SSH authorities. A node that holds an older one fetches `ssh/trust` and `ssh/host-certificates` anew, and acknowledges
    /// it with the version in its next heartbeat.
    #[serde(default = "first_version")]
    pub ssh_version: u64,
    /// The digest of what it should run; unlike its own: a new boot is due.
    #[serde(default)]
    pub generation: Option<Sha256Digest>,
    /// All members as they are reached now. Empty: the member does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<MemberEndpoint>,
    /// The members' trust bundle, where the node holds an older one. The node acknowledges it with the version in its next heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<SiteBundle>,
}

/// Where a member that is reached at `base` serves a sealed image.
#[must_use]
pub fn image_url(base: &str, digest: ImageDigest) -> String {
    format!("{}/public/images/{digest}", base.trim_end_matches('/'))
}
