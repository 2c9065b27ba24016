//! What an image says of itself: canonical JSON (RFC 8785), so that equal content is equal bytes.

use crate::error::ImageError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The metadata section.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// Image name.
    pub name: String,
    /// `ID-VERSION_ID` of os-release(5), such as `debian-12`.
    #[serde(default)]
    pub os: String,
    /// Architecture as `uname -m` says it.
    #[serde(default)]
    pub arch: String,
    /// Release of the newest kernel in it.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Program and version that packed it.
    #[serde(default)]
    pub builder: String,
    /// What it was made from.
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
    /// SHA-256 of the plaintext, hexadecimal: equal for reproducible builds.
    pub payload_sha256: String,
    /// Installed packages.
    #[serde(default)]
    pub packages: Vec<Package>,
    /// The filesystems in the payload, in order.
    #[serde(default)]
    pub filesystems: Vec<Filesystem>,
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// Architecture.
    pub arch: String,
}

/// One filesystem of the payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Where it is mounted.
    pub mount: String,
    /// Offset in the plaintext, a multiple of 1 MiB.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// How the disk it came from was laid out; empty for an image built as a tree.
    #[serde(default)]
    pub layout: String,
}

impl Metadata {
    /// The canonical bytes.
    ///
    /// # Errors
    /// It does not serialise (never, for values of this type).
    pub fn to_bytes(&self) -> Result<Vec<u8>, ImageError> {
        serde_json_canonicalizer::to_vec(self).map_err(|error| ImageError::Metadata(error.to_string()))
    }

    /// Parses it. Unknown fields are passed over: a later minor version may add some.
    ///
    /// # Errors
    /// Not JSON, or not of this shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ImageError> {
        serde_json::from_slice(bytes).map_err(|error| ImageError::Metadata(error.to_string()))
    }
}
