//! The main path on real parts, in one story: a sealed image built here, a member, and a VM with a TPM that enrols once, boots from
//! the network, boots again on its TPM identity, and cannot be impersonated by a machine with another TPM.

use anyhow::Context as _;
use moor_lab::process::wait_for;
use moor_lab::scenario::{BOOT_LIMIT, NODE, Scenario};
use moor_lab::{Swtpm, Vm};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

#[test]
fn a_node_enrols_once_boots_from_the_network_and_stays_itself() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-boot-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let scenario = Scenario::prepare(dir.path(), &mut |what| println!("{what}"))?;
    let tpm_dir = dir.path().join("tpm");

    // Not armed: refused, and the administrator can see why.
    let mut tpm = Swtpm::start(&tpm_dir)?;
    let mut vm = scenario.power_on("vm-unarmed", &tpm, 2201)?;
    wait_for("the refusal of an unarmed node", BOOT_LIMIT, || {
        Ok(scenario.member.moor_ok(&["why", NODE])?.contains("not armed"))
    })
    .with_context(|| vm.console_tail(60))?;

    // Armed once while it waits: the same boot goes on.
    scenario.member.moor_ok(&["arm", NODE])?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let first = scenario.booted_boots()?;

    let on_node = |vm: &Vm, command: &str| scenario.on_node(vm, command);
    assert_eq!(on_node(&vm, "hostname")?, NODE);
    assert_eq!(on_node(&vm, "systemctl is-system-running")?, "running", "{}", on_node(&vm, "systemctl --failed")?);
    let root = on_node(&vm, "findmnt -n -o FSTYPE /")?;
    assert_eq!(root, "overlay");
    let mounts = on_node(&vm, "cat /proc/self/mountinfo")?;
    for part in [" - squashfs /dev/loop", " - ext4 /dev/zram"] {
        assert!(mounts.contains(part), "{part} is missing in\n{mounts}");
    }
    // The tether's own mount is in a namespace of its own; it says itself that it serves, and that not all was fetched for that.
    let status = || anyhow::Ok(serde_json::from_str::<serde_json::Value>(&on_node(&vm, "moor-tether status --json")?)?);
    // One read that stalls makes the member rest for a while.
    wait_for("the only member to be good", Duration::from_mins(1), || Ok(status()?["members"][0]["state"] == "good"))?;
    let tether = status()?;
    assert_eq!(tether["mode"], "tethered", "{tether}");
    let figure = |name: &str| tether[name].as_u64().with_context(|| format!("no {name} in {tether}"));
    assert!(figure("bytes_fetched")? > 0 && figure("bytes_fetched")? < figure("image_size")?, "{tether}");
    on_node(&vm, "pgrep -f '^@moor-tether mount'")?;
    // Every file of the system is readable through the tether, and the package manager works on the overlay.
    on_node(&vm, "sha256sum /usr/bin/* >/dev/null && dpkg --audit && touch /etc/written-on-the-node")?;
    scenario.check_closed(&vm)?;
    let keys = on_node(&vm, "ls /etc/ssh/*-cert.pub | wc -l")?;
    assert!(keys.trim().parse::<u32>()? >= 1, "no host certificate on the node");
    let view = scenario.member.moor_ok(&["--json", "node", "list", NODE])?;
    assert!(view.contains("\"trust\":\"tpm\""), "{view}");
    let machine_id = on_node(&vm, "cat /etc/machine-id")?;

    // It reboots without being armed again.
    let _ = on_node(&vm, "systemctl reboot");
    scenario.wait_booted(&mut vm, &first)?;
    assert_eq!(on_node(&vm, "cat /etc/machine-id")?, machine_id);
    assert_eq!(on_node(&vm, "ls /etc/written-on-the-node 2>/dev/null | wc -l")?, "0", "the overlay is in memory only");
    vm.power_off();
    tpm.stop();

    // Another TPM under the same UUID and MAC is somebody else, also while the node is armed by mistake.
    scenario.member.moor_ok(&["arm", NODE])?;
    let other = Swtpm::start(&dir.path().join("other-tpm"))?;
    let impostor = scenario.power_on("vm-other-tpm", &other, 2202)?;
    wait_for("the refusal of another TPM", BOOT_LIMIT, || {
        Ok(scenario.member.moor_ok(&["why", NODE])?.contains("another TPM"))
    })
    .with_context(|| format!("{}\n{}", impostor.console_tail(60), scenario.member.log_tail()))?;
    assert_eq!(scenario.booted_boots()?.len(), 2, "the impostor booted");
    Ok(())
}
