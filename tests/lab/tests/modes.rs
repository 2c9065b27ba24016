//! Nodes whose root is not read from servers all the time: it is in memory as a whole, or on a disk of theirs.

use anyhow::Context as _;
use moor_lab::process::wait_for;
use moor_lab::scenario::{BOOT_LIMIT, NODE, PROFILE, Scenario};
use moor_lab::{Swtpm, Vm};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Reads every file of every package again, and compares it with what the package says of it. What a profile or a recipe left out is passed over.
const WHOLE: &str = "echo 3 >/proc/sys/vm/drop_caches; cd / && cat /var/lib/dpkg/info/*.md5sums >/run/sums && \
                     [ $(wc -l </run/sums) -gt 1000 ] && md5sum --quiet --ignore-missing -c /run/sums";

fn scenario(dir: &Path) -> anyhow::Result<Scenario> {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))?;
    Scenario::prepare(dir, &mut |what| println!("{what}"))
}

/// Sets `root` in the profile, and has the node boot it.
fn choose(scenario: &Scenario, mode: &str) -> anyhow::Result<()> {
    let path = scenario.member.profiles().join(PROFILE).join("profile.yaml");
    let text = std::fs::read_to_string(&path)?;
    let changed = text.replace("root: tethered", &format!("root: {mode}"));
    anyhow::ensure!(changed != text, "the profile has no 'root: tethered':\n{text}");
    std::fs::write(&path, changed)?;
    scenario.member.moor_ok(&["profile", "publish", PROFILE])?;
    scenario.member.moor_ok(&["deploy", NODE, "-n", PROFILE])?;
    Ok(())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn an_untethered_node_works_when_every_server_is_gone() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-untethered-").tempdir()?;
    let mut scenario = scenario(dir.path())?;
    choose(&scenario, "untethered")?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2221)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let states = scenario.states()?;
    assert!(states.iter().any(|state| state.detail.contains("root untethered")), "{states:?}");
    let booted = states.iter().find(|state| state.state == "booted").context("no state 'booted'")?;
    let fetched = booted.figures["image.bytes_fetched"];
    assert!(fetched >= scenario.image_size * 9 / 10 && fetched < scenario.image_size * 5 / 4, "{fetched}");
    assert!(vm.console().contains("brings the whole image into memory"), "{}", vm.console_tail(80));

    scenario.member.kill();
    let on_node = |command: &str| scenario.on_node(&vm, command);
    assert_eq!(on_node("findmnt -n -o FSTYPE /")?, "overlay");
    // Nothing is left that somebody could end: no process, no mount but squashfs and the disk.
    assert_eq!(on_node("pgrep -c moor-tether || true")?, "0");
    assert_eq!(on_node("grep -cE 'fuse.moor|moor-image' /proc/self/mountinfo || true")?, "0");
    on_node(&format!("{WHOLE} && touch /etc/written-on-the-node"))?;
    assert!(on_node("moor-tether status")?.contains("all of it in memory"));
    assert_eq!(on_node("systemctl is-system-running")?, "running", "{}", on_node("systemctl --failed")?);
    scenario.power_off_in_order(&mut vm)
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_with_too_little_memory_says_so_and_does_what_its_profile_says() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-little-").tempdir()?;
    let scenario = scenario(dir.path())?;
    let path = scenario.member.profiles().join(PROFILE).join("profile.yaml");
    let text = std::fs::read_to_string(&path)?;
    // A quarter of the writable layer has to be free.
    let changed =
        text.replace("size_percent: 25", "size_percent: 400").replace("on_failure: hold", "on_failure: reboot");
    std::fs::write(&path, changed)?;
    choose(&scenario, "untethered")?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let vm = scenario.power_on("vm", &tpm, 2224)?;
    let of = |state: &str| -> anyhow::Result<Vec<String>> {
        Ok(scenario.states()?.into_iter().filter(|told| told.state == state).map(|told| told.detail).collect())
    };
    wait_for("a boot that fails", BOOT_LIMIT, || Ok(!of("failed")?.is_empty()))?;
    let failed = of("failed")?;
    assert!(failed[0].contains("too little memory for an untethered root"), "{failed:?}");
    assert!(vm.console().contains("too little memory for an untethered root"), "{}", vm.console_tail(60));
    // By the profile, and not by `panic=`, with which a node that holds reboots as well.
    wait_for("the word that it reboots", BOOT_LIMIT, || Ok(vm.console().contains("; rebooting in 20 s")))?;
    let begun = vm.console().matches("Linux version ").count();
    assert_eq!(begun, 1);
    wait_for("the reboot", BOOT_LIMIT, || Ok(vm.console().matches("Linux version ").count() > begun))?;
    Ok(())
}

/// A disk with one partition of that name.
fn disk(path: &Path) -> anyhow::Result<()> {
    std::fs::File::create(path)?.set_len(1 << 30)?;
    let layout = "label: gpt\nname=mooring-cache\n";
    let command = format!("printf '{layout}' | sfdisk -q '{}'", path.display());
    let made = Command::new("sh").args(["-c", &command]).output()?;
    anyhow::ensure!(made.status.success(), "sfdisk: {made:?}");
    Ok(())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_keeps_chunks_on_its_disk_and_follows_a_member_that_moves() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-disk-").tempdir()?;
    let mut scenario = scenario(dir.path())?;
    choose(&scenario, "disk")?;
    let cache = dir.path().join("cache.img");
    disk(&cache)?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on_with("vm", &tpm, 2222, &[cache])?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let first = scenario.booted_boots()?;
    let held = |vm: &Vm| scenario.on_node(vm, "moor-tether status | grep disk");
    println!("{}", held(&vm)?);
    scenario.on_node(&vm, "sha256sum /usr/bin/* >/dev/null; sync")?;
    let _ = scenario.on_node(&vm, "systemctl reboot");
    scenario.wait_booted(&mut vm, &first)?;
    println!("{}", held(&vm)?);
    let fetched: Vec<u64> = scenario
        .states()?
        .iter()
        .filter(|state| state.state == "booted")
        .map(|state| state.figures["image.bytes_fetched"])
        .collect();
    println!("bytes fetched to 'booted': {fetched:?}");
    assert!(fetched[1] < fetched[0] / 10, "{fetched:?}");

    // The member listens at another port as well, and says that it is there. The old port goes once the node knows.
    let config = dir.path().join("member/moord.toml");
    let text = std::fs::read_to_string(&config)?;
    let both = text
        .replace("\"127.0.0.1:8443\"", "\"127.0.0.1:8443\", \"127.0.0.1:8444\"")
        .replace("10.0.2.2:8443", "10.0.2.2:8444");
    std::fs::write(&config, &both)?;
    scenario.member.stop();
    scenario.member.start(&scenario.namespace)?;
    wait_for("the node to read from the other port", Duration::from_mins(5), || {
        std::thread::sleep(Duration::from_secs(5));
        Ok(scenario.on_node(&vm, "moor-tether status --json")?.contains(":8444/"))
    })
    .with_context(|| scenario.member.log_tail())?;
    std::fs::write(&config, both.replace("\"127.0.0.1:8443\", ", ""))?;
    scenario.member.stop();
    scenario.member.start(&scenario.namespace)?;
    scenario.on_node(&vm, WHOLE)?;
    scenario.power_off_in_order(&mut vm)
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn an_unpacked_node_needs_no_server_and_no_image() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-ram-").tempdir()?;
    let mut scenario = scenario(dir.path())?;
    // By the kernel command line: the profile says tethered.
    let command_line = dir.path().join("netboot/cmdline");
    let text = std::fs::read_to_string(&command_line)?;
    std::fs::write(&command_line, format!("{} moor.root=ram", text.trim()))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2223)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    scenario.member.kill();
    let on_node = |command: &str| scenario.on_node(&vm, command);
    assert_eq!(on_node("findmnt -n -o FSTYPE /")?, "ext4");
    assert_eq!(on_node("grep -cE 'squashfs|fuse.moor' /proc/self/mountinfo || true")?, "0");
    assert_eq!(on_node("losetup -l -n | wc -l")?, "0");
    on_node(WHOLE)?;
    assert_eq!(on_node("systemctl is-system-running")?, "running", "{}", on_node("systemctl --failed")?);
    println!("{}", on_node("free -m; cat /sys/block/zram*/mm_stat")?);
    scenario.power_off_in_order(&mut vm)
}
