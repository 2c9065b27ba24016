//! A node whose system dnf has installed, from signed RPMs: kernel, systemd and dracut are Debian's, the way they came is that of
//! the RPM distributions.

use anyhow::Context as _;
use moor_lab::process::wait_for;
use moor_lab::scenario::{BOOT_LIMIT, NODE, Scenario};
use moor_lab::{Bins, Swtpm, tree};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

#[test]
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
    // The image's own RPM reads the database that was made for it, and finds the files as the packages had them.
    assert!(on_node("rpm -qa | wc -l")?.parse::<u32>()? > 150, "{}", on_node("rpm -qa")?);
    assert_eq!(on_node("rpm -q --qf '%{NAME}' -f /usr/bin/bash")?, "bash");
    assert_eq!(on_node("rpm -V bash coreutils systemd openssh-server; echo $?")?, "0");
    assert_eq!(on_node("stat -c %U:%G:%a /etc/shadow")?, "root:shadow:640");
    let closed = on_node("cat /sys/class/tpm/tpm0/pcr-sha256/15")?;
    assert!(!closed.bytes().all(|byte| byte == b'0'), "PCR 15 is open in the run stage: {closed}");

    let _ = on_node("systemctl poweroff");
    wait_for("the end of the VM after 'poweroff'", BOOT_LIMIT, || Ok(!vm.is_running()))
        .with_context(|| vm.console_tail(60))?;
    Ok(())
}
