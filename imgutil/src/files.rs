//! Files that appear under their name only when they are complete: without a name, or with a temporary one, until then.

use crate::unpack::parent_of;
use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// A file that is being made. Dropped before [`Self::appear`], it leaves nothing; killed, neither, where the file system
/// knows files without names (`O_TMPFILE`: ext4, xfs, btrfs, tmpfs).
pub(crate) struct NewFile {
    file: File,
    directory: OwnedFd,
    path: PathBuf,
    name: OsString,
    /// The temporary name, where it has one.
    temporary: Option<OsString>,
}

/// What happens when the name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// The old file is replaced.
    Replace,
    /// An error.
    Refuse,
}

impl NewFile {
    /// Begins the file that will be at `path`, with these permission bits.
    pub(crate) fn create(path: &Path, mode: u32) -> Result<Self> {
        let context = || format!("cannot create '{}'", path.display());
        let name = path.file_name().with_context(context)?.to_owned();
        let parent = parent_of(path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty()).with_context(context)?;
        let mode = Mode::from_raw_mode(mode);
        let nameless = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let (file, temporary) = match rustix::fs::openat(&directory, ".", nameless, mode) {
            Ok(file) => (file, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let temporary = temporary_name(&name);
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                (rustix::fs::openat(&directory, &temporary, flags, mode).with_context(context)?, Some(temporary))
            }
            Err(error) => return Err(error).with_context(context),
        };
        rustix::fs::fchmod(&file, mode).with_context(context)?; // whatever the umask
        Ok(Self { file: File::from(file), directory, path: path.to_owned(), name, temporary })
    }

    /// The file, to be written.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Writes the file out and gives it its name; then writes the directory out.
    pub(crate) fn appear(mut self, existing: Existing) -> Result<()> {
        let path = self.path.clone();
        let context = || format!("cannot complete '{}'", path.display());
        self.file.sync_all().with_context(context)?;
        match (existing, self.temporary.take()) {
            (Existing::Refuse, None) => self.link(&self.name).map_err(|error| self.taken(error))?,
            (Existing::Refuse, Some(temporary)) => {
                let renamed = rustix::fs::renameat_with(
                    &self.directory,
                    &temporary,
                    &self.directory,
                    &self.name,
                    RenameFlags::NOREPLACE,
                );
                self.temporary = renamed.is_err().then_some(temporary);
                renamed.map_err(|error| self.taken(error))?;
            }
            (Existing::Replace, temporary) => {
                // A name can be given to a nameless file only where there is none, so it takes a detour.
                let temporary = if let Some(temporary) = temporary {
                    temporary
                } else {
                    let temporary = temporary_name(&self.name);
                    self.link(&temporary).with_context(context)?;
                    temporary
                };
                let renamed = rustix::fs::renameat(&self.directory, &temporary, &self.directory, &self.name);
                self.temporary = renamed.is_err().then_some(temporary);
                renamed.with_context(context)?;
            }
        }
        rustix::fs::fsync(&self.directory).with_context(context)
    }

    /// Gives a nameless file a name that is free.
    fn link(&self, name: &OsString) -> rustix::io::Result<()> {
        let source = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, source, &self.directory, name, AtFlags::SYMLINK_FOLLOW)
    }

    fn taken(&self, error: Errno) -> anyhow::Error {
        if error == Errno::EXIST {
            anyhow::anyhow!("'{}' exists already, and is not overwritten", self.path.display())
        } else {
            anyhow::Error::new(error).context(format!("cannot complete '{}'", self.path.display()))
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Only reached after another failure, which is the one to report.
            let _ = rustix::fs::unlinkat(&self.directory, temporary, AtFlags::empty());
        }
    }
}

/// A name beside `name` that nobody else uses.
fn temporary_name(name: &OsString) -> OsString {
    let mut random = [0; 8];
    // The name has to be free, not secret: without randomness the process id must do.
    if rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).is_err() {
        random = u64::from(std::process::id()).to_le_bytes();
    }
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", hex::encode(random)));
    temporary
}

/// Writes a small file whole: it is there complete, or not at all.
pub(crate) fn write_whole(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let new = NewFile::create(path, mode)?;
    new.file().write_all(bytes).with_context(|| format!("cannot write '{}'", path.display()))?;
    new.appear(Existing::Replace)
}

/// Refuses a path where something is.
pub(crate) fn must_be_free(path: &Path, advice: &str) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        bail!("'{}' exists already: {advice}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).expect("lists");
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_appears_only_when_complete() {
        let work = tempfile::tempdir().expect("directory");
        let path = work.path().join("file");
        let new = NewFile::create(&path, 0o600).expect("creates");
        new.file().write_all(b"one").expect("writes");
        assert!(names(work.path()).is_empty());
        new.appear(Existing::Refuse).expect("appears");
        assert_eq!(std::fs::read(&path).expect("reads"), b"one");
        assert_eq!(path.metadata().expect("stat").permissions().mode() & 0o7777, 0o600);

        let new = NewFile::create(&path, 0o644).expect("creates");
        new.file().write_all(b"two").expect("writes");
        let error = new.appear(Existing::Refuse).expect_err("is taken");
        assert!(format!("{error:#}").contains("exists already"), "{error:#}");
        write_whole(&path, 0o644, b"three").expect("replaces");
        assert_eq!(std::fs::read(&path).expect("reads"), b"three");
        drop(NewFile::create(&path, 0o644).expect("creates"));
        assert_eq!(names(work.path()), ["file"]);
    }
}
