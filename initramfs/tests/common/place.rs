//! A tree, its sealed image, servers of it, and the program: what tests of mounts and roots stand on.

use super::authority::Authority;
use super::namespace::{apart, has_memory_disk};
use super::nginx::Nginx;
use super::{noise, seal};
use moor_tether::state::State;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Not more than a disk that others write gigabytes to may take.
const LIMIT: Duration = Duration::from_mins(3);
/// The large file of the tree.
const LARGE: usize = 24 << 20;

pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) authority: Authority,
    pub(crate) digest: String,
}

impl Place {
    /// A tree, its squashfs, and that sealed.
    pub(crate) fn new() -> Self {
        Self::with(|_| ())
    }

    /// The same with more in the tree.
    pub(crate) fn with(more: impl FnOnce(&Path)) -> Self {
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
        more(&tree);
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn nginx(&self, name: &str) -> Nginx {
        Nginx::start(self.dir.path(), name, &self.authority)
    }

    pub(crate) fn tether(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-tether"));
        // Relative paths have to work as well.
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn mount_command(&self, servers: &[&Nginx]) -> Command {
        self.command("mount", servers)
    }

    /// `mount`, or another command that reads the image.
    pub(crate) fn command(&self, word: &str, servers: &[&Nginx]) -> Command {
        let mut command = self.tether();
        command.args([word, "--key-file", "key", "--ca", "ca.pem", "--state", "run/tether.json"]);
        command.args(["--digest", &self.digest]);
        for server in servers {
            command.args(["--url", &server.url()]);
        }
        command.arg("mnt");
        command
    }

    pub(crate) fn state(&self) -> State {
        State::read(&self.path("run/tether.json")).unwrap()
    }

    pub(crate) fn root(&self, arguments: &[&str]) -> Output {
        let mut command = self.tether();
        command.args(["root", "--image", "mnt/image", "--work", "work"]).args(arguments).arg("root");
        command.output().unwrap()
    }
}

pub(crate) fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn fails(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 3 | 4)), "{}: {said}", output.status);
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with("moor-tether: error: ") && said.contains(words), "'{words}' is not in: {said}");
}

pub(crate) fn mounts_under(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    places.filter(|place| Path::new(place).starts_with(dir)).map(str::to_owned).collect()
}

pub(crate) fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !ready() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn is_gone(pid: u32) -> bool {
    // A zombie of ours is gone as well; we are process 1 here, and nobody reaps for us.
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// A root, of whose memory disk the warden knows.
pub(crate) struct Root<'a>(&'a Place);

impl<'a> Root<'a> {
    pub(crate) fn new(place: &'a Place) -> Self {
        Self::with(place, &[])
    }

    /// The same with more arguments.
    pub(crate) fn with(place: &'a Place, arguments: &[&str]) -> Self {
        ok(&place.root(arguments));
        Self::known(place, "work/writable");
        Self(place)
    }

    /// A root without layers.
    pub(crate) fn unpacked(place: &'a Place) -> Self {
        ok(&place.root(&["--unpack"]));
        Self::known(place, "root");
        Self(place)
    }

    /// The memory disk that is mounted there is one to look after.
    fn known(place: &Place, name: &str) {
        has_memory_disk(Some(memory_disk(&place.path(name))));
    }

    pub(crate) fn unmount(&self) -> Output {
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
pub(crate) fn apart_with_disks(name: &str, body: impl FnOnce()) -> Option<Output> {
    let _alone = DISKS.lock().unwrap_or_else(PoisonError::into_inner);
    // Where it is a module: so that the first disk, which comes with it, is there before disks are counted.
    let _ = Command::new("modprobe").args(["-q", "zram"]).status();
    apart(name, body)
}

/// Memory disks, and loop devices that are in use, on the whole machine.
pub(crate) fn devices() -> BTreeSet<String> {
    let all = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap());
    let ours = all.filter(|device| {
        device.path().join("loop/backing_file").exists() || device.file_name().as_encoded_bytes().starts_with(b"zram")
    });
    ours.map(|device| device.file_name().into_string().unwrap()).collect()
}

/// The kernel frees a loop device a moment after its last user is gone.
pub(crate) fn none_but(before: &BTreeSet<String>) {
    wait("the end of all devices", || devices().is_subset(before));
}

/// What was read is read from the servers again.
pub(crate) fn drop_caches() {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// The number of the memory disk that is mounted there.
pub(crate) fn memory_disk(at: &Path) -> u32 {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = format!(" {} ", at.display());
    let line = mounts.lines().find(|line| line.contains(&at)).unwrap();
    let (_, number) = line.split_once(" /dev/zram").unwrap();
    number.split(' ').next().unwrap().parse().unwrap()
}
