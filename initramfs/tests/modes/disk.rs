//! Chunks that stay on a disk.

use super::common::namespace::in_namespace;
use super::common::nginx::Nginx;
use super::common::place::{Place, drop_caches, fails, is_gone, ok, wait};
use super::common::{noise, seal};
use moor_tether::disk::DiskStatus;
use moor_tether::state::State;
use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

/// A place with a cache in a file, and a mount that uses it.
struct Cached {
    place: Place,
    server: Nginx,
}

impl Cached {
    fn new() -> Self {
        let place = Place::new();
        let server = place.nginx("server");
        Self { place, server }
    }

    fn mount(&self, more: &[&str]) {
        let mut command = self.place.mount_command(&[&self.server]);
        ok(&command.args(["--disk-cache", "cache"]).args(more).output().unwrap());
    }

    fn unmount(&self) {
        let pid = self.place.state().pid;
        ok(&self.place.tether().args(["unmount", "mnt"]).output().unwrap());
        wait("the end of the tether", || is_gone(pid));
    }

    /// The whole file, as it should be.
    fn read(&self) {
        drop_caches();
        assert!(fs::read(self.place.path("mnt/image")).unwrap() == fs::read(self.place.path("squashfs")).unwrap());
    }

    /// Mounts it and reads everything, until the disk was in time for all of it: it is the machine's, and others write to it.
    fn mount_in_time(&self) {
        wait("a disk in time", || {
            self.mount(&[]);
            self.read();
            let slots = self.disk().slots;
            wait("the state", || self.disk().hits >= slots || self.disk().late > 0);
            let is_in_time = self.disk().late == 0;
            if !is_in_time {
                self.unmount();
            }
            is_in_time
        });
    }

    fn disk(&self) -> DiskStatus {
        self.place.state().disk.unwrap()
    }

    /// Reads until everything that fits is on the disk.
    fn fill(&self) {
        wait("a full cache", || {
            self.read();
            self.disk().held == self.disk().slots
        });
    }

    /// Where the slots begin, as the head of `disk/form.rs` says.
    fn data(&self) -> u64 {
        4096 + (self.disk().slots * 8).next_multiple_of(4096)
    }
}

#[test]
fn chunks_on_a_disk_are_not_fetched_again_and_not_believed() {
    in_namespace("disk::chunks_on_a_disk_are_not_fetched_again_and_not_believed", || {
        let cached = Cached::new();
        let cache = cached.place.path("cache");
        cached.mount(&["--disk-cache-size", "100"]);
        cached.fill();
        let (data, slots) = (cached.data(), cached.disk().slots);
        cached.unmount();

        // The second start needs the header and the hashes.
        cached.mount_in_time();
        let state = cached.place.state();
        assert!(state.bytes_fetched < 200 << 10, "{state:?}");
        let shown = ok(&cached.place.tether().args(["status", "--state", "run/tether.json"]).output().unwrap());
        assert!(shown.contains(&format!("{slots} of {slots} chunks")), "{shown}");
        let metrics = cached.place.tether().args(["status", "--prometheus", "--state", "run/tether.json"]).output();
        assert!(ok(&metrics.unwrap()).contains(&format!("\nmoor_tether_disk_cache_chunks {slots}\n")));
        cached.unmount();

        // On the disk nothing is plain.
        let bytes = fs::read(&cache).unwrap();
        let squashfs = fs::read(cached.place.path("squashfs")).unwrap();
        for part in [&squashfs[..64], &squashfs[1 << 20..(1 << 20) + 64]] {
            assert!(!bytes.windows(64).any(|window| window == part), "a part of the image lies open");
        }

        // One chunk has a bit turned, one was written by half when the power went, one was never written, one is that of another place.
        let file = fs::File::options().write(true).open(&cache).unwrap();
        let slot = |chunk: u64| data + chunk * ((64 << 10) + 16);
        file.write_all_at(&[bytes[usize::try_from(slot(3) + 5000).unwrap()] ^ 4], slot(3) + 5000).unwrap();
        file.write_all_at(&vec![0; 32 << 10], slot(5) + (32 << 10)).unwrap();
        file.write_all_at(&vec![0; (64 << 10) + 16], slot(9)).unwrap();
        let other = usize::try_from(slot(11)).unwrap();
        file.write_all_at(&bytes[other..other + (64 << 10) + 16], slot(10)).unwrap();
        drop(file);
        cached.mount(&[]);
        wait("the bad chunks", || {
            // Once more where the disk was late.
            cached.read();
            cached.disk().bad == 4
        });
        cached.fill();
        cached.unmount();
        cached.mount_in_time();
        assert_eq!(cached.disk().bad, 0, "{:?}", cached.disk());
        cached.unmount();

        // The power went while it was set up: before what was there is gone, and after.
        let begun = [b"MOORCHE1".as_slice(), &[0; 4088]].concat();
        fs::File::options().write(true).open(&cache).unwrap().write_all_at(&begun, 0).unwrap();
        cached.mount(&[]);
        cached.fill();
        cached.unmount();
        fs::File::options().write(true).open(&cache).unwrap().set_len(5000).unwrap();
        cached.mount(&[]);
        cached.fill();
        cached.unmount();
    });
}

#[test]
fn a_cache_keeps_to_its_bound_and_to_one_image_and_off_what_is_not_its_own() {
    in_namespace("disk::a_cache_keeps_to_its_bound_and_to_one_image_and_off_what_is_not_its_own", || {
        let mut cached = Cached::new();
        let cache = cached.place.path("cache");
        cached.mount(&["--disk-cache-size", "8"]);
        cached.fill();
        let length = fs::metadata(&cache).unwrap().len();
        assert!(length <= 8 << 20 && length > 7 << 20, "{length}");
        assert_eq!(fs::metadata(&cache).unwrap().permissions().mode() & 0o777, 0o600);
        // Two at one time would write over each other's chunks.
        let second = cached.place.path("second");
        fs::create_dir(&second).unwrap();
        let mut another = cached.place.command("mount", &[&cached.server]);
        another.args(["--disk-cache", "cache", "--state", "run/other.json"]);
        let arguments: Vec<_> = another.get_args().map(ToOwned::to_owned).collect();
        let swap = |argument: std::ffi::OsString| if argument == "mnt" { "second".into() } else { argument };
        let once = arguments.iter().position(|argument| argument == "--state").unwrap();
        let kept =
            arguments.into_iter().enumerate().filter(|(at, _)| *at != once && *at != once + 1).map(|(_, it)| swap(it));
        ok(&cached.place.tether().args(kept).output().unwrap());
        let other = State::read(&cached.place.path("run/other.json")).unwrap();
        assert!(other.disk.unwrap().error.unwrap().contains("cannot have for itself"), "a second user");
        ok(&cached.place.tether().args(["unmount", "second"]).output().unwrap());
        cached.unmount();

        // Another image: nothing of the old one is left.
        let before = fs::read(&cache).unwrap();
        let sample = seal(noise(3 << 20, 8), 16);
        fs::write(cached.place.path("web/image.moor"), &*sample.file).unwrap();
        fs::write(cached.place.path("squashfs"), &sample.plaintext).unwrap();
        fs::write(cached.place.path("key"), sample.key.to_hex().as_bytes()).unwrap();
        cached.place.digest = hex::encode(sample.sealed.digest);
        cached.mount(&["--disk-cache-size", "8"]);
        cached.fill();
        assert_eq!(cached.disk().bad, 0);
        let after = fs::read(&cache).unwrap();
        let old = &before[1 << 20..(1 << 20) + 256];
        assert!(!after.windows(256).any(|window| window == old), "the old image is still there");
        cached.unmount();

        // What is somebody else's, too small, or not there is done without, and left as it is.
        let theirs = noise(1 << 20, 5);
        fs::write(&cache, &theirs).unwrap();
        cached.mount(&[]);
        cached.read();
        assert!(cached.disk().error.unwrap().contains("is no cache of Mooring's, and is left alone"));
        cached.unmount();
        assert!(fs::read(&cache).unwrap() == theirs);
        fs::write(&cache, "").unwrap();
        cached.mount(&["--disk-cache-size", "1"]);
        assert!(cached.disk().error.unwrap().contains("16 are the least"));
        cached.unmount();
        fs::remove_file(&cache).unwrap();
        cached.mount(&[]);
        cached.read();
        assert!(cached.disk().error.unwrap().contains("cannot open 'cache'"));
        assert!(!cache.exists());
        cached.unmount();
        fails(
            &cached.place.tether().args(["status", "--state", "run/tether.json"]).output().unwrap(),
            "no image is mounted",
        );
    });
}
