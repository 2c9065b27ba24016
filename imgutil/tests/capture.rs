//! `imgutil capture` over a real sshd, of a system on three file systems (ext4, XFS, btrfs) in files. What device-mapper makes is captured
//! in a VM, because the host has none (tests/lab).

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Makes the system at `$D/target` and captures it through sshd; runs in namespaces of its own, so that mounts, network and processes end
/// with it. `$1` is imgutil, `$2` what is captured, the rest further options.
const CAPTURE: &str = r#"
set -eu
imgutil=$1 root=$2
shift 2
ip link set lo up
mkdir -p "$D/target"
for name in root home var; do truncate -s 300M "$D/$name.img"; done
mkfs.ext4 -q -L ROOT "$D/root.img"
mkfs.xfs -q "$D/home.img"
mkfs.btrfs -q "$D/var.img"
mount -o loop "$D/root.img" "$D/target"
mkdir -p "$D/target/etc/ssh" "$D/target/home" "$D/target/var" "$D/target/root/.ssh" "$D/target/usr/bin" "$D/target/dev" "$D/target/tmp"
mount -o loop "$D/home.img" "$D/target/home"
mount -o loop "$D/var.img" "$D/target/var"
printf 'ID=debian\nVERSION_ID=12\n' > "$D/target/etc/os-release"
mkdir -p "$D/target/var/log" "$D/target/var/lib/app" "$D/target/home/op/.ssh" "$D/target/var/empty"
ssh-keygen -q -t ed25519 -N '' -f "$D/planted"
for place in etc/ssh/ssh_host_ed25519_key root/.ssh/id_ed25519 home/op/.ssh/id_ed25519 var/lib/app/tls.pem; do
    cp "$D/planted" "$D/target/$place"
done
echo 'mysql -ppassword' > "$D/target/root/.bash_history"
echo 'a token' > "$D/target/var/log/app.log"
echo 0123456789abcdef0123456789abcdef > "$D/target/etc/machine-id"
cp /bin/true "$D/target/usr/bin/true"
ln "$D/target/usr/bin/true" "$D/target/usr/bin/same"
ln -s true "$D/target/usr/bin/link"
setfattr -n user.note -v kept "$D/target/usr/bin/true"
setcap cap_net_raw+ep "$D/target/usr/bin/true"
mknod "$D/target/dev/null" c 1 3
truncate -s 40M "$D/target/home/sparse"
echo end >> "$D/target/home/sparse"
head -c 3000000 /dev/urandom > "$D/target/home/op/large"
printf x > "$D/target/home/op/$(printf 'not\377utf-8')"
chown -R 1000:1000 "$D/target/home/op"
mkdir -p "$D/run"
ssh-keygen -q -t ed25519 -N '' -f "$D/host"
ssh-keygen -q -t ed25519 -N '' -f "$D/login"
cat > "$D/sshd_config" <<X
Port 2222
ListenAddress 127.0.0.1
HostKey $D/host
AuthorizedKeysFile $D/login.pub
StrictModes no
UsePAM no
PidFile none
X
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$D/sshd_config" 2> "$D/sshd.log" &
sshd=$!
printf 'node %s\n' "$(cut -d' ' -f1,2 "$D/host.pub")" > "$D/known_hosts"
cat > "$D/ssh_config" <<X
Host node
  HostName 127.0.0.1
  Port 2222
  HostKeyAlias node
  IdentityFile $D/login
  IdentitiesOnly yes
  UserKnownHostsFile $D/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
X
for try in 1 2 3 4 5 6 7 8 9 10; do ssh -F "$D/ssh_config" -l root node true 2> /dev/null && break; sleep 0.3; done
status=0
"$imgutil" capture node --root "$root" --ssh-config "$D/ssh_config" -o "$D/node.moor" --key-file "$D/node.key" --level 1 "$@" || status=$?
kill $sshd
(cd "$D/target" && find . -type f | sort > "$D/files")
exit $status
"#;

/// The system's secrets, one on each file system, and a key where only its contents tell.
const PLANTED: [&str; 6] = [
    "etc/ssh/ssh_host_ed25519_key",
    "root/.ssh/id_ed25519",
    "root/.bash_history",
    "home/op/.ssh/id_ed25519",
    "var/log/app.log",
    "var/lib/app/tls.pem",
];

fn imgutil() -> &'static str {
    env!("CARGO_BIN_EXE_imgutil")
}

fn capture(dir: &Path, root: &str, more: &[&str]) -> Output {
    Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "--",
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["--", "sh", "-c", CAPTURE, "sh", imgutil(), root])
        .args(more)
        .env("D", dir)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn run(arguments: &[&str], image: &Path, key: &Path) -> Output {
    let output = Command::new(imgutil()).args(arguments).arg(image).arg("--key-file").arg(key).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

#[test]
fn a_system_on_several_file_systems_becomes_one_image_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let excluded = dir.path().join("exclude");
    std::fs::write(&excluded, "/home/op/large\n").unwrap();
    let target = dir.path().join("target").display().to_string();
    let output = capture(dir.path(), &target, &["--exclude", excluded.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("private keys were left out: /var/lib/app/tls.pem"), "{}", said(&output));
    let (image, key) = (dir.path().join("node.moor"), dir.path().join("node.key"));
    run(&["verify"], &image, &key);

    let inspection: Value = serde_json::from_slice(&run(&["inspect", "--json"], &image, &key).stdout).unwrap();
    let filesystems = inspection["metadata"]["filesystems"].as_array().unwrap();
    let mounts: Vec<&str> = filesystems.iter().map(|part| part["mount"].as_str().unwrap()).collect();
    assert_eq!(mounts, ["/", "/home", "/var"], "{inspection:#}");
    for (part, kind) in filesystems.iter().zip(["ext4", "xfs", "btrfs"]) {
        assert_eq!(part["offset"].as_u64().unwrap() % (1 << 20), 0);
        let layout: Value = serde_json::from_str(part["layout"].as_str().unwrap()).unwrap();
        assert_eq!(
            (layout["type"].as_str(), layout["on"][0]["type"].as_str()),
            (Some(kind), Some("loop")),
            "{layout:#}"
        );
    }
    assert_eq!(inspection["metadata"]["os"], "debian-12");

    let out = dir.path().join("out");
    let unpacked =
        Command::new(imgutil()).arg("unpack").arg(&image).arg(&out).arg("--key-file").arg(&key).output().unwrap();
    assert!(unpacked.status.success(), "{}", said(&unpacked));
    for planted in PLANTED {
        assert!(std::fs::symlink_metadata(out.join(planted)).is_err(), "'{planted}' is in the image");
    }
    assert!(!out.join("home/op/large").exists(), "what was excluded is in the image");
    assert_eq!(std::fs::read(out.join("etc/machine-id")).unwrap(), b"", "the machine's id is in the image");
    let stat = |name: &str| std::fs::symlink_metadata(out.join(name)).unwrap();
    assert_eq!(std::fs::read(out.join("usr/bin/true")).unwrap(), std::fs::read("/bin/true").unwrap());
    assert_eq!((stat("usr/bin/true").ino(), stat("usr/bin/true").nlink()), (stat("usr/bin/same").ino(), 2));
    assert_eq!(std::fs::read_link(out.join("usr/bin/link")).unwrap(), PathBuf::from("true"));
    assert_eq!(
        (stat("home/sparse").len(), stat("home/op").uid(), stat("dev/null").rdev()),
        ((40 << 20) + 4, 1000, 0x103)
    );
    let mut value = [0; 64];
    for (name, expected) in [("user.note", 4), ("security.capability", 20)] {
        let length = rustix::fs::getxattr(out.join("usr/bin/true"), name, &mut value).unwrap();
        assert_eq!(length, expected, "{name}");
    }
    // Everything else of the system is there.
    let files = std::fs::read(dir.path().join("files")).unwrap();
    for name in files.split(|byte| *byte == b'\n').filter(|name| !name.is_empty()) {
        let path = Path::new(OsStr::from_bytes(name));
        let known = |name: &str| path == Path::new(".").join(name);
        if !PLANTED.iter().any(|planted| known(planted)) && !known("home/op/large") {
            assert!(std::fs::symlink_metadata(out.join(path)).is_ok(), "'{}' is missing", path.display());
        }
    }
}

#[test]
fn a_capture_that_fails_says_why_and_leaves_neither_image_nor_key() {
    let dir = tempfile::tempdir().unwrap();
    for (root, reason) in
        [("/nowhere", "nothing is mounted at '/nowhere'"), ("relative", "'relative' is no absolute path")]
    {
        let output = capture(dir.path(), root, &[]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(
            said(&output).contains("cannot capture 'node': ") && said(&output).contains(reason),
            "{}",
            said(&output)
        );
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("node.") || name.starts_with(".node"))
            .collect();
        assert_eq!(left, Vec::<String>::new());
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() { std::fs::remove_file(path).unwrap() } else { std::fs::remove_dir_all(path).unwrap() }
        }
    }
    let config = dir.path().join("ssh_config");
    std::fs::write(&config, "Host node\n  HostName 127.0.0.1\n  Port 1\n  BatchMode yes\n").unwrap();
    let (image, key) = (dir.path().join("node.moor"), dir.path().join("node.key"));
    let output = Command::new(imgutil())
        .args(["capture", "node", "--ssh-config"])
        .arg(&config)
        .arg("-o")
        .arg(&image)
        .arg("--key-file")
        .arg(&key)
        .output()
        .unwrap();
    assert!(!output.status.success() && said(&output).contains("cannot capture 'node'"), "{}", said(&output));
    assert!(said(&output).contains("ssh failed: "), "{}", said(&output));
    assert!(!image.exists() && !key.exists());
}
