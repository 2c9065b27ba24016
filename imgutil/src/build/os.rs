//! What `build` knows of each operating system: the data files under `imgutil/os/`, parsed. No code here is about one OS.

use serde::Deserialize;
use std::collections::BTreeMap;

/// The data files, one per release.
const FILES: [&str; 5] = [
    include_str!("../../os/debian-12.toml"),
    include_str!("../../os/debian-13.toml"),
    include_str!("../../os/ubuntu-22.04.toml"),
    include_str!("../../os/ubuntu-24.04.toml"),
    include_str!("../../os/ubuntu-26.04.toml"),
];

/// One release of one distribution.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Os {
    /// As given to `--os`.
    pub(super) name: String,
    /// Which tools install its packages.
    pub(super) backend: BackendName,
    /// The archive's name for it; `{release}` in addresses.
    pub(super) release: String,
    /// Whether an image of it has been built and booted where Mooring is made.
    #[serde(default)]
    pub(super) tested: bool,
    /// Address of the main archive; `{mirror}` in addresses of repositories.
    pub(super) mirror: String,
    /// Address of the archive of security updates, if it is another one; `{security-mirror}` in addresses.
    pub(super) security_mirror: Option<String>,
    /// Where packages come from.
    #[serde(rename = "repository")]
    pub(super) repositories: Vec<OsRepository>,
    /// What differs between architectures, by their names in `uname -m`.
    pub(super) arch: BTreeMap<String, OsArch>,
    /// What makes the initramfs.
    pub(super) initramfs: Initramfs,
    /// What is installed.
    pub(super) packages: Packages,
    /// What is enabled.
    pub(super) services: Services,
}

impl Os {
    /// Its architectures in its own words, sorted.
    pub(super) fn architectures(&self) -> Vec<String> {
        let mut names: Vec<String> = self.arch.values().map(|arch| arch.name.clone()).collect();
        names.sort();
        names
    }
}

/// The tools that install packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum BackendName {
    /// mmdebstrap and apt.
    Apt,
}

/// A repository of a release.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct OsRepository {
    /// Short name.
    pub(super) name: String,
    /// Its address, with `{mirror}`, `{security-mirror}`, `{release}` and `{arch}` to be filled in.
    pub(super) uri: String,
    /// Its suites, where the back end knows such.
    #[serde(default)]
    pub(super) suites: Vec<String>,
    /// Sections that are used, where the back end knows such.
    #[serde(default)]
    pub(super) components: Vec<String>,
    /// File with its public keys, on the host and in the image.
    pub(super) key: String,
    /// The host's package that brings that file.
    pub(super) key_package: String,
}

/// A release on one architecture.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct OsArch {
    /// The distribution's name for it.
    pub(super) name: String,
    /// Packages that bring the kernel.
    pub(super) kernel: Vec<String>,
    /// Main archive, where it is another one than for most architectures.
    pub(super) mirror: Option<String>,
    /// Archive of security updates, likewise.
    pub(super) security_mirror: Option<String>,
}

/// How an initramfs is made, unless the packages of the image bring another tool.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Initramfs {
    /// With which tool.
    pub(super) tool: InitramfsTool,
    /// Where the distribution keeps it, with `{kernel}` for the kernel's version.
    pub(super) file: String,
}

/// The tools that make an initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum InitramfsTool {
    /// `update-initramfs` of Debian and Ubuntu.
    InitramfsTools,
    /// `dracut` of all others.
    Dracut,
}

/// Package lists of the two bases.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Packages {
    /// Enough for the package manager to go on in the image.
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

/// All releases.
pub(super) fn all() -> Vec<Os> {
    // The test below parses each: a broken file does not reach a user.
    FILES.iter().filter_map(|text| toml::from_str(text).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_data_file_parses_and_is_complete() {
        for text in FILES {
            let os: Os = toml::from_str(text).unwrap();
            assert!(os.arch.contains_key("x86_64"), "{}", os.name);
            assert!(os.arch.values().all(|arch| !arch.kernel.is_empty()), "{}", os.name);
            assert!(os.initramfs.file.contains("{kernel}"), "{}", os.name);
            assert_eq!(find(&os.name).unwrap().release, os.release);
        }
        let names = ["debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04", "ubuntu-26.04"];
        assert_eq!(find("debian").unwrap_err(), names);
    }
}
