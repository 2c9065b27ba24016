//! Real members, each in a network of its own. Clients come over the unix sockets, which no partition cuts.

use crate::etcd::{self, Gateway, Seat};
use crate::net::{Network, address};
use crate::shim::{self, Orders};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CollectiveView, InviteRequest, MemberRequest};
use moor_api::client::admin::AdminClient;
use moord::store::raft::{Calls, Places};
use moord::store::{Level, Replicated, Store as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;
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
    orders: Orders,
    child: Option<Child>,
    /// Of etcd: it comes to a cluster that is there.
    joins: bool,
}

/// What is left of a disk that is as good as full, in bytes: less than a member needs to go on.
const FULL: u64 = 4 << 20;
/// The same for etcd. It lays claim to the place of its log beforehand, so all that grows is its database, by a page of 4 KiB now and then.
const ETCD_FULL: u64 = 64 << 10;

/// What an earlier release knows: it is the same program, which does as one.
const OLD_LEVEL: u32 = 1;
const NEW_LEVEL: u32 = Level::NEWEST.0;

/// The collective.
pub(crate) struct Cluster {
    // Before the network: members end first.
    members: Vec<Member>,
    pub(crate) net: Network,
    is_etcd: bool,
    /// Members begin as of an earlier release.
    is_old: bool,
    library: PathBuf,
    _files: tempfile::TempDir,
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
    fn empty(count: usize, is_etcd: bool, is_old: bool) -> anyhow::Result<Self> {
        let files = tempfile::Builder::new().prefix("moord-faults-").tempdir()?;
        std::fs::set_permissions(files.path(), std::fs::Permissions::from_mode(0o755))?;
        let library = shim::compile(files.path())?;
        Ok(Self { members: Vec::new(), net: Network::new(count)?, is_etcd, is_old, library, _files: files })
    }

    /// So many members that vote, so many that do not, and one leader.
    pub(crate) async fn new(voters: usize, others: usize) -> anyhow::Result<Self> {
        Self::of_release(false, voters, others).await
    }

    /// The same of an earlier release, that is to be [upgraded](Self::upgrade).
    pub(crate) async fn old(voters: usize, others: usize) -> anyhow::Result<Self> {
        Self::of_release(true, voters, others).await
    }

    async fn of_release(is_old: bool, voters: usize, others: usize) -> anyhow::Result<Self> {
        let mut cluster = Self::empty(voters + others, false, is_old)?;
        for at in 0..voters + others {
            cluster.prepare(at)?;
            if at == 0 {
                let output = cluster.moord(at, &["init"], &["--address", &address(at)]).output()?;
                ensure!(output.status.success(), "moord init: {}", String::from_utf8_lossy(&output.stderr));
            } else {
                let request = InviteRequest { name: name(at), voter: at < voters, lifetime: 600 };
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
        while cluster.view(0).await?.members.iter().filter(|member| member.votes).count() < voters {
            ensure!(Instant::now() < end, "{voters} voters do not come:\n{}", cluster.log(0));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(cluster)
    }

    /// So many members of etcd, and one leader.
    pub(crate) async fn etcd(count: usize) -> anyhow::Result<Self> {
        let mut cluster = Self::empty(count, true, false)?;
        (0..count).try_for_each(|at| cluster.prepare(at))?;
        cluster.start_all(0..count)?;
        let end = Instant::now() + PATIENCE;
        while cluster.leader().await.is_none() {
            ensure!(Instant::now() < end, "etcd has no leader:\n{}", cluster.log(0));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(cluster)
    }

    /// A folder with all that member `at` has, and a disk of its own in it.
    fn prepare(&mut self, at: usize) -> anyhow::Result<()> {
        let dir = tempfile::Builder::new().prefix("moord-faults-").tempdir()?;
        let path = dir.path().to_owned();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        let state = path.join("state");
        std::fs::create_dir(&state)?;
        self.net.mount(at, &state, UID)?;
        chown(&path, Some(UID), Some(UID))?;
        let orders = Orders::new(path.join("orders"))?;
        self.members.push(Member { dir, orders, child: None, joins: false });
        self.configure(at, self.is_old)
    }

    /// The configuration of member `at`, as one of this release or of an earlier one. What is near is of the newer level.
    fn configure(&self, at: usize, is_old: bool) -> anyhow::Result<()> {
        let known = if is_old { OLD_LEVEL } else { NEW_LEVEL };
        let text = format!(
            "name = \"test\"\nmember_name = \"{3}\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"{1}:{PORT}\"]\n\
             urls = [\"https://{1}:{PORT}\"]\ntemplates = \"{2}/../profiles\"\nnear = [\"{1}/24\"]\nmax_feature_level = {known}\n",
            self.members[at].dir.path().display(),
            address(at),
            env!("CARGO_MANIFEST_DIR"),
            name(at)
        );
        Ok(std::fs::write(self.path(at, "moord.toml"), text)?)
    }

    /// Ends member `at`, and starts it as one of this release, or of the earlier one.
    pub(crate) fn upgrade(&mut self, at: usize, is_old: bool) -> anyhow::Result<()> {
        self.signal(at, Signal::SIGTERM)?;
        let mut child = self.members[at].child.take().context("not running")?;
        ensure!(child.wait()?.success(), "member {at} did not end well:\n{}", self.log(at));
        self.configure(at, is_old)?;
        self.start(at)
    }

    /// Whether its members begin as of an earlier release.
    pub(crate) fn is_old(&self) -> bool {
        self.is_old
    }

    /// The level has not risen as long as one member is of the earlier release.
    pub(crate) async fn is_at_the_old_level(&self) -> anyhow::Result<()> {
        for at in 0..self.members.len() {
            let view = self.view(at).await?;
            ensure!(view.level == OLD_LEVEL, "level {}, and not all are upgraded: {view:?}", view.level);
            ensure!(view.members.iter().all(|member| member.near.is_empty()), "what is newer was used: {view:?}");
        }
        Ok(())
    }

    /// Waits until the level has risen for all, and what is of it is used.
    pub(crate) async fn comes_to_the_new_level(&self) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        for at in 0..self.members.len() {
            loop {
                let view = self.view(at).await?;
                let is_used = view.members.iter().all(|member| member.near.len() == 1 && member.level == NEW_LEVEL);
                if view.level == NEW_LEVEL && is_used {
                    break;
                }
                ensure!(Instant::now() < end, "all are upgraded, and member {at} sees {view:?}\n{}", self.log(at));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// As nobody, in the namespaces of member `at`: the command's words are still to come.
    fn nobody(&self, at: usize) -> Command {
        let mut command = self.net.enter(at);
        let id = UID.to_string();
        command.args(["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all"]);
        command.args(["--pdeathsig", "KILL", "--"]).stdin(Stdio::null());
        command
    }

    /// `moord` as member `at`.
    fn moord(&self, at: usize, verb: &[&str], more: &[&str]) -> Command {
        let mut command = self.nobody(at);
        command.arg(env!("CARGO_BIN_EXE_moord")).args(verb).arg("--config").arg(self.path(at, "moord.toml"));
        command.args(more);
        command
    }

    /// etcd as member `at`. What is preloaded is for it alone: it holds up whatever the process starts afterwards as well.
    fn etcd_command(&self, at: usize) -> anyhow::Result<Command> {
        let Member { dir, orders, joins, .. } = &self.members[at];
        let mut command = self.nobody(at);
        command.args(["env", &format!("--chdir={}", dir.path().display()), "MOOR_GO=1"]);
        command.arg(format!("MOOR_ORDERS={}", orders.path.display()));
        command.arg(format!("LD_PRELOAD={}", self.library.display()));
        command.args(etcd::words(at, self.members.len(), *joins)?);
        Ok(command)
    }

    pub(crate) fn is_etcd(&self) -> bool {
        self.is_etcd
    }

    pub(crate) fn count(&self) -> usize {
        self.members.len()
    }

    fn path(&self, at: usize, name: &str) -> PathBuf {
        self.members[at].dir.path().join(name)
    }

    /// Where clients of member `at` come in.
    pub(crate) fn socket(&self, at: usize) -> PathBuf {
        self.path(at, if self.is_etcd { etcd::SOCKET } else { "api.sock" })
    }

    pub(crate) fn log(&self, at: usize) -> String {
        std::fs::read_to_string(self.path(at, "log")).unwrap_or_default()
    }

    /// What happens to the disk and the clock of member `at`.
    pub(crate) fn orders(&self, at: usize) -> &Orders {
        &self.members[at].orders
    }

    /// Its disk is as good as full from now on.
    pub(crate) fn fill(&self, at: usize) -> anyhow::Result<()> {
        self.net.room(at, &self.path(at, "state"), Some(if self.is_etcd { ETCD_FULL } else { FULL }))
    }

    /// Waits until a member whose disk is full has ended for that reason, makes room, and starts it.
    pub(crate) fn clear(&mut self, at: usize) -> anyhow::Result<()> {
        self.ended_because(at, if self.is_etcd { etcd::FULL } else { "the disk of the member's store is full" })?;
        self.net.room(at, &self.path(at, "state"), None)?;
        self.start(at)
    }

    pub(crate) async fn admin(&self, at: usize) -> anyhow::Result<AdminClient> {
        Ok(AdminClient::unix(&self.socket(at)).await?)
    }

    pub(crate) async fn view(&self, at: usize) -> anyhow::Result<CollectiveView> {
        Ok(self.admin(at).await?.collective().await?)
    }

    /// Starts a member and waits until it answers.
    pub(crate) fn start(&mut self, at: usize) -> anyhow::Result<()> {
        self.start_all(at..at + 1)
    }

    /// The same with several, side by side.
    pub(crate) fn start_all(&mut self, members: Range<usize>) -> anyhow::Result<()> {
        for at in members.clone() {
            let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path(at, "log"))?;
            let mut command = if self.is_etcd {
                // It does not remove the socket of one that was killed.
                let _ = std::fs::remove_file(self.socket(at));
                self.etcd_command(at)?
            } else {
                let mut command = self.moord(at, &["run"], &[]);
                command.env("LD_PRELOAD", &self.library).env("MOOR_ORDERS", &self.members[at].orders.path);
                command
            };
            self.members[at].child = Some(command.stdout(log.try_clone()?).stderr(log).spawn()?);
        }
        let end = Instant::now() + PATIENCE;
        for at in members {
            while std::os::unix::net::UnixStream::connect(self.socket(at)).is_err() {
                let child = self.members[at].child.as_mut().context("not running")?;
                ensure!(child.try_wait()?.is_none(), "member {at} ended:\n{}", self.log(at));
                ensure!(Instant::now() < end, "member {at} does not answer:\n{}", self.log(at));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, at: usize) {
        if let Some(mut child) = self.members[at].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits until the member has ended by itself, for this reason.
    fn ended_because(&mut self, at: usize, reason: &str) -> anyhow::Result<()> {
        let mut child = self.members[at].child.take().context("not running")?;
        let end = Instant::now() + PATIENCE;
        while child.try_wait()?.is_none() {
            if Instant::now() > end {
                // It is this one's to end as well.
                self.members[at].child = Some(child);
                anyhow::bail!("member {at} goes on:\n{}", self.log(at));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        ensure!(self.log(at).contains(reason), "member {at} ended for another reason:\n{}", self.log(at));
        Ok(())
    }

    /// SIGSTOP and SIGCONT, SIGTERM.
    pub(crate) fn signal(&self, at: usize, signal: Signal) -> anyhow::Result<()> {
        let child = self.members[at].child.as_ref().context("not running")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        Ok(())
    }

    /// Says whether member `at` is to vote, and waits until it is so.
    async fn set_voter(&self, at: usize, votes: bool) -> anyhow::Result<()> {
        let (action, request) =
            (if votes { "promote" } else { "demote" }, MemberRequest { member: name(at), force: false });
        let other = (at + 1) % self.members.len();
        let end = Instant::now() + PATIENCE;
        loop {
            // Whoever led may just have gone: it is asked again.
            let asked = self.admin(other).await?.change_member(action, &request).await;
            if asked.is_ok() {
                break;
            }
            ensure!(Instant::now() < end, "{action} of member {at}: {asked:?}\n{}", self.log(other));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        while self
            .view(other)
            .await?
            .members
            .iter()
            .any(|member| member.name == request.member && member.votes != votes)
        {
            ensure!(Instant::now() < end, "{action} of member {at} has no effect:\n{}", self.log(other));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// It votes no more, and is killed.
    pub(crate) async fn demote(&mut self, at: usize) -> anyhow::Result<()> {
        if self.is_etcd {
            // There is no other way to take the vote from a member.
            self.seat(at, Seat::None).await?;
        } else {
            self.set_voter(at, false).await?;
        }
        self.kill(at);
        Ok(())
    }

    /// It is started, and votes again.
    pub(crate) async fn promote(&mut self, at: usize) -> anyhow::Result<()> {
        if self.is_etcd {
            self.seat(at, Seat::Learner).await?;
            // It is another member than the one that was removed.
            std::fs::remove_dir_all(self.net.outside(at, &self.path(at, etcd::DATA)))?;
            self.members[at].joins = true;
            self.start(at)?;
            return self.seat(at, Seat::Voter).await;
        }
        self.start(at)?;
        self.set_voter(at, true).await
    }

    /// Waits until a member of etcd is what it is to be to the others, who refuse that until all of them have been well for five seconds, and a vote to
    /// who has not caught up.
    async fn seat(&self, at: usize, wanted: Seat) -> anyhow::Result<()> {
        let other = (at + 1) % self.members.len();
        let end = Instant::now() + PATIENCE;
        loop {
            let ask = async { Gateway::new(&self.socket(other)).await?.seat(at, wanted).await };
            let is_so = tokio::time::timeout(Duration::from_secs(10), ask).await;
            if matches!(is_so, Ok(Ok(true))) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "member {at} does not come to be {wanted:?}: {is_so:?}\n{}", self.log(other));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The place of the leader among the members, if any of them says that it leads.
    pub(crate) async fn leader(&self) -> Option<usize> {
        for at in 0..self.members.len() {
            if tokio::time::timeout(Duration::from_secs(3), self.leads(at))
                .await
                .is_ok_and(|leads| leads.unwrap_or(false))
            {
                return Some(at);
            }
        }
        None
    }

    async fn leads(&self, at: usize) -> anyhow::Result<bool> {
        if self.is_etcd {
            return Gateway::new(&self.socket(at)).await?.leads().await;
        }
        let view = self.view(at).await?;
        Ok(view.majority && view.leader == Some(view.number))
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
            let places = Places::in_dir(&self.net.outside(at, &self.path(at, "state/store")));
            let store = Replicated::open(&places, at as u64 + 1, Calls::to_nobody()?).await?;
            digests.push(store.snapshot()?.digests()?);
            store.close().await;
        }
        Ok(digests)
    }
}

/// What member `at` is called.
fn name(at: usize) -> String {
    format!("m{}", at + 1)
}
