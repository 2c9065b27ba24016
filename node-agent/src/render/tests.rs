//! One document, one text: what is rendered is compared with golden files, and read by the programs it is for.
//!
//! After a change that is meant, `MOOR_GOLDEN=write cargo test --workspace golden` writes the files anew; look at the difference.

use super::*;
use moor_api::deploy::Cidr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const SHADOW_TEXT: &str = "root:$6$image$x:19700:0:99999:7:::\ndaemon:*:19700:0:99999:7:::\n";

fn document(change: &str) -> DeployDocument {
    let mut value = serde_json::json!({
        "schema": 1,
        "deployment": null,
        "node": {"id": "6a1f2c5e-3b7d-4c1a-9e2f-1a2b3c4d5e6f", "name": "n1", "machine_id": "0123456789abcdef0123456789abcdef"},
        "profile": {"name": "demo", "generation": "00".repeat(32), "root": "tethered"},
        "interfaces": [],
        "dns": {},
        "members": [],
        "trust_version": 1
    });
    let change: serde_json::Value = serde_json::from_str(change).unwrap();
    for (key, part) in change.as_object().unwrap() {
        value[key] = part.clone();
    }
    serde_json::from_value(value).unwrap()
}

fn boot(is_static: bool) -> BootInterface {
    BootInterface {
        name: "enp1s0".into(),
        hwaddr: "52:54:00:6d:6f:01".parse().unwrap(),
        address: "10.1.2.3/24".parse::<Cidr>().unwrap(),
        gateways: vec!["10.1.2.1".parse().unwrap()],
        is_static,
        dns: vec!["10.1.2.53".parse().unwrap()],
        domain: Some("lease.example".into()),
    }
}

fn trust() -> SshTrust {
    SshTrust {
        known_hosts: vec!["@cert-authority * ssh-ed25519 AAAACA site".into()],
        shosts: vec!["n1".into(), "n2.cluster.example".into()],
        authorized_keys: vec!["ssh-ed25519 AAAAADMIN admin".into()],
        user_authorities: Vec::new(),
        version: 1,
    }
}

/// Keys of no value, so that golden files stay the same.
fn host_keys() -> (Vec<HostKey>, HostCertificates) {
    let key = |word: &'static str| HostKey {
        word,
        private: Zeroizing::new(format!("PRIVATE {word}\n")),
        public: format!("ssh-{word} AAAAKEY n1"),
    };
    let certificates = ["ed25519", "ecdsa"].map(|word| format!("ssh-{word}-cert-v01@openssh.com AAAACERT n1"));
    (
        vec![key("ed25519"), key("ecdsa")],
        HostCertificates { certificates: certificates.to_vec(), renew_after: 0, version: 1 },
    )
}

fn rendered(document: &DeployDocument, interface: &BootInterface, trust: &SshTrust) -> Vec<RenderedFile> {
    let (host_keys, certificates) = host_keys();
    let facts = Facts {
        interface,
        host_keys: &host_keys,
        certificates: &certificates,
        trust,
        shadow: Some(Zeroizing::new(SHADOW_TEXT.into())),
        authorized_keys: None,
    };
    debian(document, &facts).unwrap()
}

fn text(files: &[RenderedFile]) -> String {
    let mut text = String::new();
    for RenderedFile { path, content } in files {
        let _ = match content {
            Content::New(mode, body) => writeln!(text, "=== {path} {mode:04o}\n{}", **body),
            Content::Replaced(body) => writeln!(text, "=== {path} replaced\n{}", **body),
            Content::Link(target) => writeln!(text, "=== {path} -> {target}\n"),
            Content::Directory(mode) => writeln!(text, "=== {path}/ {mode:04o}\n"),
        };
    }
    text
}

fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"))
}

fn check(name: &str, files: &[RenderedFile]) {
    let (path, text) = (golden_path(name), text(files));
    if std::env::var_os("MOOR_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert!(text == golden, "{} differs; what is rendered now:\n{text}", path.display());
}

const STATIC: &str = r#"{
    "interfaces": [{"hwaddr": "52:54:00:6d:6f:01", "ipv4": "static", "ipv6": "static",
        "addresses": ["10.1.2.3/24", "2001:db8::3/64"], "gateways": ["10.1.2.1", "2001:db8::1"], "mtu": 9000}],
    "dns": {"servers": ["10.1.2.53", "2001:db8::53"], "domain": "cluster.example"},
    "ntp": ["ntp.cluster.example", "10.1.2.5"],
    "time_zone": "Europe/Berlin",
    "locale": {"lang": "de_DE.UTF-8", "keymap": "de-latin1"},
    "secrets": {"root_password_hash": "$y$j9T$abc./$xyz"}
}"#;

const TWO: &str = r#"{
    "interfaces": [
        {"ipv4": "dhcp", "ipv6": "none"},
        {"label": "ib", "names": ["ibp1s0", "ib0"], "ipv4": "static", "ipv6": "none", "addresses": ["192.168.7.3/16"],
         "gateways": [], "mtu": 4092}],
    "dns": {"servers": ["9.9.9.9"]}
}"#;

#[test]
fn golden_files() {
    let dhcp = r#"{"interfaces": [{"hwaddr": "52:54:00:6d:6f:01", "ipv4": "dhcp", "ipv6": "dhcp"}]}"#;
    let elsewhere =
        r#"{"interfaces": [{"names": ["enp9s0"], "ipv4": "none", "ipv6": "dhcp"}], "dns": {"domain": "own.example"}}"#;
    let authorities = SshTrust { user_authorities: vec!["ssh-ed25519 AAAAUSERCA site".into()], ..trust() };
    check("static", &rendered(&document(STATIC), &boot(false), &trust()));
    check("dhcp", &rendered(&document(dhcp), &boot(false), &authorities));
    check("two-interfaces", &rendered(&document(TWO), &boot(false), &trust()));
    check("nothing-but-a-name", &rendered(&document("{}"), &boot(true), &SshTrust::default()));
    check("booted-elsewhere", &rendered(&document(elsewhere), &boot(false), &trust()));
}

#[test]
fn values_that_would_break_a_file_are_refused_by_name() {
    let cases = [
        (r#"{"dns": {"domain": "x\nnameserver 6.6.6.6"}}"#, "dns.domain"),
        (r#"{"dns": {"domain": ""}}"#, "dns.domain"),
        (r#"{"ntp": ["a\nb"]}"#, "ntp.servers"),
        (r#"{"time_zone": "../../etc/shadow"}"#, "time.zone"),
        (r#"{"time_zone": "/etc/shadow"}"#, "time.zone"),
        (r#"{"locale": {"lang": "C\nLD_PRELOAD=x"}}"#, "locale.lang"),
        (r#"{"locale": {"keymap": "de\""}}"#, "locale.keymap"),
        (r#"{"interfaces": [{"label": "a/../b", "ipv4": "dhcp", "ipv6": "none"}]}"#, "net label"),
        (r#"{"interfaces": [{"names": ["a b"], "ipv4": "dhcp", "ipv6": "none"}]}"#, "net.interface_names"),
        (r#"{"secrets": {"root_password_hash": "x:0:0\nroot2::0:0"}}"#, "the root password's hash"),
    ];
    let (keys, certificates) = host_keys();
    for (change, field) in cases {
        let facts = Facts {
            interface: &boot(false),
            host_keys: &keys,
            certificates: &certificates,
            trust: &trust(),
            shadow: Some(Zeroizing::new(SHADOW_TEXT.into())),
            authorized_keys: None,
        };
        let Err(error) = debian(&document(change), &facts) else { panic!("{change} is taken") };
        assert_eq!(error.field, field, "{change}");
        assert!(!error.to_string().contains("root2"), "a hash is shown: {error}");
    }
}

fn install_into(dir: &Path, trust: &SshTrust) {
    let (host_keys, certificates) = host_keys();
    let interface = boot(false);
    let (shadow, authorized_keys) = (None, None);
    let (keys, certificates) = (&host_keys[..], &certificates);
    let facts = Facts { interface: &interface, host_keys: keys, certificates, trust, shadow, authorized_keys };
    install(&Tree::open(dir).unwrap(), &document(STATIC), facts).unwrap();
}

fn snapshot(dir: &Path) -> String {
    let listing = Command::new("find").arg(dir).args(["-printf", "%P %m %l %s\n"]).output().unwrap();
    let mut lines: Vec<&str> = std::str::from_utf8(&listing.stdout).unwrap().lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn installing_twice_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("etc")).unwrap();
    std::fs::write(dir.path().join("etc/shadow"), SHADOW_TEXT).unwrap();
    std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", dir.path().join("etc/resolv.conf")).unwrap();
    install_into(dir.path(), &trust());
    let (first, read) = (snapshot(dir.path()), |path: &str| std::fs::read_to_string(dir.path().join(path)).unwrap());
    assert!(read("etc/shadow").starts_with("root:$y$j9T$abc./$xyz:19700:"));
    assert!(read("etc/resolv.conf").contains("nameserver 10.1.2.53"));
    assert!(first.contains("root/.ssh 700"), "{first}");
    assert!(first.contains("etc/ssh 755"), "{first}");
    install_into(dir.path(), &trust());
    assert_eq!(snapshot(dir.path()), first);
}

/// sshd itself reads what was written: with real keys, certified by ssh-keygen.
#[test]
fn sshd_takes_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let (etc, ca) = (dir.path().join("etc/ssh"), dir.path().join("ca"));
    std::fs::create_dir_all(&etc).unwrap();
    let keygen = |arguments: &[&str], file: &Path| {
        let output = Command::new("ssh-keygen").arg("-q").args(arguments).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    keygen(&["-t", "ed25519", "-N", "", "-f"], &ca);
    let host_keys = crate::ssh::make("n1").unwrap();
    let mut certificates = HostCertificates { certificates: Vec::new(), renew_after: 0, version: 1 };
    for key in &host_keys {
        let public = dir.path().join(format!("{}.pub", key.word));
        std::fs::write(&public, &key.public).unwrap();
        keygen(&["-s", ca.to_str().unwrap(), "-h", "-I", "n1", "-n", "n1", "-V", "-5m:+1d"], &public);
        let certificate = std::fs::read_to_string(dir.path().join(format!("{}-cert.pub", key.word)));
        certificates.certificates.push(certificate.unwrap());
    }
    let authority = std::fs::read_to_string(ca.with_extension("pub")).unwrap().trim().to_owned();
    let trust = SshTrust {
        known_hosts: vec![format!("@cert-authority * {authority}")],
        user_authorities: vec![authority],
        ..trust()
    };
    let interface = boot(false);
    let (shadow, authorized_keys) = (None, None);
    let (keys, certificates) = (&host_keys[..], &certificates);
    let facts = Facts { interface: &interface, host_keys: keys, certificates, trust: &trust, shadow, authorized_keys };
    install(&Tree::open(dir.path()).unwrap(), &document(STATIC), facts).unwrap();

    // The written paths are those of the node's root; here that root is a folder.
    let drop_in = std::fs::read_to_string(etc.join("sshd_config.d/10-moor.conf")).unwrap();
    let config = dir.path().join("sshd_config");
    std::fs::write(&config, drop_in.replace("/etc/ssh/", &format!("{}/", etc.display()))).unwrap();
    let script =
        format!("mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec /usr/sbin/sshd -T -f {}", config.display());
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let etc = etc.display();
    for wanted in [
        format!("hostkey {etc}/ssh_host_ed25519_key"),
        format!("hostcertificate {etc}/ssh_host_ecdsa_key-cert.pub"),
        "hostbasedauthentication yes".to_owned(),
        "hostbasedusesnamefrompacketonly yes".to_owned(),
        format!("trustedusercakeys {etc}/moor_user_authorities"),
    ] {
        assert!(said.lines().any(|line| line == wanted), "{wanted} is not in\n{said}");
    }
    // The client's half.
    let output =
        Command::new("ssh").args(["-G", "-F"]).arg(format!("{etc}/ssh_config.d/10-moor.conf")).arg("n2").output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("hostbasedauthentication yes") && said.contains("enablesshkeysign yes"), "{said}");
}

#[test]
fn a_secret_is_in_no_file_that_others_can_read() {
    let files = rendered(&document(STATIC), &boot(false), &trust());
    for file in &files {
        if let Content::New(mode, body) = &file.content {
            assert!(mode.trailing_zeros() >= 6 || !(body.contains("PRIVATE") || body.contains("$y$")), "{}", file.path);
        }
    }
}
