//! The two block devices of a root: a loop device over the image, and a compressed disk in memory.

use super::{RootError, ioctl, load_module, step};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a device node may take to appear.
const NODE: Duration = Duration::from_secs(5);
/// Tries to get a loop device before somebody else does.
const TRIES: usize = 16;
/// Blocks of a loop device: pages. Of such a device, and of no other, squashfs keeps the pages that a block shares with its neighbours, and so
/// all of its metadata (from Linux 6.5 on, `squashfs_bio_read_cached`); else it asks for them again and again.
const BLOCK: u32 = 4096;

/// A loop device over a file, freed when it is dropped, or when what was mounted of it is unmounted.
pub(super) struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Attaches a file read-only, with direct I/O: else its data would be in the page cache twice.
    pub(super) fn attach(image: &Path) -> Result<Self, RootError> {
        let open = || format!("open the image '{}'", image.display());
        let file = File::open(image).map_err(step(open()))?;
        let block = block_size(file.metadata().map_err(step(open()))?.len());
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(|source| {
            RootError::Step { doing: "open /dev/loop-control".into(), source, advice: "; load the module 'loop'" }
        })?;
        for _ in 0..TRIES {
            let number = ioctl::free_loop_device(&control).map_err(step("find a free loop device"))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            wait_for(&path).map_err(step(format!("open '{}'", path.display())))?;
            let device = File::open(&path).map_err(step(format!("open '{}'", path.display())))?;
            match ioctl::configure(&device, &file, block) {
                Ok(()) => {
                    if std::fs::read_to_string(format!("/sys/block/loop{number}/loop/dio"))
                        .is_ok_and(|dio| dio.trim() != "1")
                    {
                        tracing::warn!("{} works without direct I/O: data are in memory twice", path.display());
                    }
                    return Ok(Self { path, _open: device });
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {}
                Err(error) => return Err(step(format!("attach the image to '{}'", path.display()))(error)),
            }
        }
        Err(step("get a free loop device")(io::Error::other("others took every one first")))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// What the image can be read by: the end of one that was not padded (mksquashfs and imgutil do that) is beyond the last whole block. 0: as the
/// kernel chooses.
fn block_size(length: u64) -> u32 {
    if length.is_multiple_of(u64::from(BLOCK)) { BLOCK } else { 0 }
}

/// A compressed disk in memory.
pub(super) struct Zram(u32);

impl Zram {
    /// Adds one of `size` bytes.
    pub(super) fn add(size: u64, algorithm: Option<&str>) -> Result<Self, RootError> {
        let control = Path::new("/sys/class/zram-control/hot_add");
        if !control.exists() {
            load_module("zram");
        }
        let number = std::fs::read_to_string(control).map_err(|source| RootError::Step {
            doing: "add a memory disk".into(),
            source,
            advice: "; load the module 'zram'",
        })?;
        let number = number.trim().parse().map_err(|_| {
            step("add a memory disk")(io::Error::other(format!("the kernel answered '{}'", number.trim())))
        })?;
        let zram = Self(number);
        match zram.set_up(size, algorithm) {
            Ok(()) => Ok(zram),
            Err(error) => {
                // The first error is the one to tell.
                let _ = zram.remove();
                Err(error)
            }
        }
    }

    fn set_up(&self, size: u64, algorithm: Option<&str>) -> Result<(), RootError> {
        let sys = PathBuf::from(format!("/sys/block/zram{}", self.0));
        if let Some(wanted) = algorithm {
            let choice = sys.join("comp_algorithm");
            if std::fs::write(&choice, wanted).is_err() {
                let known = std::fs::read_to_string(&choice).unwrap_or_default().replace(['[', ']'], "");
                return Err(RootError::Algorithm { wanted: wanted.to_owned(), known: known.trim().to_owned() });
            }
        }
        std::fs::write(sys.join("disksize"), size.to_string()).map_err(step("size the memory disk"))?;
        wait_for(&self.path()).map_err(step(format!("find '{}'", self.path().display())))
    }

    /// It takes no more than so many bytes of memory.
    pub(super) fn limit(&self, bytes: u64) -> io::Result<()> {
        std::fs::write(format!("/sys/block/zram{}/mem_limit", self.0), bytes.to_string())
    }

    /// The disk whose file system `dir` is on. By the device's number, not by a name: `dir` may be relative, or a link.
    pub(super) fn at(dir: &Path) -> Option<Self> {
        let device = std::fs::metadata(dir).ok()?.dev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let name = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        name.file_name()?.to_str()?.strip_prefix("zram")?.parse().ok().map(Self)
    }

    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.0))
    }

    /// Takes it out, with all that is in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        // Somebody (udev) may look at it for a moment.
        let end = Instant::now() + NODE;
        loop {
            let removed = std::fs::write(format!("/sys/block/zram{}/reset", self.0), "1")
                .and_then(|()| std::fs::write("/sys/class/zram-control/hot_remove", self.0.to_string()));
            match removed {
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other,
            }
        }
    }
}

fn wait_for(node: &Path) -> io::Result<()> {
    let end = Instant::now() + NODE;
    while !node.exists() {
        if Instant::now() > end {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the device node does not appear"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Type and source of what is mounted on `path`; of several mounts the uppermost.
pub(crate) fn mounted(path: &Path) -> io::Result<Option<(String, PathBuf)>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().rev().find_map(|line| parse_mount(line, path)))
}

/// `36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/zram1 rw` (proc(5)).
fn parse_mount(line: &str, path: &Path) -> Option<(String, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let (kind, source) = (after.next()?, after.next()?);
    (Path::new(before.split(' ').nth(4)?) == path).then(|| (kind.to_owned(), PathBuf::from(source)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_was_not_padded_is_read_to_its_end() {
        assert_eq!([0, 4095, 4096, 4097, 8192].map(block_size), [4096, 0, 4096, 0, 4096]);
    }

    #[test]
    fn mounts_are_found_by_their_place() {
        let line = "36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/zram1 rw";
        assert_eq!(parse_mount(line, Path::new("/mnt")), Some(("ext4".into(), "/dev/zram1".into())));
        assert_eq!(parse_mount(line, Path::new("/")), None);
        assert_eq!(parse_mount("", Path::new("/")), None);
        assert!(Zram::at(Path::new("/proc")).is_none());
    }
}
