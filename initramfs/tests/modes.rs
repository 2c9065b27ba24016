//! Roots that do not need their servers: the whole image in memory, an image that was unpacked, and chunks that stay on a disk.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "modes/disk.rs"]
mod disk;

use common::namespace::{in_namespace, passed};
use common::nginx::Nginx;
use common::place::{
    Place, Root, apart_with_disks, devices, drop_caches, fails, is_gone, memory_disk, mounts_under, none_but, ok, wait,
};
use common::{noise, seal};
use moor_tether::ram::{Claim, Ram, RamError};
use moor_tether::state::{Mode, State};
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Barrier;
use std::time::{Duration, SystemTime};

/// A program that is killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn same_tree(place: &Place) {
    let diff = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([place.path("tree"), place.path("root")])
        .output()
        .unwrap();
    assert!(diff.status.success(), "{diff:?}");
}

#[test]
fn a_whole_image_in_memory_outlives_its_servers() {
    passed(apart_with_disks("a_whole_image_in_memory_outlives_its_servers", || {
        let place = Place::new();
        let devices_before = devices();
        let server = |name| Nginx::limited(place.dir.path(), name, &place.authority, 400);
        let (mut first, mut second) = (server("first"), server("second"));
        let mut fetch = place.command("fetch", &[&first, &second]);
        let mut fetch = Running(fetch.arg("--foreground").stderr(Stdio::null()).spawn().unwrap());
        let state = || State::read(&place.path("run/tether.json"));
        let fetched = || state().map_or(0, |state| state.bytes_fetched);
        wait("the first quarter", || fetched() > 6 << 20);
        assert!(state().unwrap().members.iter().all(|member| member.bytes > 1 << 20), "{:?}", state().unwrap());

        // Both are killed in the middle. What is there stays, and the rest comes when one is back.
        first.kill();
        second.kill();
        std::thread::sleep(Duration::from_secs(2));
        let before = fetched();
        assert!(fetch.0.try_wait().unwrap().is_none(), "it gave up");
        second.restart();
        wait("the end of the fetch", || fetch.0.try_wait().unwrap().is_some());
        assert!(fetch.0.wait().unwrap().success());
        let state = state().unwrap();
        assert!(before < state.image_size, "all was there before");
        assert_eq!((state.mode, state.is_whole), (Mode::Untethered, true));
        // A few answers were cut off; nothing began anew.
        assert!(state.bytes_fetched < state.image_size * 5 / 4, "{state:?}");
        second.kill();
        assert!(fs::read(place.path("mnt/image")).unwrap() == fs::read(place.path("squashfs")).unwrap());
        assert!(!place.path("run/tether.sock").exists());
        let shown = ok(&place.tether().args(["status", "--state", "run/tether.json"]).output().unwrap());
        assert!(shown.contains("untethered, all of it in memory"), "{shown}");

        // No process serves it, and it is in no mount that somebody could take away.
        let root = Root::new(&place);
        assert_eq!(mounts_under(&place.path("mnt")), Vec::<String>::new());
        drop_caches();
        same_tree(&place);
        fs::write(place.path("root/etc/new"), "new").unwrap();
        ok(&root.unmount());
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
        none_but(&devices_before);
    }));
}

#[test]
fn a_fetch_that_was_killed_goes_on_with_what_had_arrived_and_believes_none_of_it() {
    in_namespace("a_fetch_that_was_killed_goes_on_with_what_had_arrived_and_believes_none_of_it", || {
        let mut place = Place::new();
        let slow = Nginx::limited(place.dir.path(), "slow", &place.authority, 400);
        let quick = place.nginx("quick");
        let (image, wanted) = (place.path("mnt/image"), fs::read(place.path("squashfs")).unwrap());
        let state = || State::read(&place.path("run/tether.json"));
        let begin = |server| {
            let mut fetch = place.command("fetch", &[server]);
            Running(fetch.arg("--foreground").stderr(Stdio::null()).spawn().unwrap())
        };
        let first = begin(&slow);
        let has = |bytes: usize| fs::read(&image).is_ok_and(|image| image.get(..bytes) == wanted.get(..bytes));
        wait("some of the image", || {
            state().is_ok_and(|state| state.arrived.is_some_and(|arrived| arrived.bytes > 8 << 20)) && has(1 << 20)
        });
        // It has the place for itself.
        let output = place.command("fetch", &[&quick]).output().unwrap();
        fails(&output, "another process brings an image to '");
        // SIGKILL, as when its time is over.
        drop(first);
        let killed = state().unwrap();
        let arrived = killed.arrived.unwrap();
        assert!(!killed.is_whole && arrived.bytes < arrived.of && arrived.of == wanted.len() as u64, "{killed:?}");
        let shown = place.tether().args(["status", "--state", "run/tether.json"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.contains(&format!("memory    {} of {} bytes, about ", arrived.bytes, arrived.of)), "{shown}");

        // One chunk is not what it was, and one has a byte where nothing had arrived.
        let file = fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[wanted[300_000] ^ 4], 300_000).unwrap();
        file.write_all_at(&[wanted[wanted.len() - 5] ^ 4], wanted.len() as u64 - 5).unwrap();
        ok(&place.command("fetch", &[&quick]).output().unwrap());
        assert!(fs::read(&image).unwrap() == wanted);
        let resumed = state().unwrap();
        assert!(resumed.is_whole && resumed.arrived.unwrap().seconds_left == Some(0), "{resumed:?}");
        // What is read ahead of a part that was missing may be there already.
        let most = resumed.image_size - arrived.bytes + (4 << 20);
        assert!(resumed.bytes_fetched < most, "{} of at most {most}: {resumed:?}", resumed.bytes_fetched);
        // What is whole is verified, and needs the hashes alone.
        ok(&place.command("fetch", &[&quick]).output().unwrap());
        assert!(state().unwrap().bytes_fetched < 200 << 10, "{:?}", state().unwrap());

        // Nothing of another image is taken for this one, whether it is as long or not.
        for length in [wanted.len(), 3 << 20] {
            let sample = seal(noise(length, 8), 16);
            fs::write(place.path("web/image.moor"), &*sample.file).unwrap();
            fs::write(place.path("key"), sample.key.to_hex().as_bytes()).unwrap();
            place.digest = hex::encode(sample.sealed.digest);
            ok(&place.command("fetch", &[&quick]).output().unwrap());
            assert!(fs::read(place.path("mnt/image")).unwrap() == sample.plaintext);
            assert_eq!(mounts_under(&place.path("mnt")).len(), 1);
        }
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
    });
}

/// It can be locked only once it is there: two that found none at one time mounted over each other.
#[test]
fn of_those_that_come_at_one_time_one_has_the_place() {
    const AT_ONCE: usize = 4;
    in_namespace("of_those_that_come_at_one_time_one_has_the_place", || {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        fs::create_dir(&place).unwrap();
        for round in 0..200 {
            let begin = Barrier::new(AT_ONCE);
            let take = || -> Result<Ram, RamError> {
                begin.wait();
                let claim = Claim::new(&place)?;
                if let Some(left) = claim.left(1 << 20)? { Ok(left) } else { claim.make(1 << 20) }
            };
            let taken: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(take)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(mounts_under(&place).len(), 1, "round {round}");
            let refused: Vec<_> = taken.iter().filter_map(|taken| taken.as_ref().err()).collect();
            assert_eq!(refused.len(), AT_ONCE - 1, "round {round}: {refused:?}");
            assert!(refused.iter().all(|error| matches!(error, RamError::Busy(_))), "round {round}: {refused:?}");
            drop(taken);
            assert_eq!(mounts_under(&place), Vec::<String>::new(), "round {round}");
        }
    });
}

#[test]
fn an_image_that_does_not_fit_is_refused_with_the_figures() {
    in_namespace("an_image_that_does_not_fit_is_refused_with_the_figures", || {
        let place = Place::new();
        let server = place.nginx("server");
        let mut fetch = place.command("fetch", &[&server]);
        // A full layer of four times the memory takes all of it.
        let output = fetch.args(["--overlay-percent", "400"]).output().unwrap();
        cannot(&output, "too little memory for an untethered root: the image takes ");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("choose 'root: tethered', or give the machine more memory"), "{said}");
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());

        ok(&place.mount_command(&[&server]).output().unwrap());
        let output = place.root(&["--unpack", "--overlay-percent", "400"]);
        cannot(&output, "too little memory for a root that is unpacked in it: its 2");
        let output = place.root(&["--overlay-percent", "400"]);
        cannot(&output, "too little memory for a writable layer of ");
        cannot(&place.root(&["--overlay-limit-percent", "101"]), "1 to 100 per cent of the memory, not 101");
        assert_eq!(mounts_under(place.dir.path()), [place.path("mnt").display().to_string()]);
        ok(&place.tether().args(["unmount", "mnt"]).output().unwrap());
    });
}

/// Status 3: no other try can help.
fn cannot(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(words), "'{words}' is not in: {said}");
}

/// What an image may hold that a copy can lose.
fn oddities(tree: &Path) {
    let odd = tree.join("odd");
    fs::create_dir(&odd).unwrap();
    mknod(&odd.join("pipe"), SFlag::S_IFIFO, Bits::from_bits_truncate(0o640), 0).unwrap();
    mknod(&odd.join("null"), SFlag::S_IFCHR, Bits::from_bits_truncate(0o666), makedev(1, 3)).unwrap();
    fs::write(odd.join("setuid"), "program").unwrap();
    std::os::unix::fs::chown(odd.join("setuid"), Some(1000), Some(50)).unwrap();
    fs::set_permissions(odd.join("setuid"), fs::Permissions::from_mode(0o4711)).unwrap();
    let hole = fs::File::create(odd.join("hole")).unwrap();
    hole.set_len(9 << 20).unwrap();
    hole.write_all_at(b"end", (9 << 20) - 3).unwrap();
    fs::write(odd.join("empty"), "").unwrap();
    for arguments in [["-n", "user.note", "-v", "a value"], ["-n", "trusted.x", "-v", "0x00ff"]] {
        assert!(Command::new("setfattr").args(arguments).arg(odd.join("setuid")).status().unwrap().success());
    }
    assert!(Command::new("setcap").arg("cap_net_raw+ep").arg(odd.join("empty")).status().unwrap().success());
    std::os::unix::fs::lchown(tree.join("etc/link"), Some(7), Some(8)).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for name in ["setuid", "."] {
        fs::File::open(odd.join(name)).unwrap().set_modified(long_ago).unwrap();
    }
}

/// Names, types, modes, owners, sizes, times, link counts, targets, devices, and attributes.
fn described(dir: &Path) -> String {
    let mut find = Command::new("sh");
    find.current_dir(dir).args([
        "-c",
        "find . -printf '%p %y %#m %U:%G %T@ %n %l' \\( -type d -printf '\\n' -o -printf ' %s\\n' \\) | sort; \
        getfattr -R -d -m - -e hex . | sort; stat -c '%t:%T' odd/null",
    ]);
    let output = find.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_unpacked_root_is_the_tree_and_needs_nothing_of_the_image() {
    passed(apart_with_disks("an_unpacked_root_is_the_tree_and_needs_nothing_of_the_image", || {
        let place = Place::with(oddities);
        let devices_before = devices();
        let server = place.nginx("server");
        ok(&place.mount_command(&[&server]).output().unwrap());
        let pid = place.state().pid;
        let root = Root::unpacked(&place);
        wait("the end of the tether", || is_gone(pid));
        drop(server);
        assert_eq!(mounts_under(place.dir.path()), [place.path("root").display().to_string()]);
        let loops = devices().into_iter().filter(|name| name.starts_with("loop")).collect();
        assert!(devices_before.is_superset(&loops), "{loops:?}");

        // squashfs counts whole seconds.
        let whole_seconds = |text: String| {
            let is_time =
                |word: &str| word.split_once('.').is_some_and(|(s, n)| n.len() == 10 && s.parse::<u64>().is_ok());
            let cut =
                |word: &str| if is_time(word) { word.split('.').next().unwrap().to_owned() } else { word.to_owned() };
            let line = |line: &str| line.split(' ').map(cut).collect::<Vec<_>>().join(" ");
            text.lines().map(line).collect::<Vec<_>>()
        };
        let (tree, copy) = (described(&place.path("tree")), described(&place.path("root")));
        for (wanted, got) in whole_seconds(tree.clone()).into_iter().zip(whole_seconds(copy.clone())) {
            assert_eq!(got, wanted);
        }
        assert_eq!(tree.lines().count(), copy.lines().count());
        assert!(
            tree.contains("security.capability") && tree.contains("trusted.x") && tree.contains("user.note"),
            "{tree}"
        );
        same_tree_but_devices(&place);
        let hole = place.path("root/odd/hole").metadata().unwrap();
        assert!(hole.blocks() * 512 < 64 << 10, "the hole is filled: {} blocks", hole.blocks());

        gives_memory_back(&place.path("root"), memory_disk(&place.path("root")));
        ok(&root.unmount());
        none_but(&devices_before);
    }));
}

/// The kernel takes what is written, and finds out later that there is no place for it: then the pages would be read as zeros.
#[test]
fn an_unpacked_root_that_outgrows_its_limit_is_refused() {
    passed(apart_with_disks("an_unpacked_root_that_outgrows_its_limit_is_refused", || {
        let place = Place::new();
        let devices_before = devices();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let total: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
        // A quarter more than the limit of one per cent, where files are thought to take half.
        let length = total * 1024 / 100 * 5 / 4;
        let make = format!(
            "mkdir noise && head -c {length} /dev/urandom >noise/file && mksquashfs noise noise.squashfs -quiet -no-progress -noD -noF"
        );
        ok(&Command::new("sh").current_dir(place.dir.path()).args(["-ec", &make]).output().unwrap());
        let mut root = place.tether();
        root.args(["root", "--image", "noise.squashfs", "--work", "work", "--unpack", "--overlay-percent", "1"]);
        let output = root.args(["--overlay-limit-percent", "1", "root"]).output().unwrap();
        fails(&output, "cannot write the unpacked files to the memory disk: ");
        fails(&output, "raise 'limit_percent'");
        assert_eq!(mounts_under(place.dir.path()), Vec::<String>::new());
        none_but(&devices_before);
    }));
}

fn same_tree_but_devices(place: &Place) {
    // What was written is read back.
    drop_caches();
    let sums = |dir: &str| {
        let mut sums = Command::new("sh");
        sums.current_dir(place.path(dir)).args(["-c", "find . -type f -print0 | sort -z | xargs -0 sha256sum"]);
        ok(&sums.output().unwrap())
    };
    assert_eq!(sums("tree"), sums("root"));
}

/// Bytes of memory that a disk takes: the third figure of `mm_stat`.
fn memory_of(disk: u32) -> u64 {
    let figures = fs::read_to_string(format!("/sys/block/zram{disk}/mm_stat")).unwrap();
    figures.split_whitespace().nth(2).unwrap().parse().unwrap()
}

/// Files that are deleted take no memory any more.
fn gives_memory_back(root: &Path, disk: u32) {
    nix::unistd::sync();
    let before = memory_of(disk);
    fs::write(root.join("large-and-gone"), noise(48 << 20, 77)).unwrap();
    nix::unistd::sync();
    let full = memory_of(disk);
    assert!(full > before + (40 << 20), "{before} {full}");
    fs::remove_file(root.join("large-and-gone")).unwrap();
    wait("the memory of a deleted file", || {
        nix::unistd::sync();
        memory_of(disk) < before + (8 << 20)
    });
}

#[test]
fn a_layer_gives_memory_back_and_keeps_its_limit() {
    passed(apart_with_disks("a_layer_gives_memory_back_and_keeps_its_limit", || {
        let place = Place::new();
        let server = place.nginx("server");
        ok(&place.mount_command(&[&server]).output().unwrap());
        let root = Root::with(&place, &["--overlay-limit-percent", "50", "--overlay-algorithm", "lz4"]);
        let disk = memory_disk(&place.path("work/writable"));
        gives_memory_back(&place.path("root"), disk);
        let algorithms = fs::read_to_string(format!("/sys/block/zram{disk}/comp_algorithm")).unwrap();
        assert!(algorithms.contains("[lz4]"), "{algorithms}");
        // The fourth figure is the limit, half of the memory.
        let figures = fs::read_to_string(format!("/sys/block/zram{disk}/mm_stat")).unwrap();
        let limit: u64 = figures.split_whitespace().nth(3).unwrap().parse().unwrap();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let total: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(limit.abs_diff(total * 512) < 4 << 20, "{limit} of {total} KiB");
        ok(&root.unmount());
    }));
}
