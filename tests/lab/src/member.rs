//! A member as a real process: `moord` under an unprivileged numeric uid, its state in a folder of the test.

use crate::bins::Bins;
use crate::namespace::Namespace;
use crate::process::{Guard, run, tied_as, wait_for};
use crate::vm::HOST_FROM_GUEST;
use anyhow::Context as _;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The user it runs as: any number that is nobody's.
pub const UID: u32 = 61_234;

/// A member of a collective of one.
pub struct Member {
    guard: Option<Guard>,
    bins: Bins,
    dir: PathBuf,
    port: u16,
}

impl Member {
    /// Makes a new collective in `dir` (`moord init`); it listens on `port` of the namespace's loopback once [`Self::start`]ed.
    ///
    /// # Errors
    /// `moord init` failed; with what it printed.
    pub fn init(bins: &Bins, dir: &Path, port: u16) -> anyhow::Result<Self> {
        let state = dir.join("state");
        std::fs::create_dir_all(&state).with_context(|| format!("making '{}'", state.display()))?;
        std::fs::write(
            dir.join("moord.toml"),
            format!(
                "name = \"lab\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"127.0.0.1:{port}\"]\n\
                 urls = [\"https://{HOST_FROM_GUEST}:{port}\"]\ntemplates = \"{1}/profiles\"\n",
                dir.display(),
                bins.workspace.display()
            ),
        )?;
        for path in [dir, &state] {
            chown(path, Some(UID), Some(UID)).with_context(|| format!("giving '{}' to uid {UID}", path.display()))?;
        }
        let member = Self { guard: None, bins: bins.clone(), dir: dir.to_owned(), port };
        run(tied_as(UID, bins.path("moord"))
            .args(["init", "--config"])
            .arg(member.config())
            .args(["--address", "127.0.0.1"]))
        .context("moord init")?;
        Ok(member)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("moord.toml")
    }

    /// The unix socket of the admin API.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    /// The folder with working directories of profiles.
    #[must_use]
    pub fn profiles(&self) -> PathBuf {
        self.dir.join("state/profiles")
    }

    /// URL on the namespace's loopback.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Starts it and waits until its socket answers.
    ///
    /// # Errors
    /// It does not; with its log.
    pub fn start(&mut self, namespace: &Namespace) -> anyhow::Result<()> {
        let _ = std::fs::remove_file(self.socket());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("moord.log"))?;
        let mut command = tied_as(UID, self.bins.path("moord"));
        command.args(["run", "--config"]).arg(self.config());
        let child = namespace.enter(&command).stdout(log.try_clone()?).stderr(log).spawn().context("starting moord")?;
        let mut guard = Guard::new(child);
        let socket = self.socket();
        wait_for("the member's socket", Duration::from_secs(20), || {
            anyhow::ensure!(guard.is_running(), "moord ended");
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })
        .with_context(|| self.log_tail())?;
        self.guard = Some(guard);
        Ok(())
    }

    /// Pulls the plug: SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            guard.kill();
        }
    }

    /// Stops it in good order.
    pub fn stop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            guard.terminate(Duration::from_secs(10));
        }
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.dir.join("moord.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("moord's log ends with:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
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
