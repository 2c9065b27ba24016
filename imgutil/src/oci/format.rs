//! The documents of an image (github.com/opencontainers/image-spec: index, manifest, configuration), and the list that `podman save`
//! and `docker save` write. Members that are of no use here are not read.

use serde::Deserialize;
use std::collections::BTreeMap;

/// The name of an image in an index.
pub(super) const NAME: &str = "org.opencontainers.image.ref.name";
/// The whole name, as containerd and docker write it.
pub(super) const FULL_NAME: &str = "io.containerd.image.name";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
    pub(super) variant: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// The configuration: what the layers must come to, and how the image's author means it to be run.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Configuration {
    pub(super) architecture: String,
    pub(super) os: String,
    pub(super) variant: Option<String>,
    pub(super) rootfs: RootFs,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RootFs {
    pub(super) diff_ids: Vec<String>,
}

/// An entry of `manifest.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    pub(super) repo_tags: Option<Vec<String>>,
    pub(super) layers: Vec<String>,
}

impl Platform {
    /// The words of this specification (Go's) for an architecture in Debian's.
    pub(super) fn for_debian(name: &str) -> Self {
        let (architecture, variant) = match name {
            "armhf" => ("arm", Some("v7")),
            "i386" => ("386", None),
            "ppc64el" => ("ppc64le", None),
            other => (other, None),
        };
        Self { architecture: architecture.to_owned(), os: "linux".to_owned(), variant: variant.map(str::to_owned) }
    }

    /// Whether an image for `self` is one for `wanted`. A variant counts only where both have one.
    pub(super) fn serves(&self, wanted: &Self) -> bool {
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && (wanted.variant.is_none() || self.variant.is_none() || self.variant == wanted.variant)
    }

    pub(super) fn shown(&self) -> String {
        let variant = self.variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
        format!("{}/{}{variant}", self.os, self.architecture)
    }
}
