//! From the image file to a root file system: loop device, squashfs, a compressed disk in memory, and an overlay of both.
//!
//! A step that fails undoes those before it. [`device`] holds the loop and zram devices, [`memory`] decides whether there is room.

mod device;
mod ioctl;
mod memory;

pub use memory::MemoryError;

use crate::mount;
use device::{LoopDevice, Zram};
use memory::Memory;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the work mounts are unless told otherwise: on `/run`, which moves into the new root at `switch_root`.
pub const DEFAULT_WORK: &str = "/run/mooring/root";

/// How to make the root.
#[derive(Debug, Clone)]
pub struct RootOptions {
    /// The image file.
    pub image: PathBuf,
    /// Size of the writable layer, in per cent of the machine's memory. It holds compressed data.
    pub overlay_percent: u16,
    /// Its compression; `None`: the kernel's default.
    pub overlay_algorithm: Option<String>,
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

/// Makes the root at `options.new_root`.
///
/// # Errors
/// The first step that fails; then nothing of it is left.
pub fn make(options: &RootOptions) -> Result<(), RootError> {
    for module in ["loop", "squashfs", "overlay", "zram", "ext4"] {
        load_module(module);
    }
    let memory = Memory::read().map_err(step("read /proc/meminfo"))?;
    let disk = memory.overlay(options.overlay_percent)?;
    check_image(&options.image)?;
    let (lower, writable) = (options.work.join("lower"), options.work.join("writable"));
    for dir in [&options.work, &lower, &writable] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(step(format!("make '{}'", dir.display())))?;
    }
    let mut undo = Undo::default();

    let device = LoopDevice::attach(&options.image)?;
    undo.mount((device.path(), &lower, "squashfs"), MsFlags::MS_RDONLY, "")?;
    // The mount holds the device now; the last unmount frees it.
    drop(device);

    let zram = Zram::add(disk, options.overlay_algorithm.as_deref())?;
    let disk_path = zram.path();
    undo.0.push(Made::Zram(zram));
    make_filesystem(&disk_path)?;
    // Without discard, the space of deleted files would stay in memory.
    undo.mount((&disk_path, &writable, "ext4"), MsFlags::MS_NOATIME, "discard")?;

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
    )?;
    undo.0.clear();
    hide_tether(&options.image);
    Ok(())
}

/// Takes the tether's mount out of the tree. The loop device holds its file, so it lives as long as the root does. In the tree
/// systemd-shutdown would unmount it by force, and that aborts a FUSE connection, in use or not (systemd: shutdown/umount.c,
/// `MNT_FORCE`; Linux: `fuse_umount_begin`).
fn hide_tether(image: &Path) {
    let Some(dir) = image.parent().and_then(|dir| dir.canonicalize().ok()) else { return };
    let is_tether = device::mounted(&dir).is_ok_and(|mount| mount.is_some_and(|(kind, _)| kind == mount::KIND));
    if is_tether && let Err(error) = umount2(&dir, MntFlags::MNT_DETACH) {
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
fn make_filesystem(disk: &Path) -> Result<(), RootError> {
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0", "-L", "overlay"])
        .args(["-E", "lazy_itable_init=1,nodiscard"])
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
    let mut disk = Zram::at(&writable);
    let mut found = false;
    for path in [new_root, writable.as_path(), lower.as_path()] {
        match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => found = true,
            // Nothing is mounted there, or there is no such place any more.
            Err(Errno::EINVAL | Errno::ENOENT) if path == writable => disk = None,
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
