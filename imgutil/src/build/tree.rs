//! Reading and changing files of a tree under construction by path. Symbolic links of the tree are followed inside the
//! tree: `/lib/x` lands in `/usr/lib/x`, and nothing lands on the host.

use super::BuildError;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chmodat, chownat, mkdirat, openat, symlinkat, unlinkat,
};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

/// Of a text file, so much is read.
const TEXT_LIMIT: u64 = 16 << 20;

/// A tree, held by its root directory.
pub(super) struct Tree(OwnedFd);

impl Tree {
    pub(super) fn open(root: &Path) -> Result<Self, BuildError> {
        rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(Self)
            .map_err(|error| BuildError::io("open the tree", root, error.into()))
    }

    /// Opens the directory at `path`, making what is missing of it if `make`.
    fn directory(&self, path: &Path, make: bool) -> io::Result<OwnedFd> {
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            crate::in_root::openat2(
                &self.0,
                path,
                flags,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            )
        };
        let mut directory = open(Path::new("."))?;
        let mut at = std::path::PathBuf::from("/");
        for part in path.components().filter(|part| matches!(part, Component::Normal(_))) {
            at.push(part);
            directory = match open(&at) {
                Err(rustix::io::Errno::NOENT) if make => {
                    match mkdirat(&directory, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        // It is there, and yet cannot be opened.
                        Err(rustix::io::Errno::EXIST) => return Err(Self::leads_nowhere(&at)),
                        other => other?,
                    }
                    // By the umask of no caller: `imgutil` sets its own, another program may not.
                    let made = open(&at)?;
                    chmodat(&directory, part.as_os_str(), Mode::from_raw_mode(0o755), AtFlags::empty())?;
                    made
                }
                other => other?,
            };
        }
        Ok(directory)
    }

    fn leads_nowhere(path: &Path) -> io::Error {
        io::Error::other(format!("'{}' is a symbolic link that leads to nothing in the tree", path.display()))
    }

    fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((parent, name)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Opens the directory above `path`, made if need be, and takes away what is at `path`, unless it is a directory.
    fn clear(&self, path: &Path) -> io::Result<(OwnedFd, std::ffi::OsString)> {
        let (parent, name) = Self::split(path)?;
        let directory = self.directory(parent, true)?;
        match unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok((directory, name.to_owned())),
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces the file at `path`; directories above it are made. `owner` is a user's and a group's number.
    pub(super) fn write(
        &self,
        path: impl AsRef<Path>,
        mode: u32,
        owner: (u32, u32),
        content: &mut dyn Read,
    ) -> Result<(), BuildError> {
        let path = path.as_ref();
        let mut write = || -> io::Result<()> {
            let (directory, name) = self.clear(path)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(&directory, name, flags, Mode::from_raw_mode(0o600))?;
            let mut file = std::fs::File::from(file);
            io::copy(content, &mut file)?;
            file.flush()?;
            std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
            // After the owner, whose change clears set-uid bits; not by the umask of whoever builds.
            Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?)
        };
        write().map_err(|error| BuildError::io("write in the tree", path, error))
    }

    /// Replaces what is at `path` by a symbolic link.
    pub(super) fn symlink(
        &self,
        path: impl AsRef<Path>,
        target: impl AsRef<Path>,
        owner: (u32, u32),
    ) -> Result<(), BuildError> {
        let path = path.as_ref();
        let link = || -> io::Result<()> {
            let (directory, name) = self.clear(path)?;
            symlinkat(target.as_ref(), &directory, &name)?;
            Ok(chownat(
                &directory,
                &name,
                Some(Uid::from_raw(owner.0)),
                Some(Gid::from_raw(owner.1)),
                AtFlags::SYMLINK_NOFOLLOW,
            )?)
        };
        link().map_err(|error| BuildError::io("make the link in the tree", path, error))
    }

    /// Makes the directory at `path`, or gives the one that is there this mode and owner.
    pub(super) fn make_directory(
        &self,
        path: impl AsRef<Path>,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<(), BuildError> {
        let path = path.as_ref();
        let make = || -> io::Result<()> {
            let directory = self.directory(path, true)?;
            // Opened for its name only: changed through its entry for itself.
            let (uid, gid) = (Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
            chownat(&directory, ".", uid, gid, AtFlags::empty())?;
            Ok(chmodat(&directory, ".", Mode::from_raw_mode(mode), AtFlags::empty())?)
        };
        make().map_err(|error| BuildError::io("make the directory in the tree", path, error))
    }

    /// Makes the directory at `path` if there is none. One that is there stays as it is.
    pub(super) fn have_directory(&self, path: impl AsRef<Path>) -> Result<(), BuildError> {
        let path = path.as_ref();
        self.directory(path, true).map_err(|error| BuildError::io("make the directory in the tree", path, error))?;
        Ok(())
    }

    /// Makes a symbolic link of root's in a directory that exists, unless something is at `path`.
    pub(super) fn symlink_if_free(&self, path: impl AsRef<Path>, target: impl AsRef<Path>) -> Result<(), BuildError> {
        let path = path.as_ref();
        let link = || -> io::Result<()> {
            let (parent, name) = Self::split(path)?;
            match symlinkat(target.as_ref(), self.directory(parent, false)?, name) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        link().map_err(|error| BuildError::io("make the link in the tree", path, error))
    }

    fn open_file(&self, path: &Path, flags: OFlags) -> io::Result<std::fs::File> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = std::fs::File::from(crate::in_root::openat2(&self.0, path, flags, Mode::empty(), resolve)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(file)
    }

    /// The text of the file at `path`; empty if there is none.
    pub(super) fn read_text(&self, path: &str) -> Result<String, BuildError> {
        let Some(file) = self.open_to_read(path)? else { return Ok(String::new()) };
        let mut text = String::new();
        file.take(TEXT_LIMIT)
            .read_to_string(&mut text)
            .map_err(|error| BuildError::io("read in the tree", path, error))?;
        Ok(text)
    }

    /// Opens the file at `path` for reading; `None` if there is none.
    pub(super) fn open_to_read(&self, path: &str) -> Result<Option<std::fs::File>, BuildError> {
        match self.open_file(Path::new(path), OFlags::RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).map_err(|error| BuildError::io("read in the tree", path, error)),
        }
    }

    /// Gives the file at `path` another text; mode and owner stay.
    pub(super) fn rewrite(&self, path: &str, text: &str) -> Result<(), BuildError> {
        let write = || self.open_file(Path::new(path), OFlags::WRONLY | OFlags::TRUNC)?.write_all(text.as_bytes());
        write().map_err(|error| BuildError::io("write in the tree", path, error))
    }

    /// Copies the file at `from` to `to`, as root's.
    pub(super) fn copy(&self, from: &str, to: &str, mode: u32) -> Result<(), BuildError> {
        let mut file = self
            .open_file(Path::new(from), OFlags::RDONLY)
            .map_err(|error| BuildError::io("read in the tree", from, error))?;
        self.write(to, mode, (0, 0), &mut file)
    }

    /// Replaces the file at `path` by a text.
    pub(super) fn write_text(&self, path: impl AsRef<Path>, text: &str) -> Result<(), BuildError> {
        self.write(path, 0o644, (0, 0), &mut text.as_bytes())
    }

    /// Removes the file at `path`, if there is one.
    pub(super) fn remove(&self, path: impl AsRef<Path>) -> Result<(), BuildError> {
        let path = path.as_ref();
        let remove = || -> io::Result<()> {
            let (parent, name) = Self::split(path)?;
            Ok(unlinkat(self.directory(parent, false)?, name, AtFlags::empty())?)
        };
        match remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(BuildError::io("remove in the tree", path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes what is at `path` with everything in it; a link itself and not what it leads to. Whether there was something.
    pub(super) fn remove_all(&self, path: impl AsRef<Path>) -> Result<bool, BuildError> {
        let path = path.as_ref();
        let remove = || -> io::Result<()> {
            let (parent, name) = Self::split(path)?;
            Self::remove_entry(&self.directory(parent, false)?, name)
        };
        match remove() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            other => other.map(|()| true).map_err(|error| BuildError::io("remove in the tree", path, error)),
        }
    }

    fn remove_entry(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        match unlinkat(parent, name, AtFlags::empty()) {
            Err(rustix::io::Errno::ISDIR) => {}
            other => return Ok(other?),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(parent, name, flags, Mode::empty())?;
        for entry in rustix::fs::Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                Self::remove_entry(&directory, OsStr::from_bytes(name.to_bytes()))?;
            }
        }
        Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
    }

    /// Removes the directory at `path` if it is empty. Whether it was.
    pub(super) fn remove_empty(&self, path: impl AsRef<Path>) -> bool {
        let remove = || -> io::Result<()> {
            let (parent, name) = Self::split(path.as_ref())?;
            Ok(unlinkat(self.directory(parent, false)?, name, AtFlags::REMOVEDIR)?)
        };
        remove().is_ok()
    }

    /// Names in the directory at `path`; none if there is no such directory.
    pub(super) fn list(&self, path: impl AsRef<Path>) -> Result<Vec<String>, BuildError> {
        let path = path.as_ref();
        let list = || -> io::Result<Vec<String>> {
            let directory = self.directory(path, false)?;
            let readable = openat(directory.as_fd(), ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            let mut names = Vec::new();
            for entry in rustix::fs::Dir::new(readable)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if name != "." && name != ".." {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        match list() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|error| BuildError::io("list in the tree", path, error)),
        }
    }

    /// Whether there is something at `path`, a link to nowhere not counted.
    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        crate::in_root::openat2(&self.0, path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn links_of_the_tree_end_inside_the_tree() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("root");
        std::fs::create_dir_all(root.join("usr/lib")).unwrap();
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).unwrap();
        std::os::unix::fs::symlink(scratch.path(), root.join("out")).unwrap();
        std::os::unix::fs::symlink("../../../../outside", root.join("usr/up")).unwrap();
        let tree = Tree::open(&root).unwrap();
        tree.write_text("/lib/systemd/x", "1").unwrap();
        assert_eq!(std::fs::read_to_string(root.join("usr/lib/systemd/x")).unwrap(), "1");
        let error = tree.write_text("/out/y", "2").unwrap_err().to_string();
        assert!(error.contains("'/out' is a symbolic link that leads to nothing in the tree"), "{error}");
        assert!(tree.write_text("/usr/up/z", "3").is_err());
        assert!(!scratch.path().join("y").exists() && !scratch.path().join("outside").exists());
        std::os::unix::fs::symlink("/etc/hostname", root.join("usr/h")).unwrap();
        tree.write_text("/usr/h", "mine").unwrap();
        assert!(
            !root.join("usr/h").symlink_metadata().unwrap().is_symlink(),
            "a link is replaced, not written through"
        );
        tree.remove("/usr/h").unwrap();
        tree.remove("/usr/h").unwrap();
        assert_eq!(tree.list("/usr").unwrap(), ["lib", "up"]);
        assert!(tree.list("/none").unwrap().is_empty());
        assert!(tree.exists("/lib/systemd/x") && !tree.exists("/out"));
        tree.make_directory("/srv/a", 0o700, (3, 4)).unwrap();
        tree.symlink("/srv/a/l", "../b", (5, 6)).unwrap();
        tree.write("/srv/a/f", 0o4755, (7, 8), &mut "1".as_bytes()).unwrap();
        let seen = |path: &str| {
            let metadata = root.join(path).symlink_metadata().unwrap();
            (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
        };
        assert_eq!((seen("srv").0, seen("srv/a"), seen("srv/a/f")), (0o755, (0o700, 3, 4), (0o4755, 7, 8)));
        assert_eq!((seen("srv/a/l").1, seen("srv/a/l").2), (5, 6));
        tree.rewrite("/srv/a/f", "22").unwrap();
        assert_eq!((tree.read_text("/srv/a/f").unwrap().as_str(), seen("srv/a/f").1), ("22", 7));
        assert_eq!(tree.read_text("/none").unwrap(), "");
        tree.copy("/srv/a/f", "/srv/copy", 0o600).unwrap();
        assert_eq!((tree.read_text("/srv/copy").unwrap().as_str(), seen("srv/copy")), ("22", (0o600, 0, 0)));
        assert!(tree.copy("/out/y", "/srv/copy", 0o600).is_err());
        assert!(tree.read_text("/srv").unwrap_err().to_string().contains("no regular file"));
    }

    #[test]
    fn what_is_removed_and_made_is_inside_the_tree() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, host) = (scratch.path().join("root"), scratch.path().join("host"));
        std::fs::create_dir_all(host.join("work/lib")).unwrap();
        std::fs::write(host.join("work/file"), "the host's").unwrap();
        std::fs::create_dir_all(root.join("a/b/c")).unwrap();
        std::fs::write(root.join("a/b/c/file"), "").unwrap();
        std::os::unix::fs::symlink(&host, root.join("a/b/out")).unwrap();
        std::os::unix::fs::symlink(&host, root.join("srv")).unwrap();
        let tree = Tree::open(&root).unwrap();
        assert!(!tree.remove_all("/srv/work").unwrap(), "it is not in the tree");
        assert!(tree.remove_all("/a/b").unwrap());
        assert!(tree.list("/a").unwrap().is_empty());
        assert!(!tree.remove_empty("/srv") && tree.remove_empty("/a") && !tree.remove_empty("/a"));

        assert!(tree.have_directory("/srv/work").is_err() && tree.symlink_if_free("/srv/work/x", "y").is_err());
        tree.make_directory("/var", 0o711, (3, 4)).unwrap();
        tree.have_directory("/var/lib").unwrap();
        assert_eq!(std::fs::metadata(root.join("var")).unwrap().mode() & 0o777, 0o711);
        tree.symlink_if_free("/var/lib/rpm", "x").unwrap();
        tree.symlink_if_free("/var/lib/rpm", "y").unwrap();
        assert_eq!(std::fs::read_link(root.join("var/lib/rpm")).unwrap(), Path::new("x"));

        assert_eq!(std::fs::read_to_string(host.join("work/file")).unwrap(), "the host's");
        assert_eq!(std::fs::read_dir(&host).unwrap().count(), 1);
    }
}
