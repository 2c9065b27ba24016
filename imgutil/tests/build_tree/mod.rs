//! What the tests of `build` and `exec` share: a minimal tree, built once and kept under `target`, copies of it to change,
//! and the state of the host before and after.
#![allow(dead_code, unreachable_pub)] // each test program uses a part
#![allow(clippy::unwrap_used)]

#[path = "../common/tied.rs"]
#[allow(clippy::duplicate_mod)] // the tests of `pack` use both folders
mod tied;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
pub use tied::tied;

pub fn imgutil() -> Command {
    let mut command = tied(env!("CARGO_BIN_EXE_imgutil"));
    command.stdin(Stdio::null());
    command
}

/// Something that runs with mounts of its own, which end with it.
pub fn unshared() -> Command {
    let mut command = tied("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).stdin(Stdio::null());
    command
}

/// Runs `imgutil exec TREE -- COMMAND…` as a script would.
pub fn exec(tree: &Path, command: &[&str]) -> Output {
    imgutil().arg("exec").arg(tree).arg("--").args(command).output().unwrap()
}

/// Runs a shell command in the tree; it must succeed. What it printed.
pub fn shell(tree: &Path, script: &str) -> String {
    let output = exec(tree, &["sh", "-ec", script]);
    assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A minimal Debian 12 tree that no test may change. `exec` may run in it, which shows files of its own there meanwhile and makes a place
/// for each that the tree has not.
pub fn minimal_tree() -> PathBuf {
    cached("minimal", |tree| copy(&untouched_tree(), tree))
}

/// What [`minimal_tree`] is a copy of. Nothing runs in it, so that a copy finds everything that it saw in a folder.
pub fn untouched_tree() -> PathBuf {
    cached("untouched", |tree| {
        let output = imgutil().args(["build", "--no-cache", "--minimal"]).arg(tree).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    })
}

/// A Debian tree with RPM, dnf and zypper, as a stand-in for images of the distributions that have them. No test may change it, or run
/// anything in it.
pub fn rpm_tree() -> PathBuf {
    cached("rpm", |tree| {
        let packages = "rpm,dnf,zypper";
        let output = imgutil().args(["build", "--no-cache", "--minimal", "-p", packages]).arg(tree).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    })
}

/// Programs of the small tree.
const PROGRAMS: &str = "bash cat chmod chown chroot cp date dmesg dpkg env false grep head hostname id ln ls mkdir mknod mount mv \
    nohup nsenter readlink rm setsid sh sleep touch true umount unshare";

/// The programs above with their libraries and little else, taken out of the minimal tree: a copy costs a few files instead of
/// thousands.
fn small_tree() -> PathBuf {
    let minimal = minimal_tree();
    // Another list of programs is another tree.
    cached(&format!("small-{}", PROGRAMS.len()), |tree| {
        let new = tree.with_extension("new");
        drop(std::fs::remove_dir_all(&new));
        for directory in [
            "usr/bin",
            "usr/sbin",
            "usr/lib",
            "usr/lib64",
            "etc",
            "root",
            "tmp",
            "mnt",
            "media",
            "proc",
            "sys",
            "run",
            "dev",
            "var",
        ] {
            std::fs::create_dir_all(new.join(directory)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), new.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("/run", new.join("var/run")).unwrap();
        let script = format!(
            "cd /; for name in {PROGRAMS}; do file=$(type -P $name); echo $file; ldd $file | grep -o '/[^ ]*' || true; done \
             | sort -u | sed s,^/,, | tar -chf - etc/passwd etc/group etc/resolv.conf -T -"
        );
        let packed = exec(&minimal, &["bash", "-ec", &script]);
        assert!(packed.status.success(), "{}", text(&packed.stderr));
        let mut unpack = Command::new("tar").args(["-xf", "-", "-C"]).arg(&new).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut unpack.stdin.take().unwrap(), &packed.stdout).unwrap();
        assert!(unpack.wait().unwrap().success());
        std::fs::rename(new, tree).unwrap();
    })
}

/// A tree that is made once and kept under `target`; two test programs may come here at once.
fn cached(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trees");
    std::fs::create_dir_all(&directory).unwrap();
    let lock = File::create(directory.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let tree = directory.join(name);
    if !tree.exists() {
        make(&tree);
    }
    tree
}

/// A copy of the small tree, to be changed; removed with the returned directory.
pub fn own_tree() -> (tempfile::TempDir, PathBuf) {
    copy_of(&small_tree())
}

/// A copy of the minimal tree, in which packages can be installed.
pub fn own_debian() -> (tempfile::TempDir, PathBuf) {
    copy_of(&untouched_tree())
}

/// A copy of the tree with RPM, dnf and zypper, to be changed.
pub fn own_rpm() -> (tempfile::TempDir, PathBuf) {
    copy_of(&rpm_tree())
}

fn copy_of(source: &Path) -> (tempfile::TempDir, PathBuf) {
    let scratch = scratch();
    let tree = scratch.path().join("image");
    copy(source, &tree);
    (scratch, tree)
}

fn copy(source: &Path, tree: &Path) {
    let copied = Command::new("cp").args(["-a", "--reflink=auto"]).arg(source).arg(tree).status().unwrap();
    assert!(copied.success());
}

/// A directory on the file system of the target directory: /tmp may be small or nodev.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("test-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Mount points below `path`, or anywhere with imgutil's mark.
pub fn mounts(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.contains(path) || line.contains(" imgutil ")).map(str::to_owned).collect()
}

/// Ids of processes whose command line contains `mark`.
pub fn processes(mark: &str) -> Vec<u32> {
    let own = std::process::id();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| text(&line).contains(mark)))
        .collect()
}

/// Ids of processes that have the tree as their root.
pub fn processes_in(tree: &Path) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let root = tree.metadata().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|pid| {
        std::fs::metadata(format!("/proc/{pid}/root/"))
            .is_ok_and(|seen| (seen.dev(), seen.ino()) == (root.dev(), root.ino()))
    })
    .collect()
}

/// Waits until `done`; fails with `what` after half a minute.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited 30 s for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything about every file of a tree but contents and access times.
pub fn listing(tree: &Path) -> BTreeSet<String> {
    let output = Command::new("find").arg(tree).args(["-printf", "%P %y %m %U:%G %s %T@ %l %n\\n"]).output().unwrap();
    assert!(output.status.success());
    text(&output.stdout).lines().map(str::to_owned).collect()
}

/// Names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The one error of a run that ended with `status`, which is the last line that it printed.
pub fn error(output: &Output, status: i32) -> String {
    let printed = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{printed}");
    let errors: Vec<&str> = printed.lines().filter(|line| line.starts_with("imgutil: error: ")).collect();
    assert_eq!(errors.len(), 1, "{printed}");
    assert_eq!(printed.lines().last(), Some(errors[0]), "{printed}");
    errors[0].to_owned()
}

/// The digest of the plaintext that `imgutil pack` makes of a tree, which is removed.
pub fn payload(tree: &Path) -> String {
    payload_with(tree, &[])
}

/// The same with more options of `pack`.
pub fn payload_with(tree: &Path, more: &[&str]) -> String {
    let image = tree.with_extension("moor");
    let mut pack = imgutil();
    pack.args(["pack", "--plain", "--level", "1", "--json"]).args(more).arg(tree).arg("-o").arg(&image);
    let output = pack.output().unwrap();
    let payload = payload_of(&output);
    std::fs::remove_file(image).unwrap();
    std::fs::remove_dir_all(tree).unwrap();
    payload
}

/// What `imgutil pack --json` says of the plaintext.
fn payload_of(packed: &Output) -> String {
    assert!(packed.status.success(), "{}", text(&packed.stderr));
    let said: serde_json::Value = serde_json::from_slice(&packed.stdout).unwrap();
    said["payload_sha256"].as_str().unwrap().to_owned()
}

/// Builds a tree and packs it as on another machine: of another name, in another time zone, by somebody with another umask and other
/// settings, with one processor, in a folder whose file system lists names in another order. `files` of `work` are copied there
/// before. The clock is the same; only that it goes on between two builds makes a difference.
pub fn payload_elsewhere(work: &Path, files: &[&str], build: &[&str]) -> String {
    const SCRIPT: &str = "
        machine=$1 imgutil=$2 files=$3
        shift 3
        hostname another-machine
        mount --bind /usr/share/zoneinfo/Pacific/Auckland /etc/localtime
        mount -t tmpfs -o size=3g another $machine
        umask 077
        cp -r $files $machine/
        cd $machine
        export TZ=Pacific/Auckland LANG=de_DE.UTF-8 LC_ALL=de_DE.UTF-8 HOME=/nonexistent USER=somebody LOGNAME=somebody
        $imgutil build \"$@\" tree >&2
        exec $imgutil pack --plain --level 1 --processors 1 --json tree -o image.moor";
    let machine = work.join("machine");
    std::fs::create_dir(&machine).unwrap();
    let mut command = tied("unshare");
    command.args(["--mount", "--uts", "--propagation", "private", "--", "sh", "-euc", SCRIPT, "sh"]).arg(&machine);
    command.args([env!("CARGO_BIN_EXE_imgutil"), &files.join(" ")]).args(build);
    let output = command.current_dir(work).stdin(Stdio::null()).output().unwrap();
    std::fs::remove_dir(machine).unwrap();
    payload_of(&output)
}

/// `imgutil` where there is no network at all.
pub fn imgutil_alone() -> Command {
    let mut command = tied("unshare");
    command.args(["--net", "--", env!("CARGO_BIN_EXE_imgutil")]).stdin(Stdio::null());
    command
}
