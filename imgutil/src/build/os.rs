//! What `build` knows of each operating system: the data files under `imgutil/os/`, parsed. No code here is about one OS.

use super::BuildError;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// The data files, one per release.
const FILES: [&str; 20] = [
    include_str!("../../os/debian-12.toml"),
    include_str!("../../os/debian-13.toml"),
    include_str!("../../os/ubuntu-22.04.toml"),
    include_str!("../../os/ubuntu-24.04.toml"),
    include_str!("../../os/ubuntu-26.04.toml"),
    include_str!("../../os/almalinux-8.toml"),
    include_str!("../../os/almalinux-9.toml"),
    include_str!("../../os/almalinux-10.toml"),
    include_str!("../../os/rocky-8.toml"),
    include_str!("../../os/rocky-9.toml"),
    include_str!("../../os/rocky-10.toml"),
    include_str!("../../os/rhel-8.toml"),
    include_str!("../../os/rhel-9.toml"),
    include_str!("../../os/rhel-10.toml"),
    include_str!("../../os/centos-stream-9.toml"),
    include_str!("../../os/centos-stream-10.toml"),
    include_str!("../../os/leap-15.toml"),
    include_str!("../../os/leap-16.toml"),
    include_str!("../../os/sles-15.toml"),
    include_str!("../../os/sles-16.toml"),
];

/// What releases have in common: a data file that names one of these in `family` has its values where it has none of its own.
const FAMILIES: [(&str, &str); 5] = [
    ("el-8", include_str!("../../os/el-8.toml")),
    ("el-9", include_str!("../../os/el-9.toml")),
    ("el-10", include_str!("../../os/el-10.toml")),
    ("suse-15", include_str!("../../os/suse-15.toml")),
    ("suse-16", include_str!("../../os/suse-16.toml")),
];

/// Largest data file of a user's that is read, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

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
    /// What RPM has to know; not for apt.
    #[serde(default)]
    pub(super) rpm: Rpm,
    /// What makes the initramfs.
    pub(super) initramfs: Initramfs,
    /// The system's locale.
    #[serde(default)]
    pub(super) locale: Locale,
    /// What is installed.
    pub(super) packages: Packages,
    /// What is enabled.
    pub(super) services: Services,
    /// The text of the user's own file that says all this; none of a release that is known.
    #[serde(skip)]
    pub(super) description: Option<String>,
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
    /// dnf, the fourth or the fifth.
    Dnf,
    /// zypper.
    Zypper,
}

/// What the back ends of RPM have to know of a release.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Rpm {
    /// Where its RPM has its database.
    pub(super) database: String,
    /// Whether packages that others merely recommend are installed.
    #[serde(default)]
    pub(super) weak_dependencies: bool,
    /// Packages that are never chosen.
    #[serde(default)]
    pub(super) exclude: Vec<String>,
    /// The release in the words of dnf's modules, which choose by it, as "platform:el9".
    pub(super) platform: Option<String>,
}

impl Default for Rpm {
    fn default() -> Self {
        Self { database: "/var/lib/rpm".to_owned(), weak_dependencies: false, exclude: Vec::new(), platform: None }
    }
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
    /// Whether its index is signed, where the back end has a choice.
    #[serde(default = "yes")]
    pub(super) signed_metadata: bool,
    /// File with its public keys, on the host.
    pub(super) key: String,
    /// The same in the image, if it is another there; on the host it may be at this place too.
    pub(super) key_in_image: Option<String>,
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

/// How a release is told its locale.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Locale {
    /// The file that names it.
    pub(super) file: String,
    /// Packages for every locale but C and C.UTF-8, with `{language}` as `de`.
    pub(super) packages: Vec<String>,
}

impl Default for Locale {
    /// As Debian does it.
    fn default() -> Self {
        Self { file: "/etc/default/locale".to_owned(), packages: vec!["locales".to_owned()] }
    }
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

fn yes() -> bool {
    true
}

/// The release called `name`, or described in the file of that name if it is a path.
pub(super) fn find(name: &str) -> Result<Os, BuildError> {
    if is_path(name) {
        let path = PathBuf::from(name);
        return read(&path).map_err(|reason| BuildError::OsFile { path, reason });
    }
    let all = all();
    let known = all.iter().map(|os| os.name.clone()).collect();
    all.into_iter().find(|os| os.name == name).ok_or(BuildError::UnknownOs { name: name.to_owned(), known })
}

/// What a tree says it is (os-release(5)), and the release of that name if it is a known one: the version as it stands, or its first
/// number (`9.4` is a `9`).
pub(super) fn said_by(text: &str) -> (String, Option<Os>) {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']))
    };
    let (id, version) = (value("ID").unwrap_or("unknown"), value("VERSION_ID").unwrap_or_default());
    let said = if version.is_empty() { id.to_owned() } else { format!("{id}-{version}") };
    let id = match id {
        // Since 9 there is no other.
        "centos" => "centos-stream",
        "opensuse-leap" => "leap",
        "sles_sap" => "sles",
        other => other,
    };
    let major = version.split('.').next().unwrap_or_default();
    let names = [format!("{id}-{version}"), format!("{id}-{major}")];
    let all = all();
    let found = names.iter().find_map(|name| all.iter().find(|os| os.name == *name));
    (said, found.cloned())
}

/// Whether a name of a release is that of a file.
#[must_use]
pub fn is_path(name: &str) -> bool {
    name.contains('/')
}

/// All releases.
pub(super) fn all() -> Vec<Os> {
    // The test below parses each: a broken file does not reach a user.
    FILES.iter().filter_map(|text| parse(text).ok()).collect()
}

fn read(path: &Path) -> Result<Os, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    let length = file.take(SIZE_LIMIT + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if length as u64 > SIZE_LIMIT {
        return Err("it is larger than 1 MiB".to_owned());
    }
    let os = parse(&text)?;
    Ok(Os { description: Some(text), ..os })
}

fn parse(text: &str) -> Result<Os, String> {
    let shown = |error: toml::de::Error| error.message().lines().collect::<Vec<_>>().join(" ");
    let mut own: toml::Table = text.parse().map_err(shown)?;
    let mut all = match own.remove("family") {
        None => toml::Table::new(),
        Some(family) => {
            let named = family.as_str().and_then(|name| FAMILIES.iter().find(|(known, _)| *known == name));
            let (_, text) = named.ok_or_else(|| format!("there is no family {family}"))?;
            text.parse().map_err(shown)?
        }
    };
    all.extend(own);
    all.try_into().map_err(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_data_file_parses_and_is_complete() {
        for text in FILES {
            let os = parse(text).unwrap();
            assert!(os.arch.contains_key("x86_64"), "{}", os.name);
            assert!(os.arch.values().all(|arch| !arch.kernel.is_empty()), "{}", os.name);
            assert!(os.initramfs.file.contains("{kernel}"), "{}", os.name);
            assert_eq!(find(&os.name).unwrap().release, os.release);
        }
        let error = find("debian").unwrap_err().to_string();
        assert!(error.contains("known are debian-12, debian-13, ubuntu-22.04"), "{error}");
    }

    #[test]
    fn a_tree_says_which_release_it_is() {
        for (text, said, name) in [
            ("NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n", "debian-12", Some("debian-12")),
            ("ID=ubuntu\nVERSION_ID='24.04'\n", "ubuntu-24.04", Some("ubuntu-24.04")),
            ("ID=\"almalinux\"\nVERSION_ID=\"9.4\"\n", "almalinux-9.4", Some("almalinux-9")),
            ("ID=\"centos\"\nVERSION_ID=\"10\"\n", "centos-10", Some("centos-stream-10")),
            ("ID=\"opensuse-leap\"\nVERSION_ID=\"15.6\"\n", "opensuse-leap-15.6", Some("leap-15")),
            ("ID=alpine\nVERSION_ID=3.19.1\n", "alpine-3.19.1", None),
            ("ID=arch\n", "arch", None),
            ("", "unknown", None),
        ] {
            let (seen, os) = said_by(text);
            assert_eq!((seen.as_str(), os.as_ref().map(|os| os.name.as_str())), (said, name), "{text}");
        }
    }

    #[test]
    fn a_release_has_what_its_family_has_and_may_say_otherwise() {
        let os = find("rocky-10").unwrap();
        assert_eq!((os.release.as_str(), os.rpm.database.as_str()), ("10", "/usr/lib/sysimage/rpm"));
        let directory = tempfile::tempdir().unwrap();
        let own =
            "name = \"own\"\nfamily = \"el-9\"\nmirror = \"http://m\"\nrepository = []\nservices = { node = [] }\n";
        std::fs::write(directory.path().join("own.toml"), own).unwrap();
        let os = find(directory.path().join("own.toml").to_str().unwrap()).unwrap();
        assert_eq!((os.backend, os.services.node.len(), os.release.as_str()), (BackendName::Dnf, 0, "9"));
        for (text, reason) in [
            ("name = \"x\"\nfamily = \"el-3\"", "there is no family \"el-3\""),
            ("name = 1", "invalid type"),
            ("name = ", "string values must be quoted"),
        ] {
            std::fs::write(directory.path().join("bad.toml"), text).unwrap();
            let error = find(directory.path().join("bad.toml").to_str().unwrap()).unwrap_err().to_string();
            assert!(error.contains("bad.toml") && error.contains(reason), "{error}");
        }
    }
}
