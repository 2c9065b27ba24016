//! From the image file to a root file system: loop device, squashfs, a compressed disk in memory, and an overlay of both.
//!
//! Or the tree of the image is unpacked into the disk ([`unpack`]), and nothing of the image is left. A step that fails undoes those before
//! it. [`device`] holds the loop and zram devices, [`memory`] decides whether there is room.

mod device;
mod ioctl;
mod memory;
mod unpack;

pub(crate) use device::mounted;
pub use memory::MemoryError;

use crate::meminfo::Memory;
use crate::{mount, ram};
use device::{LoopDevice, Zram};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the work mounts are unless told otherwise: on `/run`, which moves into the new root at `switch_root`.
pub const DEFAULT_WORK: &str = "/run/mooring/root";

/// A file system has an inode for each so many bytes, as mke2fs would give it.
const BYTES_PER_INODE: u64 = 16 << 10;

/// How to make the root.
#[derive(Debug, Clone)]
pub struct RootOptions {
    /// The image file.
    pub image: PathBuf,
    /// Size of the writable layer, in per cent of the machine's memory. It holds compressed data.
    pub overlay_percent: u16,
    /// Its compression; `None`: the kernel's default.
    pub overlay_algorithm: Option<String>,
    /// How much memory it may take at most, in per cent of the machine's; `None`: as much as it needs.
    pub overlay_limit_percent: Option<u16>,
    /// Whether the image is unpacked into the layer, and not needed any more then.
    pub unpack: bool,
    /// Where the work mounts go.
    pub work: PathBuf,
    /// Where the root goes.
    pub new_root: PathBuf,
}

/// The root cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A step failed.
    #[error("cannot {doing}: {source}{advice}")]
    Step {
        /// What.
        doing: String,
        /// Why not.
        source: io::Error,
        /// What to do, after "; ", or nothing.
        advice: &'static str,
    },
    /// There is too little memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A program failed.
    #[error("{program} failed ({status}): {said}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended.
        status: String,
        /// Its last line.
        said: String,
    },
    /// The image cannot be a root.
    #[error("'{}' is no root image: {why}", path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// The compression is unknown.
    #[error("this kernel compresses the overlay by one of: {known}; not by '{wanted}'")]
    Algorithm {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
}

/// A step's error, for `map_err`.
pub(crate) fn step(doing: impl Into<String>) -> impl FnOnce(io::Error) -> RootError {
    let doing = doing.into();
    move |source| RootError::Step { doing, source, advice: "" }
}

/// Loads a kernel module where it is one. What needs it says so when it is not there.
pub(crate) fn load_module(name: &str) {
    let _ = Command::new("modprobe").args(["-q", name]).stdin(Stdio::null()).stderr(Stdio::null()).status();
}

/// What has been made so far; undone in reverse order when it is dropped before the end.
#[derive(Default)]
struct Undo(Vec<Made>);

enum Made {
    Mount(PathBuf),
    Zram(Zram),
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(made) = self.0.pop() {
            let undone = match &made {
                Made::Mount(path) => umount2(path, MntFlags::MNT_DETACH).map_err(io::Error::from),
                Made::Zram(zram) => zram.remove(),
            };
            if let Err(error) = undone {
                tracing::warn!("cannot undo a step of making the root: {error}");
            }
        }
    }
}

impl Undo {
    fn mount(
        &mut self,
        (source, target, kind): (&Path, &Path, &str),
        flags: MsFlags,
        options: &str,
    ) -> Result<(), RootError> {
        nix::mount::mount(Some(source), target, Some(kind), flags, Some(options))
            .map_err(|error| step(format!("mount {kind} on '{}'", target.display()))(error.into()))?;
        self.0.push(Made::Mount(target.to_owned()));
        Ok(())
    }
}

/// What helps where a memory disk is full.
const UNPACKED: &str = "; its files do not compress as far as the limit of the memory disk needs: raise 'limit_percent' of the profile's overlay, or boot it tethered";

/// Refuses an image of `size` bytes that does not fit into memory beside a writable layer of `percent` of it. `held` bytes of memory are the
/// image's already.
///
/// # Errors
/// It does not fit: how much there is, and how much it takes.
pub fn check_memory_for_image(size: u64, held: u64, percent: u16) -> Result<(), RootError> {
    let memory = Memory::read().map_err(step("read /proc/meminfo"))?;
    // The image may have what it has.
    let memory = Memory { available: memory.available.saturating_add(held), ..memory };
    Ok(memory.image(size, percent)?)
}

/// Makes the root at `options.new_root`.
///
/// # Errors
/// The first step that fails; then nothing of it is left.
pub fn make(options: &RootOptions) -> Result<(), RootError> {
    for module in ["loop", "squashfs", "overlay", "zram", "ext4"] {
        load_module(module);
    }
    let memory = Memory::read().map_err(step("read /proc/meminfo"))?;
    check_image(&options.image)?;
    let mut undo = Undo::default();
    if options.unpack {
        unpacked(options, memory, &mut undo)?;
    } else {
        layered(options, memory, &mut undo)?;
    }
    undo.0.clear();
    hide_image(&options.image);
    Ok(())
}

fn make_dir(dir: &Path) -> Result<(), RootError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(step(format!("make '{}'", dir.display())))
}

/// The image's squashfs, mounted in the work directory. The mount holds its loop device: the last unmount frees that.
fn mount_image(options: &RootOptions, undo: &mut Undo) -> Result<PathBuf, RootError> {
    let lower = options.work.join("lower");
    make_dir(&lower)?;
    let device = LoopDevice::attach(&options.image)?;
    undo.mount((device.path(), &lower, "squashfs"), MsFlags::MS_RDONLY, "")?;
    Ok(lower)
}

/// A disk in memory of `size` bytes with a file system on it, mounted on `place`.
fn mount_disk(
    options: &RootOptions,
    (size, limit): (u64, Option<u64>),
    more: &[&str],
    place: &Path,
    undo: &mut Undo,
) -> Result<(), RootError> {
    let zram = Zram::add(size, options.overlay_algorithm.as_deref())?;
    let disk = zram.path();
    let limited = limit.map_or(Ok(()), |limit| zram.limit(limit));
    undo.0.push(Made::Zram(zram));
    limited.map_err(step("limit the memory disk"))?;
    make_filesystem(&disk, more)?;
    // Without discard, the space of deleted files would stay in memory.
    undo.mount((&disk, place, "ext4"), MsFlags::MS_NOATIME, "discard")
}

/// The image below, and a writable layer above.
fn layered(options: &RootOptions, memory: Memory, undo: &mut Undo) -> Result<(), RootError> {
    let limit = memory.limit(options.overlay_limit_percent)?;
    let disk = memory.overlay(options.overlay_percent, limit)?;
    let writable = options.work.join("writable");
    make_dir(&writable)?;
    let lower = mount_image(options, undo)?;
    mount_disk(options, (disk, limit), &[], &writable, undo)?;
    let (upper, scratch) = (writable.join("upper"), writable.join("work"));
    let like = std::fs::metadata(&lower).map_err(step("read the image's root directory"))?;
    for dir in [&upper, &scratch] {
        std::fs::create_dir(dir).map_err(step(format!("make '{}'", dir.display())))?;
    }
    // The root directory's own attributes are those of the upper layer.
    std::fs::set_permissions(&upper, std::fs::Permissions::from_mode(like.permissions().mode() & 0o7777))
        .and_then(|()| std::os::unix::fs::chown(&upper, Some(like.uid()), Some(like.gid())))
        .map_err(step("give the new root the owner and mode of the image's"))?;
    let layers = format!("lowerdir={},upperdir={},workdir={}", option(&lower)?, option(&upper)?, option(&scratch)?);
    // redirect_dir: directories of the image can be renamed, as on any other root.
    undo.mount(
        (Path::new("mooring"), &options.new_root, "overlay"),
        MsFlags::empty(),
        &format!("{layers},redirect_dir=on"),
    )
}

/// All that is in the image, in a file system of its own.
fn unpacked(options: &RootOptions, memory: Memory, undo: &mut Undo) -> Result<(), RootError> {
    let lower = mount_image(options, undo)?;
    let size = unpack::measure(&lower)?;
    let limit = memory.limit(options.overlay_limit_percent)?;
    let disk = memory.unpacked(size.bytes, options.overlay_percent, limit)?;
    let wanted = size.inodes.saturating_mul(2).max(disk / BYTES_PER_INODE).to_string();
    mount_disk(options, (disk, limit), &["-N", &wanted], &options.new_root, undo)?;
    // mke2fs makes it; the image has none, or its own.
    let lost = options.new_root.join("lost+found");
    std::fs::remove_dir(&lost).map_err(step(format!("remove '{}'", lost.display())))?;
    // Opened before: what failed to be written since then is told to who asks by this descriptor (syncfs(2)).
    let whole = std::fs::File::open(&options.new_root).map_err(step("open the new root"))?;
    let copied = unpack::copy(&lower, &options.new_root);
    // A memory disk that is full says so when the kernel writes to it: to the copy as a file system that is damaged, or after its last byte.
    rustix::fs::syncfs(&whole).map_err(|error| {
        let doing = "write the unpacked files to the memory disk".into();
        RootError::Step { doing, source: error.into(), advice: UNPACKED }
    })?;
    copied?;
    umount2(&lower, MntFlags::UMOUNT_NOFOLLOW)
        .map_err(|error| step(format!("unmount '{}'", lower.display()))(error.into()))?;
    undo.0.retain(|made| !matches!(made, Made::Mount(path) if *path == lower));
    Ok(())
}

/// Takes the image's mount out of the tree: the tether's, or that of an image in memory. A loop device holds the file, so it lives as long
/// as the root does; where it was unpacked, it ends. In the tree systemd-shutdown would unmount it by force, and that aborts a FUSE
/// connection, in use or not (systemd: shutdown/umount.c, `MNT_FORCE`; Linux: `fuse_umount_begin`).
fn hide_image(image: &Path) {
    let Some(dir) = image.parent().and_then(|dir| dir.canonicalize().ok()) else { return };
    let is_tether = |(kind, _): (String, PathBuf)| kind == mount::KIND;
    let is_image =
        ram::is_place(&dir).unwrap_or(false) || mounted(&dir).is_ok_and(|mount| mount.is_some_and(is_tether));
    if is_image && let Err(error) = umount2(&dir, MntFlags::MNT_DETACH) {
        tracing::warn!("cannot take '{}' out of the tree: {error}", dir.display());
    }
}

/// A path in the overlay's options, where commas and colons separate.
fn option(path: &Path) -> Result<&str, RootError> {
    path.to_str().filter(|text| !text.contains([',', ':', '\\'])).ok_or_else(|| {
        step(format!("use '{}' as a work directory", path.display()))(io::Error::other(
            "its name has a comma, a colon or a backslash",
        ))
    })
}

fn check_image(path: &Path) -> Result<(), RootError> {
    use std::io::Read as _;
    let image = |why| RootError::Image { path: path.to_owned(), why };
    let open = step(format!("open the image '{}'", path.display()));
    let mut file = std::fs::File::open(path).map_err(open)?;
    let length = file.metadata().map_err(step("read the image's length"))?.len();
    if length % 512 != 0 {
        return Err(image(
            "its length is not a multiple of 512, so a loop device would cut off its end; pack it again",
        ));
    }
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(step("read the image's first bytes"))?;
    if &magic != b"hsqs" {
        return Err(image("it holds no squashfs; pack a root tree with `imgutil pack`"));
    }
    Ok(())
}

/// ext4 without a journal: it never outlives the machine's memory.
fn make_filesystem(disk: &Path, more: &[&str]) -> Result<(), RootError> {
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0", "-L", "overlay"])
        .args(["-E", "lazy_itable_init=1,nodiscard"])
        .args(more)
        .arg(disk)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| RootError::Step {
            doing: "start mke2fs".into(),
            source,
            advice: "; the image needs the package e2fsprogs, and the initramfs a copy of it",
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned();
    Err(RootError::Program { program: "mke2fs", status: output.status.to_string(), said })
}

/// Takes down a root made by [`make`] that is not in use any more: overlay, work mounts and memory disk.
///
/// Goes on where an earlier try has ended: what is gone already is passed over.
///
/// # Errors
/// It is in use, or nothing of it is there.
pub fn take_down(new_root: &Path, work: &Path) -> Result<(), RootError> {
    let busy = |path: &Path| {
        let doing = format!("unmount '{}'", path.display());
        move |error: Errno| RootError::Step { doing, source: error.into(), advice: "; end what uses it first" }
    };
    let (lower, writable) = (work.join("lower"), work.join("writable"));
    // An unpacked root is on the disk itself.
    let whole = Zram::at(new_root);
    let is_whole = whole.is_some();
    let mut disk = whole.or_else(|| Zram::at(&writable));
    let mut found = false;
    for path in [new_root, writable.as_path(), lower.as_path()] {
        match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => found = true,
            // Nothing is mounted there, or there is no such place any more.
            Err(Errno::EINVAL | Errno::ENOENT) if path == writable && !is_whole => disk = None,
            Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(busy(path)(error)),
        }
    }
    if let Some(zram) = disk {
        zram.remove().map_err(step("remove the memory disk"))?;
    }
    if !found {
        return Err(step(format!("unmount '{}'", new_root.display()))(io::Error::other("nothing is mounted there")));
    }
    Ok(())
}
