//! Writes files into a root tree that nobody vouches for: every path is resolved as that root would (`openat2` with
//! `RESOLVE_IN_ROOT`), so no link in it leads out, and every file appears whole under its name by rename.

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// As often a path is tried.
const TRIES: usize = 1000;
/// Longest file that is read from the tree.
const MAX_READ: u64 = 4 << 20;

/// A file of the tree cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} '{path}' in the root '{}': {cause}", .root.display())]
pub struct TreeError {
    action: &'static str,
    path: String,
    root: PathBuf,
    cause: std::io::Error,
}

/// A root tree.
pub struct Tree {
    root: OwnedFd,
    shown: PathBuf,
}

impl Tree {
    /// Opens the directory.
    ///
    /// # Errors
    /// It is not there or no directory.
    pub fn open(root: &Path) -> Result<Self, TreeError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(root, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { root: fd, shown: root.to_owned() }),
            Err(cause) => {
                Err(TreeError { action: "open", path: "/".into(), root: root.to_owned(), cause: cause.into() })
            }
        }
    }

    fn error(&self, action: &'static str, path: &str, cause: impl Into<std::io::Error>) -> TreeError {
        TreeError { action, path: path.to_owned(), root: self.shown.clone(), cause: cause.into() }
    }

    fn resolve(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let open = || rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        // openat2(2): while anything on the machine is renamed or mounted, the kernel cannot follow a `..`, and says "again".
        for _ in 1..TRIES {
            match open() {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
        open()
    }

    /// Reads a text file; `None` if there is none.
    ///
    /// # Errors
    /// It is no regular file, too long, or cannot be read.
    pub fn read(&self, path: &str) -> Result<Option<String>, TreeError> {
        let file = match self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(cause) => return Err(self.error("read", path, cause)),
        };
        let meta = file.metadata().map_err(|cause| self.error("read", path, cause))?;
        if !meta.is_file() || meta.len() > MAX_READ {
            let cause = std::io::Error::other("it is no regular file of a plausible size");
            return Err(self.error("read", path, cause));
        }
        let mut bytes = Vec::new();
        file.take(MAX_READ).read_to_end(&mut bytes).map_err(|cause| self.error("read", path, cause))?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Whether there is something at `path`, links followed inside of the root.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        self.resolve(path, OFlags::PATH).is_ok()
    }

    /// Writes a file with this mode, owned by root, and the missing directories above it (mode 0755).
    ///
    /// # Errors
    /// A directory or the file cannot be made.
    pub fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<(), TreeError> {
        let bits = Mode::from_raw_mode(mode);
        self.place(path, |directory, temporary| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, temporary, flags, Mode::from_raw_mode(0o600))?;
            let mut file = File::from(file);
            file.write_all(content)?;
            rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT))?;
            rustix::fs::fchmod(&file, bits)?;
            Ok(())
        })
    }

    /// As [`Self::write`], keeping owner and mode of the file that is replaced (`/etc/shadow` belongs to group `shadow`).
    ///
    /// # Errors
    /// There is no such file; it cannot be replaced.
    pub fn replace(&self, path: &str, content: &[u8]) -> Result<(), TreeError> {
        let old = self.resolve(path, OFlags::PATH).map_err(|cause| self.error("replace", path, cause))?;
        let stat = rustix::fs::fstat(&old).map_err(|cause| self.error("replace", path, cause))?;
        self.place(path, |directory, temporary| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, temporary, flags, Mode::from_raw_mode(0o600))?;
            let mut file = File::from(file);
            file.write_all(content)?;
            rustix::fs::fchown(&file, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
            Ok(())
        })
    }

    /// Makes a symbolic link, in place of what is there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn link(&self, path: &str, target: &str) -> Result<(), TreeError> {
        self.place(path, |directory, temporary| Ok(rustix::fs::symlinkat(target, directory, temporary)?))
    }

    /// Makes a directory of this mode, owned by root, where there is none; one that is there stays as it is. Those above it get
    /// mode 0755.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_directory(&self, path: &str, mode: u32) -> Result<(), TreeError> {
        let result = self.directory(split(path).0, 0o755).and_then(|_| self.directory(path, mode));
        result.map(drop).map_err(|cause| self.error("make", path, cause))
    }

    /// Removes a file or link, if it is there.
    ///
    /// # Errors
    /// It is a directory or cannot be removed.
    pub fn remove(&self, path: &str) -> Result<(), TreeError> {
        let (parent, name) = split(path);
        let result = self
            .resolve(parent, OFlags::PATH | OFlags::DIRECTORY)
            .and_then(|directory| rustix::fs::unlinkat(directory, name, AtFlags::empty()));
        match result {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(cause) => Err(self.error("remove", path, cause)),
        }
    }

    /// Makes the thing beside its name by `make`, then renames it.
    fn place(&self, path: &str, make: impl FnOnce(&OwnedFd, &str) -> std::io::Result<()>) -> Result<(), TreeError> {
        let (parent, name) = split(path);
        let directory = self.directory(parent, 0o755).map_err(|cause| self.error("write", path, cause))?;
        let temporary = format!(".{name}.moor-new");
        // Left by a boot that was interrupted.
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        let result = make(&directory, &temporary)
            .and_then(|()| Ok(rustix::fs::renameat(&directory, &temporary, &directory, name)?));
        result.map_err(|cause| {
            let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
            self.error("write", path, cause)
        })
    }

    /// Opens a directory, and makes it and those above it where they are missing.
    fn directory(&self, path: &str, mode: u32) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        if path.is_empty() {
            return self.resolve("/", flags);
        }
        match self.resolve(path, flags) {
            Err(Errno::NOENT) => (),
            other => return other,
        }
        let (parent, name) = split(path);
        let above = self.directory(parent, mode)?;
        match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode)) {
            Ok(()) => {
                // Not the mode that the umask leaves; the name was made just now, and it is opened as itself.
                let own = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&above, name, own, Mode::empty())?;
                rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
            }
            // A link that leads nowhere also says so: then the next line fails.
            Err(Errno::EXIST) => (),
            Err(error) => return Err(error),
        }
        self.resolve(path, flags)
    }
}

/// Parent and name of an absolute path of the tree.
fn split(path: &str) -> (&str, &str) {
    path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    struct Place {
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(dir.path().join("root/etc")).unwrap();
            std::fs::create_dir_all(dir.path().join("outside")).unwrap();
            Self { dir }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn tree(&self) -> Tree {
            Tree::open(&self.path("root")).unwrap()
        }
    }

    #[test]
    fn a_file_appears_with_mode_owner_and_directories() {
        let place = Place::new();
        place.tree().make_directory("/etc/ssh/deep", 0o700).unwrap();
        place.tree().make_directory("/etc/ssh/deep", 0o755).unwrap();
        place.tree().write("/etc/ssh/deep/key", 0o600, b"secret").unwrap();
        place.tree().write("/etc/hostname", 0o644, b"n1\n").unwrap();
        place.tree().write("/etc/hostname", 0o644, b"n2\n").unwrap();
        let mode = |path: &str| std::fs::metadata(place.path(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            [mode("root/etc/ssh/deep/key"), mode("root/etc/ssh/deep"), mode("root/etc/ssh")],
            [0o600, 0o700, 0o755]
        );
        assert_eq!(place.tree().read("/etc/hostname").unwrap().as_deref(), Some("n2\n"));
        assert_eq!(place.tree().read("/etc/none").unwrap(), None);
        assert_eq!(std::fs::read_dir(place.path("root/etc")).unwrap().count(), 2, "nothing is left beside");
    }

    #[test]
    fn no_link_leads_out_of_the_root() {
        let place = Place::new();
        std::fs::write(place.path("outside/passwd"), "keep").unwrap();
        let outside = place.path("outside");
        // An absolute link is taken as the root would take it, one with `..` stops at the root.
        symlink(&outside, place.path("root/etc/absolute")).unwrap();
        symlink("../../../../../../../../outside", place.path("root/etc/relative")).unwrap();
        symlink(outside.join("passwd"), place.path("root/etc/passwd")).unwrap();
        let tree = place.tree();
        assert!(tree.write("/etc/absolute/new", 0o644, b"x").is_err());
        assert!(tree.write("/etc/relative/new", 0o644, b"x").is_err());
        assert_eq!(tree.read("/etc/passwd").unwrap(), None);
        // The link itself is replaced by the file.
        tree.write("/etc/passwd", 0o644, b"new").unwrap();
        assert!(!std::fs::symlink_metadata(place.path("root/etc/passwd")).unwrap().is_symlink());
        assert_eq!(std::fs::read_to_string(place.path("outside/passwd")).unwrap(), "keep");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    }

    #[test]
    fn the_whole_of_etc_may_be_a_link_out() {
        let place = Place::new();
        std::fs::remove_dir(place.path("root/etc")).unwrap();
        symlink(place.path("outside"), place.path("root/etc")).unwrap();
        assert!(place.tree().write("/etc/hostname", 0o644, b"n1\n").is_err());
        assert_eq!(std::fs::read_dir(place.path("outside")).unwrap().count(), 0);
    }

    #[test]
    fn a_link_inside_is_followed_as_the_root_would() {
        let place = Place::new();
        std::fs::create_dir_all(place.path("root/usr/etc/ssh")).unwrap();
        symlink("/usr/etc/ssh", place.path("root/etc/ssh")).unwrap();
        place.tree().write("/etc/ssh/sshd_config.d/10.conf", 0o644, b"x").unwrap();
        assert!(place.path("root/usr/etc/ssh/sshd_config.d/10.conf").is_file());
    }

    #[test]
    fn replacing_keeps_owner_and_mode() {
        let place = Place::new();
        let shadow = place.path("root/etc/shadow");
        std::fs::write(&shadow, "old").unwrap();
        std::fs::set_permissions(&shadow, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(&shadow, Some(0), Some(42)).unwrap();
        place.tree().replace("/etc/shadow", b"new").unwrap();
        let meta = std::fs::metadata(&shadow).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o640, 42));
        assert!(place.tree().replace("/etc/gshadow", b"new").is_err());
    }

    #[test]
    fn links_are_made_and_things_removed() {
        let place = Place::new();
        place.tree().link("/etc/localtime", "/usr/share/zoneinfo/UTC").unwrap();
        place.tree().link("/etc/localtime", "/usr/share/zoneinfo/Europe/Berlin").unwrap();
        let target = std::fs::read_link(place.path("root/etc/localtime")).unwrap();
        assert_eq!(target, Path::new("/usr/share/zoneinfo/Europe/Berlin"));
        place.tree().remove("/etc/localtime").unwrap();
        place.tree().remove("/etc/localtime").unwrap();
        assert_eq!(std::fs::read_dir(place.path("root/etc")).unwrap().count(), 0);
    }
}
