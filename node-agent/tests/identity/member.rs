//! Enrolment and sessions at a real member (`moord`), with real TPMs and with the soft key.

use crate::port::free_ports;
use crate::swtpm::{Made, Swtpm};
use moor_agent::identity::soft::SoftKey;
use moor_agent::identity::tpm::TpmIdentity;
use moor_agent::identity::{self, Identity, IdentityError};
use moor_agent::members::Members;
use moor_api::admin::{ArmRequest, BackupRequest, DefineNodes};
use moor_api::client::admin::AdminClient;
use moor_api::client::node::NodeConnection;
use moor_api::client::session::SessionKey;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::BootId;
use moor_api::node::{Base64, Hello, HelloReply, KnownNode, NextStep, Stage, StageClosed};
use moor_api::problem::Code;
use moor_api::trust::{Incarnation, SiteBundle};
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Nobody's uid: a member never runs as root.
const UID: u32 = 61_236;
const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) struct Member {
    dir: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Member {
    pub(crate) fn start() -> Self {
        let mut member = Self::prepare();
        crate::swtpm::good(member.moord("init").args(["--address", "127.0.0.1"]));
        member.run();
        member
    }

    /// Another collective of one, out of a backup of this one.
    async fn restored(&self) -> Self {
        let (passphrase, mut new) = ("correct horse battery", Self::prepare());
        let (file, secret) = (new.path("backup"), new.path("passphrase"));
        let request =
            BackupRequest { passphrase: Some(passphrase.into()), recipients: Vec::new(), without_majority: false };
        let mut admin = self.admin().await;
        let (mut parts, mut bytes) = (admin.backup(&request).await.unwrap(), Vec::new());
        while let Some(part) = parts.next().await.unwrap() {
            bytes.extend_from_slice(&part);
        }
        for (path, content) in [(&file, &bytes[..]), (&secret, passphrase.as_bytes())] {
            std::fs::write(path, content).unwrap();
            std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
            chown(path, Some(UID), Some(UID)).unwrap();
        }
        let mut restore = new.moord("restore");
        restore.arg(&file).args(["--address", "127.0.0.1", "--passphrase-file"]).arg(&secret);
        crate::swtpm::good(&mut restore);
        new.run();
        new
    }

    /// A configuration, and nothing else.
    fn prepare() -> Self {
        let dir = tempfile::Builder::new().prefix("moor-identity-").tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let port = free_ports(1);
        let member = Self { dir, port, child: None };
        let state = member.path("state");
        std::fs::create_dir(&state).unwrap();
        let text = format!(
            "name = \"test\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"127.0.0.1:{port}\"]\n\
             urls = [\"https://127.0.0.1:{port}\"]\ntemplates = \"{1}/../profiles\"\n",
            member.dir.path().display(),
            env!("CARGO_MANIFEST_DIR")
        );
        std::fs::write(member.path("moord.toml"), text).unwrap();
        for path in [member.dir.path(), &state] {
            chown(path, Some(UID), Some(UID)).unwrap();
        }
        member
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn run(&mut self) {
        let mut child = self.moord("run").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let end = Instant::now() + TIMEOUT;
        while std::os::unix::net::UnixStream::connect(self.path("api.sock")).is_err() {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < end, "moord does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child = Some(child);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// `moord` lies beside the folder of the tests: cargo builds the workspace's programs with them.
    fn moord(&self, verb: &str) -> Command {
        let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("moord");
        assert!(program.exists(), "'{}' is not built: run `make build`", program.display());
        let id = UID.to_string();
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
            "--pdeathsig",
            "KILL",
            "--",
        ]);
        command.arg(program).args([verb, "--config"]).arg(self.path("moord.toml")).stdin(Stdio::null());
        command
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn admin(&self) -> AdminClient {
        AdminClient::unix(&self.path("api.sock")).await.unwrap()
    }

    pub(crate) async fn define(&self, name: &str, uuid: Uuid) {
        let attributes = [("id.uuid".to_owned(), uuid.to_string())].into();
        let changed = self.admin().await.define(&DefineNodes { range: name.into(), attributes }).await.unwrap();
        assert!(changed.refused.is_empty(), "{changed:?}");
    }

    pub(crate) async fn arm(&self, name: &str) {
        self.admin().await.arm(&ArmRequest { range: name.into(), until: "once".into() }).await.unwrap();
    }

    pub(crate) async fn bundle(&self) -> SiteBundle {
        self.admin().await.site().await.unwrap().bundle
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One stage of a boot: a session key and a connection.
pub(crate) struct Visit {
    pub(crate) bundle: SiteBundle,
    uuid: Uuid,
    pub(crate) boot: BootId,
    pub(crate) key: SessionKey,
    pub(crate) connection: NodeConnection,
}

impl Visit {
    pub(crate) async fn to(member: &Member, uuid: Uuid, boot: BootId) -> Self {
        let bundle = member.bundle().await;
        let key = SessionKey::generate().unwrap();
        let config = Arc::new(member_tls_config(&bundle, Some(&key)).unwrap());
        let connection = NodeConnection::connect(&member.url(), bundle.collective, config, TIMEOUT).await.unwrap();
        Self { bundle, uuid, boot, key, connection }
    }

    async fn hello(&mut self, identity: &Identity) -> HelloReply {
        let hello =
            Hello { uuid: Some(self.uuid), ..moor_agent::machine::describe(self.boot, identity.capabilities()) };
        self.connection.hello(&hello).await.unwrap()
    }

    pub(crate) async fn known(&mut self, identity: &Identity) -> KnownNode {
        let reply = self.hello(identity).await;
        reply.node.clone().unwrap_or_else(|| panic!("{reply:?}"))
    }

    pub(crate) async fn enroll(&mut self, identity: &mut Identity, known: &KnownNode) -> Result<Base64, IdentityError> {
        let enrolled =
            identity::enroll(&mut self.connection, identity, self.bundle.collective, known, self.boot, &self.key)
                .await?;
        Ok(enrolled.nonce)
    }

    pub(crate) async fn session(
        &mut self,
        identity: &mut Identity,
        known: &KnownNode,
        nonce: &Base64,
        stage: Stage,
    ) -> Result<(), IdentityError> {
        let (collective, boot) = (self.bundle.collective, self.boot);
        let reply =
            identity::session(&mut self.connection, identity, collective, known, nonce, boot, stage, &self.key).await?;
        assert_eq!(reply.stage, stage);
        self.connection.set_token(&reply.token).unwrap();
        Ok(())
    }

    /// Hello and session in a row.
    pub(crate) async fn log_in(&mut self, identity: &mut Identity, stage: Stage) -> Result<(), IdentityError> {
        let known = self.known(identity).await;
        self.session(identity, &known, &known.nonce.clone(), stage).await
    }
}

pub(crate) fn tpm(tpm: &Swtpm) -> Identity {
    Identity::Tpm(TpmIdentity::open(tpm.transport()).unwrap())
}

fn code(result: Result<impl Sized, IdentityError>) -> Code {
    match result.map(drop) {
        Err(IdentityError::Refused(problem)) => problem.code,
        other => panic!("{other:?}"),
    }
}

// The agent runs on one thread: TPM work must not block it, and must not need a second one.
#[tokio::test(flavor = "current_thread")]
async fn a_node_enrols_by_its_tpm_once_and_boots_ever_after() {
    let (member, mut chip) = (Member::start(), Swtpm::new(Made::default()));
    let uuid = Uuid::new_v4();
    member.define("n1", uuid).await;

    // Not armed.
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    let refusal = visit.hello(&tpm(&chip)).await.refusal;
    assert_eq!(refusal.map(|problem| problem.code), Some(Code::NotArmed));

    // Armed once: it enrols and gets a token of the boot stage.
    member.arm("n1").await;
    let mut identity = tpm(&chip);
    let boot = BootId::random();
    let mut visit = Visit::to(&member, uuid, boot).await;
    let known = visit.known(&identity).await;
    assert_eq!(known.next, NextStep::Enroll);
    let nonce = visit.enroll(&mut identity, &known).await.unwrap();
    visit.session(&mut identity, &known, &nonce, Stage::Boot).await.unwrap();

    // The stage is closed: no boot token any more, a run token still.
    identity.close_boot_stage().unwrap();
    visit.connection.stage_closed(&StageClosed { boot }).await.unwrap();
    let mut visit = Visit::to(&member, uuid, boot).await;
    assert_eq!(code(visit.log_in(&mut identity, Stage::Boot).await), Code::StageClosed);
    visit.log_in(&mut identity, Stage::Run).await.unwrap();

    // kexec: another boot, the same PCR 15.
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    assert_eq!(code(visit.log_in(&mut identity, Stage::Boot).await), Code::StageClosed);
    drop(identity);

    // A cold reboot, without being armed again.
    chip.reset();
    let mut identity = tpm(&chip);
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    assert_eq!(visit.known(&identity).await.next, NextStep::SessionTpm);
    visit.log_in(&mut identity, Stage::Boot).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn another_tpm_in_the_same_machine_is_refused_and_the_reason_is_kept() {
    let member = Member::start();
    let (chip, other) = (Swtpm::new(Made::default()), Swtpm::new(Made::default()));
    let uuid = Uuid::new_v4();
    member.define("n1", uuid).await;
    member.arm("n1").await;
    let mut identity = tpm(&chip);
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    let known = visit.known(&identity).await;
    let nonce = visit.enroll(&mut identity, &known).await.unwrap();
    visit.session(&mut identity, &known, &nonce, Stage::Boot).await.unwrap();

    // Neither a session nor an enrolment, armed or not.
    let mut stranger = tpm(&other);
    for armed in [false, true] {
        if armed {
            member.arm("n1").await;
        }
        let mut visit = Visit::to(&member, uuid, BootId::random()).await;
        assert_eq!(code(visit.log_in(&mut stranger, Stage::Boot).await), Code::IdentityMismatch, "armed: {armed}");
        let mut visit = Visit::to(&member, uuid, BootId::random()).await;
        let known = visit.known(&stranger).await;
        assert_eq!(code(visit.enroll(&mut stranger, &known).await), Code::IdentityMismatch, "armed: {armed}");
    }
    let why = member.admin().await.why("n1").await.unwrap();
    assert!(why.refusals.iter().any(|refusal| refusal.problem.code == Code::IdentityMismatch), "{why:?}");

    // A machine that shows no TPM at all says so itself.
    let folder = tempfile::tempdir().unwrap();
    let mut soft = Identity::Soft(SoftKey::open(&folder.path().join("soft.key")).unwrap());
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    let error = visit.log_in(&mut soft, Stage::Boot).await.unwrap_err();
    assert!(matches!(error, IdentityError::NoTpm(_)) && !error.is_transient(), "{error}");
}

/// Boot files of before the collective began anew believe members of before. Who has spoken with one of now goes back to none of them.
#[tokio::test(flavor = "current_thread")]
async fn who_has_met_a_collective_that_began_anew_goes_back_to_no_member_of_before() {
    let old = Member::start();
    let before = old.bundle().await;
    let mut new = old.restored().await;
    let session = SessionKey::generate().unwrap();
    let mut members = Members::new(&before, &session, vec![new.url(), old.url()]).unwrap();
    let met = members.connection().await.unwrap();
    assert_eq!((met.url(), met.incarnation()), (&*new.url(), Incarnation::FIRST.next()));
    let now = new.bundle().await;
    new.kill();
    members.disconnect();
    let error = members.connection().await.err().expect("it went back").to_string();
    assert!(error.contains(&format!("{} is of incarnation 1 of the collective", old.url())), "{error}");
    // Who has not, cannot know; who has boot files of now does.
    let mut other = Members::new(&before, &session, vec![old.url()]).unwrap();
    other.connection().await.unwrap();
    let mut other = Members::new(&now, &session, vec![old.url()]).unwrap();
    let error = other.connection().await.err().expect("it was believed").to_string();
    assert!(error.contains("its certificate is of incarnation 1 of the collective"), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_node_without_a_tpm_enrols_by_its_soft_key() {
    let member = Member::start();
    let uuid = Uuid::new_v4();
    member.define("n1", uuid).await;
    member.arm("n1").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("soft.key");
    let mut identity = Identity::Soft(SoftKey::open(&path).unwrap());
    let boot = BootId::random();
    let mut visit = Visit::to(&member, uuid, boot).await;
    let known = visit.known(&identity).await;
    let nonce = visit.enroll(&mut identity, &known).await.unwrap();
    visit.session(&mut identity, &known, &nonce, Stage::Boot).await.unwrap();
    visit.connection.stage_closed(&StageClosed { boot }).await.unwrap();

    // The same key in the run stage, read by another process.
    let mut identity = Identity::Soft(SoftKey::open(&path).unwrap());
    let mut visit = Visit::to(&member, uuid, boot).await;
    visit.log_in(&mut identity, Stage::Run).await.unwrap();

    // Another key is another machine.
    let mut other = Identity::Soft(SoftKey::open(&folder.path().join("other.key")).unwrap());
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    assert_eq!(code(visit.log_in(&mut other, Stage::Boot).await), Code::IdentityMismatch);

    // A TPM is not the soft key that the member expects.
    let chip = Swtpm::new(Made::default());
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    let error = visit.log_in(&mut tpm(&chip), Stage::Boot).await.unwrap_err();
    assert!(matches!(error, IdentityError::NoSoftKey(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_nonce_is_good_once() {
    let (member, chip) = (Member::start(), Swtpm::new(Made::default()));
    let uuid = Uuid::new_v4();
    member.define("n1", uuid).await;
    member.arm("n1").await;
    let mut identity = tpm(&chip);
    let mut visit = Visit::to(&member, uuid, BootId::random()).await;
    let known = visit.known(&identity).await;
    let nonce = visit.enroll(&mut identity, &known).await.unwrap();
    visit.session(&mut identity, &known, &nonce, Stage::Boot).await.unwrap();
    assert_eq!(code(visit.session(&mut identity, &known, &nonce, Stage::Boot).await), Code::ProofInvalid);
    // It is enrolled and not armed any more: the next step is a session.
    let known = visit.known(&identity).await;
    assert_eq!(known.next, NextStep::SessionTpm);
}

#[tokio::test(flavor = "current_thread")]
async fn the_agent_takes_no_member_of_another_authority_and_goes_on_to_its_own() {
    let (own, other) = (Member::start(), Member::start());
    let bundle = own.bundle().await;
    let url = |member: &Member| format!("https://127.0.0.1:{}", member.port);
    let session = SessionKey::generate().unwrap();
    let disguised = SiteBundle { collective: bundle.collective, ..other.bundle().await };
    for (what, bundle, member) in [
        ("a server of another authority", &bundle, &other),
        ("roots of another authority under this collective's name", &disguised, &own),
    ] {
        let mut members = Members::new(bundle, &session, vec![url(member)]).unwrap();
        let error = members.connection().await.map(drop).unwrap_err();
        let said = error.to_string();
        assert!(said.contains(&url(member)) && said.contains("is of another authority"), "{what}: {said}");
        assert!(!said.contains('\n'), "{what}: {said}");
        // It tries again and elsewhere: another member may be right.
        assert!(error.is_transient(), "{what}");
    }
    let mut members = Members::new(&bundle, &session, vec![url(&other), url(&own)]).unwrap();
    assert_eq!(members.connection().await.unwrap().url(), url(&own));
}
