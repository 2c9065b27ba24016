//! A whole system that dnf has installed, from signed RPMs: kernel, systemd and dracut are Debian's, the way they came is that of
//! the RPM distributions. With `make test-full` it is looked at, and boots as a node.

use moor_lab::process::{run, tied};
use moor_lab::scenario::{NODE, Scenario};
use moor_lab::{Bins, Swtpm, tree};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

#[test]
#[ignore = "packs a hundred packages again first: make test-full"]
fn dnf_makes_a_tree_that_its_own_rpm_knows() -> anyhow::Result<()> {
    let bins = Bins::find()?;
    let tree = tree::rpm(&bins, &mut |what| println!("{what}"))?;
    let in_tree = |command: &str| -> anyhow::Result<String> {
        let output = run(tied(bins.path("imgutil")).arg("exec").arg(&tree).args(["--", "sh", "-c", command]))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // The image's own RPM reads the database that was made for it, and finds the files as the packages had them.
    assert!(in_tree("rpm -qa | wc -l")?.parse::<u32>()? > 150, "{}", in_tree("rpm -qa")?);
    assert_eq!(in_tree("rpm -q --qf '%{NAME}' -f /usr/bin/bash")?, "bash");
    assert_eq!(in_tree("rpm -V bash coreutils systemd openssh-server util-linux; echo $?")?, "0");
    assert_eq!(in_tree("stat -c %U:%G:%a /etc/shadow /usr/bin/passwd")?, "root:shadow:640\nroot:root:4755");
    // Scripts have run (depmod), the kernel is where the server looks for it, and the initramfs holds the node's agent.
    let kernel = in_tree("ls /usr/lib/modules")?;
    for file in [
        format!("usr/lib/modules/{kernel}/modules.dep.bin"),
        format!("boot/vmlinuz-{kernel}"),
        format!("boot/initramfs-{kernel}.img"),
        "etc/yum.repos.d/image.repo".to_owned(),
    ] {
        assert!(tree.join(&file).is_file(), "{file} is missing");
    }
    assert!(in_tree(&format!("lsinitrd /boot/initramfs-{kernel}.img"))?.contains("usr/bin/moor-agent"));
    assert_eq!(std::fs::read(tree.join("etc/machine-id"))?, b"");
    for nothing in ["var/cache/dnf", "var/log/dnf.log", "var/log/hawkey.log"] {
        assert!(!tree.join(nothing).exists(), "{nothing} was left");
    }
    Ok(())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_boots_an_image_that_dnf_has_made() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-rpm-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let bins = Bins::find()?;
    let mut say = |what: &str| println!("{what}");
    let tree = tree::rpm(&bins, &mut say)?;
    let scenario = Scenario::of_tree(bins, &tree, 3, dir.path(), &mut say)?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2221)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;

    let on_node = |command: &str| scenario.on_node(&vm, command);
    assert_eq!(on_node("hostname")?, NODE);
    assert_eq!(on_node("systemctl is-system-running")?, "running", "{}", on_node("systemctl --failed")?);
    assert_eq!(on_node("findmnt -n -o FSTYPE /")?, "overlay");
    let initramfs = on_node("systemctl show -P InitRDTimestampMonotonic")?;
    assert!(initramfs.parse::<u64>()? > 0, "no systemd in the initramfs: {initramfs}");
    assert_eq!(on_node("rpm -V bash coreutils systemd openssh-server; echo $?")?, "0");
    scenario.check_closed(&vm)?;

    scenario.power_off_in_order(&mut vm)
}
