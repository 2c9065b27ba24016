//! The site bundle that the boot payload carries, and who may act as a member.

use crate::ids::{CollectiveId, MemberId};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;

/// Where the site cpio puts the bundle in the initramfs.
pub const SITE_FILE: &str = "/etc/mooring/site.json";

/// How often the collective began anew (a survivor of a lost majority went on alone, or a backup was restored), from 1 on. Members of an earlier
/// one are none any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(NonZeroU64);

impl Incarnation {
    /// The one that was founded.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// Whether it is the one that was founded. Nothing is written of that: it is as before there was a number.
    #[must_use]
    pub fn is_first(&self) -> bool {
        *self == Self::FIRST
    }

    /// The one that comes after this.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Default for Incarnation {
    fn default() -> Self {
        Self::FIRST
    }
}

impl std::fmt::Display for Incarnation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

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
    /// Who trusts this bundle believes no member of an earlier incarnation.
    #[serde(default, skip_serializing_if = "Incarnation::is_first")]
    pub incarnation: Incarnation,
}

/// URI SAN of a member's certificate.
#[must_use]
pub fn member_uri(collective: CollectiveId, member: MemberId) -> String {
    format!("mooring://{collective}/member/{member}")
}

/// URI SAN that stands beside that of a member, unless the incarnation is the first.
#[must_use]
pub fn incarnation_uri(collective: CollectiveId, incarnation: Incarnation) -> String {
    format!("mooring://{collective}/incarnation/{incarnation}")
}

/// The incarnation that a URI SAN names, when it is one of `collective`.
#[must_use]
pub fn parse_incarnation_uri(collective: CollectiveId, uri: &str) -> Option<Incarnation> {
    uri.strip_prefix(&format!("mooring://{collective}/incarnation/"))?.parse().ok().map(Incarnation)
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

    #[test]
    fn an_incarnation_uri_reads_back_and_names_no_member() {
        let collective = CollectiveId::random();
        let second = Incarnation::FIRST.next();
        let uri = incarnation_uri(collective, second);
        assert_eq!(parse_incarnation_uri(collective, &uri), Some(second));
        assert_eq!(parse_incarnation_uri(CollectiveId::random(), &uri), None);
        assert_eq!(parse_member_uri(collective, &uri), None, "an older release finds the member's beside it");
        for bad in ["0", "-1", "", "x", "18446744073709551616"] {
            let uri = format!("mooring://{collective}/incarnation/{bad}");
            assert_eq!(parse_incarnation_uri(collective, &uri), None, "{uri}");
        }
    }

    #[test]
    fn a_bundle_of_the_first_incarnation_is_as_before_there_was_a_number() {
        let text = format!(
            r#"{{"version":1,"collective":"{}","name":"x","roots":[],"members":[],"ssh_host_authorities":[],"built":1}}"#,
            CollectiveId::random()
        );
        let bundle: SiteBundle = serde_json::from_str(&text).unwrap();
        assert_eq!(bundle.incarnation, Incarnation::FIRST);
        assert_eq!(serde_json::to_string(&bundle).unwrap(), text);
        let second = SiteBundle { incarnation: Incarnation::FIRST.next(), ..bundle };
        let text = serde_json::to_string(&second).unwrap();
        assert_eq!(serde_json::from_str::<SiteBundle>(&text).unwrap(), second);
        assert!(serde_json::from_str::<SiteBundle>(&text.replace("n\":2", "n\":0")).is_err(), "{text}");
    }
}
