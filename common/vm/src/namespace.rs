//! A network namespace with a loopback and nothing else: what runs in it reaches itself and nobody outside.
//!
//! QEMU's user network inside it gives a VM DHCP and the way to the namespace's loopback (10.0.2.2), and to nothing beyond.

use crate::VmError;
use crate::process::{Guard, spawn, tied};
use std::io::{self, Read as _};
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
    pub fn new() -> Result<Self, VmError> {
        let mut holder = spawn(
            tied("unshare")
                .args(["--net", "--", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"])
                .stdout(Stdio::piped()),
        )?;
        let mut word = [0; 5];
        let said = match holder.stdout.take() {
            Some(mut out) => out.read_exact(&mut word),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        let pid = holder.id();
        let holder = Guard::new(holder);
        said.map_err(VmError::Namespace)?;
        Ok(Self { holder, pid })
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
