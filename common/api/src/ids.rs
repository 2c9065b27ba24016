//! Names and numbers that identify things, as types, so that one cannot stand where another belongs.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// A text is not a valid identifier of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a valid {kind}: {reason}")]
pub struct InvalidId {
    /// What it should have been, in words ("node name").
    pub kind: &'static str,
    /// What was given, cut to 80 characters.
    pub text: String,
    /// Which rule it breaks.
    pub reason: &'static str,
}

fn invalid(kind: &'static str, text: &str, reason: &'static str) -> InvalidId {
    InvalidId { kind, text: text.chars().take(80).collect(), reason }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random one.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// From its 16 bytes, in the order of the text form.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes that proofs and keys hash.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::parse_str(text).map(Self).map_err(|_| invalid($kind, text, "not a UUID"))
            }
        }
    };
}

uuid_id!(
    /// A node, for ever: random, immutable, never reused. Name, UUID, MACs, serial and TPM are attributes of it.
    NodeId, "node id"
);
uuid_id!(
    /// A member of a collective.
    MemberId, "member id"
);
uuid_id!(
    /// A collective: the members that share one truth.
    CollectiveId, "collective id"
);
uuid_id!(
    /// One boot of one node, drawn by the agent in the initramfs.
    BootId, "boot id"
);
uuid_id!(
    /// One order to deploy; consumed exactly once by an installation.
    DeploymentId, "deployment id"
);

/// SHA-256 of something, written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

/// The digest of an image: its header hash. Pins, URLs and the catalogue name images by it.
pub type ImageDigest = Sha256Digest;

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sha256Digest({self})")
    }
}

impl FromStr for Sha256Digest {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| invalid("digest", text, "not 64 hexadecimal digits"))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Sha256Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An Ethernet (6 bytes) or `InfiniBand` (20 bytes) hardware address, in lower case with colons.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HwAddr(String);

impl HwAddr {
    /// The canonical text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HwAddr {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let error = |reason| invalid("hardware address", text, reason);
        let lower = text.to_ascii_lowercase().replace('-', ":");
        let parts: Vec<&str> = lower.split(':').collect();
        if !matches!(parts.len(), 6 | 20) {
            return Err(error("it has neither 6 nor 20 bytes"));
        }
        if parts.iter().any(|part| part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Err(error("each byte is two hexadecimal digits"));
        }
        Ok(Self(lower))
    }
}

impl TryFrom<String> for HwAddr {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<HwAddr> for String {
    fn from(address: HwAddr) -> Self {
        address.0
    }
}

impl fmt::Display for HwAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name in the user's world (node, group, profile, image): 1 to 63 of `a-z A-Z 0-9 . _ -`, first a letter or digit.
/// It is safe as a file name and as a path segment of a URL.
fn check_name(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    if text.is_empty() || text.len() > 63 {
        return Err(invalid(kind, text, "it has 1 to 63 characters"));
    }
    if !text.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(invalid(kind, text, "it begins with a letter or a digit"));
    }
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Err(invalid(kind, text, "only letters, digits, '.', '_' and '-' are allowed"));
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check_name($kind, text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                check_name($kind, &text)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The name of a node; may change, its [`NodeId`] does not.
    NodeName, "node name"
);
name_type!(
    /// The name of a profile.
    ProfileName, "profile name"
);
name_type!(
    /// The name of an image; its generations share a lineage.
    ImageName, "image name"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_file_names() {
        for good in ["n1", "rack-1.n_2", "0", "A"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-n", "a/b", "a b", "ä", &"x".repeat(64), "a\n", ".hidden"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
            assert!(serde_json::from_value::<NodeName>(serde_json::json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn hardware_addresses_become_canonical() {
        assert_eq!("52-54-00-AB-cd-01".parse::<HwAddr>().unwrap().as_str(), "52:54:00:ab:cd:01");
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:1", "52:54:00:ab:cd:0g", "525400abcd01"] {
            assert!(bad.parse::<HwAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_64_hexadecimal_digits() {
        let text = "00ff".repeat(16);
        assert_eq!(text.parse::<Sha256Digest>().unwrap().to_string(), text);
        assert!("00".parse::<Sha256Digest>().is_err());
    }
}
