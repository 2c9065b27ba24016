//! The authorities: which there are, who trusts them already, and how one takes the place of another.

use crate::ids::NodeName;
use serde::{Deserialize, Serialize};

/// The authorities, and who has heard of the newest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityView {
    /// The newest version of the trust bundle.
    pub version: u64,
    /// Those of certificates, oldest first; more than one while one takes the place of another.
    pub authorities: Vec<AuthorityInfo>,
    /// Those of SSH.
    pub ssh: Vec<SshAuthorityInfo>,
    /// All members.
    pub members: Vec<MemberTrust>,
    /// Nodes that have an identity: those that count here.
    pub nodes: usize,
    /// Those among them that have not said that they trust the newest bundle.
    pub nodes_behind: Vec<NodeName>,
    /// Nodes that trust it, and began their boot with an older one: if that came out of boot files that were made before, they will again.
    pub old_boot_files: Vec<NodeName>,
}

/// What becomes of an authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthorityState {
    /// Members' certificates are from it.
    InUse,
    /// It is trusted, and takes over when the one in use is retired.
    Next,
    /// It is retired; members still show certificates from it, or did a moment ago.
    Retiring,
}

/// An authority of certificates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityInfo {
    /// Counts from 1 on; never given twice.
    pub number: u32,
    /// What becomes of it.
    pub state: AuthorityState,
    /// SHA-256 of the root certificate, hexadecimal.
    pub fingerprint: String,
    /// When it was made, Unix seconds.
    pub made: u64,
    /// Until when it is good, Unix seconds: the root, or the member authority under it, whichever ends first.
    pub expires: u64,
}

/// An authority of SSH.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAuthorityInfo {
    /// `host` or `user`: what it certifies.
    pub role: String,
    /// `SHA256:…`, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// When it was made, Unix seconds.
    pub made: u64,
}

/// What a member has taken up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberTrust {
    /// Its name.
    pub name: String,
    /// The version of the trust bundle.
    pub version: u64,
    /// The number of the authority that its certificate is from.
    pub shows: u32,
}

/// A new authority is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRotated {
    /// Its number.
    pub number: u32,
    /// The version of the trust bundle that has it.
    pub version: u64,
}

/// A new authority is not wanted any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityCancelled {
    /// Its number, which none has again.
    pub number: u32,
    /// The version of the trust bundle that is without it.
    pub version: u64,
}

/// Asks to retire the oldest authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetireRequest {
    /// Nodes that have not acknowledged the newest bundle are left behind.
    #[serde(default)]
    pub force: bool,
}

/// An authority is retired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRetired {
    /// Its number.
    pub number: u32,
    /// Nodes that were left behind: they trust no member any more.
    pub left_behind: Vec<NodeName>,
    /// Members that still show certificates from it, because they do not run: as long as they do it is trusted.
    pub waits_for: Vec<String>,
    /// Nodes that began their boot with a bundle from before the rotation.
    pub old_boot_files: Vec<NodeName>,
}
