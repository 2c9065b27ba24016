//! systemd reads what is meant for it: the unit by its own checker, the network files by its network service in a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; its helpers too")]

use moor_agent::render::{self, BootInterface, Content, Facts};
use moor_api::deploy::DeployDocument;
use moor_api::node::{HostCertificates, SshTrust};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn ok(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_unit_is_valid() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/moor-agent.service");
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("moor-agent.service");
    // The program is in images, not here.
    let text = std::fs::read_to_string(unit).unwrap().replace("/usr/bin/moor-agent onboot", "/bin/true onboot");
    std::fs::write(&copy, text).unwrap();
    let output = run("systemd-analyze", &["verify", "--man=no", copy.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("moor-agent")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}

/// A namespace with one card, removed at the end.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.0]);
    }
}

/// A child that does not outlive the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The boot stage left an address, a route and (here) a second address that the document does not know: networkd takes the interface
/// over, adds what is missing, and removes nothing, because the root comes over it.
#[test]
fn networkd_takes_the_interface_over_and_removes_nothing() {
    let namespace = Namespace(format!("moor-networkd-{}", std::process::id()));
    let name = namespace.0.as_str();
    ok("ip", &["netns", "add", name]);
    let on = |arguments: &str| {
        let words: Vec<&str> = ["-n", name].into_iter().chain(arguments.split_whitespace()).collect();
        ok("ip", &words)
    };
    on("link add eth0 type veth peer name other");
    for change in [
        "link set other up",
        "link set eth0 up",
        "addr add 10.1.2.3/24 brd + dev eth0",
        "addr add 10.55.0.9/24 brd + dev eth0",
        "route add default via 10.1.2.1 dev eth0 proto static",
    ] {
        on(change);
    }
    let shown = on("-o link show eth0");
    let hwaddr = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("network");
    std::fs::create_dir(&config).unwrap();
    for (path, text) in network_files(hwaddr) {
        std::fs::write(config.join(Path::new(&path).file_name().unwrap()), text).unwrap();
    }
    let log = dir.path().join("log");
    let script = format!(
        "set -e
        mount --make-rprivate /
        mount -t tmpfs tmpfs /run
        mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
        chmod -R 777 /run/systemd
        mount -o remount,bind,ro /sys
        mount --bind {} /etc/systemd/network
        SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console exec /lib/systemd/systemd-networkd >{} 2>&1",
        config.display(),
        log.display()
    );
    // Every step is an exec: the child is networkd itself in the end.
    let child = Command::new("ip")
        .args(["netns", "exec", name, "unshare", "--mount", "sh", "-c", &script])
        .stdin(Stdio::null())
        .spawn();
    let mut networkd = Killed(child.unwrap());
    let begin = Instant::now();
    while !on("-6 addr show eth0").contains("2001:db8::3/64") {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(begin.elapsed() < Duration::from_secs(50) && networkd.0.try_wait().unwrap().is_none(), "{said}");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(networkd);

    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("10-moor-0.network"), "{said}");
    let complaints: Vec<&str> = said.lines().filter(|line| line.contains("10-moor-0.network:")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    let addresses = on("-4 -o addr show eth0");
    assert!(addresses.contains("10.1.2.3/24") && addresses.contains("10.55.0.9/24"), "{addresses}");
    assert_eq!(on("route show default").lines().count(), 1, "{}", on("route show default"));
}

fn network_files(hwaddr: &str) -> Vec<(String, String)> {
    let document: DeployDocument = serde_json::from_value(serde_json::json!({
        "schema": 1,
        "deployment": null,
        "node": {"id": "6a1f2c5e-3b7d-4c1a-9e2f-1a2b3c4d5e6f", "name": "n1", "machine_id": "0123456789abcdef0123456789abcdef"},
        "profile": {"name": "demo", "generation": "00".repeat(32), "root": "tethered"},
        "interfaces": [{"hwaddr": hwaddr, "ipv4": "static", "ipv6": "static", "addresses": ["10.1.2.3/24", "2001:db8::3/64"],
                        "gateways": ["10.1.2.1"], "mtu": 1400}],
        "dns": {"servers": ["10.1.2.53"], "domain": "cluster.example"},
        "members": [],
        "trust_version": 1
    }))
    .unwrap();
    let interface = BootInterface {
        name: "eth0".into(),
        hwaddr: hwaddr.parse().unwrap(),
        address: "10.1.2.3/24".parse().unwrap(),
        gateways: Vec::new(),
        is_static: false,
        dns: Vec::new(),
        domain: None,
    };
    let facts = Facts {
        interface: &interface,
        host_keys: &[],
        certificates: &HostCertificates { certificates: Vec::new(), renew_after: 0, version: 1 },
        trust: &SshTrust::default(),
        shadow: None,
        authorized_keys: None,
    };
    let files = render::debian(&document, &facts).unwrap();
    files
        .into_iter()
        .filter_map(|file| match file.content {
            Content::New(_, text) if file.path.ends_with(".network") => Some((file.path, text.to_string())),
            _ => None,
        })
        .collect()
}
