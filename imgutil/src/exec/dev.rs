//! The image's own `/dev`: the few nodes that every program may use, a terminal multiplexer of its own, nothing of the host's.

use super::mounts::{Detached, During, MountError, tmpfs};
use rustix::fs::{FileType, Mode, OFlags, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::mount::MountAttrFlags;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// name, major, minor (Documentation/admin-guide/devices.txt of the kernel)
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A pseudo-terminal of the image's own `/dev/pts`.
pub(super) struct Terminal {
    /// The end that goes to the host.
    pub(super) master: OwnedFd,
    /// The end that becomes the command's controlling terminal.
    pub(super) slave: OwnedFd,
}

/// Where the nodes come from.
pub(super) enum Nodes {
    /// They are made, not bound from the host: a `chmod /dev/null` in a maintainer script must not reach the host's.
    Made,
    /// The root of a user namespace can make none. Read-only mounts of the host's: what is written goes to the device, but their
    /// mode and owner cannot be changed.
    Bound(Vec<Detached>),
}

impl Nodes {
    pub(super) fn to_be_made() -> Self {
        Self::Made
    }

    /// Takes hold of the host's, in the order of `NODES`; call it while the host's paths still mean something.
    pub(super) fn of_the_host() -> Result<Self, MountError> {
        let attributes =
            MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let copy = |(name, _, _): &(&str, u32, u32)| {
            let path = Path::new("/dev").join(name);
            let node = Detached::copy_of(rustix::fs::CWD, &path, false)?;
            node.restrict(attributes, false).during("make read-only", &path)?;
            Ok::<_, MountError>(node)
        };
        Ok(Self::Bound(NODES.iter().map(copy).collect::<Result<_, _>>()?))
    }

    /// Puts the nodes into the new filesystem `root`.
    fn place(&self, root: BorrowedFd<'_>) -> Result<(), MountError> {
        for (index, (name, major, minor)) in NODES.iter().enumerate() {
            let path = Path::new("/dev").join(name);
            match self {
                Self::Made => {
                    let mode = Mode::from_raw_mode(0o666);
                    mknodat(root, *name, FileType::CharacterDevice, mode, makedev(*major, *minor))
                        .during("make the device", path)?;
                }
                Self::Bound(mounts) => {
                    if let Some(mount) = mounts.get(index) {
                        mount.attach(empty_file(root, name, 0o666)?.as_fd()).during("mount the host's", path)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes a file to mount over.
fn empty_file(root: BorrowedFd<'_>, name: &str, mode: u32) -> Result<OwnedFd, MountError> {
    let path = Path::new("/dev").join(name);
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    drop(openat(root, name, flags, Mode::from_raw_mode(mode)).during("make", &path)?);
    openat(root, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during("open", &path)
}

/// Fills the directory behind `dev`; with `terminal`, allocates one, which is also `/dev/console`.
pub(super) fn mount(dev: BorrowedFd<'_>, nodes: &Nodes, terminal: bool) -> Result<Option<Terminal>, MountError> {
    let filesystem = tmpfs("755", "4m", MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    let root = filesystem.fd();
    filesystem.attach(dev).during("mount", "/dev")?;
    nodes.place(root)?;
    for (name, target) in LINKS {
        symlinkat(target, root, name).during("make the link", Path::new("/dev").join(name))?;
    }

    let plain = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    attach_at(root, "shm", &tmpfs("1777", "50%", plain)?)?;
    let pts = Detached::new(
        "devpts",
        // Group 5 is `tty` in every distribution; a new instance is what devpts mounts are since kernel 4.7.
        &[("mode", "620"), ("gid", "5"), ("ptmxmode", "666")],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    attach_at(root, "pts", &pts)?;
    if !terminal {
        return Ok(None);
    }

    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = openat(pts.fd(), "ptmx", flags, Mode::empty()).during("open", "/dev/pts/ptmx")?;
    unlockpt(&master).during("unlock", "/dev/pts/ptmx")?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .during("open the terminal of", "/dev/pts/ptmx")?;
    // The first terminal of a new instance.
    let console = Detached::copy_of(pts.fd(), Path::new("0"), false)?;
    console.attach(empty_file(root, "console", 0o600)?.as_fd()).during("mount", "/dev/console")?;
    Ok(Some(Terminal { master, slave }))
}

fn attach_at(root: BorrowedFd<'_>, name: &str, mount: &Detached) -> Result<(), MountError> {
    let path = Path::new("/dev").join(name);
    mkdirat(root, name, Mode::from_raw_mode(0o755)).during("make", &path)?;
    let place = openat(root, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during("open", &path)?;
    mount.attach(place.as_fd()).during("mount", &path)
}
