//! Files that appear under their name only when they are complete: without a name, or with a temporary one, until then.
//!
//! A temporary name goes with the process that has made it: it is removed on failure and, where [`clean_up_when_asked_to_end`] was called,
//! when a signal ends the program. What a killed one has left is removed by the next one that makes a file of the same name, or by who asks
//! for it ([`LeftOver`]). Each holds a lock on its file by which others know that it lives.

use crate::exec::{ASK_FOR_THE_END, SignalWatch};
use crate::unpack::parent_of;
use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Temporary names of this process.
static TEMPORARY: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn temporary() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    // A set of names is whole also if a thread has died over it.
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes something under a temporary name. The names are held meanwhile: a signal between the name and what is made would remove nothing, and
/// what is made then would stay.
fn make_temporary<T>(path: PathBuf, make: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let mut names = temporary();
    let made = make()?;
    names.insert(path);
    Ok(made)
}

/// From here on a signal that asks the program to end removes its temporary names first. For programs that do not watch signals themselves:
/// there can be one watch in a process.
pub(crate) fn clean_up_when_asked_to_end() -> Result<()> {
    let signals = SignalWatch::start(&ASK_FOR_THE_END)?;
    let wait = move || loop {
        // An error can only be an interruption, and then there is something to take.
        let _ = poll(&mut [PollFd::new(&signals, PollFlags::IN)], None);
        if let Some(signal) = signals.take().first() {
            // Held to the end: nobody makes a new one.
            let names = temporary();
            for name in names.iter() {
                // It has its own name already.
                let _ = std::fs::remove_file(name);
            }
            // With the dispositions of before, so that whoever waits sees what has ended the program.
            drop(signals);
            let _ = nix::sys::signal::raise(*signal);
            std::process::exit(128 + *signal as i32);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot watch signals")?;
    Ok(())
}

/// A file that is being made. Dropped before [`Self::appear`], it leaves nothing; killed, neither, where the file system
/// knows files without names (`O_TMPFILE`: ext4, xfs, btrfs, tmpfs; not NFS).
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
        remove_left_over(&directory, &name);
        let (file, temporary) = match rustix::fs::openat(&directory, ".", nameless, mode) {
            Ok(file) => (file, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let (file, temporary) = create_named(&directory, parent, &name, mode).with_context(context)?;
                (file, Some(temporary))
            }
            Err(error) => return Err(error).with_context(context),
        };
        // Another's name for it will come later, and the lock is there before.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
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
                self.let_go(temporary, renamed.is_ok());
                renamed.map_err(|error| self.taken(error))?;
            }
            (Existing::Replace, named) => {
                // A name can be given to a nameless file only where there is none, so it takes a detour.
                let temporary = if let Some(named) = named {
                    named
                } else {
                    let name = temporary_name(&self.name);
                    make_temporary(parent_of(&self.path).join(&name), || self.link(&name)).with_context(context)?;
                    name
                };
                let renamed = rustix::fs::renameat(&self.directory, &temporary, &self.directory, &self.name);
                self.let_go(temporary, renamed.is_ok());
                renamed.with_context(context)?;
            }
        }
        rustix::fs::fsync(&self.directory).with_context(context)
    }

    /// A temporary name is not there any more, or still is.
    fn let_go(&mut self, name: OsString, is_gone: bool) {
        if is_gone {
            temporary().remove(&parent_of(&self.path).join(name));
        } else {
            self.temporary = Some(name);
        }
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
        if let Some(name) = self.temporary.take() {
            // Only reached after another failure, which is the one to report.
            let _ = rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty());
            self.let_go(name, true);
        }
    }
}

/// Makes a file under a temporary name. It is locked, unless the file system has no locks.
fn create_named(
    directory: &OwnedFd,
    parent: &Path,
    name: &OsString,
    mode: Mode,
) -> rustix::io::Result<(OwnedFd, OsString)> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        let name = temporary_name(name);
        let file = make_temporary(parent.join(&name), || rustix::fs::openat(directory, &name, flags, mode))?;
        let is_taken = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK);
        // Before it was locked another one may have taken it for left over, and remove it.
        if !is_taken && rustix::fs::fstat(&file)?.st_nlink > 0 {
            return Ok((file, name));
        }
        temporary().remove(&parent.join(&name));
    }
}

/// Removes temporary names of `name` that nobody holds any more. What cannot be removed stays: it is in nobody's way.
fn remove_left_over(directory: &OwnedFd, name: &OsString) {
    for (name, _lock) in left_over(directory, |own| own == name.as_bytes()) {
        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
    }
}

/// Temporary names that nobody holds any more, of files whose own name is wanted. Each with its lock.
fn left_over(directory: &OwnedFd, is_wanted: impl Fn(&[u8]) -> bool) -> Vec<(CString, OwnedFd)> {
    let Ok(entries) = rustix::fs::Dir::read_from(directory) else { return Vec::new() };
    let take = |entry: rustix::fs::DirEntry| {
        let name = entry.file_name();
        own_name(name.to_bytes()).filter(|own| is_wanted(own))?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some((name.to_owned(), file))
    };
    entries.flatten().filter_map(take).collect()
}

/// The name that the file under a temporary name was to get.
fn own_name(temporary: &[u8]) -> Option<&[u8]> {
    let rest = temporary.strip_prefix(b".")?;
    let (name, end) = rest.split_at_checked(rest.len().checked_sub(17)?)?;
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    end.strip_prefix(b".")?.iter().all(is_digit).then_some(name)
}

/// What a killed program has begun, under a temporary name, and nobody goes on with.
pub(crate) struct LeftOver {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Its size.
    pub(crate) bytes: u64,
    _lock: OwnedFd,
}

impl LeftOver {
    /// All of them in `directory` whose own name is wanted, in no order.
    pub(crate) fn find(directory: &Path, is_wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Self>> {
        let context = || format!("cannot list '{}'", directory.display());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(directory, flags, Mode::empty()).with_context(context)?;
        let look = |(name, lock): (CString, OwnedFd)| {
            let bytes = rustix::fs::fstat(&lock).with_context(context)?.st_size;
            let path = directory.join(OsStr::from_bytes(name.to_bytes()));
            Ok(Self { path, bytes: u64::try_from(bytes).unwrap_or_default(), _lock: lock })
        };
        left_over(&opened, is_wanted).into_iter().map(look).collect()
    }

    /// Removes it.
    pub(crate) fn remove(&self) -> Result<()> {
        std::fs::remove_file(&self.path).with_context(|| format!("cannot remove '{}'", self.path.display()))
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
    fn no_signal_comes_between_a_temporary_name_and_its_file() {
        let path = || PathBuf::from("/nowhere/.file.0123456789abcdef");
        let is_held = || matches!(TEMPORARY.try_lock(), Err(std::sync::TryLockError::WouldBlock));
        assert!(make_temporary(path(), || Ok(is_held())).expect("makes"), "a signal could remove names meanwhile");
        assert!(temporary().remove(&path()));
        assert_eq!(make_temporary::<()>(path(), || Err(Errno::NOSPC)), Err(Errno::NOSPC));
        assert!(!temporary().contains(&path()));
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

    #[test]
    fn what_a_killed_program_left_goes_and_what_another_makes_stays() {
        let work = tempfile::tempdir().expect("directory");
        for name in [".file.0123456789abcdef", ".file.0123456789ABCDEF", ".file.x", ".other.0123456789abcdef"] {
            std::fs::write(work.path().join(name), "").expect("writes");
        }
        let directory = OwnedFd::from(File::open(work.path()).expect("opens"));
        let (held, name) =
            create_named(&directory, work.path(), &"file".into(), Mode::RUSR | Mode::WUSR).expect("creates");
        drop(NewFile::create(&work.path().join("file"), 0o644).expect("creates"));
        let mut expected = [".file.0123456789ABCDEF", ".file.x", ".other.0123456789abcdef"].map(str::to_owned).to_vec();
        expected.push(name.into_string().expect("is text"));
        expected.sort();
        let there = || {
            let mut there = names(work.path());
            there.sort();
            there
        };
        assert_eq!(there(), expected);
        // Whoever asks for all of them finds those of other names too, and not the one that is held.
        let found = LeftOver::find(work.path(), |own| own != b"file").expect("lists");
        let paths: Vec<_> = found.iter().map(|left| left.path.clone()).collect();
        assert_eq!(paths, [work.path().join(".other.0123456789abcdef")]);
        assert!(LeftOver::find(work.path(), |_| true).expect("lists").is_empty(), "held by whoever found it");
        drop(found);
        drop(held);
        write_whole(&work.path().join("file"), 0o644, b"x").expect("writes");
        assert_eq!(there(), [".file.0123456789ABCDEF", ".file.x", ".other.0123456789abcdef", "file"]);
    }
}
