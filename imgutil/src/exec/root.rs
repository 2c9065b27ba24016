//! The image as `/`: namespaces, `pivot_root`, and the filesystems the kernel provides.

use super::Options;
use super::dev::{self, Terminal};
use super::mounts::{Detached, During, MountError, file_type, open_below, tmpfs, top_directory};
use super::plant::{PLACE_MODE, Planted, Sources};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::mount::MountAttrFlags;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Why the image could not become `/`.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    /// A namespace was refused.
    #[error("cannot make new namespaces: {0}")]
    Namespaces(std::io::Error),
    /// A mount was refused.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The name of the image was refused as host name.
    #[error("cannot set the host name to '{0}': {1}")]
    HostName(String, std::io::Error),
}

/// New namespaces for everything but the process ids (the caller is in that one already) and the network, in which
/// package managers fetch. No mount made from here on is seen by the host, and none of the host's arrives.
fn unshare() -> Result<(), RootError> {
    let flags =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP;
    nix::sched::unshare(flags).map_err(|error| RootError::Namespaces(error.into()))?;
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .during("make private the mounts below", "/")?;
    Ok(())
}

/// Keeps the host's files and gives the caller its own process list: what a program that itself sets up mounts
/// (mmdebstrap) runs in, so that they end with it.
pub(super) fn enter_host() -> Result<(), RootError> {
    unshare()?;
    let proc = proc_filesystem()?;
    let place = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during("open", "/proc")?;
    proc.attach(place.as_fd()).during("mount", "/proc")?;
    Ok(())
}

/// Makes `tree` the root and fills in what a running system has. Gives the command's terminal, if one was asked for; what
/// was made in the tree is in `planted`, also after an error.
pub(super) fn enter_tree(
    tree: &Path,
    options: &Options,
    files: &Sources,
    planted: &mut Planted,
) -> Result<Option<Terminal>, RootError> {
    unshare()?;
    let nowhere = rustix::fs::CWD;
    // What comes from the host is taken hold of while the host's paths still mean something.
    let mut binds = Vec::new();
    for bind in &options.binds {
        binds.push((bind, take_bind(bind)?));
    }
    // nodev: a device file that lies in the image must not open the host's device.
    let root_mount = Detached::copy_of(nowhere, tree, true)?;
    root_mount.restrict(MountAttrFlags::MOUNT_ATTR_NODEV, true).during("forbid device files in", tree)?;
    let place = rustix::fs::open(tree, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during("open", tree)?;
    root_mount.attach(place.as_fd()).during("mount", tree)?;
    pivot(root_mount.fd(), tree)?;

    let root = root_mount.fd();
    let mut fixed = |name: &'static str| -> Result<OwnedFd, MountError> {
        let fd = top_directory(root, name, PLACE_MODE)?;
        planted.adopt(root, OsStr::new(name), &Path::new("/").join(name))?;
        Ok(fd)
    };
    let (proc, sys, run, dev) = (fixed("proc")?, fixed("sys")?, fixed("run")?, fixed("dev")?);

    mount_proc(proc.as_fd())?;
    let closed =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Detached::new("sysfs", &[], closed | MountAttrFlags::MOUNT_ATTR_RDONLY)?
        .attach(sys.as_fd())
        .during("mount", "/sys")?;
    let prepared = files.prepare(run.as_fd())?;
    let run_mount = tmpfs("755", "20%", MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    rustix::fs::mkdirat(run_mount.fd(), "lock", Mode::from_raw_mode(0o1777)).during("make", "/run/lock")?;
    run_mount.attach(run.as_fd()).during("mount", "/run")?;
    let terminal = dev::mount(dev.as_fd(), options.terminal.is_some())?;

    prepared.place(root, planted)?;
    for (bind, mount) in binds {
        let kind = file_type(mount.fd()).during("look at", &bind.source)?;
        let target = planted.make_place(root, &bind.target, kind)?;
        mount.attach(target.as_fd()).during("mount over", &bind.target)?;
    }
    if let Some(name) = &options.name {
        nix::unistd::sethostname(name).map_err(|error| RootError::HostName(name.clone(), error.into()))?;
    }
    Ok(terminal)
}

/// Takes a bind of the host's file or directory, read-only with everything below it unless it is writable.
fn take_bind(bind: &super::Bind) -> Result<Detached, MountError> {
    let mount = Detached::copy_of(rustix::fs::CWD, &bind.source, true)?;
    let kind = file_type(mount.fd()).during("look at", &bind.source)?;
    let mut attributes = MountAttrFlags::empty();
    // A device that is named itself is meant to be used.
    attributes
        .set(MountAttrFlags::MOUNT_ATTR_NODEV, !matches!(kind, FileType::CharacterDevice | FileType::BlockDevice));
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, !bind.writable);
    mount.restrict(attributes, true).during("set the attributes of the bind mount of", &bind.source)?;
    Ok(mount)
}

/// `pivot_root` onto the mount itself: the old root ends up over the new one and is detached at once (see its manual page).
fn pivot(root: BorrowedFd<'_>, tree: &Path) -> Result<(), MountError> {
    nix::unistd::fchdir(root).during("enter", tree)?;
    nix::unistd::pivot_root(".", ".").during("change the root to", tree)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).during("detach the host's root from", tree)?;
    nix::unistd::chdir("/").during("enter", tree)
}

fn proc_filesystem() -> Result<Detached, MountError> {
    let closed =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Detached::new("proc", &[], closed)
}

/// `/proc` with everything read-only that is not about a process: `sys`, `sysrq-trigger`, `irq` and their like belong to
/// the host's kernel, and root without any capability may write to them.
fn mount_proc(place: BorrowedFd<'_>) -> Result<(), MountError> {
    let proc = proc_filesystem()?;
    proc.attach(place).during("mount", "/proc")?;
    let listing =
        rustix::fs::openat(proc.fd(), ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .during("read", "/proc")?;
    for entry in Dir::new(listing).during("read", "/proc")? {
        let entry = entry.during("read", "/proc")?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let of_a_process = name.bytes().all(|byte| byte.is_ascii_digit());
        if name == "." || name == ".." || of_a_process || entry.file_type() == FileType::Symlink {
            continue;
        }
        let path = Path::new("/proc").join(name);
        let stat =
            rustix::fs::statat(proc.fd(), name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).during("look at", &path)?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !directory && stat.st_mode & 0o222 == 0 {
            continue;
        }
        let copy = Detached::copy_of(proc.fd(), Path::new(name), false)?;
        copy.restrict(MountAttrFlags::MOUNT_ATTR_RDONLY, false).during("make read-only", &path)?;
        let target = open_below(proc.fd(), Path::new(name), OFlags::NOFOLLOW).during("open", &path)?;
        copy.attach(target.as_fd()).during("mount", &path)?;
    }
    Ok(())
}
