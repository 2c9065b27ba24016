//! Looks at a tree once and remembers what is in it: names, inodes, xattrs, link groups. No file is opened for reading.
//!
//! The tree is not trusted: every step goes through the handle of a directory with `O_NOFOLLOW`, never through a path.

use super::attributes::{self, Attributes, Batch};
use crate::inodes::{self, Inode, InodeIndex, Kind, MAX_DEPTH, XattrSet, XattrSets};
use crate::scrub::{Candidate, Verdict, View, ViewPlace};
use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Statx, StatxFlags};
use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender};

/// So many inodes of a directory have their attributes read in a row.
const BATCH: usize = 512;
/// So many batches wait: each holds a directory open.
const AHEAD: usize = 32;

/// How a path is named in warnings and errors: from the root of the image.
pub(super) type ImagePath = PathBuf;

/// Everything that will become an image.
pub(super) struct Tree {
    /// All inodes; the root is the first.
    pub(super) inodes: Vec<Inode>,
    /// Device and number of each in the source: notices files that were replaced since.
    pub(super) identities: Vec<(u64, u64)>,
    /// Different sets of xattrs; inodes refer to them.
    pub(super) xattrs: Vec<XattrSet>,
    /// What the image will lack, and where.
    pub(super) warnings: Warnings,
}

impl Tree {
    /// Bytes in an inode's file; 0 for what is none.
    pub(super) fn size(&self, index: InodeIndex) -> u64 {
        if let Kind::File(size) = self.inodes[index.0 as usize].kind { size } else { 0 }
    }

    /// Gives its inodes the attributes that a squashfs can hold; the others become warnings.
    fn take_attributes(&mut self, all: Vec<Attributes>) -> Result<()> {
        let mut sets = XattrSets::default();
        for Attributes { index, path, set, others } in all {
            self.inodes[index.0 as usize].xattrs = sets.add(set)?;
            let (acls, others): (Vec<_>, Vec<_>) =
                others.into_iter().partition(|name| name.to_bytes().starts_with(b"system.posix_acl_"));
            self.warnings.xattrs.extend(others.iter().map(|name| (path.clone(), name.to_string_lossy().into_owned())));
            if !acls.is_empty() {
                self.warnings.acls.push(path);
            }
        }
        self.xattrs = sets.into_sets();
        Ok(())
    }
}

/// What was left out or changed, for the person who packs.
#[derive(Debug, Default)]
pub struct Warnings {
    /// Paths whose POSIX ACLs were left out.
    pub acls: Vec<PathBuf>,
    /// Other xattrs that a squashfs has no room for: path and name.
    pub xattrs: Vec<(PathBuf, String)>,
    /// Files and directories whose contents belong to another mount: kept, but empty.
    pub mounts: Vec<PathBuf>,
    /// Paths whose time is before 1970 or after 2106 and was moved to the nearest time that fits.
    pub times: Vec<PathBuf>,
}

/// Opens the root of a tree.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .with_context(|| format!("cannot open the tree '{}'", path.display()))
}

/// Opens a subdirectory without following a link.
pub(super) fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// `path` and `name` joined, for messages.
pub(super) fn join(path: &Path, name: &CStr) -> ImagePath {
    path.join(OsStr::from_bytes(name.to_bytes()))
}

/// Scans the tree below `root`, as `view` shows it.
pub(super) fn scan(root: BorrowedFd<'_>, view: &mut View) -> Result<Tree> {
    let stat = stat(root, c"")?;
    let (batches, incoming) = mpsc::sync_channel(AHEAD);
    let mut scanner = Scanner {
        tree: Tree { inodes: Vec::new(), identities: Vec::new(), xattrs: Vec::new(), warnings: Warnings::default() },
        mount: stat.stx_mnt_id,
        device: (stat.stx_dev_major, stat.stx_dev_minor),
        links: HashMap::new(),
        batches,
        view,
    };
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new()
            .name("attributes".into())
            .spawn_scoped(scope, || attributes::read(incoming))
            .context("cannot start the thread that reads attributes")?;
        let place = scanner.view.root();
        let scanned = scanner.directory(root, &stat, Path::new("/"), 0, &place);
        let Scanner { mut tree, batches, .. } = scanner;
        drop(batches);
        let read = reader.join().map_err(|_| anyhow::anyhow!("the thread that reads attributes failed"))?;
        // If that one has failed, the scan has merely noticed.
        tree.take_attributes(read?)?;
        scanned?;
        Ok(tree)
    })
}

struct Scanner<'v> {
    view: &'v mut View,
    tree: Tree,
    mount: u64,
    device: (u32, u32),
    links: HashMap<(u64, u64), InodeIndex>,
    /// What the thread that reads attributes gets.
    batches: SyncSender<Batch>,
}

impl Scanner<'_> {
    /// Adds the directory behind `fd` and all below it.
    fn directory(
        &mut self,
        fd: BorrowedFd<'_>,
        stat: &Statx,
        path: &Path,
        depth: usize,
        place: &ViewPlace,
    ) -> Result<InodeIndex> {
        if depth > MAX_DEPTH {
            bail!("'{}': directories are nested deeper than {MAX_DEPTH}; flatten them", path.display());
        }
        let index = self.add(stat, Kind::Directory(Vec::new()), path)?;
        if self.is_elsewhere(stat) {
            self.tree.warnings.mounts.push(path.to_owned());
            return Ok(index);
        }
        let listing = |operation| {
            let path = path.to_owned();
            move || format!("cannot {operation} '{}'", path.display())
        };

        let mut names = Vec::new();
        for entry in Dir::read_from(fd).with_context(listing("list"))? {
            let entry = entry.with_context(listing("list"))?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();

        let mut entries = Vec::with_capacity(names.len());
        let mut subdirectories = 0;
        let (mut own, mut leaves) = (Some(index), Vec::new());
        for name in names {
            let child_path = join(path, &name);
            let stat = self::stat(fd, &name).with_context(|| format!("cannot look at '{}'", child_path.display()))?;
            let (verdict, below) = self.judge(fd, place, &name, &stat, &child_path)?;
            if verdict == Verdict::LeaveOut {
                continue;
            }
            let child = if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory {
                subdirectories += 1;
                let child_fd = open_directory(fd, &name)
                    .with_context(|| format!("cannot open the directory '{}'", child_path.display()))?;
                let stat = self::stat(child_fd.as_fd(), c"")?;
                self.directory(child_fd.as_fd(), &stat, &child_path, depth + 1, &below)?
            } else {
                let (child, is_new) = self.leaf(fd, &name, &stat, &child_path, verdict == Verdict::Empty)?;
                if is_new {
                    leaves.push((name.clone(), child));
                }
                child
            };
            entries.push((name, child));
            if leaves.len() >= BATCH {
                self.send(fd, path, own.take(), std::mem::take(&mut leaves))?;
            }
        }
        self.send(fd, path, own, leaves)?;
        let inode = &mut self.tree.inodes[index.0 as usize];
        inode.links = 2 + subdirectories;
        inode.kind = Kind::Directory(entries);
        Ok(index)
    }

    /// Whether the image gets an entry.
    fn judge(
        &mut self,
        parent: BorrowedFd<'_>,
        place: &ViewPlace,
        name: &CStr,
        stat: &Statx,
        path: &Path,
    ) -> Result<(Verdict, ViewPlace)> {
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let candidate = Candidate {
            path,
            name: name.to_bytes(),
            is_directory: kind == FileType::Directory,
            is_regular: kind == FileType::RegularFile,
            bytes: stat.stx_size,
        };
        self.view.judge(place, &candidate, || {
            const HEAD: u64 = 256 << 10;
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
            let mut bytes = Vec::new();
            file.take(HEAD).read_to_end(&mut bytes)?;
            Ok(bytes)
        })
    }

    /// Has the attributes read of a directory's inode, and of what lies in it.
    fn send(
        &self,
        directory: BorrowedFd<'_>,
        path: &Path,
        own: Option<InodeIndex>,
        entries: Vec<(CString, InodeIndex)>,
    ) -> Result<()> {
        let directory = rustix::io::fcntl_dupfd_cloexec(directory, 0)
            .with_context(|| format!("cannot open the directory '{}' once more", path.display()))?;
        let sent = self.batches.send(Batch { directory, path: path.to_owned(), own, entries });
        sent.map_err(|_| anyhow::anyhow!("the thread that reads attributes has ended"))
    }

    /// Adds what is not a directory, or another name of what was added before; and whether its attributes are to be read.
    fn leaf(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        stat: &Statx,
        path: &Path,
        empty: bool,
    ) -> Result<(InodeIndex, bool)> {
        let identity = identity(stat);
        if stat.stx_nlink > 1
            && let Some(index) = self.links.get(&identity)
        {
            self.tree.inodes[index.0 as usize].links += 1;
            return Ok((*index, false));
        }
        let elsewhere = self.is_elsewhere(stat);
        let device = (stat.stx_rdev_major, stat.stx_rdev_minor);
        let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile if elsewhere || empty => Kind::File(0),
            FileType::RegularFile => Kind::File(stat.stx_size),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new())
                    .with_context(|| format!("cannot read the symbolic link '{}'", path.display()))?;
                Kind::Symlink(target.into_bytes())
            }
            FileType::BlockDevice => Kind::BlockDevice(device.0, device.1),
            FileType::CharacterDevice => Kind::CharDevice(device.0, device.1),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Directory | FileType::Unknown => bail!("'{}' changed while it was looked at", path.display()),
        };
        let index = self.add(stat, kind, path)?;
        if stat.stx_nlink > 1 {
            self.links.insert(identity, index);
        }
        if elsewhere {
            self.tree.warnings.mounts.push(path.to_owned());
        }
        Ok((index, !elsewhere))
    }

    fn add(&mut self, stat: &Statx, kind: Kind, path: &Path) -> Result<InodeIndex> {
        let index = inodes::next_index(&self.tree.inodes)?;
        let seconds = stat.stx_mtime.tv_sec.clamp(0, i64::from(u32::MAX));
        if seconds != stat.stx_mtime.tv_sec {
            self.tree.warnings.times.push(path.to_owned());
        }
        self.tree.identities.push(identity(stat));
        self.tree.inodes.push(Inode {
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime: u32::try_from(seconds).unwrap_or(u32::MAX),
            links: 1,
            xattrs: None,
            kind,
        });
        Ok(index)
    }

    /// Whether an inode belongs to another mount than the root. The mount's number also tells bind mounts of the same
    /// file system; the device is for kernels that do not report it (before 5.8).
    fn is_elsewhere(&self, stat: &Statx) -> bool {
        if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 {
            return stat.stx_mnt_id != self.mount;
        }
        (stat.stx_dev_major, stat.stx_dev_minor) != self.device
    }
}

fn identity(stat: &Statx) -> (u64, u64) {
    ((u64::from(stat.stx_dev_major) << 32) | u64::from(stat.stx_dev_minor), stat.stx_ino)
}

/// `statx` of an entry without following it; of `fd` itself if the name is empty.
pub(super) fn stat(fd: BorrowedFd<'_>, name: &CStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    Ok(rustix::fs::statx(fd, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?)
}

/// Whether a directory is on the same mount as an open one; a scan of that one goes no further.
pub(super) fn is_on_mount_of(root: BorrowedFd<'_>, directory: &Path) -> Result<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let other = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .with_context(|| format!("cannot open '{}'", directory.display()))?;
    let (root, other) = (stat(root, c"")?, stat(other.as_fd(), c"")?);
    if root.stx_mask & other.stx_mask & StatxFlags::MNT_ID.bits() != 0 {
        return Ok(root.stx_mnt_id == other.stx_mnt_id);
    }
    Ok((root.stx_dev_major, root.stx_dev_minor) == (other.stx_dev_major, other.stx_dev_minor))
}

/// Identity of an open file, comparable with those of [`Tree::identities`].
pub(super) fn identity_of(fd: impl AsFd) -> Result<((u64, u64), Statx)> {
    let stat = stat(fd.as_fd(), c"")?;
    Ok((identity(&stat), stat))
}
