//! A network and mounts of its own for each member; the networks are joined by a bridge: so that members can be cut off from one another, each way
//! by itself, and a disk can be full for one of them.
//! Everything goes with this process: the namespaces live as long as the processes that hold them.

use anyhow::{Context as _, ensure};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Size of a member's file system: memory is taken as it fills.
const ROOMY: &str = "size=4g";

/// The address of member `at`.
pub(crate) fn address(at: usize) -> String {
    format!("10.77.0.{}", at + 1)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A network and a mount namespace, held by a process that sleeps.
struct Namespace(Child);

impl Namespace {
    fn new() -> anyhow::Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--mount", "--", "sleep", "100000"]);
        let child = command.stdin(Stdio::null()).spawn().context("unshare")?;
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let end = Instant::now() + Duration::from_secs(20);
        while std::fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|theirs| theirs == own)
            // Mounts are made private after both are there.
            || std::fs::read_to_string(format!("/proc/{}/comm", child.id())).is_ok_and(|comm| comm.trim() != "sleep")
        {
            ensure!(Instant::now() < end, "no namespaces");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self(child))
    }

    /// A command in it: its words are still to come.
    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.0.id().to_string(), "--net", "--mount", "--"]);
        command
    }

    /// `ip` in it.
    fn ip(&self, arguments: &str) -> anyhow::Result<()> {
        run(self.enter().arg("ip").args(arguments.split(' ')))
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

    /// A command in the namespaces of member `at`: its words are still to come.
    pub(crate) fn enter(&self, at: usize) -> Command {
        self.members[at].enter()
    }

    /// How the path `path` of member `at` is reached from outside.
    pub(crate) fn outside(&self, at: usize, path: &Path) -> PathBuf {
        let mut outside = PathBuf::from(format!("/proc/{}/root", self.members[at].0.id()));
        outside.extend(path.components().filter(|part| matches!(part, Component::Normal(_))));
        outside
    }

    /// A file system in memory for member `at` alone.
    pub(crate) fn mount(&self, at: usize, path: &Path, owner: u32) -> anyhow::Result<()> {
        let options = format!("{ROOMY},mode=0750,uid={owner},gid={owner}");
        run(self.enter(at).args(["mount", "-t", "tmpfs", "-o", &options, "member"]).arg(path))
    }

    /// The file system that was mounted at `path` has so many bytes left from now on, or as many as there could be.
    pub(crate) fn room(&self, at: usize, path: &Path, left: Option<u64>) -> anyhow::Result<()> {
        let size = match left {
            Some(left) => {
                let is = nix::sys::statvfs::statvfs(&self.outside(at, path))?;
                let used = (is.blocks() - is.blocks_free()) * is.fragment_size();
                format!("size={}k", (used + left) >> 10)
            }
            None => ROOMY.to_owned(),
        };
        run(self.enter(at).args(["mount", "-o", &format!("remount,{size}")]).arg(path))
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
