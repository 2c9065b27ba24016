//! A real `moord` under another uid on loopback, and an administrator.

#[path = "../../../tests/port.rs"]
mod port;

use self::port::free_ports;
use anyhow::{Context as _, ensure};
use moor_api::admin::{ArmRequest, DefineNodes, DeployRequest, ImageView, ImportImage, SiteInfo};
use moor_api::client::ClientError;
use moor_api::client::admin::AdminClient;
use moor_image::{Dek, Metadata, Payload, SealOptions, Sealer};
use moord::collective::identity::Identity;
use moord::secrets::{Keyring, Ring};
use moord::store::Replicated;
use moord::store::raft::{Calls, FOUNDER, Places, Survivor};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::io::{Cursor, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Nobody's uid.
pub(crate) const UID: u32 = 61_235;
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// A member in a folder of its own.
pub(crate) struct Member {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
    child: Option<Child>,
}

/// `moord` as the user that it runs as.
pub(crate) fn as_user(arguments: &[&str]) -> Command {
    let id = UID.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--pdeathsig", "KILL", "--"]);
    command.arg(env!("CARGO_BIN_EXE_moord")).args(arguments).stdin(Stdio::null());
    command
}

impl Member {
    /// `moord init`; not started.
    pub(crate) fn init() -> anyhow::Result<Self> {
        let member = Self::prepare()?;
        let output = member.moord("init", &["--address", "127.0.0.1"])?;
        ensure!(output.status.success(), "moord init: {}", String::from_utf8_lossy(&output.stderr));
        Ok(member)
    }

    /// A configuration, and nothing else.
    pub(crate) fn prepare() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("moord-test-").tempdir()?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
        let port = free_ports(1);
        let member = Self { dir, port, child: None };
        std::fs::create_dir(member.path("state"))?;
        std::fs::write(
            member.path("moord.toml"),
            format!(
                "name = \"test\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"127.0.0.1:{port}\"]\n\
                 urls = [\"https://127.0.0.1:{port}\"]\ntemplates = \"{1}/../profiles\"\n",
                member.dir.path().display(),
                env!("CARGO_MANIFEST_DIR")
            ),
        )?;
        for path in [member.dir.path().to_owned(), member.path("state")] {
            chown(path, Some(UID), Some(UID))?;
        }
        Ok(member)
    }

    /// Adds to its configuration, before it is started.
    pub(crate) fn configure(&self, more: &str) -> anyhow::Result<()> {
        let mut file = std::fs::OpenOptions::new().append(true).open(self.path("moord.toml"))?;
        Ok(file.write_all(more.as_bytes())?)
    }

    /// A member that runs.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut member = Self::init()?;
        member.run()?;
        Ok(member)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store of a member that does not run.
    pub(crate) async fn store(&self) -> anyhow::Result<Replicated> {
        Ok(Replicated::open(&Places::in_dir(&self.path("state/store")), FOUNDER, Calls::to_nobody()?).await?)
    }

    /// What a member that does not run can open, and what it has.
    pub(crate) fn opened(&self) -> anyhow::Result<(Arc<Ring>, Survivor)> {
        let (store, keys) = (self.path("state/store"), self.path("state/store/keys"));
        let own = Identity::read(&store.join("member.json"))?;
        let store = Survivor::open(&Places::in_dir(&store))?;
        let ring = Keyring::open(&keys, own.site.collective, own.id)?.refresh(&store.view()?.key_versions()?)?;
        Ok((ring, store))
    }

    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub(crate) fn config(&self) -> String {
        self.path("moord.toml").display().to_string()
    }

    /// Runs `moord VERB` to its end.
    pub(crate) fn moord(&self, verb: &str, more: &[&str]) -> anyhow::Result<Output> {
        let config = self.config();
        Ok(as_user(&[&[verb, "--config", &config], more].concat()).output()?)
    }

    /// `moord run` to its end, which comes at once; one that goes on is killed.
    pub(crate) fn run_to_its_end(&self) -> anyhow::Result<Output> {
        let config = self.config();
        let run = as_user(&["run", "--config", &config]);
        let mut command = Command::new("timeout");
        command.args(["--signal", "KILL", "30"]).arg(run.get_program()).args(run.get_args());
        Ok(command.stdin(Stdio::null()).output()?)
    }

    /// Runs `moord join` with this invitation on standard input.
    pub(crate) fn join(&self, invitation: &str) -> anyhow::Result<Output> {
        self.join_by(invitation, &[])
    }

    /// The same with more arguments.
    pub(crate) fn join_by(&self, invitation: &str, more: &[&str]) -> anyhow::Result<Output> {
        let config = self.config();
        let mut command = as_user(&[&["join", "--config", &config, "--address", "127.0.0.1"], more].concat());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("moord join")?;
        // It may refuse before it has read all.
        let _ = child.stdin.take().context("no pipe")?.write_all(invitation.as_bytes());
        Ok(child.wait_with_output()?)
    }

    /// Starts `moord run` and waits until it answers.
    pub(crate) fn run(&mut self) -> anyhow::Result<()> {
        self.run_by(as_user(&["run", "--config", &self.config()]))
    }

    /// The same, with all that it can say of itself in its log, as lines of JSON.
    pub(crate) fn run_loud(&mut self) -> anyhow::Result<()> {
        let mut run = as_user(&["run", "--config", &self.config()]);
        run.env("MOORD_LOG", "info,moord=debug,openraft=error").env("MOORD_LOG_FORMAT", "json");
        self.run_by(run)
    }

    /// The same by a command that becomes `moord run`.
    pub(crate) fn run_by(&mut self, mut command: Command) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("log"))?;
        let mut child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let end = Instant::now() + TIMEOUT;
        while std::os::unix::net::UnixStream::connect(self.path("api.sock")).is_err() {
            ensure!(child.try_wait()?.is_none(), "moord ended:\n{}", self.log());
            ensure!(Instant::now() < end, "moord does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child = Some(child);
        Ok(())
    }

    /// Stores that were set aside.
    pub(crate) fn aside(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.path("state"))? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("store.aside-")) {
                found.push(path);
            }
        }
        Ok(found)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid().context("not running")?)?;
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?)
    }

    /// SIGTERM; true when it ended well and in time.
    pub(crate) fn terminate(&mut self) -> anyhow::Result<bool> {
        self.signal(Signal::SIGTERM)?;
        Ok(self.wait()?.success())
    }

    /// Waits for its end; one that does not come in time is made by SIGKILL.
    pub(crate) fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let mut child = self.child.take().context("not running")?;
        let end = Instant::now() + TIMEOUT;
        while Instant::now() < end {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        Ok(child.wait()?)
    }

    pub(crate) async fn admin(&self) -> anyhow::Result<AdminClient> {
        Ok(AdminClient::unix(&self.path("api.sock")).await?)
    }

    pub(crate) async fn site(&self) -> anyhow::Result<SiteInfo> {
        Ok(self.admin().await?.site().await?)
    }

    /// Puts a small sealed image into the catalogue and publishes a profile `p` that boots it. Returns it with its key.
    pub(crate) async fn publish(&self) -> anyhow::Result<(ImageView, Dek)> {
        let mut admin = self.admin().await?;
        let dek = Dek::generate()?;
        let view = import(&mut admin, "root", [7; 16], 1, Some(&dek)).await?;
        admin
            .create_profile(&moor_api::admin::CreateProfile {
                name: "p".parse()?,
                image: "root".parse()?,
                template: "debian-diskless".into(),
            })
            .await?;
        admin.publish(&"p".parse()?).await?;
        Ok((view, dek))
    }

    /// The working directory of a profile.
    pub(crate) fn profile_dir(&self, name: &str) -> PathBuf {
        self.path("state/profiles").join(name)
    }

    /// Writes a file of a profile as the administrator does.
    pub(crate) fn write_profile(&self, profile: &str, path: &str, content: &str) -> anyhow::Result<()> {
        let file = self.profile_dir(profile).join(path);
        std::fs::create_dir_all(file.parent().context("no parent")?)?;
        std::fs::write(&file, content)?;
        Ok(())
    }

    pub(crate) async fn define(&self, name: &str, uuid: Uuid) -> anyhow::Result<()> {
        let attributes = [("id.uuid".to_owned(), uuid.to_string())].into();
        let changed = self.admin().await?.define(&DefineNodes { range: name.into(), attributes }).await?;
        ensure!(changed.refused.is_empty(), "{changed:?}");
        Ok(())
    }

    pub(crate) async fn arm(&self, name: &str, until: &str) -> anyhow::Result<()> {
        self.admin().await?.arm(&ArmRequest { range: name.into(), until: until.into() }).await?;
        Ok(())
    }

    pub(crate) async fn deploy(&self, name: &str) -> anyhow::Result<()> {
        self.admin().await?.deploy(&DeployRequest { range: name.into(), profile: "p".parse()? }).await?;
        Ok(())
    }

    /// The states of a node so far.
    pub(crate) async fn states(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let mut admin = self.admin().await?;
        let mut events = admin.status(Some(name), true, false).await?;
        let mut states = Vec::new();
        while let Some(event) = events.next().await? {
            states.push(event.state);
        }
        Ok(states)
    }

    /// All that `moor why` says, as text.
    pub(crate) async fn why(&self, subject: &str) -> anyhow::Result<String> {
        let why = self.admin().await?.why(subject).await?;
        let lines: Vec<String> =
            why.refusals.iter().map(|refusal| format!("{}: {}", refusal.call, refusal.problem.detail)).collect();
        Ok(lines.join("\n"))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("moord's log:\n{}", self.log());
        }
    }
}

/// A sealed image of 200,000 bytes.
pub(crate) fn sealed(name: &str, lineage: [u8; 16], serial: u64, dek: Option<&Dek>) -> anyhow::Result<Vec<u8>> {
    let options = SealOptions {
        lineage,
        serial,
        created: 1_700_000_000,
        chunk_log2: 16,
        payload: Payload::Opaque,
        key: dek.cloned(),
    };
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options)?;
    sealer.write_all(&vec![42; 200_000])?;
    let metadata = |summary: moor_image::PayloadSummary| Metadata {
        name: name.to_owned(),
        os: "test-1".into(),
        payload_sha256: hex::encode(summary.sha256),
        ..Metadata::default()
    };
    let (file, _) = sealer.finish(metadata, None)?;
    Ok(file.into_inner())
}

/// Seals an image and imports it.
pub(crate) async fn import(
    admin: &mut AdminClient,
    name: &str,
    lineage: [u8; 16],
    serial: u64,
    dek: Option<&Dek>,
) -> anyhow::Result<ImageView> {
    let file = sealed(name, lineage, serial, dek)?;
    let image = admin.add_blob(Cursor::new(file), |_| {}).await?.blob;
    let kernel = admin.add_blob(Cursor::new(b"kernel".to_vec()), |_| {}).await?.blob;
    let initramfs = admin.add_blob(Cursor::new(b"initramfs".to_vec()), |_| {}).await?.blob;
    let key = dek.map(|dek| dek.to_hex().to_string());
    Ok(admin
        .import_image(&ImportImage {
            name: name.parse()?,
            image,
            key,
            signatures: None,
            kernel,
            initramfs,
            boot_loaders: BTreeMap::new(),
        })
        .await?)
}

/// The code and the sentence of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (moor_api::problem::Code, String) {
    match result {
        Err(ClientError::Problem(problem)) => {
            assert!(!problem.detail.contains('\n'), "more than one line: {problem:?}");
            (problem.code, problem.detail)
        }
        other => panic!("not refused: {other:?}"),
    }
}
