//! A node to capture: a real sshd with processes and a network of its own, and a system on three file systems (ext4, XFS, btrfs) in
//! files. All of it ends with the value.

use moor_vm::Namespace;
use moor_vm::process::{Guard, spawn, tied};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Makes the system at `$D/target`, lists its files in `$D/files`, and starts sshd. `$1` is what to plant besides.
const START: &str = r#"
set -eu
# What tools say goes to standard error: only "ready" is waited for.
exec 3>&1 >&2
mount -t tmpfs tmpfs /run
# sshd's log and the disks are open for writing, each by way of this mount.
mount --bind "$D" "$D"
mkdir -p "$D/target" /run/sshd
for name in root home var; do truncate -s 300M "$D/$name.img"; done
mkfs.ext4 -q -L ROOT "$D/root.img"
mkfs.xfs -q "$D/home.img"
mkfs.btrfs -q "$D/var.img" > /dev/null
mount -o loop "$D/root.img" "$D/target"
cd "$D/target"
mkdir -p etc/ssh home var root/.ssh usr/bin dev tmp
mount -o loop "$D/home.img" home
mount -o loop "$D/var.img" var
printf 'ID=debian\nVERSION_ID=12\n' > etc/os-release
mkdir -p var/log var/lib/dpkg/info home/op/.ssh var/empty
ssh-keygen -q -t ed25519 -N '' -f "$D/planted"
eval "$1"
cd /
(cd "$D/target" && find . -type f | sort > "$D/files")
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
  ServerAliveInterval 1
  ServerAliveCountMax 3
X
/usr/sbin/sshd -D -e -f "$D/sshd_config" 2> "$D/sshd.log" &
for try in $(seq 60); do ssh -F "$D/ssh_config" -l root node true 2> /dev/null && break; sleep 0.3; done
ssh -F "$D/ssh_config" -l root node true
echo ready >&3
exec sleep infinity 3>&-
"#;

/// Makes everything read-only but the folder of log and disks, `$1`, and tries whether that is so in places where programs write. `$0` is the
/// system's root.
const READ_ONLY: &str = r#"
while read -r _ _ _ _ point _; do
    [ "$point" = "$1" ] || mount -o remount,bind,ro "$(printf %b "$point")" 2> /dev/null || true
done < /proc/self/mountinfo
for place in / /tmp /var/tmp /dev/shm /run /root "$0" "$0/home" "$0/var"; do
    if touch "$place/imgutil-probe" 2> /dev/null; then
        rm "$place/imgutil-probe"
        echo "$place can be written" >&2
        exit 99
    fi
done
"#;

/// The node. Its fields are dropped in order.
pub struct Node {
    _system: Guard,
    namespace: Namespace,
    dir: PathBuf,
    imgutil: PathBuf,
}

impl Node {
    /// Starts it in `dir`, to be captured by the program `imgutil`; the shell commands `plant` run in the root of its system, and find a private key in `$D/planted`.
    pub fn start(imgutil: impl Into<PathBuf>, dir: &Path, plant: &str) -> Self {
        let namespace = Namespace::new().unwrap();
        let mut system = tied("unshare");
        system.args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            "sh",
            "-c",
            START,
            "sh",
            plant,
        ]);
        let mut child = spawn(namespace.enter(&system).env("D", dir).stdout(Stdio::piped())).unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the node does not start: {}", log(dir));
        Self { _system: Guard::new(child), namespace, dir: dir.to_owned(), imgutil: imgutil.into() }
    }

    /// Where the node has its system mounted.
    pub fn target(&self) -> String {
        self.dir.join("target").display().to_string()
    }

    /// From now on nobody can write anything there but in the folder that it was started in.
    pub fn make_read_only(&self) {
        let mut ssh = tied("ssh");
        let words =
            format!("sh -euc '{}' '{}' '{}'", READ_ONLY.replace('\'', "'\\''"), self.target(), self.dir.display());
        ssh.arg("-F").arg(self.dir.join("ssh_config")).args(["-l", "root", "node", &words]);
        let output = self.namespace.enter(&ssh).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// `imgutil capture` of that system to `DIR/out/node.moor`, not started yet.
    pub fn capture(&self, root: &str, more: &[&str]) -> Command {
        let (image, key) = (self.dir.join("out/node.moor"), self.dir.join("out/node.key"));
        let to = ["-o", image.to_str().unwrap(), "--key-file", key.to_str().unwrap()];
        self.capture_to(root, &[&to, more].concat())
    }

    /// `imgutil capture` of that system to what `more` says, not started yet; its temporary files go to `DIR/tmp`.
    pub fn capture_to(&self, root: &str, more: &[&str]) -> Command {
        for name in ["out", "tmp"] {
            std::fs::create_dir_all(self.dir.join(name)).unwrap();
        }
        let mut command = tied(&self.imgutil);
        command.args(["capture", "node", "--root", root, "--ssh-config"]).arg(self.dir.join("ssh_config")).args(more);
        command.env("TMPDIR", self.dir.join("tmp"));
        self.namespace.enter(&command)
    }

    /// What a capture may have left: files where images and temporary files go, and processes of ours on the way to the node.
    pub fn left_here(&self) -> Vec<String> {
        let mut left = Vec::new();
        for directory in ["out", "tmp"] {
            let entries = std::fs::read_dir(self.dir.join(directory)).unwrap();
            left.extend(entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()));
        }
        left.extend(self.processes(true).into_iter().filter_map(|(_, line)| line.starts_with("ssh ").then_some(line)));
        left
    }

    /// The processes on the node that its login service has started, for a capture: each its id and its command line.
    pub fn sessions(&self) -> Vec<(i32, String)> {
        let processes = self.processes(false).into_iter();
        processes.filter(|(_, line)| !line.contains("sshd -D") && !line.starts_with("sleep infinity")).collect()
    }

    /// Processes in the node's network: those of this side, or those of the node's.
    fn processes(&self, here: bool) -> Vec<(i32, String)> {
        let space = |process: &Path, kind: &str| std::fs::read_link(process.join("ns").join(kind)).ok();
        let network = space(Path::new(&format!("/proc/{}", self.namespace.pid())), "net");
        let ours = space(Path::new("/proc/self"), "pid");
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(id) = process.file_name().to_string_lossy().parse::<i32>() else { continue };
            let path = process.path();
            if space(&path, "net") == network && (space(&path, "pid") == ours) == here {
                let words = std::fs::read(path.join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&words).replace('\0', " ");
                if !line.is_empty() {
                    found.push((id, line));
                }
            }
        }
        found
    }
}

fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("sshd.log")).unwrap_or_default()
}
