//! What a root over the network costs a node in memory: beside a machine that runs the same tree from its disk.

use anyhow::{Context as _, ensure};
use moor_lab::process::{run, tied, wait_for};
use moor_lab::scenario::{BOOT_LIMIT, MAC, NODE, Scenario, UUID};
use moor_lab::tree::{self, Initramfs};
use moor_lab::{Bins, Namespace, Swtpm, Vm, VmOptions};
use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Memory of the nodes in MiB.
const MEMORY: u32 = 8192;
/// What the tether and all that belongs to it may take, in KiB: 40 MB.
const ALLOWED: i64 = 40_000_000 / 1024;
/// A minute after the system is up, nothing is in memory that can be read again: KiB that are in use. Free pages that a processor keeps for itself do
/// not count as free, differ by 7 MB between boots of one machine, and are free all the same: they are taken off.
const LOOK: &str = "sleep 60; sync; echo 3 >/proc/sys/vm/drop_caches; \
                    echo 1 >/proc/sys/vm/compact_memory; sleep 2; \
                    awk '/^ *count:/ {kept+=4*$2} /^MemTotal/ {all=$2} /^MemAvailable/ {free=$2} \
                    END {print \"KIB-IN-USE\", all-free-kept, \"END\"}' /proc/zoneinfo /proc/meminfo";
/// What it is in use for: told beside the figure, so that one run explains itself.
const WHERE: &str = "grep -E '^(MemFree|MemAvailable|Buffers|Cached|SReclaimable|AnonPages|Shmem|Mlocked|Slab|SUnreclaim|KernelStack|PageTables|VmallocUsed|Percpu):' /proc/meminfo; \
                     grep -H -E '^VmRSS' /proc/[0-9]*/status | sort -k2 -n -r | head -n 12 | \
                     while IFS=/: read -r _ _ pid _ _ rss; do echo \"$(cat /proc/$pid/comm) $rss\"; done; \
                     awk '/^ *count:/ {free+=$2} END {print \"pages that processors keep:\", free}' /proc/zoneinfo; \
                     cat /sys/block/zram*/mm_stat 2>/dev/null";

/// As the disk's unit does it, and not under somebody who is logged in: a login has processes of its own.
const UNIT: &str = "cat >/run/look.sh && systemd-run -q --unit=look sh -c 'sh /run/look.sh >/run/look 2>&1'";
/// Until it has looked: a login meanwhile would be measured too.
const LOOKS: Duration = Duration::from_secs(90);

fn look() -> String {
    format!("{LOOK}; {WHERE}; echo LOOKED")
}

/// What a node by network has in use, and what for.
fn on_node(scenario: &Scenario, vm: &Vm) -> anyhow::Result<String> {
    let mut begin = scenario.shell_on_node(vm, UNIT);
    let mut child = begin.stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("ssh without an input")?.write_all(look().as_bytes())?;
    ensure!(child.wait()?.success(), "the node does not begin to look");
    std::thread::sleep(LOOKS);
    let mut said = String::new();
    wait_for("the node to look", BOOT_LIMIT, || {
        said = scenario.on_node(vm, "cat /run/look")?;
        if !said.contains("LOOKED") {
            std::thread::sleep(Duration::from_secs(10));
        }
        Ok(said.contains("LOOKED"))
    })?;
    Ok(said)
}

fn in_use(text: &str) -> anyhow::Result<i64> {
    let (_, rest) = text.split_once("KIB-IN-USE ").with_context(|| format!("nothing was measured: {text}"))?;
    rest.split_whitespace().next().unwrap_or_default().parse().context("reading what is in use")
}

/// The tree on a disk, with a unit that looks and tells the console.
fn disk(tree: &Path, dir: &Path) -> anyhow::Result<PathBuf> {
    let (copy, disk) = (dir.join("copy"), dir.join("disk"));
    run(tied("cp").args(["-a", "--reflink=auto"]).arg(tree).arg(&copy)).context("copying the tree")?;
    let units = copy.join("etc/systemd/system");
    // No server is there to be asked.
    for unit in std::fs::read_dir(copy.join("usr/lib/systemd/system"))?.flatten() {
        if unit.file_name().to_string_lossy().starts_with("moor-") {
            let mask = units.join(unit.file_name());
            let _ = std::fs::remove_file(&mask);
            std::os::unix::fs::symlink("/dev/null", mask)?;
        }
    }
    // The console is opened when there is something to say: a getty that begins meanwhile hangs up whoever has it open.
    let script = format!("({}) >/run/look 2>&1\ncat /run/look >/dev/console\n", look());
    std::fs::write(copy.join("usr/local/sbin/look"), script)?;
    let unit = "[Unit]\nAfter=multi-user.target\n[Service]\nType=oneshot\nExecStart=/bin/sh /usr/local/sbin/look\n";
    std::fs::write(units.join("look.service"), unit)?;
    let wanted = units.join("multi-user.target.wants");
    std::fs::create_dir_all(&wanted)?;
    std::os::unix::fs::symlink("../look.service", wanted.join("look.service"))?;
    // sshd runs on both.
    run(tied("ssh-keygen").arg("-A").arg("-f").arg(&copy)).context("making host keys")?;
    std::fs::File::create(&disk)?.set_len(2 << 30)?;
    run(tied("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&copy).arg(&disk)).context("making the disk")?;
    run(tied("rm").arg("-rf").arg(&copy))?;
    Ok(disk)
}

/// KiB in use on a machine that runs the tree from its disk.
fn on_disk(bins: &Bins, kernel: &Path, dir: &Path) -> anyhow::Result<i64> {
    let tree = tree::debian(bins, Initramfs::InitramfsTools, &mut |what| println!("{what}"))?;
    let disk = disk(&tree, dir)?;
    let boot = std::fs::read_dir(tree.join("boot"))?.flatten().map(|entry| entry.path());
    let initramfs = boot.into_iter().find(|path| path.to_string_lossy().contains("/initrd.img-"));
    let options = VmOptions {
        kernel: kernel.to_owned(),
        initramfs: initramfs.context("no initramfs in the tree")?,
        command_line: "boot=local root=/dev/vda rw console=ttyS0 panic=-1".into(),
        uuid: UUID.into(),
        mac: MAC.into(),
        memory: MEMORY,
        ssh_port: 2252,
        disks: vec![disk],
        kvm: false,
    };
    let namespace = Namespace::new()?;
    let mut vm = Vm::start(&namespace, &dir.join("on-disk"), &options, None)?;
    let at = vm.wait_console("KIB-IN-USE ", 0, BOOT_LIMIT)?;
    let at = at - "KIB-IN-USE ".len();
    vm.wait_console("LOOKED", at, Duration::from_mins(1))?;
    let said = vm.console()[at..].to_owned();
    println!("from disk: {said}");
    in_use(&said)
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_of_8_gb_needs_at_most_40_mb_more_than_one_that_runs_from_its_disk() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-memory-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let mut scenario = Scenario::prepare(dir.path(), &mut |what| println!("{what}"))?;
    scenario.memory = MEMORY;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2251)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let said = on_node(&scenario, &vm)?;
    println!("by network: {said}");
    let by_network = in_use(&said)?;
    vm.power_off();
    let by_disk = on_disk(&scenario.bins, &scenario.kernel(), dir.path())?;
    println!("in use: {by_network} KiB by network, {by_disk} KiB from disk: {} KiB more", by_network - by_disk);
    assert!(by_network - by_disk <= ALLOWED, "{by_network} KiB by network, {by_disk} KiB from disk");
    Ok(())
}
