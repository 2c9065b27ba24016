//! etcd as the distribution has it: three members on the loopback, TLS between them and to clients, everything else as it comes.

use super::load::{Client, request};
use super::web::Authority;
use crate::collective::port::free_ports;
use crate::process::{Guard, text, tied, wait_for};
use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use moor_tether::tls::Trust;
use rustls::ClientConfig;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// Members.
const COUNT: usize = 3;

/// Three of them.
pub(super) struct Etcd {
    guards: Vec<Guard>,
    ports: Vec<u16>,
    authority: PathBuf,
    tls: Arc<ClientConfig>,
    leader: usize,
}

impl Etcd {
    /// Starts them, with their files in `dir`, on certificates of the authority whose files lie in `keys`.
    pub(super) fn start(dir: &Path, authority: &Authority, keys: &Path) -> anyhow::Result<Self> {
        let mut ports = Vec::new();
        let mut cluster = String::new();
        for at in 0..COUNT {
            let peer = free_ports(1);
            write!(cluster, "{}e{at}=https://127.0.0.1:{peer}", if at == 0 { "" } else { "," })?;
            ports.push((free_ports(1), peer));
        }
        let (good, key, trust) = (keys.join("good.pem"), keys.join("key.pem"), authority.file());
        let mut guards = Vec::new();
        for (at, (port, peer)) in ports.iter().enumerate() {
            let mut command = tied("etcd");
            command.args(["--name", &format!("e{at}"), "--initial-cluster", &cluster, "--log-level", "warn"]);
            for (kind, port) in [("client", port), ("peer", peer)] {
                let url = format!("https://127.0.0.1:{port}");
                command.args([&format!("--listen-{kind}-urls"), &url]);
                let advertise =
                    if kind == "peer" { "--initial-advertise-peer-urls" } else { "--advertise-client-urls" };
                command.args([advertise, &url]);
            }
            for kind in ["", "peer-"] {
                command.arg(format!("--{kind}cert-file")).arg(&good).arg(format!("--{kind}key-file")).arg(&key);
            }
            // Were clients' authority named as well, it would want certificates of them.
            command.arg("--peer-trusted-ca-file").arg(&trust);
            command.arg("--peer-client-cert-auth").arg("--data-dir").arg(dir.join(format!("e{at}")));
            let log = File::create(dir.join(format!("e{at}.log")))?;
            guards.push(Guard::new(command.stdout(log.try_clone()?).stderr(log).spawn().context("starting etcd")?));
        }
        let tls = Trust::authority(&trust)?.config().clone();
        let ports = ports.into_iter().map(|(port, _)| port).collect();
        let mut etcd = Self { guards, ports, authority: trust, tls, leader: 0 };
        let mut leader = None;
        wait_for("etcd", Duration::from_secs(30), || {
            for (at, guard) in etcd.guards.iter_mut().enumerate() {
                let log = dir.join(format!("e{at}.log"));
                ensure!(guard.is_running(), "etcd ended: {}", std::fs::read_to_string(log).unwrap_or_default());
            }
            leader = etcd.find_leader();
            Ok(leader.is_some())
        })?;
        etcd.leader = leader.context("etcd has no leader")?;
        Ok(etcd)
    }

    /// `etcdctl` for all of them.
    pub(super) fn ctl(&self, arguments: &[&str]) -> Command {
        let endpoints: Vec<_> = self.ports.iter().map(|port| format!("https://127.0.0.1:{port}")).collect();
        let mut command = tied("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(endpoints.join(","));
        command.arg("--cacert").arg(&self.authority).args(arguments);
        command
    }

    /// What etcd's own generator says (500 clients, at most 8,000 writes in a second, a minute).
    pub(super) fn check_perf(&self) -> anyhow::Result<String> {
        // Its status is not 0 where etcd is slower than etcd's authors wish.
        let output = self.ctl(&["check", "perf", "--load", "l"]).output().context("starting etcdctl")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<_> = said
            .split(['\n', '\r'])
            .map(str::trim)
            .filter(|line| line.contains("Throughput") || line.contains("Slowest"))
            .collect();
        ensure!(!lines.is_empty(), "etcdctl check perf: {said}{}", String::from_utf8_lossy(&output.stderr));
        Ok(format!(
            "`etcdctl check perf --load l` (500 clients, it asks for no more than 8000 in a second): {}",
            lines.join("; ")
        ))
    }

    fn find_leader(&self) -> Option<usize> {
        let said = text(&mut self.ctl(&["endpoint", "status", "-w", "json"])).ok()?;
        let members: Vec<serde_json::Value> = serde_json::from_str(&said).ok()?;
        (members.len() == COUNT).then_some(())?;
        members.iter().position(|member| {
            let status = &member["Status"];
            status["leader"].as_u64().is_some_and(|id| id > 0) && status["leader"] == status["header"]["member_id"]
        })
    }

    /// A connection to the leader that sends these.
    pub(super) fn client(&self, requests: Vec<Vec<u8>>, expected: &'static str) -> Client {
        Client { tls: self.tls.clone(), port: self.ports[self.leader], requests, expected, pause: Duration::ZERO }
    }
}

/// `version` as it says it.
pub(super) fn version() -> anyhow::Result<String> {
    let said = text(tied("etcd").arg("--version")).context("etcd is not installed: tests/setup installs it")?;
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

/// Sets a key by the JSON gateway.
pub(super) fn put(key: &str, value: &str) -> Vec<u8> {
    let body = format!(r#"{{"key":"{}","value":"{}"}}"#, BASE64.encode(key), BASE64.encode(value));
    request("POST", "/v3/kv/put", None, &body)
}

/// Reads a key, linearizably, as is the default.
pub(super) fn range(key: &str) -> Vec<u8> {
    request("POST", "/v3/kv/range", None, &format!(r#"{{"key":"{}"}}"#, BASE64.encode(key)))
}
