//! What an image says of itself, read from the tree: system, architecture, kernel, packages.

use crate::boot_files::{VENDORS, loaders};
use crate::in_root;
use crate::sbom::database::{self, TreeFiles};
use anyhow::{Context as _, Result, bail};
use moor_image::Package;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::BorrowedFd;

/// Bound on small files that are read.
const SMALL: u64 = 64 << 10;

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
    let installed = database::installed(&TreeFiles::new(root))?;
    let packages: Vec<Package> = installed
        .into_iter()
        .map(|package| Package { name: package.name, version: package.version, arch: package.arch })
        .collect();
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

/// Opens the newest `/boot/vmlinuz-*` and the initramfs of the same release; an error for a tree that could not boot with them.
pub(super) fn boot_files(root: BorrowedFd<'_>) -> Result<BootFiles> {
    let names = in_root::list(root, "boot")?;
    let Some(release) = newest_kernel(&names) else {
        bail!("the tree has no kernel (boot/vmlinuz-*): install one, for example with `imgutil exec`");
    };
    let kernel = in_root::open(root, &format!("boot/vmlinuz-{release}"))?;
    let mut initramfs = None;
    for name in initramfs_names(release) {
        if initramfs.is_none() {
            initramfs = in_root::open(root, &format!("boot/{name}"))?;
        }
    }
    let files = BootFiles {
        kernel: kernel.with_context(|| format!("the tree's boot/vmlinuz-{release} is no regular file"))?,
        initramfs: initramfs.with_context(|| {
            format!(
                "the tree's kernel {release} has no boot/initrd.img-{release} (or initramfs-{release}.img): run `update-initramfs -c -k {release}` or `dracut --no-hostonly --kver {release}` in it"
            )
        })?,
        release: release.to_owned(),
    };
    // What an initramfs starts when its work is done.
    if in_root::open(root, "sbin/init")?.is_none() {
        bail!("the tree has no init (sbin/init): install one, for example systemd-sysv with `imgutil exec`");
    }
    Ok(files)
}

/// The distribution's signed boot loaders, if the tree has both.
pub(super) fn boot_loaders(root: BorrowedFd<'_>) -> Result<Option<[(String, File); 2]>> {
    loaders(&in_root::list(root, VENDORS)?, |path| in_root::open(root, path))
}

/// How an initramfs of a kernel is called in /boot: by initramfs-tools, by dracut on EL, and by dracut on SUSE.
pub(crate) fn initramfs_names(release: &str) -> [String; 3] {
    [format!("initrd.img-{release}"), format!("initramfs-{release}.img"), format!("initrd-{release}")]
}

/// The release of the newest kernel among the names in /boot.
pub(crate) fn newest_kernel(names: &[String]) -> Option<&str> {
    newest(names, "vmlinuz-")
}

/// The greatest of some versions.
pub(crate) fn newest_version(versions: &[String]) -> Option<&str> {
    newest(versions, "")
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
pub(crate) fn os_name(text: &str) -> String {
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

/// The architecture of the C library's package, as `uname -m` says it; RPM uses the same words.
fn architecture(packages: &[Package]) -> String {
    let core = packages.iter().find(|package| matches!(package.name.as_str(), "dpkg" | "libc6" | "glibc"));
    match core.map(|package| package.arch.as_str()) {
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
    fn the_architecture_is_that_of_the_system_s_first_packages() {
        let package = |name: &str, arch: &str| Package { name: name.into(), version: "1".into(), arch: arch.into() };
        assert_eq!(architecture(&[package("base-files", "all"), package("dpkg", "amd64")]), "x86_64");
        assert_eq!(architecture(&[package("glibc", "aarch64"), package("tzdata", "noarch")]), "aarch64");
        assert_eq!(architecture(&[]), "");
    }
}
