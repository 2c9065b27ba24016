//! Reading and changing files of a tree under construction by path. Symbolic links of the tree are followed inside the
//! tree: `/lib/x` lands in `/usr/lib/x`, and nothing lands on the host.

use super::BuildError;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, unlinkat};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

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
            openat2(&self.0, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
        };
        let mut directory = open(Path::new("."))?;
        let mut at = std::path::PathBuf::from("/");
        for part in path.components().filter(|part| matches!(part, Component::Normal(_))) {
            at.push(part);
            directory = match open(&at) {
                Err(rustix::io::Errno::NOENT) if make => {
                    mkdirat(&directory, part.as_os_str(), Mode::from_raw_mode(0o755))?;
                    open(&at)?
                }
                other => other?,
            };
        }
        Ok(directory)
    }

    fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((parent, name)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Replaces the file at `path`; directories above it are made.
    pub(super) fn write(&self, path: impl AsRef<Path>, mode: u32, content: &mut dyn Read) -> Result<(), BuildError> {
        let path = path.as_ref();
        let mut write = || -> io::Result<()> {
            let (parent, name) = Self::split(path)?;
            let directory = self.directory(parent, true)?;
            match unlinkat(&directory, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(&directory, name, flags, Mode::from_raw_mode(0o600))?;
            let mut file = std::fs::File::from(file);
            io::copy(content, &mut file)?;
            file.flush()?;
            // Not by the umask of whoever builds.
            Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?)
        };
        write().map_err(|error| BuildError::io("write in the tree", path, error))
    }

    /// Replaces the file at `path` by a text.
    pub(super) fn write_text(&self, path: impl AsRef<Path>, text: &str) -> Result<(), BuildError> {
        self.write(path, 0o644, &mut text.as_bytes())
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

    /// Removes all that is in the directory at `path`, if there is such a directory; it stays.
    pub(super) fn remove_below(&self, path: impl AsRef<Path>) -> Result<(), BuildError> {
        let path = path.as_ref();
        for name in self.list(path)? {
            let place = path.join(&name);
            // A link to a directory is a link: what is behind it stays.
            let remove =
                |flags| -> io::Result<()> { Ok(unlinkat(self.directory(path, false)?, name.as_str(), flags)?) };
            match remove(AtFlags::empty()) {
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                    self.remove_below(&place)?;
                    remove(AtFlags::REMOVEDIR)
                }
                other => other,
            }
            .map_err(|error| BuildError::io("remove in the tree", &place, error))?;
        }
        Ok(())
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
        openat2(&self.0, path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(tree.write_text("/out/y", "2").is_err(), "the link's target does not exist in the tree");
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
        std::fs::create_dir_all(root.join("var/cache/a/b")).unwrap();
        std::fs::write(root.join("var/cache/a/file"), "x").unwrap();
        std::os::unix::fs::symlink("../../usr", root.join("var/cache/link")).unwrap();
        tree.remove_below("/var/cache").unwrap();
        tree.remove_below("/var/none").unwrap();
        assert!(tree.list("/var/cache").unwrap().is_empty());
        assert!(tree.exists("/lib/systemd/x") && !tree.exists("/out"));
    }
}
