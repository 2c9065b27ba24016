//! Mounts as values: made detached, given their attributes, and only then attached, so that a read-only mount is never
//! writable for a moment. Targets are found below a directory descriptor; no path of the image is followed on the host.

use super::sys;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A mount call that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    /// The kernel refused.
    #[error("cannot {doing} '{path}': {source}")]
    Call {
        /// What was being done, as a verb phrase.
        doing: &'static str,
        /// To which path or filesystem.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A fixed place of the tree is not a directory.
    #[error("'/{path}' in the image is {found}, not a directory: the image must have a real directory there")]
    NotADirectory {
        /// Which place, relative to the root.
        path: String,
        /// What stands there instead.
        found: &'static str,
    },
}

/// Names an operation and its object in the error of a kernel call.
pub(super) trait During<T> {
    fn during(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, MountError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, MountError> {
        self.map_err(|error| MountError::Call {
            doing,
            path: path.as_ref().display().to_string(),
            source: error.into(),
        })
    }
}

/// A mount that is not (yet) part of any tree. Dropping it unattached frees it.
pub(super) struct Detached(OwnedFd);

impl Detached {
    /// A new instance of the filesystem `kind`.
    pub(super) fn new(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<Self, MountError> {
        Self::with_flags(kind, options, &[], attributes)
    }

    /// The same, with options that have no value.
    pub(super) fn with_flags(
        kind: &str,
        options: &[(&str, &str)],
        flags: &[&str],
        attributes: MountAttrFlags,
    ) -> Result<Self, MountError> {
        let make = || -> rustix::io::Result<OwnedFd> {
            let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, value) in options {
                fsconfig_set_string(context.as_fd(), *key, *value)?;
            }
            for flag in flags {
                fsconfig_set_flag(context.as_fd(), *flag)?;
            }
            fsconfig_create(context.as_fd())?;
            fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        make().map(Self).during("make a filesystem of type", kind)
    }

    /// A copy of what is mounted at `path` below `at`, with all mounts below it if `recursive`.
    pub(super) fn copy_of(at: BorrowedFd<'_>, path: &Path, recursive: bool) -> Result<Self, MountError> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        flags.set(OpenTreeFlags::AT_EMPTY_PATH, path.as_os_str().is_empty());
        open_tree(at, path, flags).map(Self).during("take a bind mount of", path)
    }

    /// Sets attributes on this mount and, if `recursive`, on all that came with it.
    pub(super) fn restrict(&self, attributes: MountAttrFlags, recursive: bool) -> io::Result<()> {
        sys::mount_setattr(self.0.as_fd(), attributes.bits(), recursive)
    }

    /// Puts it over the file or directory behind `target`.
    pub(super) fn attach(&self, target: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(self.0.as_fd(), "", target, "", flags)?)
    }

    /// The root of the mount.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens `path` below `root` as a place (`O_PATH`). Symbolic links stay inside `root`.
pub(super) fn open_below(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(crate::in_root::openat2(root, path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Opens the top-level directory `name` of the tree, which must not be a symbolic link; makes it, with `mode`, if it is missing.
pub(super) fn top_directory(root: BorrowedFd<'_>, name: &str, mode: u32) -> Result<OwnedFd, MountError> {
    let open = || {
        rustix::fs::openat(root, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(io::Error::from)
    };
    let fd = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match rustix::fs::mkdirat(root, name, Mode::from_raw_mode(mode)) {
                // Exists: another command in the same tree was quicker.
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error).during("make the mount point", name),
            }
            open().during("open", name)?
        }
        other => other.during("open", name)?,
    };
    match file_type(fd.as_fd()).during("look at", name)? {
        FileType::Directory => Ok(fd),
        FileType::Symlink => Err(MountError::NotADirectory { path: name.to_owned(), found: "a symbolic link" }),
        _ => Err(MountError::NotADirectory { path: name.to_owned(), found: "a file" }),
    }
}

/// What kind of file is behind `fd`.
pub(super) fn file_type(fd: BorrowedFd<'_>) -> io::Result<FileType> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

/// Makes the tmpfs that several places need.
pub(super) fn tmpfs(mode: &str, size: &str, attributes: MountAttrFlags) -> Result<Detached, MountError> {
    Detached::new("tmpfs", &[("mode", mode), ("size", size), ("source", "imgutil")], attributes)
}
