//! Real members, each in a network of its own. Clients come over the unix sockets, which no partition cuts.

use crate::net::{Network, address};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CollectiveView, InviteRequest};
use moor_api::client::admin::AdminClient;
use moord::store::Replicated;
use moord::store::Store as _;
use moord::store::raft::{Calls, Places};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For what a quiet machine does in a second or two.
const PATIENCE: Duration = Duration::from_mins(1);
const PORT: u16 = 8443;
/// Nobody's uid.
const UID: u32 = 61_236;

struct Member {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

/// The collective.
pub(crate) struct Cluster {
    // Before the network: members end first.
    members: Vec<Member>,
    pub(crate) net: Network,
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Cluster {
    /// So many members that vote, and one leader.
    pub(crate) async fn new(count: usize) -> anyhow::Result<Self> {
        let mut cluster = Self { members: Vec::new(), net: Network::new(count)? };
        for at in 0..count {
            cluster.members.push(prepare(at)?);
            if at == 0 {
                let output = cluster.moord(at, &["init"], &["--address", &address(at)]).output()?;
                ensure!(output.status.success(), "moord init: {}", String::from_utf8_lossy(&output.stderr));
            } else {
                let request = InviteRequest { name: format!("m{}", at + 1), voter: true, lifetime: 600 };
                let invited = cluster.admin(0).await?.invite(&request).await?;
                let mut join = cluster.moord(at, &["join"], &["--address", &address(at)]);
                let mut child = join.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
                child.stdin.take().context("no pipe")?.write_all(invited.invitation.as_bytes())?;
                let output = child.wait_with_output()?;
                ensure!(output.status.success(), "moord join: {}", String::from_utf8_lossy(&output.stderr));
            }
            cluster.start(at)?;
        }
        let end = Instant::now() + PATIENCE;
        while cluster.view(0).await?.members.iter().filter(|member| member.votes).count() < count {
            ensure!(Instant::now() < end, "{count} voters do not come:\n{}", cluster.log(0));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(cluster)
    }

    /// `moord` as member `at`, in its network, as nobody.
    fn moord(&self, at: usize, verb: &[&str], more: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.net.holder(at).to_string(), "--net", "--", "setpriv"]);
        let id = UID.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--pdeathsig", "KILL"]);
        command.arg("--").arg(env!("CARGO_BIN_EXE_moord")).args(verb).arg("--config").arg(self.path(at, "moord.toml"));
        command.args(more).stdin(Stdio::null());
        command
    }

    fn path(&self, at: usize, name: &str) -> PathBuf {
        self.members[at].dir.path().join(name)
    }

    /// Where the administrators of member `at` come in.
    pub(crate) fn socket(&self, at: usize) -> PathBuf {
        self.path(at, "api.sock")
    }

    pub(crate) fn log(&self, at: usize) -> String {
        std::fs::read_to_string(self.path(at, "log")).unwrap_or_default()
    }

    pub(crate) async fn admin(&self, at: usize) -> anyhow::Result<AdminClient> {
        Ok(AdminClient::unix(&self.socket(at)).await?)
    }

    pub(crate) async fn view(&self, at: usize) -> anyhow::Result<CollectiveView> {
        Ok(self.admin(at).await?.collective().await?)
    }

    /// Starts a member and waits until it answers.
    pub(crate) fn start(&mut self, at: usize) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path(at, "log"))?;
        let mut child = self.moord(at, &["run"], &[]).stdout(log.try_clone()?).stderr(log).spawn()?;
        let end = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(self.socket(at)).is_err() {
            ensure!(child.try_wait()?.is_none(), "moord ended:\n{}", self.log(at));
            ensure!(Instant::now() < end, "moord does not answer:\n{}", self.log(at));
            std::thread::sleep(Duration::from_millis(10));
        }
        self.members[at].child = Some(child);
        Ok(())
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, at: usize) {
        if let Some(mut child) = self.members[at].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP and SIGCONT, SIGTERM.
    pub(crate) fn signal(&self, at: usize, signal: Signal) -> anyhow::Result<()> {
        let child = self.members[at].child.as_ref().context("not running")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        Ok(())
    }

    /// The place of the leader among the members, if any of them says that it leads.
    pub(crate) async fn leader(&self) -> Option<usize> {
        for at in 0..self.members.len() {
            let view = tokio::time::timeout(Duration::from_secs(3), self.view(at)).await;
            if let Ok(Ok(view)) = view
                && view.majority
                && view.leader == Some(view.number)
            {
                return usize::try_from(view.number).ok()?.checked_sub(1);
            }
        }
        None
    }

    /// Waits until all have applied the same, ends them, and gives the digests of each one's tables.
    pub(crate) async fn settle(&mut self) -> anyhow::Result<Vec<BTreeMap<String, [u8; 32]>>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut applied = Vec::new();
            for at in 0..self.members.len() {
                applied.push(self.view(at).await.map(|view| (view.applied, view.last, view.leader)).ok());
            }
            let first = applied[0].filter(|(applied, last, leader)| applied == last && leader.is_some());
            if first.is_some() && applied.iter().all(|seen| *seen == first) {
                break;
            }
            ensure!(Instant::now() < end, "they do not come to the same: {applied:?}\n{}", self.log(0));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let mut digests = Vec::new();
        for at in 0..self.members.len() {
            self.signal(at, Signal::SIGTERM)?;
            let mut child = self.members[at].child.take().context("not running")?;
            ensure!(child.wait()?.success(), "member {at} did not end well:\n{}", self.log(at));
        }
        for at in 0..self.members.len() {
            let places = Places::in_dir(&self.path(at, "state/store"));
            let store = Replicated::open(&places, at as u64 + 1, Calls::to_nobody()?).await?;
            digests.push(store.snapshot()?.digests()?);
            store.close().await;
        }
        Ok(digests)
    }
}

fn prepare(at: usize) -> anyhow::Result<Member> {
    let dir = tempfile::Builder::new().prefix("moord-faults-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    let member = Member { dir, child: None };
    let path = member.dir.path();
    std::fs::create_dir(path.join("state"))?;
    std::fs::write(
        path.join("moord.toml"),
        format!(
            "name = \"test\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"{1}:{PORT}\"]\n\
             urls = [\"https://{1}:{PORT}\"]\ntemplates = \"{2}/../profiles\"\n",
            path.display(),
            address(at),
            env!("CARGO_MANIFEST_DIR")
        ),
    )?;
    for path in [path.to_owned(), path.join("state")] {
        chown(path, Some(UID), Some(UID))?;
    }
    Ok(member)
}
