//! Puts a layer into a tree (image-spec, layer.md). Every path is found below the tree's root by the kernel (`RESOLVE_IN_ROOT`):
//! `..` and symbolic links, absolute ones too, mean what they would mean to a process whose root the tree is.

use crate::tar::{Entry, Kind, Reader, TarError};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags, mkdirat, openat,
    statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// Directories below each other, at most.
const DEPTH_LIMIT: usize = 512;
/// So often the caller is asked whether to go on, in entries.
const ASK_EVERY: u64 = 256;

/// Before the name of something that a layer takes away.
const WHITEOUT: &[u8] = b".wh.";
/// Takes away all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("'{path}' {reason}")]
    Refused { path: String, reason: &'static str },
    #[error("cannot {doing} '{path}': {source}")]
    Call { doing: &'static str, path: String, source: io::Error },
    #[error("it has more than {0} entries, as no honest image does")]
    TooMany(u64),
    #[error("interrupted")]
    Interrupted,
}

/// Names an operation and its object in an error.
trait During<T> {
    fn during(self, doing: &'static str, path: &[u8]) -> Result<T, ApplyError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, doing: &'static str, path: &[u8]) -> Result<T, ApplyError> {
        self.map_err(|error| ApplyError::Call { doing, path: shown(path), source: error.into() })
    }
}

/// A name in a directory, by the directory's inode: what this layer has made.
type Place = (u64, OsString);

/// The tree under construction.
pub(super) struct Applier<'a> {
    root: BorrowedFd<'a>,
    entries_left: u64,
    entries: u64,
}

/// What belongs to one layer.
#[derive(Default)]
struct Layer {
    made: HashSet<Place>,
    /// Times of directories, set at the end: what is put into them changes them.
    times: BTreeMap<PathBuf, Timespec>,
    /// The directory of the entry before, which is mostly that of the next one too.
    last: Option<(PathBuf, OwnedFd)>,
}

impl<'a> Applier<'a> {
    /// Into the directory behind `root`, at most `entries` entries.
    pub(super) fn new(root: BorrowedFd<'a>, entries: u64) -> Self {
        Self { root, entries_left: entries, entries }
    }
}

impl Applier<'_> {
    /// Applies one layer. `go_on` is asked now and then.
    pub(super) fn layer<R: Read>(
        &mut self,
        archive: &mut Reader<R>,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), ApplyError> {
        let mut layer = Layer::default();
        while let Some(entry) = archive.next()? {
            self.entries_left = self.entries_left.checked_sub(1).ok_or(ApplyError::TooMany(self.entries))?;
            if self.entries_left.is_multiple_of(ASK_EVERY) && !go_on() {
                return Err(ApplyError::Interrupted);
            }
            self.entry(&entry, archive, &mut layer)?;
        }
        for (path, time) in &layer.times {
            match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(directory) => {
                    let times = Timestamps { last_access: *time, last_modification: *time };
                    rustix::fs::futimens(&directory, &times).during("set the time of", path.as_os_str().as_bytes())?;
                }
                // The layer itself has put something else in its place.
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => return Err(error).during("open", path.as_os_str().as_bytes()),
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, content: &mut impl Read, layer: &mut Layer) -> Result<(), ApplyError> {
        let parts = parts(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            // The root itself.
            if entry.kind == Kind::Directory {
                let root = self.open(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY).during("open", b"/")?;
                directory_attributes(&root, entry)?;
                layer.times.insert(PathBuf::from("."), time(entry));
            }
            return Ok(());
        };
        let parent = self.parent(above, layer, &entry.path)?;
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return take_away(&parent, name, hidden, layer, &entry.path);
        }
        let old = look(parent.as_fd(), name).during("look at", &entry.path)?;
        let both_directories =
            entry.kind == Kind::Directory && old.as_ref().is_some_and(|old| kind(old) == FileType::Directory);
        if let (Some(old), false) = (&old, both_directories) {
            remove(parent.as_fd(), name, kind(old)).during("replace", &entry.path)?;
            layer.last = None;
        }
        self.make(entry, content, &parent, name, both_directories)?;
        if entry.kind == Kind::Directory {
            let path: PathBuf = parts.iter().collect();
            layer.times.insert(path, time(entry));
        }
        layer.made.insert((inode(parent.as_fd()).during("look above", &entry.path)?, (*name).to_owned()));
        Ok(())
    }

    /// Makes what the entry says under a name that is free, or, for a directory, may be one already.
    fn make(
        &self,
        entry: &Entry,
        content: &mut impl Read,
        parent: &OwnedFd,
        name: &OsStr,
        exists: bool,
    ) -> Result<(), ApplyError> {
        let path = &entry.path;
        match entry.kind {
            Kind::Directory => {
                if !exists {
                    mkdirat(parent, name, Mode::RWXU).during("make the directory", path)?;
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                directory_attributes(&openat(parent, name, flags, Mode::empty()).during("open", path)?, entry)
            }
            Kind::File => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(parent, name, flags, Mode::RUSR | Mode::WUSR).during("make", path)?;
                let mut file = File::from(made);
                let written = io::copy(content, &mut file).during("write", path)?;
                if written != entry.size {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).during("write", path);
                }
                let failed = "set the attributes of";
                rustix::fs::fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
                    .during(failed, path)?;
                for (key, value) in kept(&entry.xattrs) {
                    rustix::fs::fsetxattr(&file, key, value, XattrFlags::empty()).during(failed, path)?;
                }
                rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).during(failed, path)?;
                let time = time(entry);
                rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time })
                    .during(failed, path)
            }
            Kind::HardLink => self.link(entry, parent, name),
            Kind::Symlink => {
                rustix::fs::symlinkat(entry.target.as_slice(), parent, name).during("make the link", path)?;
                leaf_attributes(parent, name, entry)
            }
            Kind::Fifo | Kind::Character | Kind::Block => {
                let kind = match entry.kind {
                    Kind::Character => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device).during("make", path)?;
                leaf_attributes(parent, name, entry)
            }
        }
    }

    /// Another name for a file of this or a lower layer.
    fn link(&self, entry: &Entry, parent: &OwnedFd, name: &OsStr) -> Result<(), ApplyError> {
        let parts = parts(&entry.target)?;
        let refused = |reason| ApplyError::Refused { path: shown(&entry.path), reason };
        let (target, above) = parts.split_last().ok_or_else(|| refused("is a hard link to the root"))?;
        let above: PathBuf = above.iter().collect();
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { &above };
        match self.open(above, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(directory) => match rustix::fs::linkat(&directory, *target, parent, name, AtFlags::empty()) {
                Err(Errno::NOENT) => Err(refused("is a hard link to a file that the image does not have")),
                other => other.during("make the hard link", &entry.path),
            },
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                Err(refused("is a hard link to a file that the image does not have"))
            }
            Err(error) => Err(error).during("find the target of", &entry.path),
        }
    }

    fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        crate::in_root::openat2(self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// The directory that an entry goes into; what is missing of it is made.
    fn parent(&self, above: &[&OsStr], layer: &mut Layer, shown_for: &[u8]) -> Result<OwnedFd, ApplyError> {
        let wanted: PathBuf = above.iter().collect();
        if let Some((path, directory)) = &layer.last
            && *path == wanted
        {
            return directory.try_clone().during("keep", shown_for);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let mut directory = self.open(Path::new("."), flags).during("open", b"/")?;
        let mut path = PathBuf::new();
        // Mostly all of it is there.
        match self.open(if above.is_empty() { Path::new(".") } else { &wanted }, flags) {
            Ok(found) => directory = found,
            Err(_) => {
                for part in above {
                    path.push(part);
                    directory = match self.open(&path, flags) {
                        Err(Errno::NOENT) => {
                            match mkdirat(&directory, *part, Mode::from_raw_mode(0o755)) {
                                // There is a link to nowhere.
                                Err(Errno::EXIST) => {
                                    let reason = "is below a link that leads nowhere in the image";
                                    return Err(ApplyError::Refused { path: shown(shown_for), reason });
                                }
                                other => other.during("make the directories above", shown_for)?,
                            }
                            self.open(&path, flags).during("open the directories above", shown_for)?
                        }
                        other => other.during("open the directories above", shown_for)?,
                    };
                }
            }
        }
        layer.last = Some((wanted, directory.try_clone().during("keep", shown_for)?));
        Ok(directory)
    }
}

/// Does what a whiteout says: only to what lower layers have made.
fn take_away(parent: &OwnedFd, name: &OsStr, hidden: &[u8], layer: &mut Layer, path: &[u8]) -> Result<(), ApplyError> {
    layer.last = None;
    if name.as_bytes() == OPAQUE {
        return clear(parent.as_fd(), &layer.made).during("clear the directory of", path);
    }
    if hidden.starts_with(WHITEOUT) {
        // aufs' own files (`.wh..wh.plnk`), of which an image means nothing.
        return Ok(());
    }
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(ApplyError::Refused { path: shown(path), reason: "takes away no name" });
    }
    let name = OsStr::from_bytes(hidden);
    let own = (inode(parent.as_fd()).during("look above", path)?, name.to_owned());
    let Some(old) = look(parent.as_fd(), name).during("look at", path)? else { return Ok(()) };
    match (layer.made.contains(&own), kind(&old)) {
        (false, kind) => remove(parent.as_fd(), name, kind).during("take away what is hidden by", path),
        (true, FileType::Directory) => {
            let directory = directory(parent.as_fd(), name).during("open what is hidden by", path)?;
            clear(directory.as_fd(), &layer.made).during("clear what is hidden by", path)
        }
        (true, _) => Ok(()),
    }
}

/// A path of an archive as names; `/` and `./` at its beginning mean the root.
fn parts(path: &[u8]) -> Result<Vec<&OsStr>, ApplyError> {
    let refused = |reason| ApplyError::Refused { path: shown(path), reason };
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(refused("leads upwards")),
            part if part.len() > 255 || part.contains(&0) => return Err(refused("has a part that is no name")),
            part => parts.push(OsStr::from_bytes(part)),
        }
    }
    if parts.len() > DEPTH_LIMIT { Err(refused("is nested too deep")) } else { Ok(parts) }
}

fn look(directory: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<Option<Stat>> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn inode(directory: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    Ok(rustix::fs::fstat(directory)?.st_ino)
}

fn directory(at: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<OsString>> {
    let listing = openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(listing)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    Ok(names)
}

/// Removes something, a directory with all that is in it.
fn remove(at: BorrowedFd<'_>, name: &OsStr, kind: FileType) -> rustix::io::Result<()> {
    if kind != FileType::Directory {
        return unlinkat(at, name, AtFlags::empty());
    }
    clear(directory(at, name)?.as_fd(), &HashSet::new())?;
    unlinkat(at, name, AtFlags::REMOVEDIR)
}

/// Removes all that is in a directory, but not what is in `keep`.
fn clear(at: BorrowedFd<'_>, keep: &HashSet<Place>) -> rustix::io::Result<()> {
    let own = inode(at)?;
    for name in names(at)? {
        let Some(found) = look(at, &name)? else { continue };
        let place = (own, name);
        let stays = keep.contains(&place);
        let (_, name) = place;
        match (kind(&found), stays) {
            (FileType::Directory, true) => clear(directory(at, &name)?.as_fd(), keep)?,
            (_, true) => {}
            (FileType::Directory, false) => {
                clear(directory(at, &name)?.as_fd(), keep)?;
                unlinkat(at, &name, AtFlags::REMOVEDIR)?;
            }
            (_, false) => unlinkat(at, &name, AtFlags::empty())?,
        }
    }
    Ok(())
}

/// The attributes that an image may set. overlayfs' own are none of a tree's: they would say things to the next overlay over it.
fn kept(xattrs: &[(std::ffi::CString, Vec<u8>)]) -> impl Iterator<Item = (&std::ffi::CStr, &[u8])> {
    xattrs
        .iter()
        .filter(|(key, _)| {
            let key = key.to_bytes();
            !key.starts_with(b"trusted.overlay.") && !key.starts_with(b"user.overlay.")
        })
        .map(|(key, value)| (key.as_c_str(), value.as_slice()))
}

fn time(entry: &Entry) -> Timespec {
    Timespec { tv_sec: entry.modified.0, tv_nsec: entry.modified.1 }
}

/// Owner, attributes, mode: in the order that lets each stay. The time comes at the end of the layer.
fn directory_attributes(directory: &OwnedFd, entry: &Entry) -> Result<(), ApplyError> {
    let failed = "set the attributes of";
    rustix::fs::fchown(directory, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .during(failed, &entry.path)?;
    for (key, value) in kept(&entry.xattrs) {
        rustix::fs::fsetxattr(directory, key, value, XattrFlags::empty()).during(failed, &entry.path)?;
    }
    rustix::fs::fchmod(directory, Mode::from_raw_mode(entry.mode)).during(failed, &entry.path)
}

/// The attributes of a link, pipe or device, which is not opened.
fn leaf_attributes(parent: &OwnedFd, name: &OsStr, entry: &Entry) -> Result<(), ApplyError> {
    let failed = "set the attributes of";
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).during(failed, &entry.path)?;
    // The calls that take an attribute want a path: that of the directory's handle, and one name that they do not follow.
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.as_bytes());
    for (key, value) in kept(&entry.xattrs) {
        rustix::fs::lsetxattr(path.as_slice(), key, value, XattrFlags::empty()).during(failed, &entry.path)?;
    }
    if entry.kind != Kind::Symlink {
        // It would follow a link; this is a pipe or device that was made a moment ago in a tree that only we write to.
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
            .during(failed, &entry.path)?;
    }
    let time = time(entry);
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).during(failed, &entry.path)
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_none_are_refused() {
        let long = [b'a'; 256];
        for (path, expected) in [
            (&b"./etc/passwd"[..], Some(vec!["etc", "passwd"])),
            (b"/etc//passwd/", Some(vec!["etc", "passwd"])),
            (b"./", Some(vec![])),
            (b"../etc", None),
            (b"a/../../b", None),
            (b"a\0b", None),
            (&long, None),
            (&b"a/".repeat(DEPTH_LIMIT + 1), None),
        ] {
            let found = parts(path).ok();
            assert_eq!(found, expected.map(|parts| parts.into_iter().map(OsStr::new).collect()), "{}", shown(path));
        }
    }
}
