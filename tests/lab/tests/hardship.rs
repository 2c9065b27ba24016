//! Hard times on a node: memory that runs short, and a minute without its only server.

use anyhow::{Context as _, ensure};
use moor_lab::scenario::{BOOT_LIMIT, NODE, Scenario};
use moor_lab::{Swtpm, Vm};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// All of /usr, from the server.
const TAR: &str = "echo 3 >/proc/sys/vm/drop_caches; bash -o pipefail -c 'tar --sort=name -cf - /usr | sha256sum'";
/// Takes memory until only 60 MiB are available, waits until the tether has seen it, and says what the tether takes then. Gives all of it back.
const FILL: &str = r#"
mkdir -p /run/fill && mount -t tmpfs -o size=95% fill /run/fill || exit
while [ "$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)" -gt 61440 ]; do head -c 4M /dev/zero >>/run/fill/all || exit; done
for try in $(seq 60); do grep -q '"cache_limit":1048576' /run/mooring/tether.json && break; sleep 1; done
cat /run/mooring/tether.json; awk '/^VmRSS/ {print $2}' /proc/$(pgrep -f '^@moor-tether')/status
umount /run/fill
"#;
/// Of the 8 MiB of its cache the tether keeps one, and of 2 MiB of buffers a few; some of it may be in use just then.
const GIVEN_BACK: u64 = 6 << 10;

fn state(scenario: &Scenario, vm: &Vm) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&scenario.on_node(vm, "cat /run/mooring/tether.json")?)?)
}

/// Memory runs short, and the cache goes; it comes back with the memory.
fn short_of_memory(scenario: &Scenario, vm: &Vm) -> anyhow::Result<()> {
    let resident = "awk '/^VmRSS/ {print $2}' /proc/$(pgrep -f '^@moor-tether')/status";
    let before: u64 = scenario.on_node(vm, resident)?.trim().parse().context("what the tether takes")?;
    let full = state(scenario, vm)?;
    ensure!(full["cache_bytes"].as_u64() > Some(7 << 20), "the cache is not full: {full}");
    let said = scenario.on_node(vm, FILL)?;
    let (json, rest) = said.trim().rsplit_once('\n').with_context(|| format!("two lines are missing: {said}"))?;
    let (short, during): (Value, u64) = (serde_json::from_str(json)?, rest.trim().parse()?);
    println!("the tether took {before} KiB, and {during} KiB while memory was short");
    ensure!(short["cache_bytes"].as_u64().is_some_and(|bytes| bytes <= 1 << 20), "the cache is still large: {short}");
    ensure!(during + GIVEN_BACK <= before, "{before} KiB before, {during} KiB while memory was short");
    scenario.on_node(vm, TAR)?;
    let after = state(scenario, vm)?;
    ensure!(after["cache_bytes"].as_u64() > Some(7 << 20), "the cache stays small: {after}");
    Ok(())
}

/// A minute without the server, under a program that reads all of /usr. Returns what the console showed meanwhile.
fn a_minute_alone(scenario: &mut Scenario, vm: &Vm, sum: &str) -> anyhow::Result<String> {
    let from = vm.console().len();
    // The command is there, with all that it needs, before the server goes.
    let command = format!("tar --version >/dev/null; echo begins; sleep 3; {TAR}");
    let mut reads = scenario.shell_on_node(vm, &command).stdout(Stdio::piped()).spawn()?;
    let mut out = BufReader::new(reads.stdout.take().context("no output")?);
    let mut said = String::new();
    out.read_line(&mut said)?;
    scenario.member.kill();
    let gone = Instant::now();
    std::thread::sleep(Duration::from_mins(1));
    ensure!(reads.try_wait()?.is_none(), "the program ended without a server");
    scenario.member.start(&scenario.namespace)?;
    said.clear();
    out.read_to_string(&mut said)?;
    ensure!(reads.wait()?.success(), "the program failed: {said}");
    ensure!(said.trim() == sum, "it read something else: {said}");
    println!("read to its end {} s after the server had gone", gone.elapsed().as_secs());
    ensure!(gone.elapsed() < BOOT_LIMIT);
    Ok(vm.console()[from..].to_owned())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_short_of_memory_gets_the_cache_back_and_a_minute_without_its_server_is_one_line() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-hardship-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let mut scenario = Scenario::prepare(dir.path(), &mut |what| println!("{what}"))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2271)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let sum = scenario.on_node(&vm, TAR)?;
    short_of_memory(&scenario, &vm)?;
    let console = a_minute_alone(&mut scenario, &vm, sum.trim())?;
    println!("console meanwhile:\n{console}");
    let ours: Vec<&str> = console.lines().filter(|line| line.contains("moor-tether: ")).collect();
    assert!(
        matches!(ours[..], [begun] if begun.contains("no server of the image answers; programs wait")),
        "{console}"
    );
    for complaint in ["blocked for more than", "I/O error", "SQUASHFS error", "Out of memory"] {
        assert!(!console.contains(complaint), "{complaint}: {console}");
    }
    assert_eq!(scenario.on_node(&vm, "systemctl is-system-running")?.trim(), "running");
    scenario.power_off_in_order(&mut vm)
}

/// What a shutdown executes is in memory after this: where it is not, process 1 itself ends with what it cannot read, and nobody is left to power off.
const WARM: &str = "systemctl is-system-running; tar --version >/dev/null; shutdown=/usr/lib/systemd/systemd-shutdown; \
                    cat $shutdown $(ldd $shutdown | awk '$3 ~ /^\\// {print $3}') >/dev/null; sync; \
                    systemd-run --quiet --unit=reads sh -c 'sleep 5; exec tar -cf - /usr | cat >/dev/null'";

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_whose_only_server_is_gone_can_be_powered_off() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-alone-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let mut scenario = Scenario::prepare(dir.path(), &mut |what| println!("{what}"))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2272)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    scenario.on_node(&vm, WARM)?;
    scenario.member.kill();
    let begun = Instant::now();
    // Somebody waits for a file then.
    std::thread::sleep(Duration::from_secs(10));
    let powered_off = scenario.power_off_in_order(&mut vm);
    println!("{} s after the server had gone:\n{}", begun.elapsed().as_secs(), vm.console_tail(60));
    powered_off?;
    assert!(vm.console().contains("I/O error"), "nobody waited for the server");
    Ok(())
}
