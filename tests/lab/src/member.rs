//! A member under test, and `moor` commands for it.

use crate::bins::Bins;
use crate::process::run;
use moor_vm::{MemberOptions, Namespace};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A member of a collective of one.
pub struct Member {
    bins: Bins,
    server: moor_vm::Member,
}

impl Member {
    /// Makes a new collective in `dir` (`moord init`); it listens on `port` of the namespace's loopback once it is started.
    ///
    /// # Errors
    /// `moord init` failed; with what it printed.
    pub fn init(bins: &Bins, dir: &Path, port: u16) -> anyhow::Result<Self> {
        let options = MemberOptions {
            moord: bins.path("moord"),
            templates: bins.workspace.join("profiles"),
            dir: dir.to_owned(),
            port,
            ports: vec![port],
        };
        Ok(Self { bins: bins.clone(), server: moor_vm::Member::init(options)? })
    }

    /// A new collective in the folder `member` of `work`, which others may look into from now on, and running.
    ///
    /// # Errors
    /// It was not made, or does not answer; with what it printed.
    pub fn start_in(work: &Path, bins: &Bins, namespace: &Namespace) -> anyhow::Result<Self> {
        // The member is another user than the one who made the folder.
        std::fs::set_permissions(work, std::fs::Permissions::from_mode(0o755))?;
        let mut member = Self::init(bins, &work.join("member"), 8443)?;
        member.start(namespace)?;
        Ok(member)
    }

    /// A `moor` command for this member.
    #[must_use]
    pub fn moor(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bins.path("moor"));
        command.arg("--socket").arg(self.socket()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs `moor` and returns what it printed.
    ///
    /// # Errors
    /// Its status is not 0; with what it printed.
    pub fn moor_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output: Output = run(&mut self.moor(arguments))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Deref for Member {
    type Target = moor_vm::Member;

    fn deref(&self) -> &Self::Target {
        &self.server
    }
}

impl DerefMut for Member {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.server
    }
}
