//! The SSH authorities are rotated while users log in to a node: a real member, the real agent, and OpenSSH on both sides.

use crate::member::{Member, Visit};
use crate::port::free_ports;
use crate::rotation::{Agent, boot, in_namespace, publish, until};
use crate::swtpm::good;
use moor_agent::handover::{BootRecord, RUN_DIR, RunDir};
use moor_agent::identity::Identity;
use moor_agent::identity::soft::SoftKey;
use moor_agent::render::{self, BootInterface, Facts};
use moor_agent::ssh;
use moor_agent::tree::Tree;
use moor_api::admin::{BackupRequest, RetireRequest, SshRole};
use moor_api::client::ClientError;
use moor_api::node::{HostCertificateRequest, Stage};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use uuid::Uuid;

const NAME: &str = "ssh_rotation::users_log_in_before_a_rotation_of_the_ssh_authorities_during_it_and_after_it";
const ETC: &str = "/etc/ssh";
const USER_AUTHORITIES: &str = "/etc/ssh/moor_user_authorities";

/// The agent has one place for what sshd reads, and one for its boot: the test runs in a mount namespace with its own of both.
#[test]
fn users_log_in_before_a_rotation_of_the_ssh_authorities_during_it_and_after_it() {
    in_namespace(NAME, &["/run", ETC], rotate);
}

/// sshd, with the configuration that the agent rendered and what makes it run here; ended with the test.
struct Sshd {
    child: Child,
    port: u16,
}

impl Sshd {
    fn start(dir: &Path, name: &str, more: &str) -> Self {
        let port = free_ports(1);
        let (config, pid) = (dir.join(format!("{name}.config")), dir.join(format!("{name}.pid")));
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nPidFile {}\nUsePAM no\nPasswordAuthentication no\nAuthorizedKeysFile none\n\
             PermitRootLogin prohibit-password\n{more}\n",
            pid.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(dir.join(format!("{name}.log"))).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        let child = command.args(["-D", "-e", "-f"]).arg(&config).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let sshd = Self { child, port };
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let said = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap();
            assert!(std::time::Instant::now() < end, "sshd does not listen: {said}");
            std::thread::sleep(Duration::from_millis(50));
        }
        sshd
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A user's key with a certificate, and the hosts that the user knows.
struct User {
    dir: PathBuf,
}

impl User {
    fn new(dir: &Path, name: &str) -> Self {
        let dir = dir.join(name);
        fs::create_dir(&dir).unwrap();
        good(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join("key")));
        Self { dir }
    }

    /// As an administrator on a member does it: by the file of the authority.
    fn certify(&self, member: &Member, file: &str) {
        let authority = member.path("state/store/keys").join(file);
        let mut command = Command::new("ssh-keygen");
        command.arg("-q").arg("-s").arg(authority).args(["-I", "somebody", "-n", "root", "-V", "-5m:+1d"]);
        good(command.arg(self.dir.join("key.pub")));
    }

    async fn learn_hosts(&self, member: &Member) {
        let lines = member.admin().await.site().await.unwrap().known_hosts;
        fs::write(self.dir.join("known_hosts"), lines.join("\n") + "\n").unwrap();
    }

    fn log_in(&self, sshd: &Sshd) -> Output {
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-p", &sshd.port.to_string(), "-i"]).arg(self.dir.join("key"));
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.dir.join("known_hosts").display()));
        for option in [
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
            "HostKeyAlias=n1",
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "ConnectTimeout=20",
        ] {
            command.args(["-o", option]);
        }
        command.args(["root@127.0.0.1", "echo", "it", "is", "in"]).stdin(Stdio::null()).output().unwrap()
    }

    fn comes_in(&self, sshd: &Sshd) {
        let output = self.log_in(sshd);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && output.stdout == b"it is in\n", "{}: {said}", self.dir.display());
    }

    fn does_not_come_in(&self, sshd: &Sshd, why: &str) {
        let output = self.log_in(sshd);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(255) && said.contains(why), "{}: {said}", self.dir.display());
    }
}

/// The run stage's own connection to the member.
async fn visit(member: &Member, run: &RunDir, uuid: Uuid) -> Visit {
    let mut identity = Identity::Soft(SoftKey::open(&run.soft_key()).unwrap());
    let mut visit = Visit::to(member, uuid, run.boot().unwrap().boot).await;
    visit.log_in(&mut identity, Stage::Run).await.unwrap();
    visit
}

/// What the boot stage makes of `/etc/ssh`.
async fn render(visit: &mut Visit) {
    let host_keys = ssh::make("n1").unwrap();
    let public_keys = host_keys.iter().map(|key| key.public.clone()).collect();
    let certificates = visit.connection.host_certificates(&HostCertificateRequest { public_keys }).await.unwrap();
    let trust = visit.connection.ssh_trust().await.unwrap();
    let document = visit.connection.config().await.unwrap();
    let interface = BootInterface {
        name: "eth0".into(),
        hwaddr: "52:54:00:6d:6f:01".parse().unwrap(),
        address: "10.0.0.2/24".parse().unwrap(),
        gateways: Vec::new(),
        is_static: true,
        dns: Vec::new(),
        domain: None,
    };
    let facts = Facts {
        interface: &interface,
        host_keys: &host_keys,
        certificates: &certificates,
        trust: &trust,
        shadow: None,
        authorized_keys: None,
    };
    let tree = Tree::open(Path::new("/")).unwrap();
    for file in render::debian(&document, &facts).unwrap() {
        if file.path.starts_with("/etc/ssh/") {
            file.write(&tree).unwrap();
        }
    }
}

/// The agent has sshd read its certificates anew as it does on a node with systemd, which is not here: this is what comes of it there.
fn reload_by_systemctl(dir: &Path, pid: &Path) {
    let bin = dir.join("bin");
    fs::create_dir(&bin).unwrap();
    let text = format!(
        "#!/bin/sh\n[ \"$*\" = 'try-reload-or-restart ssh.servic[e] sshd.servic[e]' ] && exec kill -HUP \"$(cat {})\"\nexit 1\n",
        pid.display()
    );
    fs::write(bin.join("systemctl"), text).unwrap();
    fs::set_permissions(bin.join("systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// The agent of the running system, which asks at once.
fn agent(dir: &Path) -> Agent {
    Agent::start_with(&dir.join("bin"))
}

async fn have_all_acknowledged(member: &Member) -> bool {
    member.admin().await.authority().await.unwrap().ssh_behind.is_empty()
}

/// How often a member has certified this node's keys, as its audit log says.
async fn certificates_given(member: &Member) -> usize {
    let request = BackupRequest { passphrase: None, recipients: Vec::new(), without_majority: false };
    let (mut admin, mut text) = (member.admin().await, Vec::new());
    let mut parts = admin.backup(&request).await.unwrap();
    while let Some(part) = parts.next().await.unwrap() {
        text.extend_from_slice(&part);
    }
    String::from_utf8(text).unwrap().lines().filter(|line| line.contains("\"host-certificates\"")).count()
}

fn lines(path: &str) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

async fn rotate() {
    let member = Member::start();
    publish(&member, b"a root").await;
    let run = RunDir::new(RUN_DIR);
    let uuid = boot(&member, &run).await;
    let place = tempfile::tempdir().unwrap();
    let dir = place.path();
    fs::create_dir("/run/sshd").unwrap();
    render(&mut visit(&member, &run, uuid).await).await;
    let sshd = Sshd::start(dir, "node", "Include /etc/ssh/sshd_config.d/*.conf");
    reload_by_systemctl(dir, &dir.join("node.pid"));
    let running = agent(dir);
    until("the feature level", async || member.admin().await.collective().await.unwrap().level >= 4).await;

    let old = User::new(dir, "old");
    old.certify(&member, "ssh-user-ca");
    old.learn_hosts(&member).await;
    old.comes_in(&sshd);
    // As it was: for a host that goes on to show this.
    let kept = dir.join("kept");
    good(Command::new("cp").arg("-a").arg(ETC).arg(&kept));

    let mut admin = member.admin().await;
    let request = RetireRequest { force: false };
    for (role, version) in [(SshRole::User, 2), (SshRole::Host, 3)] {
        assert_eq!(admin.rotate_ssh_authority(role).await.unwrap().version, version);
        match admin.retire_ssh_authority(role, &request).await {
            Err(ClientError::Problem(problem)) => assert!(problem.detail.contains(": n1: "), "{problem}"),
            other => panic!("{other:?}"),
        }
    }
    // Neither the node nor the user has heard of it.
    old.comes_in(&sshd);
    // The agent dies, and begins anew with what is on its disk.
    drop(running);
    // Certificates are due just now: those that come with the authorities do for that.
    let due = moor_agent::clock::now();
    run.write_boot(&BootRecord { renew_after: due, ..run.boot().unwrap() }).unwrap();
    let given = certificates_given(&member).await;
    let running = agent(dir);
    until("the acknowledgement", async || have_all_acknowledged(&member).await).await;
    assert_eq!(run.boot().unwrap().ssh_version, 3);
    assert_eq!(certificates_given(&member).await, given + 1, "they were renewed once more");
    assert!(run.boot().unwrap().renew_after > due);
    assert_eq!((lines(USER_AUTHORITIES).len(), lines("/etc/ssh/ssh_known_hosts").len()), (2, 2));
    old.comes_in(&sshd);
    let new = User::new(dir, "new");
    new.certify(&member, "ssh-user-ca-2");
    new.learn_hosts(&member).await;
    assert_eq!(lines(new.dir.join("known_hosts").to_str().unwrap()).len(), 2);
    new.comes_in(&sshd);

    // Of users, it is over with this; of hosts, once the node shows the new one.
    let retired = admin.retire_ssh_authority(SshRole::User, &request).await.unwrap();
    assert!(retired.left_behind.is_empty() && retired.waits_for.is_empty(), "{retired:?}");
    let retired = admin.retire_ssh_authority(SshRole::Host, &request).await.unwrap();
    assert_eq!(retired.waits_for, ["n1"]);
    drop(running);
    let running = agent(dir);
    until("the node shows the new one", async || member.admin().await.site().await.unwrap().known_hosts.len() == 1)
        .await;
    drop(running);
    let running = agent(dir);
    until("the last acknowledgement", async || have_all_acknowledged(&member).await).await;
    assert_eq!((lines(USER_AUTHORITIES).len(), lines("/etc/ssh/ssh_known_hosts").len()), (1, 1));

    // Of this user both are old: the host is not believed, and that comes first.
    old.does_not_come_in(&sshd, "Host key verification failed");
    old.learn_hosts(&member).await;
    old.does_not_come_in(&sshd, "Permission denied (publickey");
    new.comes_in(&sshd);
    new.learn_hosts(&member).await;
    new.comes_in(&sshd);
    // A host with what it was given before.
    let keys = ["ed25519", "ecdsa"].map(|word| {
        let key = kept.join(format!("ssh_host_{word}_key"));
        format!("HostKey {0}\nHostCertificate {0}-cert.pub\n", key.display())
    });
    let was = format!("TrustedUserCAKeys {USER_AUTHORITIES}\n{}", keys.concat());
    let stale = Sshd::start(dir, "stale", &was);
    new.does_not_come_in(&stale, "Host key verification failed");
    // It is for the certificate alone.
    old.certify(&member, "ssh-user-ca-2");
    old.comes_in(&sshd);
    drop(running);
}
