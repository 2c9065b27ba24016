//! Files that an image sees only while a command runs in it: the host's resolver, a `policy-rc.d` that lets no service
//! start, places for binds. They are mounts; what had to be made in the tree to carry them is taken away at the end.

use super::Network;
use super::mounts::{Detached, During, MountError, open_below, tmpfs};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, chmodat, fstat, mkdirat, openat,
    readlinkat, statat, unlinkat, utimensat,
};
use rustix::mount::{MountAttrFlags, UnmountFlags};
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// `invoke-rc.d` and `deb-systemd-invoke` ask this program; 101 forbids the action
/// (/usr/share/doc/init-system-helpers/README.policy-rc.d.gz).
const POLICY: &str = "#!/bin/sh\n# Nothing starts while imgutil runs a command in an image.\nexit 101\n";

/// A place of ours in a tree: an empty file that nobody may read. If a run was ended too hard to remove it, the next one
/// knows it by this and does.
const STUB_MODE: u32 = 0;
/// The same for directories: a mode that nobody gives to one. It is there from the first moment, so another command in the same
/// tree knows it too, and the last to leave takes it away.
pub(super) const PLACE_MODE: u32 = 0o1511;

/// What is to appear in the image, read on the host before it is entered.
pub(super) struct Sources {
    /// Path in the image, mode, content.
    files: Vec<(PathBuf, u32, Vec<u8>)>,
}

impl Sources {
    /// Nothing is shown.
    pub(super) fn nothing() -> Self {
        Self { files: Vec::new() }
    }

    /// Reads the host's resolver file and finds out whether the image at `tree` asks a `policy-rc.d`; `more` is shown too.
    pub(super) fn read<'a>(tree: &Path, network: Network, more: impl Iterator<Item = &'a (PathBuf, Vec<u8>)>) -> Self {
        let mut files = Vec::new();
        // A host without a resolver file is no error: its image has none either.
        if let (Ok(resolver), Network::Host) = (std::fs::read("/etc/resolv.conf"), network) {
            files.push((PathBuf::from("etc/resolv.conf"), 0o644, resolver));
        }
        if tree.join("usr/bin/dpkg").symlink_metadata().is_ok_and(|found| found.is_file()) {
            files.push((PathBuf::from("usr/sbin/policy-rc.d"), 0o755, POLICY.as_bytes().to_vec()));
        }
        files.extend(more.map(|(path, content)| (path.clone(), 0o644, content.clone())));
        Self { files }
    }

    /// Makes mounts of the files. `scratch` is a directory that is covered for a moment; what lies there is not changed.
    pub(super) fn prepare(&self, scratch: BorrowedFd<'_>) -> Result<Prepared, MountError> {
        let store = tmpfs("755", "4m", MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
        store.attach(scratch).during("mount", "/run")?;
        let mut files = Vec::new();
        for (index, (path, mode, content)) in self.files.iter().enumerate() {
            let name = index.to_string();
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(store.fd(), &name, flags, Mode::from_raw_mode(*mode)).during("make", path)?;
            std::fs::File::from(file).write_all(content).during("write", path)?;
            let mount = Detached::copy_of(store.fd(), Path::new(&name), false)?;
            mount.restrict(MountAttrFlags::MOUNT_ATTR_RDONLY, false).during("make read-only", path)?;
            files.push((path.clone(), mount));
        }
        // The bind mounts keep the filesystem; nothing in the image shall find the originals.
        rustix::mount::unmount("/run", UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).during("unmount", "/run")?;
        Ok(Prepared { files })
    }
}

/// The files of [`Sources`] as mounts without a place.
pub(super) struct Prepared {
    files: Vec<(PathBuf, Detached)>,
}

impl Prepared {
    /// Puts them where the image's programs look for them, following the image's symbolic links inside the image.
    pub(super) fn place(self, root: BorrowedFd<'_>, planted: &mut Planted) -> Result<(), MountError> {
        for (path, mount) in self.files {
            match planted.file_place(root, &path)? {
                Some(place) => mount.attach(place.as_fd()).during("mount over", Path::new("/").join(path))?,
                None => planted.warnings.push(format!(
                    "/{} in the image is a link to nowhere or no file: it is left alone, so what imgutil shows there (name \
                     servers, a lock for services, a repository) is not seen",
                    path.display()
                )),
            }
        }
        Ok(())
    }
}

/// Something that was made in the tree.
struct Made {
    parent: OwnedFd,
    name: OsString,
    /// As seen from inside, to unmount what is on it.
    path: PathBuf,
    directory: bool,
    /// The parent's modification time before and after, to be set back if nothing else has changed the parent.
    times: Option<(Timespec, Timespec)>,
}

/// What has to be taken away when the command has ended.
#[derive(Default)]
pub(super) struct Planted {
    made: Vec<Made>,
    /// What the user should know, though the command can run.
    pub(super) warnings: Vec<String>,
}

impl Planted {
    /// Remembers what somebody made as a place: this run, or another one in the same tree.
    pub(super) fn adopt(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<(), MountError> {
        let Some(stat) = stat_of(parent, name).during("look at", path)?.filter(is_place) else { return Ok(()) };
        let parent = parent.try_clone_to_owned().during("keep", path)?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        self.made.push(Made { parent, name: name.into(), path: path.to_owned(), directory, times: None });
        Ok(())
    }

    /// Finds or makes the file at `path` (relative to `root`) to mount over. `None` if that cannot be done without
    /// changing what is in the image.
    fn file_place(&mut self, root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>, MountError> {
        let mut path = path.to_path_buf();
        // As many links as the kernel follows.
        for _ in 0..40 {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
            let Some(directory) = Self::parent_directory(root, parent)? else { return Ok(None) };
            let shown = Path::new("/").join(&path);
            match stat_of(directory.as_fd(), name).during("look at", &shown)? {
                None => {
                    if let Some(place) = self.make_stub(directory, name.to_owned(), shown)? {
                        return Ok(Some(place));
                    }
                }
                Some(stat) => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::RegularFile => {
                        let place =
                            openat(&directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                                .during("open", &shown)?;
                        // Of another run in this tree, or left by one that was killed together with its PID 1.
                        self.adopt(directory.as_fd(), name, &shown)?;
                        return Ok(Some(place));
                    }
                    FileType::Symlink => {
                        let target = readlinkat(&directory, name, Vec::new()).during("read the link", &shown)?;
                        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                        path = parent.join(target);
                        if let Ok(absolute) = path.strip_prefix("/") {
                            path = absolute.to_path_buf();
                        }
                    }
                    _ => return Ok(None),
                },
            }
        }
        Ok(None)
    }

    /// Opens a directory of the image; below `/run`, which is ours and empty, it is made.
    fn parent_directory(root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>, MountError> {
        let shown = Path::new("/").join(path);
        let name = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        match open_below(root, name, OFlags::DIRECTORY) {
            Ok(directory) => return Ok(Some(directory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            Err(error) => return Err(error).during("open", shown),
        }
        let Some(inside) = below_run(path) else { return Ok(None) };
        let mut at = open_below(root, Path::new("run"), OFlags::DIRECTORY).during("open", "/run")?;
        for part in inside.components() {
            match mkdirat(&at, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error).during("make", shown),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            at = openat(&at, part.as_os_str(), flags, Mode::empty()).during("open", &shown)?;
        }
        Ok(Some(at))
    }

    /// `None`: another command in the same tree was quicker, look again.
    fn make_stub(&mut self, parent: OwnedFd, name: OsString, path: PathBuf) -> Result<Option<OwnedFd>, MountError> {
        let before = modified(&parent).during("look above", &path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&parent, &name, flags, Mode::from_raw_mode(STUB_MODE)) {
            Ok(file) => drop(file),
            Err(rustix::io::Errno::EXIST) => return Ok(None),
            Err(error) => return Err(error).during("make", &path),
        }
        let times = Some((before, modified(&parent).during("look above", &path)?));
        let place = openat(&parent, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .during("open", &path)?;
        self.made.push(Made { parent, name, path, directory: false, times });
        Ok(Some(place))
    }

    fn make_directory(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), MountError> {
        let before = modified(parent).during("look above", path)?;
        match mkdirat(parent, name, Mode::from_raw_mode(PLACE_MODE)) {
            Ok(()) => {}
            // Another command in the same tree was quicker.
            Err(rustix::io::Errno::EXIST) => return self.adopt(parent.as_fd(), name, path),
            Err(error) => return Err(error).during("make the mount point", path),
        }
        let times = Some((before, modified(parent).during("look above", path)?));
        let parent = parent.try_clone().during("keep", path)?;
        self.made.push(Made { parent, name: name.to_owned(), path: path.to_path_buf(), directory: true, times });
        Ok(())
    }

    /// Finds or makes, with the directories above it, the place at the absolute path `target` for a mount of `kind`.
    pub(super) fn make_place(
        &mut self,
        root: BorrowedFd<'_>,
        target: &Path,
        kind: FileType,
    ) -> Result<OwnedFd, MountError> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let open =
            |path: &Path| crate::in_root::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
        let parts: Vec<_> = target.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let mut parent = open(Path::new(".")).during("open", "/")?;
        let mut path = PathBuf::new();
        for (index, part) in parts.iter().enumerate() {
            path.push(part);
            let shown = Path::new("/").join(&path);
            let fd = match open(&path) {
                Ok(fd) => {
                    self.adopt(parent.as_fd(), part.as_os_str(), &shown)?;
                    fd
                }
                Err(rustix::io::Errno::NOENT) => {
                    let name = part.as_os_str();
                    let there = stat_of(parent.as_fd(), name).during("look at", &shown)?;
                    if there.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink) {
                        let found = "a symbolic link that leads nowhere in the image";
                        return Err(MountError::NotADirectory { path: path.display().to_string(), found });
                    }
                    if index + 1 < parts.len() || kind == FileType::Directory {
                        self.make_directory(&parent, name, &shown)?;
                        open(&path).during("open", &shown)?
                    } else {
                        let above = parent.try_clone().during("keep", &shown)?;
                        if let Some(place) = self.make_stub(above, name.to_owned(), shown.clone())? {
                            place
                        } else {
                            // The other command may end first: then the place is this one's to take away.
                            let fd = open(&path).during("open", &shown)?;
                            self.adopt(parent.as_fd(), name, &shown)?;
                            fd
                        }
                    }
                }
                Err(error) => return Err(error).during("open", shown),
            };
            parent = fd;
        }
        Ok(parent)
    }

    /// Takes away what was made, the newest first. Something that the command has put into a directory of ours stays.
    pub(super) fn remove(&mut self) {
        while let Some(made) = self.made.pop() {
            match take_away(&made) {
                Ok(()) => {}
                Err(error) => {
                    self.warnings.push(format!("cannot remove {} from the image: {error}", made.path.display()));
                }
            }
        }
    }
}

fn take_away(made: &Made) -> io::Result<()> {
    // A mount point cannot be removed in its own mount namespace. EINVAL: nothing was mounted, the set-up had failed before.
    match rustix::mount::unmount(&made.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let now = modified(&made.parent)?;
    if !stat_of(made.parent.as_fd(), &made.name)?.is_some_and(|stat| is_place(&stat)) {
        return Ok(());
    }
    if !made.directory {
        unlinkat(&made.parent, &made.name, AtFlags::empty())?;
        return set_back(made, now);
    }
    match unlinkat(&made.parent, &made.name, AtFlags::REMOVEDIR) {
        Ok(()) => set_back(made, now),
        // The command has put something into it: it stays, as a directory like any other.
        Err(rustix::io::Errno::NOTEMPTY) => {
            Ok(chmodat(&made.parent, &made.name, Mode::from_raw_mode(0o755), AtFlags::empty())?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether something in the tree is a place of ours.
fn is_place(stat: &Stat) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => stat.st_mode & 0o7777 == PLACE_MODE,
        FileType::RegularFile => stat.st_size == 0 && stat.st_mode & 0o7777 == STUB_MODE,
        _ => false,
    }
}

/// Gives the parent the time it had before, if it was not changed between making and removing: the tree is then as it was.
fn set_back(made: &Made, now: Timespec) -> io::Result<()> {
    let Some((before, _)) = made.times.filter(|(_, after)| *after == now) else { return Ok(()) };
    let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
    let times = Timestamps { last_access: omit, last_modification: before };
    Ok(utimensat(&made.parent, ".", &times, AtFlags::empty())?)
}

fn modified(directory: &OwnedFd) -> io::Result<Timespec> {
    let stat = fstat(directory)?;
    Ok(Timespec { tv_sec: stat.st_mtime, tv_nsec: i64::try_from(stat.st_mtime_nsec).unwrap_or(0) })
}

fn stat_of(directory: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<Option<Stat>> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The part of `path` below `/run` (or `/var/run`, its other name), where directories may be made. `None` outside of it, and
/// for a path that goes up again below it: through a directory that does not exist no program would find its way.
fn below_run(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir if plain.starts_with("run") || plain.starts_with("var/run") => return None,
            Component::ParentDir => {
                plain.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let inside = plain.strip_prefix("run").or_else(|_| plain.strip_prefix("var/run")).ok()?;
    Some(inside.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_below_run_only() {
        for (path, inside) in [
            ("etc/../run/systemd/resolve", Some("systemd/resolve")),
            ("run", Some("")),
            ("var/run/a", Some("a")),
            ("etc/../../run/a", Some("a")),
            ("run/a/../b", None),
            ("run/../etc/a", None),
            ("etc/a", None),
            ("var/runner", None),
        ] {
            assert_eq!(below_run(Path::new(path)), inside.map(PathBuf::from), "{path}");
        }
    }
}
