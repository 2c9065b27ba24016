//! The site bundle that the boot payload carries, and who may act as a member.

use crate::ids::{CollectiveId, MemberId};
use serde::{Deserialize, Serialize};

/// Where the site cpio puts the bundle in the initramfs.
pub const SITE_FILE: &str = "/etc/mooring/site.json";

/// What a node trusts and where it may look first. Public data; it decides nothing but trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteBundle {
    /// Grows with each change of the authorities.
    pub version: u64,
    /// The collective.
    pub collective: CollectiveId,
    /// Its name, for people.
    pub name: String,
    /// Root certificates in PEM, one per entry.
    pub roots: Vec<String>,
    /// `https://ADDRESS:PORT` of members; hints only, TLS decides.
    pub members: Vec<String>,
    /// `ssh-ed25519 …` lines of the SSH host authorities, as they were then; they have no part in [`Self::version`].
    pub ssh_host_authorities: Vec<String>,
    /// When the bundle was made, Unix seconds: no clock of a node is before it.
    pub built: u64,
}

/// URI SAN of a member's certificate.
#[must_use]
pub fn member_uri(collective: CollectiveId, member: MemberId) -> String {
    format!("mooring://{collective}/member/{member}")
}

/// URI SAN of the intermediate that issues certificates of `role` ("member", "node", "token").
#[must_use]
pub fn authority_uri(collective: CollectiveId, role: &str) -> String {
    format!("mooring://{collective}/authority/{role}")
}

/// The member that a URI SAN names, when it is one of `collective`.
#[must_use]
pub fn parse_member_uri(collective: CollectiveId, uri: &str) -> Option<MemberId> {
    uri.strip_prefix(&format!("mooring://{collective}/member/"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_uri_reads_back_and_no_other_does() {
        let (collective, member) = (CollectiveId::random(), MemberId::random());
        let uri = member_uri(collective, member);
        assert_eq!(parse_member_uri(collective, &uri), Some(member));
        assert_eq!(parse_member_uri(CollectiveId::random(), &uri), None);
        for bad in [format!("{uri}/x"), format!("mooring://{collective}/node/{member}"), String::new()] {
            assert_eq!(parse_member_uri(collective, &bad), None, "{bad}");
        }
    }
}
