//! What a block of the root costs through FUSE and a loop device, beside NBD: system calls of who serves it, and changes from one task to another.
//! Both serve from memory what was decrypted already; the kernel is Debian's, in a virtual machine, because it has NBD. Times in emulation mean
//! little, and are not taken.

use anyhow::{Context as _, ensure};
use moor_lab::process::{run, tied};
use moor_lab::scenario::{NODE, Scenario};
use moor_lab::{Swtpm, Vm};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

/// NBD's two sides, and what they need that the tree has not.
const PACKAGES: [&str; 5] = ["nbd-client", "nbd-server", "libnl-3-200", "libnl-genl-3-200", "libglib2.0-0"];
/// Requests of one pass, and how often it is read: it fits into the tether's cache.
const REQUESTS: u32 = 32;
const PASSES: u32 = 50;
/// Reads a device past the page cache, 128 KiB at a time, and counts: system calls of the processes that serve it, by the kernel's trace events, and the
/// machine's changes of task.
const MEASURE: &str = r#"
set -e
trace=/sys/kernel/tracing
mountpoint -q $trace || mount -t tracefs tracefs $trace
switches() { awk '/^ctxt/ {print $2}' /proc/stat; }
measure() {
    mkdir -p $trace/instances/moor; cd $trace/instances/moor
    echo 16384 >buffer_size_kb
    for pid in $3; do ls /proc/$pid/task; done >set_event_pid
    dd if=$2 of=/dev/null iflag=direct bs=128k count=$requests status=none
    echo >trace
    echo 1 >events/raw_syscalls/sys_enter/enable
    before=$(switches)
    for pass in $(seq $passes); do dd if=$2 of=/dev/null iflag=direct bs=128k count=$requests status=none; done
    after=$(switches)
    echo 0 >events/raw_syscalls/sys_enter/enable
    echo "$1 $(grep -c 'NR ' trace) $((after - before))"
}
export PATH=$PATH:/opt/nbd/usr/bin:/opt/nbd/usr/sbin:/opt/nbd/sbin:/opt/nbd/bin
export LD_LIBRARY_PATH=/opt/nbd/usr/lib/x86_64-linux-gnu:/opt/nbd/lib/x86_64-linux-gnu
modprobe nbd
head -c 4194304 /dev/urandom >/run/payload
nbd-server -C /dev/null 127.0.0.1:10809 /run/payload -r >/dev/null 2>&1
nbd-client 127.0.0.1 10809 /dev/nbd0 >/dev/null 2>&1
measure nbd /dev/nbd0 "$(pgrep -d ' ' nbd-server)"
measure fuse $(losetup -n -O NAME | head -n 1) "$(pgrep -d ' ' -f '^@.*moor-tether')"
nbd-client -d /dev/nbd0 >/dev/null 2>&1
"#;

/// System calls and changes of task for one request.
#[derive(Debug)]
struct Cost {
    calls: f64,
    switches: f64,
}

impl Cost {
    fn find(said: &str, name: &str) -> anyhow::Result<Self> {
        let line =
            said.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in: {said}"))?;
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [calls, switches] = numbers[..] else { anyhow::bail!("no two numbers: {line}") };
        let requests = f64::from(REQUESTS * PASSES);
        ensure!(calls > 0.0, "nothing was counted: {said}");
        Ok(Self { calls: calls / requests, switches: switches / requests })
    }
}

/// Lays NBD's programs into the node's writable layer: of /run nothing may be executed.
fn bring(scenario: &Scenario, vm: &Vm, dir: &Path) -> anyhow::Result<()> {
    let (packages, files) = (dir.join("packages"), dir.join("nbd"));
    std::fs::create_dir_all(&packages)?;
    run(tied("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .args(PACKAGES)
        .current_dir(&packages))?;
    for package in packages.read_dir()?.flatten() {
        run(tied("dpkg-deb").arg("-x").arg(package.path()).arg(&files))?;
    }
    let mut tar = tied("tar").arg("-C").arg(&files).args(["-cf", "-", "."]).stdout(Stdio::piped()).spawn()?;
    let archive = tar.stdout.take().context("tar without an output")?;
    let mut unpack = scenario.shell_on_node(vm, "mkdir /opt/nbd && tar -C /opt/nbd -xf -");
    ensure!(unpack.stdin(archive).status()?.success() && tar.wait()?.success(), "the node has not unpacked it");
    Ok(())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_block_of_the_root_costs_no_more_system_calls_than_by_nbd() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-nbd-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let scenario = Scenario::prepare(dir.path(), &mut |what| println!("{what}"))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2261)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    bring(&scenario, &vm, dir.path())?;
    let said = scenario.on_node(&vm, &format!("requests={REQUESTS}; passes={PASSES}; {MEASURE}"))?;
    let (nbd, fuse) = (Cost::find(&said, "nbd ")?, Cost::find(&said, "fuse ")?);
    for (name, cost) in [("NBD", &nbd), ("FUSE and loop", &fuse)] {
        println!("{name}: {:.2} system calls, {:.2} changes of task for 128 KiB", cost.calls, cost.switches);
    }
    assert!(fuse.calls <= nbd.calls, "FUSE and loop {fuse:?}, NBD {nbd:?}");
    Ok(())
}
