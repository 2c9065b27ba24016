//! A node whose initramfs dracut made, with systemd in it: the same agent and tether, through systemd's isolate, `switch_root` and
//! shutdown.

use moor_lab::Swtpm;
use moor_lab::scenario::{NODE, Scenario};
use moor_lab::tree::Initramfs;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn a_node_boots_with_dracut_and_shuts_down_in_good_order() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-dracut-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let scenario = Scenario::with_initramfs(Initramfs::Dracut, dir.path(), &mut |what| println!("{what}"))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2211)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;

    let on_node = |command: &str| scenario.on_node(&vm, command);
    assert_eq!(on_node("systemctl is-system-running")?, "running", "{}", on_node("systemctl --failed")?);
    assert_eq!(on_node("findmnt -n -o FSTYPE /")?, "overlay");
    // dracut and systemd were in the initramfs: systemd says when it began there.
    let initramfs = on_node("systemctl show -P InitRDTimestampMonotonic")?;
    assert!(initramfs.parse::<u64>()? > 0, "no systemd in the initramfs: {initramfs}");
    // The root's server is in no unit that a later systemd could end, and serves every file.
    let place = on_node("cat /proc/$(pgrep -x moor-tether)/cgroup")?;
    assert_eq!(place, "0::/init.scope");
    on_node("sha256sum /usr/bin/* >/dev/null && dpkg --audit && touch /etc/written-on-the-node")?;
    scenario.check_closed(&vm)?;

    scenario.power_off_in_order(&mut vm)
}
