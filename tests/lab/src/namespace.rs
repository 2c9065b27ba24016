//! A network namespace with a loopback and nothing else: what runs in it reaches itself and nobody outside.
//!
//! QEMU's user network inside it gives a VM DHCP and the way to the namespace's loopback (10.0.2.2), and to nothing beyond.

use crate::process::{Guard, tied};
use anyhow::Context as _;
use std::io::Read as _;
use std::process::{Command, Stdio};

/// The namespace; gone on drop.
pub struct Namespace {
    holder: Guard,
    pid: u32,
}

impl Namespace {
    /// Makes one.
    ///
    /// # Errors
    /// Not root, or no network namespaces.
    pub fn new() -> anyhow::Result<Self> {
        let mut holder = tied("unshare")
            .args(["--net", "--", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"])
            .stdout(Stdio::piped())
            .spawn()
            .context("starting unshare")?;
        let mut word = [0; 5];
        let mut out = holder.stdout.take().context("the holder has no output")?;
        out.read_exact(&mut word).context("making a network namespace (are you root?)")?;
        let pid = holder.id();
        Ok(Self { holder: Guard::new(holder), pid })
    }

    /// Puts a command into the namespace: `ns.enter(tied("curl")).arg(…)`.
    #[must_use]
    pub fn enter(&self, inner: &Command) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/ns/net", self.pid))
            .arg("--")
            .arg(inner.get_program())
            .args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(Stdio::null());
        command
    }

    /// The process that holds it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether its holder still lives.
    pub fn is_alive(&mut self) -> bool {
        self.holder.is_running()
    }
}
