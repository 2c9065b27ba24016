//! A network of its own for each member, joined by a bridge: so that members can be cut off from one another, each way by itself.
//! Everything goes with this process: the namespaces live as long as the processes that hold them.

use anyhow::{Context as _, ensure};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The address of member `at`.
pub(crate) fn address(at: usize) -> String {
    format!("10.77.0.{}", at + 1)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A network namespace, held by a process that sleeps.
struct Namespace(Child);

impl Namespace {
    fn new() -> anyhow::Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sleep", "100000"]);
        let child = command.stdin(Stdio::null()).spawn().context("unshare")?;
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let end = Instant::now() + Duration::from_secs(20);
        while std::fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|theirs| theirs == own) {
            ensure!(Instant::now() < end, "no network namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self(child))
    }

    /// `ip` in it.
    fn ip(&self, arguments: &str) -> anyhow::Result<()> {
        let pid = self.0.id().to_string();
        let mut command = Command::new("nsenter");
        run(command.args(["--target", &pid, "--net", "--", "ip"]).args(arguments.split(' ')))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The network of a collective.
pub(crate) struct Network {
    members: Vec<Namespace>,
    _bridge: Namespace,
}

impl Network {
    /// A network for so many members; all reach all.
    pub(crate) fn new(count: usize) -> anyhow::Result<Self> {
        let bridge = Namespace::new()?;
        bridge.ip("link add bridge type bridge")?;
        bridge.ip("link set bridge up")?;
        let mut members = Vec::with_capacity(count);
        for at in 0..count {
            let member = Namespace::new()?;
            bridge.ip(&format!("link add m{at} type veth peer name net0 netns {}", member.0.id()))?;
            bridge.ip(&format!("link set m{at} master bridge up"))?;
            member.ip("link set lo up")?;
            member.ip(&format!("address add {}/24 dev net0", address(at)))?;
            member.ip("link set net0 up")?;
            members.push(member);
        }
        Ok(Self { members, _bridge: bridge })
    }

    /// The process that holds the network of member `at`.
    pub(crate) fn holder(&self, at: usize) -> u32 {
        self.members[at].0.id()
    }

    /// What `from` sends to `to` is lost from now on.
    pub(crate) fn cut(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.members[from].ip(&format!("route replace blackhole {}/32", address(to)))
    }

    /// All reach all again.
    pub(crate) fn heal(&self) -> anyhow::Result<()> {
        for from in &self.members {
            from.ip("route flush type blackhole")?;
        }
        Ok(())
    }
}
