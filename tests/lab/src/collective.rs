//! Several members of one collective as real processes on this machine's loopback. They are killed, stopped and started one by one.

#[path = "../../port.rs"]
pub(crate) mod port;

use self::port::free_ports;
use crate::bins::Bins;
use crate::process::{Guard, run, tied_as, wait_for};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CollectiveView, InviteRequest};
use moor_api::client::admin::AdminClient;
use moor_vm::process::{spawn, tail};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The user that members run as: any number that is nobody's.
const UID: u32 = 61_237;
/// For what a quiet machine does in a second or two.
const PATIENCE: Duration = Duration::from_mins(1);

struct Process {
    dir: PathBuf,
    port: u16,
    guard: Option<Guard>,
}

/// The collective. Its members end with it.
pub struct Collective {
    bins: Bins,
    dir: PathBuf,
    members: Vec<Process>,
}

impl Collective {
    /// So many members that vote, and one of them leads. All of it lies in `dir`, which others may look into from now on.
    ///
    /// # Errors
    /// A member does not come about; with what it printed.
    pub async fn new(bins: &Bins, dir: &Path, count: usize) -> anyhow::Result<Self> {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))?;
        let mut collective = Self { bins: bins.clone(), dir: dir.to_owned(), members: Vec::new() };
        for _ in 0..count {
            collective.add(true).await?;
        }
        let end = Instant::now() + PATIENCE;
        while collective.view(0).await?.members.iter().filter(|member| member.votes).count() < count {
            ensure!(Instant::now() < end, "{count} voters do not come:\n{}", collective.log_tail(0));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(collective)
    }

    /// One more member, running; gives its place.
    ///
    /// # Errors
    /// It does not come about; with what it printed.
    pub async fn add(&mut self, votes: bool) -> anyhow::Result<usize> {
        let at = self.members.len();
        let dir = self.dir.join(format!("m{}", at + 1));
        let port = free_ports(1);
        let state = dir.join("state");
        std::fs::create_dir_all(&state)?;
        let text = format!(
            "name = \"lab\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"127.0.0.1:{port}\"]\n\
             connections_per_address = 8192\nurls = [\"https://127.0.0.1:{port}\"]\ntemplates = \"{1}\"\n",
            dir.display(),
            self.bins.workspace.join("profiles").display()
        );
        std::fs::write(dir.join("moord.toml"), text)?;
        for path in [&dir, &state] {
            chown(path, Some(UID), Some(UID))?;
        }
        self.members.push(Process { dir, port, guard: None });
        if at == 0 {
            run(self.moord(at, "init").args(["--address", "127.0.0.1"]))?;
        } else {
            let request = InviteRequest { name: format!("m{}", at + 1), voter: votes, lifetime: 600 };
            let invited = self.admin(0).await?.invite(&request).await?;
            let mut command = self.moord(at, "join");
            command.args(["--address", "127.0.0.1"]).stdin(Stdio::piped()).stderr(Stdio::piped());
            let mut child = spawn(&mut command)?;
            child.stdin.take().context("no pipe")?.write_all(invited.invitation.as_bytes())?;
            let output = child.wait_with_output()?;
            ensure!(output.status.success(), "moord join: {}", String::from_utf8_lossy(&output.stderr));
        }
        self.start(at)?;
        Ok(at)
    }

    fn moord(&self, at: usize, verb: &str) -> Command {
        let mut command = tied_as(UID, self.bins.path("moord"));
        command.arg(verb).arg("--config").arg(self.members[at].dir.join("moord.toml"));
        command
    }

    /// Starts member `at` and waits until its socket answers.
    ///
    /// # Errors
    /// It does not; with its log.
    pub fn start(&mut self, at: usize) -> anyhow::Result<()> {
        let (socket, log) = (self.socket(at), self.members[at].dir.join("log"));
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = self.moord(at, "run");
        let mut guard = Guard::new(spawn(command.stdout(log.try_clone()?).stderr(log))?);
        wait_for("a member's socket", PATIENCE, || {
            ensure!(guard.is_running(), "moord ended: {}", self.log_tail(at));
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })?;
        self.members[at].guard = Some(guard);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self, at: usize) {
        if let Some(mut guard) = self.members[at].guard.take() {
            guard.kill();
        }
    }

    /// Stops it in good order.
    pub fn stop(&mut self, at: usize) {
        if let Some(mut guard) = self.members[at].guard.take() {
            guard.terminate(Duration::from_secs(20));
        }
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn id(&self, at: usize) -> Option<u32> {
        self.members[at].guard.as_ref().and_then(Guard::id)
    }

    /// The folder of member `at`.
    #[must_use]
    pub fn dir(&self, at: usize) -> &Path {
        &self.members[at].dir
    }

    /// Where member `at` listens.
    #[must_use]
    pub fn port(&self, at: usize) -> u16 {
        self.members[at].port
    }

    /// How nodes reach each member, in their order.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("https://127.0.0.1:{}", member.port)).collect()
    }

    /// Where administrators of member `at` come in.
    #[must_use]
    pub fn socket(&self, at: usize) -> PathBuf {
        self.members[at].dir.join("api.sock")
    }

    /// A connection to member `at` as its administrator.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn admin(&self, at: usize) -> anyhow::Result<AdminClient> {
        Ok(AdminClient::unix(&self.socket(at)).await?)
    }

    /// How member `at` sees the collective.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn view(&self, at: usize) -> anyhow::Result<CollectiveView> {
        Ok(self.admin(at).await?.collective().await?)
    }

    /// The place of the member that leads.
    ///
    /// # Errors
    /// Nobody does for a while.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let end = Instant::now() + PATIENCE;
        loop {
            for at in (0..self.members.len()).filter(|at| self.members[*at].guard.is_some()) {
                let view = self.view(at).await?;
                if view.majority && view.leader == Some(view.number) {
                    return Ok(at);
                }
            }
            ensure!(Instant::now() < end, "nobody leads:\n{}", self.log_tail(0));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The end of a member's log.
    #[must_use]
    pub fn log_tail(&self, at: usize) -> String {
        let text = std::fs::read_to_string(self.members[at].dir.join("log")).unwrap_or_default();
        format!("the log of m{} ends with:\n{}", at + 1, tail(&text, 20))
    }
}
