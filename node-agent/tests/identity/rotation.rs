//! A node that runs goes over to a new authority. Its agent takes up the trust bundle and acknowledges it, and the process that serves its root
//! reads on, while the agent and the member are killed in between: all of them the real programs.

use crate::member::{Member, Visit};
use crate::swtpm::good;
use moor_agent::handover::{BootRecord, RUN_DIR, RunDir};
use moor_agent::identity::Identity;
use moor_agent::identity::soft::SoftKey;
use moor_agent::machine;
use moor_api::admin::{CreateProfile, DefineNodes, DeployRequest, ImageView, ImportImage, RetireRequest};
use moor_api::client::ClientError;
use moor_api::ids::BootId;
use moor_api::node::{Stage, StageClosed, image_url};
use moor_api::tether::{self, Request, Trust};
use moor_image::{Dek, Metadata, Payload, SealOptions, Sealer};
use std::collections::BTreeMap;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uuid::Uuid;

const NAME: &str = "rotation::a_node_that_runs_goes_over_to_a_new_authority_and_its_root_reads_on";
/// Set in the inner run.
const MARK: &str = "MOOR_AGENT_TEST_IN_NAMESPACE";
/// More than two heartbeats.
const LIMIT: Duration = Duration::from_mins(3);
/// More than the tether's cache holds.
const PLAINTEXT: usize = 20 << 20;

/// The agent has one place where it looks for its boot: the test runs in a mount namespace with a `/run` of its own. What it leaves running ends
/// with its PID namespace.
#[test]
fn a_node_that_runs_goes_over_to_a_new_authority_and_its_root_reads_on() {
    in_namespace(NAME, &["/run"], rotate);
}

/// Runs `test` with these directories empty and its own, in a run of the test `name` of its own.
pub(crate) fn in_namespace<F: Future<Output = ()>>(name: &str, own: &[&str], test: impl FnOnce() -> F) {
    if std::env::var_os(MARK).is_some() {
        for directory in own {
            good(Command::new("mount").args(["-t", "tmpfs", "tmpfs", directory]));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(test());
        return;
    }
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .args(["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}", output.status);
}

pub(crate) async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so().await {
        assert!(Instant::now() < end, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A program of the workspace: they lie beside the folder of the tests.
fn program(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name(name);
    assert!(program.exists(), "'{}' is not built: run `make build`", program.display());
    program
}

/// The agent of the running system.
pub(crate) struct Agent(Child);

impl Agent {
    pub(crate) fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-agent"));
        Self(command.arg("onboot").stdin(Stdio::null()).spawn().unwrap())
    }

    /// That finds programs in this directory before others.
    pub(crate) fn start_with(programs: &Path) -> Self {
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-agent"));
        Self(command.arg("onboot").env("PATH", path).stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program that reads the whole root again and again, past the page cache.
struct Reading {
    rounds: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reading {
    fn start(file: PathBuf, plaintext: Vec<u8>) -> Self {
        let (rounds, ends) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counted, told) = (rounds.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
                assert!(std::fs::read(&file).unwrap() == plaintext, "other bytes");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { rounds, ends, thread: Some(thread) }
    }

    /// Two more rounds: all of one of them was read after this call.
    async fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        until("reading", async || {
            let is_running = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
            assert!(is_running, "the program met an error");
            self.rounds.load(Ordering::Relaxed) >= before + 2
        })
        .await;
    }

    fn end(mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// An image of these bytes in the catalogue, and a profile `p` that boots it.
pub(crate) async fn publish(member: &Member, plaintext: &[u8]) -> (ImageView, Dek) {
    let dek = Dek::generate().unwrap();
    let options = SealOptions {
        lineage: [7; 16],
        serial: 1,
        created: 1_700_000_000,
        chunk_log2: 16,
        payload: Payload::Opaque,
        key: Some(dek.clone()),
    };
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options).unwrap();
    sealer.write_all(plaintext).unwrap();
    let metadata = |summary: moor_image::PayloadSummary| Metadata {
        name: "root".into(),
        os: "test-1".into(),
        payload_sha256: hex::encode(summary.sha256),
        ..Metadata::default()
    };
    let (file, _) = sealer.finish(metadata, None).unwrap();
    let mut admin = member.admin().await;
    let image = admin.add_blob(Cursor::new(file.into_inner()), |_| {}).await.unwrap().blob;
    let kernel = admin.add_blob(Cursor::new(b"kernel".to_vec()), |_| {}).await.unwrap().blob;
    let initramfs = admin.add_blob(Cursor::new(b"initramfs".to_vec()), |_| {}).await.unwrap().blob;
    let import = ImportImage {
        name: "root".parse().unwrap(),
        image,
        key: Some(dek.to_hex().to_string()),
        signatures: None,
        kernel,
        initramfs,
        boot_loaders: BTreeMap::new(),
    };
    let view = admin.import_image(&import).await.unwrap();
    let profile = CreateProfile {
        name: "p".parse().unwrap(),
        image: "root".parse().unwrap(),
        template: "debian-diskless".into(),
    };
    admin.create_profile(&profile).await.unwrap();
    admin.publish(&profile.name).await.unwrap();
    (view, dek)
}

/// This machine is the node `n1`, and its boot stage is over: what its run stage begins with is in `run`. Returns what the node is known by.
pub(crate) async fn boot(member: &Member, run: &RunDir) -> Uuid {
    let boot = BootId::random();
    let hello = machine::describe(boot, Vec::new());
    let uuid = hello.uuid.unwrap_or_else(Uuid::new_v4);
    let attributes = [("id.uuid".to_owned(), uuid.to_string()), ("net.hwaddr".to_owned(), hello.macs[0].to_string())];
    let mut admin = member.admin().await;
    let nodes = DefineNodes { range: "n1".into(), attributes: attributes.into() };
    let changed = admin.define(&nodes).await.unwrap();
    assert!(changed.refused.is_empty(), "{changed:?}");
    admin.deploy(&DeployRequest { range: "n1".into(), profile: "p".parse().unwrap() }).await.unwrap();
    member.arm("n1").await;

    run.create().unwrap();
    let mut identity = Identity::Soft(SoftKey::open(&run.soft_key()).unwrap());
    let mut visit = Visit::to(member, uuid, boot).await;
    let known = visit.known(&identity).await;
    let nonce = visit.enroll(&mut identity, &known).await.unwrap();
    visit.session(&mut identity, &known, &nonce, Stage::Boot).await.unwrap();
    let document = visit.connection.config().await.unwrap();
    visit.connection.stage_closed(&StageClosed { boot }).await.unwrap();
    run.write_site(&visit.bundle).unwrap();
    let record = BootRecord {
        collective: visit.bundle.collective,
        node: known.id,
        name: known.name,
        boot,
        members: vec![member.url()],
        generation: document.profile.generation,
        sequence: 10,
        renew_after: 0,
        ssh_version: 1,
        interface: "lo".into(),
        is_up: true,
        is_trace_told: true,
    };
    run.write_boot(&record).unwrap();
    uuid
}

async fn have_all_acknowledged(member: &Member) -> bool {
    member.admin().await.authority().await.unwrap().nodes_behind.is_empty()
}

async fn rotate() {
    let mut member = Member::start();
    let mut plaintext = vec![0; PLAINTEXT];
    aws_lc_rs::rand::fill(&mut plaintext).unwrap();
    let (image, dek) = publish(&member, &plaintext).await;
    let run = RunDir::new(RUN_DIR);
    boot(&member, &run).await;
    let place = tempfile::tempdir().unwrap();
    let (key, mount) = (place.path().join("key"), place.path().join("mnt"));
    std::fs::write(&key, dek.to_hex().as_bytes()).unwrap();
    std::fs::create_dir(&mount).unwrap();
    let (state, site) = (run.path("tether.json"), run.path("site.json"));
    let paths: [(&str, &Path); 3] = [("--key-file", &key), ("--state", &state), ("--site", &site)];
    let mut command = Command::new(program("moor-tether"));
    command.arg("mount");
    for (option, path) in paths {
        command.arg(option).arg(path);
    }
    good(command.args(["--url", &image_url(&member.url(), image.digest)]).arg(&mount));
    let reading = Reading::start(mount.join("image"), plaintext);
    reading.goes_on().await;

    let agent = Agent::start();
    until("the feature level", async || member.admin().await.collective().await.unwrap().level >= 3).await;
    let mut admin = member.admin().await;
    assert_eq!(admin.rotate_authority().await.unwrap().version, 2);
    until("the new bundle", async || member.bundle().await.roots.len() == 2).await;
    let request = RetireRequest { force: false };
    match admin.retire_authority(&request).await {
        Err(ClientError::Problem(problem)) => assert!(problem.detail.contains(": n1: "), "{problem}"),
        other => panic!("{other:?}"),
    }
    // The agent dies, and begins anew with what is on its disk: it asks at once, and acknowledges soon.
    drop(agent);
    let agent = Agent::start();
    until("the acknowledgement", async || have_all_acknowledged(&member).await).await;
    assert_eq!(run.site().unwrap(), member.bundle().await);
    reading.goes_on().await;

    let retired = admin.retire_authority(&request).await.unwrap();
    assert!(retired.left_behind.is_empty() && retired.waits_for.is_empty(), "{retired:?}");
    // All connections are made anew, and show a certificate from the new one.
    drop(admin);
    member.kill();
    member.run();
    reading.goes_on().await;
    let newest = member.bundle().await;
    assert_eq!((newest.version, newest.roots.len()), (3, 1));
    // This time the agent runs on: the bundle comes with one of its heartbeats.
    until("the last acknowledgement", async || have_all_acknowledged(&member).await).await;
    assert_eq!(run.site().unwrap(), newest);
    let older = tether::ask(
        &run.path("tether.sock"),
        &Request::Trust(Trust::Site(moor_api::trust::SiteBundle { version: 2, ..newest })),
    );
    let error = older.unwrap_err().to_string();
    assert!(error.contains("version 2, which is older than 3, the one in use"), "{error}");
    member.kill();
    member.run();
    reading.goes_on().await;
    reading.end();
    drop(agent);
    good(Command::new(program("moor-tether")).arg("unmount").arg(&mount));
}
