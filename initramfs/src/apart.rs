//! A mount namespace of its own for the process that serves the root, with nothing in it but /dev/fuse.
//!
//! What it needs is open before: its state's directory, the kernel's log, a cache's disk. In the namespace of its clients it would see the
//! root that it serves, and a path looked up there could wait for the process that looks it up; and whoever unmounts on its side would
//! meet its working directory. In a copy of that namespace it would hold its own mount, and nobody outside could end it. In an empty one
//! neither is so. What has to be done by path later (to mount, to look at the mount) is done by a thread that stays outside until then.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// Where paths mean what they meant when the process was started.
pub struct Outside {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Outside {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Outside {
    /// This process stays where it is.
    #[must_use]
    pub fn here() -> Self {
        Self { jobs: None, thread: None }
    }

    /// Leaves a thread behind, and takes the calling one, and all that it starts later, into an empty namespace. It must be the only one.
    ///
    /// # Errors
    /// The kernel refuses; then paths may mean nothing any more.
    pub fn leave() -> io::Result<Self> {
        let (jobs, list) = sync_channel(0);
        let (says, ready) = sync_channel(1);
        let thread = std::thread::Builder::new().name("outside".into());
        let thread = thread.stack_size(256 << 10).spawn(move || stay(&says, &list))?;
        let outside = Self { jobs: Some(jobs), thread: Some(thread) };
        ready.recv().map_err(io::Error::other)??;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?;
        empty()?;
        Ok(outside)
    }

    /// Does something outside, and waits for it.
    ///
    /// # Errors
    /// The thread outside is gone.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let Some(jobs) = &self.jobs else { return Ok(job()) };
        let (sender, result) = sync_channel(1);
        let job = move || {
            // Whoever asked waits for it.
            let _ = sender.send(job());
        };
        jobs.send(Box::new(job)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }
}

fn gone() -> io::Error {
    io::Error::other("the thread outside of the mount namespace is gone")
}

/// Works off what is asked of it, until nobody asks any more.
fn stay(says: &SyncSender<io::Result<()>>, list: &Receiver<Job>) {
    // Threads share where they are until one of them goes.
    let apart = unshare(CloneFlags::CLONE_FS).map_err(io::Error::from);
    if says.send(apart).is_err() {
        return;
    }
    while let Ok(job) = list.recv() {
        job();
    }
}

/// Takes every mount out of this namespace, and covers the root with an empty file system.
fn empty() -> io::Result<()> {
    let mut mounts = mount_points(&std::fs::read_to_string("/proc/thread-self/mountinfo")?);
    mounts.reverse();
    // A directory that every root has.
    let place = Path::new("/proc");
    for point in mounts.iter().filter(|point| point.as_path() != Path::new("/")) {
        // Gone with another one is as good.
        let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some("moor-tether"), place, Some("tmpfs"), flags, Some("mode=0500,nr_inodes=8,size=16k"))?;
    let dev = place.join("dev");
    std::fs::create_dir(&dev)?;
    // Of a mount, each thread that takes requests opens it anew.
    mknod(&dev.join("fuse"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(10, 229))?;
    mount(None::<&str>, place, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags, None::<&str>)?;
    // As switch_root does: the initramfs's own root cannot be unmounted or pivoted.
    std::env::set_current_dir(place)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

/// The places in a mountinfo (proc(5)), in its order.
fn mount_points(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped).collect()
}

/// Spaces and the like are written as octal numbers there.
fn unescaped(text: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, others @ ..] = rest {
        let number = others.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = number.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(byte);
            rest = &others[3..];
        } else {
            bytes.push(*first);
            rest = others;
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_the_kernel_writes_them() {
        let text = "36 35 98:0 / /mnt\\0402 rw - ext4 /dev/x rw\n37 36 98:0 / / rw - ext4 /dev/y rw\n";
        assert_eq!(mount_points(text), [PathBuf::from("/mnt 2"), PathBuf::from("/")]);
        assert_eq!(unescaped("/a\\134b\\"), PathBuf::from("/a\\b\\"));
    }

    #[test]
    fn here_a_job_runs_where_it_is_asked_for() {
        let thread = std::thread::current().id();
        assert_eq!(Outside::here().run(move || std::thread::current().id()).unwrap(), thread);
    }
}
