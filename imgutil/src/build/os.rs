//! What `build` knows of each operating system: the data files under `imgutil/os/`, parsed. No code here is about one OS.

use serde::Deserialize;
use std::collections::BTreeMap;

/// The data files, one per release.
const FILES: [&str; 3] = [
    include_str!("../../os/debian-12.toml"),
    include_str!("../../os/debian-13.toml"),
    include_str!("../../os/ubuntu-24.04.toml"),
];

/// One release of one distribution.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Os {
    /// As given to `--os`.
    pub(super) name: String,
    /// The archive's name for it.
    pub(super) release: String,
    /// Sections of the archive that are used.
    pub(super) components: Vec<String>,
    /// The archive's public keys, on the host and in the image.
    pub(super) keyring: String,
    /// The host's package that brings the keyring.
    pub(super) keyring_package: String,
    /// Where packages come from.
    pub(super) mirror: Mirror,
    /// Kernel package by architecture.
    pub(super) kernel: BTreeMap<String, String>,
    /// What is installed beside essential packages.
    pub(super) packages: Packages,
    /// What is enabled.
    pub(super) services: Services,
}

/// The archives of a release.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Mirror {
    /// The main archive.
    pub(super) archive: String,
    /// Suite of stable updates in the main archive.
    pub(super) updates: String,
    /// The archive of security updates.
    pub(super) security: String,
    /// Its suite.
    pub(super) security_suite: String,
}

/// Package lists of the two bases.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Packages {
    /// Enough for apt to go on.
    pub(super) minimal: Vec<String>,
    /// What a node boots with, on top of it; the kernel is named elsewhere.
    pub(super) node: Vec<String>,
}

/// Units to enable.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Services {
    /// Those of a node.
    pub(super) node: Vec<String>,
}

/// The release called `name`; the names that exist, if there is none.
pub(super) fn find(name: &str) -> Result<Os, Vec<String>> {
    let all = all();
    let names = all.iter().map(|os| os.name.clone()).collect();
    all.into_iter().find(|os| os.name == name).ok_or(names)
}

fn all() -> Vec<Os> {
    // The test below parses each: a broken file does not reach a user.
    FILES.iter().filter_map(|text| toml::from_str(text).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_data_file_parses_and_names_a_kernel() {
        for text in FILES {
            let os: Os = toml::from_str(text).unwrap();
            assert!(os.kernel.contains_key("amd64"), "{}", os.name);
            assert_eq!(find(&os.name).unwrap().release, os.release);
        }
        assert_eq!(find("debian").unwrap_err(), ["debian-12", "debian-13", "ubuntu-24.04"]);
    }
}
