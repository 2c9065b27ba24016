//! An ordinary kernel update inside a tree: the kernel package's own scripts make the initramfs anew, and it is one for a node without a disk,
//! because what an image has of ours stands in the tools' own folders. Nobody has to remember anything.

use anyhow::Context as _;
use moor_lab::Bins;
use moor_lab::process::{run, tied};
use moor_lab::tree::{self, Initramfs};

/// What dpkg runs last of a kernel package that it installs.
const SCRIPT: &str = "/var/lib/dpkg/info/linux-image-$kernel.postinst configure";
/// All of an update, from the archive.
const REINSTALL: &str = "apt-get -q update && apt-get -q install -y --reinstall linux-image-$kernel";

/// Takes the initramfs of a tree away, updates its kernel, and looks for ours and for what any machine needs in the initramfs that then is
/// there. The tree stays as it is.
fn check(made_by: Initramfs, update: &str, list: &str, parts: &[&str]) -> anyhow::Result<()> {
    let bins = Bins::find()?;
    let tree = tree::debian(&bins, made_by, &mut |what| println!("{what}"))?;
    let script = format!(
        "set -e; export DEBIAN_FRONTEND=noninteractive; kernel=$(ls /usr/lib/modules); rm /boot/initrd.img-$kernel; \
         {{ {update}; }} >&2; {list} /boot/initrd.img-$kernel"
    );
    let mut exec = tied(bins.path("imgutil"));
    exec.args(["exec", "--try", "--drop"]).arg(tree).args(["--", "sh", "-c", &script]);
    let output = run(&mut exec).context("updating the kernel")?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    // Modules of machines other than the one that built it.
    let usual =
        ["usr/bin/moor-agent", "usr/bin/moor-tether", "libtss2-esys", "/virtio_net.ko", "/ixgbe.ko", "/mlx5_core.ko"];
    for part in usual.iter().chain(parts) {
        assert!(listed.lines().any(|line| line.contains(part)), "{made_by:?}: no '{part}' in\n{listed}");
    }
    Ok(())
}

#[test]
#[ignore = "two minutes: `make test-full` runs it"]
fn the_script_of_a_kernel_package_makes_an_initramfs_that_needs_no_disk() -> anyhow::Result<()> {
    check(Initramfs::InitramfsTools, SCRIPT, "lsinitramfs", &["scripts/moor", "scripts/panic/moor"])
}

#[test]
#[ignore = "downloads kernels, and dracut takes minutes: `make test-full` runs it"]
fn a_kernel_from_the_archive_brings_one_with_either_tool() -> anyhow::Result<()> {
    check(Initramfs::InitramfsTools, REINSTALL, "lsinitramfs", &["scripts/moor", "scripts/panic/moor"])?;
    check(Initramfs::Dracut, REINSTALL, "lsinitrd", &["moor-root.service", "usr/sbin/moor-root"])
}
