//! Kernel, initramfs and signed boot loaders: where a system has them, and how they are taken out of an image, as a server would give them
//! to a machine's firmware.

use crate::pack::{initramfs_names, newest_kernel};
use crate::squashfs::Source;
use crate::system::System;
use anyhow::{Context as _, Result, bail};

/// shim and GRUB: name and content of each.
pub(crate) type BootLoaders = [(String, Vec<u8>); 2];

/// More than any kernel or initramfs has.
const LIMIT: u64 = 1 << 30;
/// Where EL and Fedora have boot loaders: on the EFI system partition, each vendor's in a directory of its own.
pub(crate) const VENDORS: &str = "boot/efi/EFI";

/// The newest kernel of an image with its initramfs.
pub(crate) struct BootFiles {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initramfs: Vec<u8>,
}

/// The newest kernel among the names in /boot, and its initramfs.
pub(crate) fn choose(names: &[String]) -> Result<(String, String)> {
    let Some(release) = newest_kernel(names) else {
        bail!("the image has no kernel (/boot/vmlinuz-*)");
    };
    let candidates = initramfs_names(release);
    let Some(initramfs) = candidates.iter().find(|name| names.contains(name)) else {
        bail!("the image's kernel {release} has no initramfs: /boot has none of {}", candidates.join(", "));
    };
    Ok((format!("vmlinuz-{release}"), initramfs.clone()))
}

/// The distribution's signed boot loaders, which firmware with Secure Boot takes: file name that they look for each other by, and
/// what `open` makes of the file, which is `None` where there is none. None unless both are there: one of two distributions does not
/// start the other. `vendors` are the names in [`VENDORS`].
pub(crate) fn loaders<F>(
    vendors: &[String],
    mut open: impl FnMut(&str) -> Result<Option<F>>,
) -> Result<Option<[(String, F); 2]>> {
    for (short, long) in [("x64", "x86_64"), ("aa64", "arm64"), ("aa64", "aarch64")] {
        // Debian and Ubuntu; GRUB's build for the network comes first.
        let debian_shim =
            [format!("usr/lib/shim/shim{short}.efi.signed"), format!("usr/lib/shim/shim{short}.efi.signed.latest")];
        let debian_grub =
            ["grubnet", "grub"].map(|name| format!("usr/lib/grub/{long}-efi-signed/{name}{short}.efi.signed"));
        // SUSE.
        let suse_shim = [format!("usr/share/efi/{long}/shim.efi")];
        let suse_grub = [format!("usr/share/efi/{long}/grub.efi")];
        let mut pairs = vec![(debian_shim.to_vec(), debian_grub.to_vec()), (suse_shim.to_vec(), suse_grub.to_vec())];
        for vendor in vendors {
            let file = |name: &str| vec![format!("{VENDORS}/{vendor}/{name}{short}.efi")];
            pairs.push((file("shim"), file("grub")));
        }
        for (shims, grubs) in pairs {
            let mut first = |paths: Vec<String>| -> Result<Option<F>> {
                for path in paths {
                    if let Some(file) = open(&path)? {
                        return Ok(Some(file));
                    }
                }
                Ok(None)
            };
            if let (Some(shim), Some(grub)) = (first(shims)?, first(grubs)?) {
                return Ok(Some([(format!("shim{short}.efi"), shim), (format!("grub{short}.efi"), grub)]));
            }
        }
    }
    Ok(None)
}

impl<S: Source> System<S> {
    /// The newest kernel with its initramfs.
    pub(crate) fn boot_files(&mut self) -> Result<BootFiles> {
        let names = self.list("boot")?.context("the image has no directory /boot")?;
        let (kernel, initramfs) = choose(&names)?;
        let mut file = |name: String| -> Result<Vec<u8>> {
            self.boot_file(&format!("boot/{name}"))?.with_context(|| format!("/boot/{name} is no regular file"))
        };
        Ok(BootFiles { kernel: file(kernel)?, initramfs: file(initramfs)? })
    }

    /// The signed boot loaders, if there are both.
    pub(crate) fn boot_loaders(&mut self) -> Result<Option<BootLoaders>> {
        let vendors = self.list(VENDORS)?.unwrap_or_default();
        loaders(&vendors, |path| self.boot_file(path))
    }

    /// A regular file's bytes; `None` if there is no such file.
    fn boot_file(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        if self.size(path)?.is_some_and(|size| size > LIMIT) {
            bail!("/{path} is larger than any boot file");
        }
        self.read(path, LIMIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::squashfs::peer::{Packed, pack};
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    /// Packs directories of `work` as the file systems of these mount points.
    fn system(work: &Path, parts: &[(&str, &str)]) -> System<Packed> {
        let pack = |(mount, name): &(&str, &str)| (PathBuf::from(mount), pack(&work.join(name)));
        System::open(parts.iter().map(pack).collect()).expect("reads")
    }

    fn write(work: &Path, name: &str, content: &str) {
        let path = work.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
        fs::write(path, content).expect("writes");
    }

    fn names(loaders: Option<BootLoaders>) -> Vec<String> {
        let shown = |(name, bytes): (String, Vec<u8>)| format!("{name} {}", String::from_utf8_lossy(&bytes));
        loaders.into_iter().flatten().map(shown).collect()
    }

    #[test]
    fn files_are_found_through_links_and_mounts() {
        let work = tempfile::tempdir().expect("directory");
        let work = work.path();
        write(work, "root/boot/hidden-by-the-mount", "");
        write(work, "root/usr/lib/shim/shimx64.efi.signed.latest", "shim");
        write(work, "usr/x86_64-efi-signed/grubx64.efi.signed", "grub");
        write(work, "boot/vmlinuz-1", "kernel");
        write(work, "boot/real", "initramfs");
        fs::create_dir_all(work.join("root/etc/alternatives")).expect("makes");
        fs::create_dir_all(work.join("root/usr/lib/grub")).expect("makes");
        // As Ubuntu has it; a link that is a circle; one that goes up from a mount point, and beyond the root.
        for (link, target) in [
            ("root/usr/lib/shim/shimx64.efi.signed", "/etc/alternatives/shim"),
            ("root/etc/alternatives/shim", "../../usr/lib/shim/shimx64.efi.signed.latest"),
            ("root/lib", "usr/lib"),
            ("root/circle", "/circle"),
            ("boot/initrd.img-1", "../../../boot/./real"),
        ] {
            symlink(target, work.join(link)).expect("links");
        }
        let mut system = system(work, &[("/", "root"), ("/boot", "boot"), ("/usr/lib/grub", "usr")]);
        let boot = system.boot_files().expect("are there");
        assert_eq!((&boot.kernel[..], &boot.initramfs[..]), (&b"kernel"[..], &b"initramfs"[..]));
        assert_eq!(system.list("boot").expect("reads").expect("is there"), ["initrd.img-1", "real", "vmlinuz-1"]);
        assert_eq!(names(system.boot_loaders().expect("reads")), ["shimx64.efi shim", "grubx64.efi grub"]);
        let read = |system: &mut System<_>, path: &str| system.boot_file(path).expect("reads").is_some();
        assert!(read(&mut system, "lib/shim/shimx64.efi.signed"));
        for none in ["circle", "boot", "none/at/all", "boot/real/below"] {
            assert!(!read(&mut system, none), "{none}");
        }
    }

    #[test]
    fn loaders_are_those_of_one_distribution() {
        let work = tempfile::tempdir().expect("directory");
        let work = work.path();
        // Debian's shim alone, and a vendor's pair on the EFI system partition.
        write(work, "root/usr/lib/shim/shimx64.efi.signed", "another's shim");
        fs::create_dir_all(work.join("root/boot/efi")).expect("makes");
        write(work, "esp/EFI/BOOT/BOOTX64.EFI", "shim");
        write(work, "esp/EFI/rocky/shimx64.efi", "shim");
        let mut without = system(work, &[("/", "root"), ("/boot/efi", "esp")]);
        assert_eq!(names(without.boot_loaders().expect("reads")), Vec::<String>::new());
        write(work, "esp/EFI/rocky/grubx64.efi", "grub");
        let mut with = system(work, &[("/", "root"), ("/boot/efi", "esp")]);
        assert_eq!(names(with.boot_loaders().expect("reads")), ["shimx64.efi shim", "grubx64.efi grub"]);
        let error = with.boot_files().err().expect("no kernel").to_string();
        assert_eq!(error, "the image has no kernel (/boot/vmlinuz-*)");
    }
}
