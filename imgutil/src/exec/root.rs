//! The image as `/`: namespaces, `pivot_root`, and the filesystems the kernel provides.

use super::command::{SHELL_FILE, shell_file};
use super::dev::{self, Nodes, Terminal};
use super::devices::{Guard, Rule};
use super::foreign::Emulator;
use super::init::{Holdings, Plan};
use super::mounts::{Detached, During, MountError, file_type, open_below, tmpfs, top_directory};
use super::plant::PLACE_MODE;
use super::trial::Trial;
use super::{Network, sys};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::mount::MountAttrFlags;
use std::ffi::OsStr;
use std::io::Write as _;
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
    /// The kernel cannot keep a device from being written to.
    #[error(
        "'{0}' cannot be shown read-only, because this kernel can restrict no device ({1}): give it with ':rw', or not at all"
    )]
    Device(std::path::PathBuf, String),
    /// The loopback interface did not come up.
    #[error("cannot bring up the loopback interface of the image: {0}")]
    Loopback(std::io::Error),
    /// The name of the image was refused as host name.
    #[error("cannot set the host name to '{0}': {1}")]
    HostName(String, std::io::Error),
}

/// New namespaces for everything but the process ids (the caller is in that one already), and for the network if the command
/// is to have none. No mount made from here on is seen by the host, and none of the host's arrives.
fn unshare(network: Network) -> Result<(), RootError> {
    let mut flags =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP;
    flags.set(CloneFlags::CLONE_NEWNET, network == Network::None);
    nix::sched::unshare(flags).map_err(|error| RootError::Namespaces(error.into()))?;
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .during("make private the mounts below", "/")?;
    Ok(())
}

/// Keeps the host's files and gives the caller its own process list: what a program that itself sets up mounts
/// (mmdebstrap) runs in, so that they end with it.
pub(super) fn enter_host(plan: &Plan<'_>, holdings: &mut Holdings) -> Result<(), RootError> {
    unshare(Network::Host)?;
    holdings.formats = plan.emulator.map(Emulator::register).transpose()?;
    let proc = proc_filesystem()?;
    let place = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during("open", "/proc")?;
    proc.attach(place.as_fd()).during("mount", "/proc")?;
    Ok(())
}

/// Makes `tree` the root and fills in what a running system has. Gives the command's terminal, if one was asked for; what has
/// to be taken away at the end is in `holdings`, also after an error.
pub(super) fn enter_tree(tree: &Path, plan: &Plan<'_>, holdings: &mut Holdings) -> Result<Option<Terminal>, RootError> {
    let options = plan.options;
    unshare(options.network)?;
    if options.network == Network::None {
        sys::bring_up_loopback().map_err(RootError::Loopback)?;
    }
    // What comes from the host is taken hold of while the host's paths still mean something, and the kernel's own filesystems
    // are made while it can see the host's: for a user namespace it makes none that would show more.
    let mut binds = Vec::new();
    let mut devices = Vec::new();
    for bind in options.binds.iter().chain(plan.shown.iter().flat_map(|shown| &shown.binds)) {
        let (mount, rule) = take_bind(bind)?;
        binds.push((bind, mount));
        devices.extend(rule.map(|rule| (bind, rule)));
    }
    restrict_devices(&devices, plan, holdings)?;
    holdings.formats = plan.emulator.map(Emulator::register).transpose()?;
    let nodes = if plan.in_user_namespace { Nodes::of_the_host()? } else { Nodes::to_be_made() };
    let proc_mount = proc_filesystem()?;
    let sys_mount = sys_filesystem(plan)?;
    // nodev: a device file that lies in the image must not open the host's device.
    let root_mount = match &options.trial {
        None => Detached::copy_of(rustix::fs::CWD, tree, true)?,
        Some(trial) => overlay(tree, trial, plan.in_user_namespace)?,
    };
    root_mount.restrict(MountAttrFlags::MOUNT_ATTR_NODEV, true).during("forbid device files in", tree)?;
    let place = rustix::fs::open(tree, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during("open", tree)?;
    root_mount.attach(place.as_fd()).during("mount", tree)?;
    pivot(root_mount.fd(), tree)?;

    let root = root_mount.fd();
    let planted = &mut holdings.planted;
    let mut fixed = |name: &'static str| -> Result<OwnedFd, MountError> {
        let fd = top_directory(root, name, PLACE_MODE)?;
        planted.adopt(root, OsStr::new(name), &Path::new("/").join(name))?;
        Ok(fd)
    };
    let (proc, sys, run, dev) = (fixed("proc")?, fixed("sys")?, fixed("run")?, fixed("dev")?);

    mount_proc(&proc_mount, proc.as_fd())?;
    sys_mount.attach(sys.as_fd()).during("mount", "/sys")?;
    if plan.in_user_namespace {
        cover_control_groups(sys_mount.fd())?;
    }
    let prepared = plan.sources.prepare(run.as_fd())?;
    let shell_file = shell_file(options).map(|text| (SHELL_FILE.to_owned(), text.into_bytes()));
    mount_run(run.as_fd(), shell_file.iter().chain(plan.shown.iter().flat_map(|shown| &shown.in_run)))?;
    let terminal = dev::mount(dev.as_fd(), &nodes, options.terminal.is_some())?;

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

/// The tree with a layer over it that takes all changes.
fn overlay(tree: &Path, trial: &Trial, in_user_namespace: bool) -> Result<Detached, MountError> {
    let open = |path: &Path| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).during("open", path)
    };
    let (tree, upper, work) = (open(tree)?, open(&trial.upper())?, open(&trial.work())?);
    // Paths that have no character with a meaning to overlayfs.
    let path = |fd: &OwnedFd| format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
    let (lower_path, upper_path, work_path) = (path(&tree), path(&upper), path(&work));
    // Every renamed directory and every changed file is in the layer as a whole, and names of one file stay together (index):
    // that is what `trial` reads.
    let mut options = vec![
        ("lowerdir", lower_path.as_str()),
        ("upperdir", upper_path.as_str()),
        ("workdir", work_path.as_str()),
        ("redirect_dir", "nofollow"),
        ("metacopy", "off"),
        ("index", "on"),
    ];
    let mut flags = Vec::new();
    if in_user_namespace {
        options.truncate(3);
        flags.push("userxattr");
    }
    Detached::with_flags("overlay", &options, &flags, MountAttrFlags::empty())
}

/// Lets the command open the image's own devices, and those that were bound by name, and no others.
fn restrict_devices(bound: &[(&super::Bind, Rule)], plan: &Plan<'_>, holdings: &mut Holdings) -> Result<(), RootError> {
    if plan.in_user_namespace {
        // Control groups of the host are not for the root of a user namespace; what keeps devices away there are the mounts,
        // which it cannot change, and the rights of the user.
        holdings.guard = Guard::MountsOnly("an ordinary user's image has no control group of its own".to_owned());
    } else {
        let rules: Vec<Rule> = bound.iter().map(|(_, rule)| *rule).collect();
        holdings.guard = Guard::make(&rules);
    }
    let Guard::MountsOnly(reason) = &holdings.guard else { return Ok(()) };
    // A read-only mount does not make a device read-only.
    if let Some((bind, _)) = bound.iter().find(|(bind, _)| !bind.writable) {
        return Err(RootError::Device(bind.source.clone(), reason.clone()));
    }
    if !plan.in_user_namespace {
        holdings.planted.warnings.push(format!(
            "this kernel gives no control group for devices, so the flag 'nodev' of the image's mounts alone keeps them away ({reason})"
        ));
    }
    Ok(())
}

/// Takes a bind of the host's file or directory, read-only with everything below it unless it is writable; for a device, with
/// the rule that lets it be opened.
fn take_bind(bind: &super::Bind) -> Result<(Detached, Option<Rule>), MountError> {
    let mount = Detached::copy_of(rustix::fs::CWD, &bind.source, true)?;
    let stat = rustix::fs::statat(mount.fd(), "", rustix::fs::AtFlags::EMPTY_PATH).during("look at", &bind.source)?;
    let rule = Rule::for_bind(&stat, bind.writable);
    let mut attributes = MountAttrFlags::empty();
    // A device that is named itself is meant to be used.
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, rule.is_none());
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, !bind.writable);
    mount.restrict(attributes, true).during("set the attributes of the bind mount of", &bind.source)?;
    Ok((mount, rule))
}

/// `pivot_root` onto the mount itself: the old root ends up over the new one and is detached at once (see its manual page).
fn pivot(root: BorrowedFd<'_>, tree: &Path) -> Result<(), MountError> {
    nix::unistd::fchdir(root).during("enter", tree)?;
    nix::unistd::pivot_root(".", ".").during("change the root to", tree)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).during("detach the host's root from", tree)?;
    nix::unistd::chdir("/").during("enter", tree)
}

/// What `/proc` and `/sys` are mounted with.
const CLOSED: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

fn proc_filesystem() -> Result<Detached, MountError> {
    Detached::new("proc", &[], CLOSED)
}

/// `/sys`, read-only. It shows the devices of a network namespace, so only its owner may make one: with the host's network, a
/// user namespace gets a copy of the host's.
fn sys_filesystem(plan: &Plan<'_>) -> Result<Detached, MountError> {
    let attributes = CLOSED | MountAttrFlags::MOUNT_ATTR_RDONLY;
    if !plan.in_user_namespace || plan.options.network == Network::None {
        return Detached::new("sysfs", &[], attributes);
    }
    let copy = Detached::copy_of(rustix::fs::CWD, Path::new("/sys"), true)?;
    copy.restrict(attributes, true).during("make read-only", "/sys")?;
    Ok(copy)
}

/// Covers the host's control groups, which come with a copy of its `/sys`.
fn cover_control_groups(sys: BorrowedFd<'_>) -> Result<(), MountError> {
    let shown = "/sys/fs/cgroup";
    match open_below(sys, Path::new("fs/cgroup"), OFlags::DIRECTORY) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        place => {
            let empty = tmpfs("555", "4k", CLOSED | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
            empty.attach(place.during("open", shown)?.as_fd()).during("cover", shown)
        }
    }
}

/// `/run`, empty but for `lock` and files that programs of the image are to find.
fn mount_run<'a>(place: BorrowedFd<'_>, files: impl Iterator<Item = &'a (String, Vec<u8>)>) -> Result<(), MountError> {
    let mount = tmpfs("755", "20%", MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    let directory = |name: &Path, mode| match rustix::fs::mkdirat(mount.fd(), name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).during("make", Path::new("/run").join(name)),
    };
    directory(Path::new("lock"), 0o1777)?;
    for (name, content) in files {
        let shown = Path::new("/run").join(name);
        let above: Vec<&Path> =
            Path::new(name).ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
        for path in above.into_iter().rev() {
            directory(path, 0o755)?;
        }
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(mount.fd(), name, flags, Mode::from_raw_mode(0o644)).during("make", &shown)?;
        std::fs::File::from(file).write_all(content).during("write", &shown)?;
    }
    mount.attach(place).during("mount", "/run")
}

/// `/proc` with everything read-only that is not about a process: `sys`, `sysrq-trigger`, `irq` and their like belong to
/// the host's kernel, and root without any capability may write to them.
fn mount_proc(proc: &Detached, place: BorrowedFd<'_>) -> Result<(), MountError> {
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
