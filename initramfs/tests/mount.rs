//! The whole way on this machine: sealed image, real web servers, FUSE, loop device, squashfs, zram, overlay. And its end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "mount/mishaps.rs"]
mod mishaps;

use common::namespace::{has_memory_disk, in_namespace, passed};
use common::noise;
use common::place::{
    Place, Root, apart_with_disks, devices, drop_caches, fails, is_gone, mounts_under, none_but, ok, wait,
};
use moor_tether::reader::Standing;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

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
    check_apart(&proc);
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        kill(pid_of(pid), signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    assert!(!is_gone(pid));
}

/// It sees nothing but /dev/fuse, and may make a few system calls only.
fn check_apart(proc: &Path) {
    let namespace = |proc: &Path| fs::read_link(proc.join("ns/mnt")).unwrap();
    assert_ne!(namespace(proc), namespace(Path::new("/proc/self")));
    let threads = || fs::read_dir(proc.join("task")).unwrap().map(|thread| thread.unwrap().path());
    for thread in threads() {
        assert_eq!(namespace(&thread), namespace(proc), "{}", thread.display());
    }
    let names = |dir: &str| {
        let entries = fs::read_dir(proc.join("root").join(dir)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!([names(""), names("dev")], [["dev"], ["fuse"]]);
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    assert!(mounts.lines().all(|line| line.split(' ').nth(4) == Some("/")), "{mounts}");
    // It puts the filter on once it has said that it serves.
    wait("the filter of system calls", || {
        threads().all(|thread| {
            let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
            status.lines().any(|line| line == "Seccomp:\t2")
        })
    });
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
fn what_earlier_boots_read_is_fetched_before_anybody_reads() {
    in_namespace("what_earlier_boots_read_is_fetched_before_anybody_reads", || {
        let place = Place::new();
        let server = place.nginx("server");
        // No two are neighbours: read-ahead has no part in this.
        let list: Vec<u64> = (0..20).map(|index| index * 17).collect();
        fs::write(place.path("list"), serde_json::to_vec(&list).unwrap()).unwrap();
        ok(&place.mount_command(&[&server]).args(["--prefetch", "list"]).output().unwrap());
        wait("the prefetch", || place.state().prefetched == 20);
        assert!(place.state().chunks_fetched >= 20, "{:?}", place.state());
        let status = |form: &[&str]| {
            let arguments = [&["status", "--state", "run/tether.json"], form].concat();
            ok(&place.tether().args(arguments).output().unwrap())
        };
        assert!(status(&[]).contains("\nprefetch  20 chunks\n"), "{}", status(&[]));
        assert!(status(&["--prometheus"]).contains("\nmoor_tether_prefetched_chunks_total 20\n"));

        // They are the image's bytes like any other.
        assert!(fs::read(place.path("mnt/image")).unwrap() == fs::read(place.path("squashfs")).unwrap());
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
    });
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The test says how much memory there is, where the kernel would.
#[test]
fn a_machine_short_of_memory_gets_the_cache_back_until_it_is_not_short_any_more() {
    in_namespace("a_machine_short_of_memory_gets_the_cache_back_until_it_is_not_short_any_more", || {
        let place = Place::new();
        let server = place.nginx("server");
        let has = |mib: u64| {
            let text = format!("MemTotal: {} kB\nMemAvailable: {} kB\n", 2048 << 10, mib << 10);
            fs::write(place.path("meminfo"), text).unwrap();
        };
        has(1000);
        let here = None::<&str>;
        mount(Some(&place.path("meminfo")), "/proc/meminfo", here, MsFlags::MS_BIND, here).unwrap();
        ok(&place.mount_command(&[&server]).output().unwrap());
        let squashfs = fs::read(place.path("squashfs")).unwrap();
        let reads = || assert!(fs::read(place.path("mnt/image")).unwrap() == squashfs);
        reads();
        wait("a full cache", || place.state().cache_bytes > 7 << 20);
        let pid = place.state().pid;
        let before = resident(pid);

        has(63);
        wait("a small cache", || place.state().cache_limit == 1 << 20);
        let short = place.state();
        assert!(short.cache_bytes <= 1 << 20, "{short:?}");
        // It is the kernel's again, although all of the process is locked.
        let during = resident(pid);
        println!("{before} KiB, {during} KiB while memory is short");
        assert!(during + (6 << 10) <= before, "{before} KiB, {during} KiB while memory is short");
        // Reads go on, and what is small does not make them fetch twice.
        reads();
        let chunks = squashfs.len() as u64 / (64 << 10) + 1;
        let fetched = place.state().chunks_fetched - short.chunks_fetched;
        assert!(fetched <= chunks + chunks / 20, "{fetched} of {chunks} chunks");
        assert!(place.state().cache_bytes <= 1 << 20, "{:?}", place.state());

        has(1000);
        wait("a large bound", || place.state().cache_limit == 8 << 20);
        reads();
        wait("a full cache", || place.state().cache_bytes > 7 << 20);
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
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
