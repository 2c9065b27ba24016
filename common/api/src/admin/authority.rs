//! The authorities: which there are, who trusts them already, and how one takes the place of another.

use crate::ids::NodeName;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What an SSH authority certifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SshRole {
    /// Hosts' keys.
    Host,
    /// Users' keys.
    User,
}

impl SshRole {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Host, Self::User];

    /// `host` or `user`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::User => "user",
        }
    }
}

impl fmt::Display for SshRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An authority that is rotated by itself: `x509`, `ssh-host`, `ssh-user`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthorityKind {
    /// That of certificates.
    X509,
    /// One of SSH.
    Ssh(SshRole),
}

impl fmt::Display for AuthorityKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X509 => f.write_str("x509"),
            Self::Ssh(role) => write!(f, "ssh-{role}"),
        }
    }
}

/// It is none of the three words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no such kind of authority: it is x509, ssh-host or ssh-user")]
pub struct UnknownKind;

impl FromStr for AuthorityKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        match text {
            "x509" => Ok(Self::X509),
            "ssh-host" => Ok(Self::Ssh(SshRole::Host)),
            "ssh-user" => Ok(Self::Ssh(SshRole::User)),
            _ => Err(UnknownKind),
        }
    }
}

/// The authorities, and who has heard of the newest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityView {
    /// The newest version of the trust bundle.
    pub version: u64,
    /// Those of certificates, oldest first; more than one while one takes the place of another.
    pub authorities: Vec<AuthorityInfo>,
    /// Those of SSH: of hosts, then of users, each oldest first; more than one of a kind while one takes the place of another.
    pub ssh: Vec<SshAuthorityInfo>,
    /// The newest version of what there is to know of those of SSH.
    #[serde(default = "crate::node::first_version")]
    pub ssh_version: u64,
    /// Nodes with an identity that have not said that they have taken that up.
    #[serde(default)]
    pub ssh_behind: Vec<NodeName>,
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthorityState {
    /// Members' certificates are from it. Of SSH: those of hosts are, or those of users may be.
    #[default]
    InUse,
    /// It is trusted, and takes over when the one in use is retired. Of users: certificates from it are good already.
    Next,
    /// It is retired; members (of SSH: nodes) still show certificates from it, or did a moment ago.
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
    /// What it certifies.
    pub role: SshRole,
    /// Counts from 1 on, for each role; never given twice.
    #[serde(default = "first_number")]
    pub number: u32,
    /// What becomes of it.
    #[serde(default)]
    pub state: AuthorityState,
    /// `SHA256:…`, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// When it was made, Unix seconds.
    pub made: u64,
}

/// Before there was a number, there was one authority.
fn first_number() -> u32 {
    1
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
    /// The version of the trust bundle that has it; of SSH: that of the SSH authorities.
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
    /// Nodes that have not acknowledged the newest bundle, or the newest SSH authorities, are left behind.
    #[serde(default)]
    pub force: bool,
}

/// An authority is retired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRetired {
    /// Its number.
    pub number: u32,
    /// Nodes that were left behind: they trust no member any more. Of SSH: until they run and have heard of it.
    pub left_behind: Vec<NodeName>,
    /// Members (of SSH: nodes) that still show certificates from it, because they do not run or have not heard of it yet: as long as they do it
    /// is trusted.
    pub waits_for: Vec<String>,
    /// Nodes that began their boot with a bundle from before the rotation. None for SSH: a boot begins with nothing.
    pub old_boot_files: Vec<NodeName>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_reads_back_and_no_other_word_does() {
        for kind in [AuthorityKind::X509, AuthorityKind::Ssh(SshRole::Host), AuthorityKind::Ssh(SshRole::User)] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        for word in ["", "ssh", "ssh-", "SSH-USER", "host", "x509 "] {
            assert_eq!(word.parse::<AuthorityKind>(), Err(UnknownKind), "{word:?}");
        }
    }
}
