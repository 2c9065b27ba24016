//! A node whose root three members serve: the one in use is killed while it boots, and another under a program that reads all of /usr. The
//! node notices nothing.

use anyhow::{Context as _, ensure};
use moor_api::admin::StatusEvent;
use moor_lab::process::{run, text, tied, wait_for};
use moor_lab::scenario::{BOOT_LIMIT, NODE, Scenario};
use moor_lab::{Swtpm, Vm};
use moor_vm::member::UID;
use moor_vm::{Member, MemberOptions};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Ports of the members.
const PORTS: [u16; 3] = [8443, 8444, 8445];
/// So many bytes from one member say that the node reads from it: heartbeats between members are far less in that time.
const IN_USE: u64 = 2 << 20;
/// The state from which on the root is read through the tether.
const TETHERED: &str = "switch-root";

/// A scenario with two members more.
struct Trio {
    scenario: Scenario,
    others: [Member; 2],
}

impl Trio {
    fn prepare(dir: &Path) -> anyhow::Result<Self> {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))?;
        let mut scenario = Scenario::prepare(dir, &mut |what| println!("{what}"))?;
        // Members call each other where nodes call them.
        run(&mut scenario.namespace.enter(tied("ip").args(["address", "add", "10.0.2.2/32", "dev", "lo"])))?;
        scenario.member.stop();
        everywhere(&dir.join("member"))?;
        scenario.member.start(&scenario.namespace)?;
        let join = |number: usize| -> anyhow::Result<Member> {
            let name = format!("m{}", number + 1);
            let invitation = scenario.member.moor_ok(&["collective", "invite", &name])?;
            let home = dir.join(format!("member-{}", number + 1));
            std::fs::create_dir(&home)?;
            let options = MemberOptions {
                moord: scenario.bins.path("moord"),
                templates: scenario.bins.workspace.join("profiles"),
                dir: home.clone(),
                port: PORTS[number],
                ports: vec![PORTS[number]],
            };
            let mut member = Member::join(options, &scenario.namespace, &invitation)?;
            everywhere(&home)?;
            member.start(&scenario.namespace)?;
            Ok(member)
        };
        let others = [join(1)?, join(2)?];
        let trio = Self { scenario, others };
        trio.wait_for_content(dir)?;
        Ok(trio)
    }

    /// Each member has every image, and votes.
    fn wait_for_content(&self, dir: &Path) -> anyhow::Result<()> {
        wait_for("all members to vote and to hold the image", Duration::from_mins(2), || {
            let view: Value =
                serde_json::from_str(&self.scenario.member.moor_ok(&["--json", "collective", "show"])?)?;
            let members = view["members"].as_array().map_or(&[][..], Vec::as_slice);
            let voters = members.iter().filter(|member| member["votes"] == true).count();
            let images = ["member", "member-2", "member-3"].map(|home| largest(&dir.join(home).join("state/blobs")));
            Ok(voters == PORTS.len() && images.iter().all(|size| *size == self.scenario.image_size))
        })
    }

    fn members(&self) -> [&Member; 3] {
        let [second, third] = &self.others;
        [&self.scenario.member, second, third]
    }

    fn members_mut(&mut self) -> [&mut Member; 3] {
        let [second, third] = &mut self.others;
        [&mut self.scenario.member, second, third]
    }

    fn served(&self) -> [u64; 3] {
        self.members().map(served)
    }

    /// Waits until one member has sent much more than before, and kills it. Which it was.
    fn kill_the_one_in_use(&mut self, before: [u64; 3]) -> anyhow::Result<usize> {
        let end = Instant::now() + BOOT_LIMIT;
        loop {
            let now = self.served();
            let (used, sent) = (0..PORTS.len())
                .map(|at| (at, now[at].saturating_sub(before[at])))
                .max_by_key(|(_, sent)| *sent)
                .context("no member")?;
            if sent > IN_USE {
                println!("member {} has sent {} KiB: it is killed", used + 1, sent >> 10);
                self.members_mut()[used].kill();
                return Ok(used);
            }
            ensure!(Instant::now() < end, "no member has sent more than {sent} bytes");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The node's states, as a member that lives tells them.
    fn states(&self) -> anyhow::Result<Vec<StatusEvent>> {
        let member = self.members().into_iter().find(|member| member.id().is_some()).context("no member lives")?;
        let mut command = tied(self.scenario.bins.path("moor"));
        command.arg("--socket").arg(member.socket()).args(["--json", "status", "--history", NODE]);
        text(&mut command)?.lines().map(|line| serde_json::from_str(line).context("reading a status event")).collect()
    }

    fn wait_state(&self, vm: &mut Vm, wanted: &str) -> anyhow::Result<()> {
        wait_for(&format!("the state '{wanted}'"), BOOT_LIMIT, || {
            std::thread::sleep(Duration::from_millis(200));
            vm.check_running()?;
            let states = self.states()?;
            if let Some(failed) = states.iter().find(|event| event.state == "failed") {
                anyhow::bail!("the node failed: {}", failed.detail);
            }
            Ok(states.iter().any(|event| event.state == wanted))
        })
        .with_context(|| format!("console:\n{}", vm.console_tail(60)))
    }

    /// What the tether says of the member at this place.
    fn standing(&self, vm: &Vm, at: usize) -> anyhow::Result<Value> {
        let state: Value = serde_json::from_str(&self.scenario.on_node(vm, "moor-tether status --json")?)?;
        let members = state["members"].as_array().context("no members")?;
        let port = format!(":{}/", PORTS[at]);
        let found = members.iter().find(|member| member["url"].as_str().is_some_and(|url| url.contains(&port)));
        found.cloned().with_context(|| format!("the node does not know the member at port {}: {state}", PORTS[at]))
    }
}

/// Has a member listen on every address of its namespace.
fn everywhere(home: &Path) -> anyhow::Result<()> {
    let config = home.join("moord.toml");
    let text = std::fs::read_to_string(&config)?;
    let changed = text.replace("listen = [\"127.0.0.1:", "listen = [\"0.0.0.0:");
    ensure!(changed != text, "the configuration listens elsewhere:\n{text}");
    std::fs::write(&config, changed)?;
    std::os::unix::fs::chown(&config, Some(UID), Some(UID))?;
    Ok(())
}

/// Size of the largest file below a folder.
fn largest(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => largest(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.max().unwrap_or(0)
}

/// Bytes that a member has written so far, to sockets above all (`wchar`, proc(5)).
fn served(member: &Member) -> u64 {
    let Some(id) = member.id() else { return 0 };
    let text = std::fs::read_to_string(format!("/proc/{id}/io")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("wchar:")?.trim().parse().ok()).unwrap_or(0)
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn the_member_in_use_dies_during_the_boot_and_again_under_tar_and_the_node_notices_nothing() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-trio-").tempdir()?;
    let mut trio = Trio::prepare(dir.path())?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    trio.scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = trio.scenario.power_on("vm", &tpm, 2241)?;
    trio.wait_state(&mut vm, TETHERED)?;
    let before = trio.served();
    let first = trio.kill_the_one_in_use(before)?;
    trio.wait_state(&mut vm, "booted")?;
    let killed = trio.standing(&vm, first)?;
    assert!(killed["faults"].as_u64() > Some(0) && killed["state"] != "good", "it was not in use: {killed}");
    let on_node = |trio: &Trio, vm: &Vm, command: &str| trio.scenario.on_node(vm, command);
    let is_running = on_node(&trio, &vm, "systemctl is-system-running --wait || systemctl --failed")?;
    assert_eq!(is_running, "running");

    // It comes back, and the node finds that out by itself.
    let namespace = &trio.scenario.namespace;
    match first {
        0 => trio.scenario.member.start(namespace)?,
        other => trio.others[other - 1].start(namespace)?,
    }
    wait_for("the node to take the member back", Duration::from_mins(3), || {
        std::thread::sleep(Duration::from_secs(2));
        Ok(trio.standing(&vm, first)?["state"] == "good")
    })?;

    // Under a program that reads everything. Its sum is the same as one that was read in peace.
    let tar = "echo 3 >/proc/sys/vm/drop_caches; bash -o pipefail -c 'tar --sort=name -cf - /usr | sha256sum'";
    let in_peace = on_node(&trio, &vm, tar)?;
    let before = trio.served();
    let mut reads = trio.scenario.shell_on_node(&vm, tar).stdout(Stdio::piped()).spawn()?;
    let second = trio.kill_the_one_in_use(before)?;
    ensure!(reads.try_wait()?.is_none(), "tar had ended before the member was killed");
    let output = reads.wait_with_output()?;
    assert!(output.status.success(), "tar failed: {output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), in_peace);
    let killed = trio.standing(&vm, second)?;
    assert!(killed["faults"].as_u64() > Some(0), "it was not in use: {killed}");

    // Nothing of it reached a program or the administrator.
    let complaints = "dmesg | grep -iE 'i/o error|squashfs error|hung task|no server of the image' || true";
    assert_eq!(on_node(&trio, &vm, complaints)?, "");
    assert_eq!(on_node(&trio, &vm, "systemctl is-system-running")?, "running");
    trio.scenario.power_off_in_order(&mut vm)
}
