//! The whole way on this machine: sealed image, real web servers, FUSE, loop device, squashfs, zram, overlay. And its end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::authority::Authority;
use common::namespace::{apart, has_memory_disk, in_namespace, passed};
use common::nginx::Nginx;
use common::{noise, seal};
use moor_tether::reader::Standing;
use moor_tether::state::State;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_mins(1);
/// The large file of the tree.
const LARGE: usize = 24 << 20;

struct Place {
    dir: TempDir,
    authority: Authority,
    digest: String,
}

impl Place {
    /// A tree, its squashfs, and that sealed.
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap(), authority: Authority::new(), digest: String::new() };
        let tree = place.path("tree");
        fs::create_dir_all(tree.join("etc/deep/er")).unwrap();
        fs::create_dir_all(place.path("web")).unwrap();
        for dir in ["mnt", "root"] {
            fs::create_dir(place.path(dir)).unwrap();
        }
        fs::write(tree.join("etc/hostname"), "node\n").unwrap();
        fs::write(tree.join("etc/deep/er/file"), noise(200_000, 4)).unwrap();
        fs::hard_link(tree.join("etc/hostname"), tree.join("etc/same")).unwrap();
        symlink("hostname", tree.join("etc/link")).unwrap();
        fs::write(tree.join("large"), noise(LARGE, 3)).unwrap();
        for index in 0..300 {
            fs::write(tree.join(format!("etc/deep/{index}")), noise(index * 7, index as u64 + 10)).unwrap();
        }
        fs::set_permissions(&tree, fs::Permissions::from_mode(0o751)).unwrap();
        let squashfs = place.path("squashfs");
        let made = Command::new("mksquashfs")
            .args([&tree, &squashfs])
            .args(["-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", "1"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let sample = seal(fs::read(&squashfs).unwrap(), 16);
        fs::write(place.path("web/image.moor"), &*sample.file).unwrap();
        fs::write(place.path("key"), sample.key.to_hex().as_bytes()).unwrap();
        fs::write(place.path("ca.pem"), place.authority.pem()).unwrap();
        Self { digest: hex::encode(sample.sealed.digest), ..place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn nginx(&self, name: &str) -> Nginx {
        Nginx::start(self.dir.path(), name, &self.authority)
    }

    fn tether(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-tether"));
        // Relative paths have to work as well.
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn mount_command(&self, servers: &[&Nginx]) -> Command {
        let mut command = self.tether();
        command.args(["mount", "--key-file", "key", "--ca", "ca.pem", "--state", "run/tether.json"]);
        command.args(["--digest", &self.digest]);
        for server in servers {
            command.args(["--url", &server.url()]);
        }
        command.arg("mnt");
        command
    }

    fn state(&self) -> State {
        State::read(&self.path("run/tether.json")).unwrap()
    }

    fn root(&self, arguments: &[&str]) -> Output {
        let mut command = self.tether();
        command.args(["root", "--image", "mnt/image", "--work", "work"]).args(arguments).arg("root");
        command.output().unwrap()
    }
}

fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fails(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with("moor-tether: error: ") && said.contains(words), "'{words}' is not in: {said}");
}

fn mounts_under(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    places.filter(|place| Path::new(place).starts_with(dir)).map(str::to_owned).collect()
}

fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !ready() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_gone(pid: u32) -> bool {
    // A zombie of ours is gone as well; we are process 1 here, and nobody reaps for us.
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// A root, of whose memory disk the warden knows.
struct Root<'a>(&'a Place);

impl<'a> Root<'a> {
    fn new(place: &'a Place) -> Self {
        ok(&place.root(&[]));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let writable = format!(" {} ", place.path("work/writable").display());
        let line = mounts.lines().find(|line| line.contains(&writable)).unwrap();
        let (_, number) = line.split_once(" /dev/zram").unwrap();
        has_memory_disk(Some(number.split(' ').next().unwrap().parse().unwrap()));
        Self(place)
    }

    fn unmount(&self) -> Output {
        let output = self.0.tether().args(["unmount", "--root", "--work", "work", "root"]).output().unwrap();
        if output.status.success() {
            has_memory_disk(None);
        }
        output
    }
}

impl Drop for Root<'_> {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Memory disks belong to the whole machine: of the tests that add or count some, one runs at a time.
static DISKS: Mutex<()> = Mutex::new(());

/// The same as [`apart`], for a test that adds a memory disk or counts them.
fn apart_with_disks(name: &str, body: impl FnOnce()) -> Option<Output> {
    let _alone = DISKS.lock().unwrap_or_else(PoisonError::into_inner);
    // Where it is a module: so that the first disk, which comes with it, is there before disks are counted.
    let _ = Command::new("modprobe").args(["-q", "zram"]).status();
    apart(name, body)
}

/// Memory disks, and loop devices that are in use, on the whole machine.
fn devices() -> BTreeSet<String> {
    let all = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap());
    let ours = all.filter(|device| {
        device.path().join("loop/backing_file").exists() || device.file_name().as_encoded_bytes().starts_with(b"zram")
    });
    ours.map(|device| device.file_name().into_string().unwrap()).collect()
}

/// The kernel frees a loop device a moment after its last user is gone.
fn none_but(before: &BTreeSet<String>) {
    wait("the end of all devices", || devices().is_subset(before));
}

/// Not a test of the program, but of the tests: one that ends without taking its root down leaves no memory disk.
#[test]
fn a_memory_disk_does_not_outlive_its_test() {
    let output = apart_with_disks("a_memory_disk_does_not_outlive_its_test", || {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").unwrap();
        has_memory_disk(Some(number.trim().parse().unwrap()));
        println!("disk={}", number.trim());
        // As if it were killed: nothing is dropped.
        std::process::exit(9);
    });
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let (_, number) = said.split_once("disk=").unwrap();
    let number = number.split_whitespace().next().unwrap();
    assert!(!Path::new("/sys/block").join(format!("zram{number}")).exists(), "zram{number} is there");
}

#[test]
fn a_node_s_root_from_two_servers_of_which_one_dies() {
    passed(apart_with_disks("a_node_s_root_from_two_servers_of_which_one_dies", || {
        let place = Place::new();
        let devices_before = devices();
        let (mut first, second) = (place.nginx("first"), place.nginx("second"));
        ok(&place.mount_command(&[&first, &second]).output().unwrap());

        // The file is the squashfs, and what serves it is ready for the worst.
        assert!(fs::read(place.path("mnt/image")).unwrap() == fs::read(place.path("squashfs")).unwrap());
        let state = place.state();
        check_process(state.pid);
        assert_eq!(state.image_size, place.path("web/image.moor").metadata().unwrap().len());
        let json = ok(&place.tether().args(["status", "--json", "--state", "run/tether.json"]).output().unwrap());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["members"][0]["state"], "good");
        assert_eq!(json["members"][1]["url"], second.url());

        // The root is the tree, and it can be written to.
        let root = Root::new(&place);
        assert_eq!(mounts_under(&place.path("mnt")), Vec::<String>::new(), "systemd-shutdown would find it");
        let compare = || {
            let mut diff = Command::new("diff");
            ok(&diff.args(["-r", "--no-dereference"]).args([place.path("tree"), place.path("root")]).output().unwrap())
        };
        assert_eq!(compare(), "");
        assert_eq!(place.path("root").metadata().unwrap().permissions().mode() & 0o7777, 0o751);
        check_stopping(&place, state.pid);
        check_writing(&place.path("root"));

        // One server is killed while a program reads.
        drop_caches();
        let before = place.state().bytes_fetched;
        let sum = Command::new("sha256sum").arg(place.path("root/large")).stdout(Stdio::piped()).spawn().unwrap();
        wait("reading", || place.state().bytes_fetched > before);
        first.kill();
        let read = sum.wait_with_output().unwrap();
        assert!(read.status.success());
        let good = Command::new("sha256sum").arg(place.path("tree/large")).output().unwrap();
        assert_eq!(read.stdout[..64], good.stdout[..64]);
        wait("the fault", || {
            drop_caches();
            fs::read(place.path("root/large")).unwrap();
            place.state().members[0].state == Standing::BackingOff
        });
        let shown = ok(&place.tether().args(["status", "--state", "run/tether.json"]).output().unwrap());
        assert!(shown.contains("backing-off") && shown.contains("good"), "{shown}");

        // The end: the root goes, and with it everything below.
        ok(&root.unmount());
        wait("the end of the tether", || is_gone(state.pid));
        assert!(!place.path("run/tether.json").exists());
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
        none_but(&devices_before);
    }));
}

fn check_process(pid: u32) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    assert!(fs::read(proc.join("cmdline")).unwrap().starts_with(b"@moor-tether\0mount\0"));
    assert_eq!(fs::read_to_string(proc.join("comm")).unwrap(), "moor-tether\n");
    assert_eq!(fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
    for stream in 0..3 {
        assert_eq!(fs::read_link(proc.join(format!("fd/{stream}"))).unwrap(), Path::new("/dev/null"));
    }
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    // A container may hold CAP_SYS_RESOURCE (bit 24) back from its root; a node does not.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let may = capabilities(&own, "CapEff") & 1 << 24 != 0;
    let exempt = fs::read_to_string(proc.join("oom_score_adj")).unwrap();
    assert_eq!(exempt.trim(), if may { "-1000" } else { "0" });
    // No thread of it may do anything but lock memory (CAP_IPC_LOCK, bit 14).
    for thread in fs::read_dir(proc.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        for set in ["CapEff", "CapPrm", "CapInh"] {
            assert_eq!(capabilities(&status, set) & !(1 << 14), 0, "{status}");
        }
    }
    assert!(field("VmLck").parse::<u64>().unwrap() > 1000, "{status}");
    // Request buffers of FUSE and stacks are not resident.
    assert!(field("VmRSS").parse::<u64>().unwrap() < 64 << 10, "{status}");
    assert_eq!(nix::unistd::getsid(Some(pid_of(pid))).unwrap(), pid_of(pid));
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        kill(pid_of(pid), signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    assert!(!is_gone(pid));
}

fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(':')).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

/// systemd-shutdown stops everybody, and reads from the root meanwhile.
fn check_stopping(place: &Place, pid: u32) {
    for _ in 0..5 {
        drop_caches();
        kill(pid_of(pid), Signal::SIGSTOP).unwrap();
        assert!(fs::read(place.path("root/etc/deep/299")).unwrap() == noise(299 * 7, 309));
    }
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap())
}

fn check_writing(root: &Path) {
    fs::write(root.join("etc/new"), "new").unwrap();
    fs::write(root.join("etc/hostname"), "other\n").unwrap();
    fs::remove_file(root.join("etc/same")).unwrap();
    fs::rename(root.join("etc/deep"), root.join("etc/moved")).unwrap();
    assert_eq!(fs::read_to_string(root.join("etc/hostname")).unwrap(), "other\n");
    assert!(root.join("etc/moved/er/file").exists() && !root.join("etc/same").exists());
}

/// What was read is read from the servers again.
fn drop_caches() {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// A program that is killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mount_ends_when_it_is_unmounted_or_asked_to_and_not_while_it_is_used() {
    in_namespace("a_mount_ends_when_it_is_unmounted_or_asked_to_and_not_while_it_is_used", || {
        let place = Place::new();
        let server = place.nginx("server");
        ok(&place.mount_command(&[&server]).output().unwrap());
        let pid = place.state().pid;
        let user = fs::File::open(place.path("mnt/image")).unwrap();
        assert!(fs::write(place.path("mnt/image"), "x").is_err());
        assert!(fs::write(place.path("mnt/other"), "x").is_err());
        fails(&place.tether().args(["unmount", "mnt"]).output().unwrap(), "is in use");
        drop(user);
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
        wait("the end of the tether", || is_gone(pid));
        assert!(!place.path("run/tether.json").exists());

        // In the foreground a signal is enough.
        let mut running = Running(place.mount_command(&[&server]).arg("--foreground").spawn().unwrap());
        wait("the mount", || place.path("mnt/image").exists());
        kill(pid_of(running.0.id()), Signal::SIGTERM).unwrap();
        assert!(running.0.wait().unwrap().success());
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
    });
}

#[test]
fn a_root_that_cannot_be_made_leaves_nothing_behind() {
    passed(apart_with_disks("a_root_that_cannot_be_made_leaves_nothing_behind", || {
        let place = Place::new();
        let devices_before = devices();
        let server = place.nginx("server");
        ok(&place.mount_command(&[&server]).output().unwrap());
        let only_the_mount = [place.path("mnt").display().to_string()];
        for (arguments, words) in [
            (&["--overlay-percent", "0"][..], "1 to 400 per cent"),
            (&["--overlay-algorithm", "magic"], "this kernel compresses the overlay by one of"),
        ] {
            fails(&place.root(arguments), words);
            assert_eq!(mounts_under(place.dir.path()), only_the_mount);
            none_but(&devices_before);
        }
        // The last step fails: all before it is undone.
        fs::remove_dir(place.path("root")).unwrap();
        fails(&place.root(&[]), "cannot mount overlay on");
        assert_eq!(mounts_under(place.dir.path()), only_the_mount);
        none_but(&devices_before);
        let mut command = place.tether();
        fails(
            &command.args(["root", "--image", "key", "--work", "work", "root"]).output().unwrap(),
            "is no root image",
        );
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
    }));
}

#[test]
fn a_root_is_taken_down_also_when_a_part_of_it_is_gone_already() {
    passed(apart_with_disks("a_root_is_taken_down_also_when_a_part_of_it_is_gone_already", || {
        let place = Place::new();
        let devices_before = devices();
        let server = place.nginx("server");
        ok(&place.mount_command(&[&server]).output().unwrap());
        let pid = place.state().pid;
        let root = Root::new(&place);
        // Somebody was here before, or the first try met a program that still used the disk.
        umount2(&place.path("root"), MntFlags::empty()).unwrap();
        ok(&root.unmount());
        wait("the end of the tether", || is_gone(pid));
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
        none_but(&devices_before);
        let again = place.tether().args(["unmount", "--root", "--work", "work", "root"]).output().unwrap();
        fails(&again, "nothing is mounted there");
    }));
}
