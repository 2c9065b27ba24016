//! What an image says of itself, read from the tree: system, architecture, kernel, packages.

use crate::in_root;
use anyhow::{Context as _, Result, bail};
use moor_image::Package;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::BorrowedFd;

/// Bounds on what is read: a list of 100,000 packages has 100 MB.
const SMALL: u64 = 64 << 10;
const STATUS: u64 = 256 << 20;

/// What was found in a tree.
#[derive(Debug, Default)]
pub(super) struct Description {
    /// Such as `debian-12`; empty if the tree does not say.
    pub(super) os: String,
    /// As `uname -m` says it; empty if unknown.
    pub(super) arch: String,
    /// Release of the newest kernel.
    pub(super) kernel: Option<String>,
    pub(super) packages: Vec<Package>,
}

/// Looks at a tree. What it does not have is left empty; only what cannot be read is an error.
pub(super) fn describe(root: BorrowedFd<'_>) -> Result<Description> {
    let release = in_root::read(root, "etc/os-release", SMALL)?;
    let packages = in_root::read(root, "var/lib/dpkg/status", STATUS)?.map_or_else(Vec::new, |text| packages(&text));
    let mut modules = in_root::list(root, "lib/modules")?;
    modules.sort_by(|a, b| compare_versions(a, b));
    let kernel = newest(&in_root::list(root, "boot")?, "vmlinuz-").map(str::to_owned).or_else(|| modules.pop());
    Ok(Description {
        os: release.map(|text| os_name(&text)).unwrap_or_default(),
        arch: architecture(&packages),
        kernel,
        packages,
    })
}

/// The newest kernel with its initramfs.
pub(super) struct BootFiles {
    pub(super) release: String,
    pub(super) kernel: File,
    pub(super) initramfs: File,
}

/// Opens the newest `/boot/vmlinuz-*` and the `/boot/initrd.img-*` of the same release.
pub(super) fn boot_files(root: BorrowedFd<'_>) -> Result<BootFiles> {
    let names = in_root::list(root, "boot")?;
    let Some(release) = newest_kernel(&names) else {
        bail!("the tree has no kernel (boot/vmlinuz-*): install one, for example with `imgutil exec`");
    };
    let kernel = in_root::open(root, &format!("boot/vmlinuz-{release}"))?;
    let initramfs = in_root::open(root, &format!("boot/initrd.img-{release}"))?;
    Ok(BootFiles {
        kernel: kernel.with_context(|| format!("the tree's boot/vmlinuz-{release} is no regular file"))?,
        initramfs: initramfs.with_context(|| {
            format!("the tree's kernel {release} has no boot/initrd.img-{release}: run `update-initramfs -c -k {release}` in it")
        })?,
        release: release.to_owned(),
    })
}

/// The release of the newest kernel among the names in /boot.
pub(crate) fn newest_kernel(names: &[String]) -> Option<&str> {
    newest(names, "vmlinuz-")
}

/// The greatest version among names of the form PREFIX VERSION.
fn newest<'a>(names: &'a [String], prefix: &str) -> Option<&'a str> {
    names.iter().filter_map(|name| name.strip_prefix(prefix)).max_by(|a, b| compare_versions(a, b))
}

/// Compares as people do: numbers by value, the rest by letters; `6.1.0-9` comes before `6.1.0-10`.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let text = |text: &str| text.find(|c: char| c.is_ascii_digit()).unwrap_or(text.len());
        let (a_text, a_rest) = a.split_at(text(a));
        let (b_text, b_rest) = b.split_at(text(b));
        let number = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (a_number, a_rest) = a_rest.split_at(number(a_rest));
        let (b_number, b_rest) = b_rest.split_at(number(b_rest));
        let (a_number, b_number) = (a_number.trim_start_matches('0'), b_number.trim_start_matches('0'));
        let order = a_text.cmp(b_text).then(a_number.len().cmp(&b_number.len())).then(a_number.cmp(b_number));
        if order != Ordering::Equal || (a_rest.is_empty() && b_rest.is_empty()) {
            return order;
        }
        (a, b) = (a_rest, b_rest);
    }
}

/// `ID-VERSION_ID` of os-release(5).
fn os_name(text: &str) -> String {
    let fields: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.trim().split_once('='))
        .map(|(key, value)| (key, value.trim_matches(['"', '\''])))
        .collect();
    let id = fields.get("ID").copied().unwrap_or("linux");
    match fields.get("VERSION_ID") {
        Some(version) => format!("{id}-{version}"),
        None => id.to_owned(),
    }
}

/// Installed packages of a dpkg status file (deb-control(5): paragraphs of fields), sorted.
fn packages(text: &str) -> Vec<Package> {
    let mut packages = Vec::new();
    for paragraph in text.split("\n\n") {
        let field =
            |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        if field("Status").is_some_and(|status| status.ends_with(" installed"))
            && let (Some(name), Some(version), Some(arch)) = (field("Package"), field("Version"), field("Architecture"))
        {
            packages.push(Package { name: name.to_owned(), version: version.to_owned(), arch: arch.to_owned() });
        }
    }
    packages.sort_unstable();
    packages
}

/// Debian's name of the architecture most packages have, as `uname -m` says it.
fn architecture(packages: &[Package]) -> String {
    let dpkg = packages.iter().find(|package| package.name == "dpkg" || package.name == "libc6");
    match dpkg.map(|package| package.arch.as_str()) {
        Some("amd64") => "x86_64",
        Some("arm64") => "aarch64",
        Some("armhf") => "armv7l",
        Some("i386") => "i686",
        Some("ppc64el") => "ppc64le",
        Some(other) => other,
        None => "",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_people_do() {
        for (older, newer) in [
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("5.10.0-28-amd64", "6.1.0-1-amd64"),
            ("6.1.0-10-amd64", "6.1.0-10-rt-amd64"),
            ("6.1", "6.1.1"),
            ("6.08", "6.9"),
        ] {
            assert_eq!(compare_versions(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare_versions(newer, older), Ordering::Greater, "{newer} {older}");
            assert_eq!(compare_versions(newer, newer), Ordering::Equal, "{newer}");
        }
    }

    #[test]
    fn the_system_is_named_by_os_release() {
        assert_eq!(os_name("PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n"), "debian-12");
        assert_eq!(os_name("ID=arch\n"), "arch");
        assert_eq!(os_name("nonsense"), "linux");
    }

    #[test]
    fn only_installed_packages_are_listed() {
        let text = "Package: dpkg\nStatus: install ok installed\nVersion: 1.21.22\nArchitecture: amd64\nDescription: x\n y\n\n\
            Package: gone\nStatus: deinstall ok config-files\nVersion: 1\nArchitecture: all\n\n\
            Package: base-files\nStatus: install ok installed\nVersion: 12\nArchitecture: amd64\n";
        let packages = packages(text);
        assert_eq!(packages.iter().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["base-files", "dpkg"]);
        assert_eq!(packages[1].version, "1.21.22");
        assert_eq!(architecture(&packages), "x86_64");
        assert_eq!(architecture(&[]), "");
    }
}
