//! One read-only file in a directory: `DIR/image`. What a file system has to know about FUSE is in [`fuse`]; the reader's side is the
//! trait [`ReadOnlyFile`], so that another way into the kernel can take its place.

mod fuse;

use crate::apart::Outside;
use crate::reader::Reader;
use bytes::Bytes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use tokio::runtime::Handle;

/// Name of the file in the mount.
pub const FILE_NAME: &str = "image";
/// Its type, as /proc/self/mountinfo shows it.
pub const KIND: &str = "fuse.moor-tether";

/// Bytes of a file in a row, in parts that nobody had to copy.
pub type Pieces = Vec<Bytes>;
/// What to do with the result of a read.
pub type Reply = Box<dyn FnOnce(io::Result<Pieces>) + Send>;

/// A file that can be read at random. Its reads may take for ever; they must not block the caller.
pub trait ReadOnlyFile: Send + Sync + 'static {
    /// Its length in bytes.
    fn size(&self) -> u64;
    /// When it was made, in Unix seconds.
    fn modified(&self) -> u64;
    /// Reads `length` bytes at `offset`, less only at the end, and hands them to `reply`.
    fn read(&self, offset: u64, length: usize, reply: Reply);
}

/// The reader as a file: reads that have to wait become tasks of its runtime.
pub struct ImageFile {
    reader: Reader,
    runtime: Handle,
}

impl ImageFile {
    /// Reads run on `runtime`.
    #[must_use]
    pub fn new(reader: Reader, runtime: Handle) -> Self {
        Self { reader, runtime }
    }
}

impl ReadOnlyFile for ImageFile {
    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn modified(&self) -> u64 {
        self.reader.header().created
    }

    fn read(&self, offset: u64, length: usize, reply: Reply) {
        let read = self.reader.start(offset, length);
        match read.now() {
            Some(pieces) => reply(Ok(pieces)),
            None => {
                self.runtime.spawn(async move {
                    reply(read.wait().await.map_err(io::Error::other));
                });
            }
        }
    }
}

/// The mount cannot be made, or not be ended.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The directory is not there, or is none.
    #[error("cannot mount on '{}': {source}; make the directory first", dir.display())]
    Directory {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel has no FUSE, or this process may not use it.
    #[error("cannot open /dev/fuse: {0}; load the module 'fuse', and run as root")]
    Device(io::Error),
    /// The kernel refuses.
    #[error("cannot mount on '{}': {source}", dir.display())]
    Mount {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel and this program do not understand each other, or the first look at the mount failed.
    #[error("the mount on '{}' does not work: {source}", dir.display())]
    Session {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is in use.
    #[error("'{}' is in use: end what uses it first (a loop device over its image: `losetup -a`)", .0.display())]
    Busy(PathBuf),
    /// It cannot be ended for another reason.
    #[error("cannot unmount '{}': {source}", dir.display())]
    Unmount {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A mounted image. Dropped, it is unmounted, lazily where it is in use.
pub struct Mount {
    dir: PathBuf,
    /// As long as this process may unmount it.
    outside: Option<Outside>,
    session: Option<JoinHandle<io::Result<()>>>,
}

impl Mount {
    /// Mounts `file` on `dir` and returns once the mount answers. `outside` is where `dir` means what the caller meant.
    ///
    /// # Errors
    /// No directory, no FUSE, or it does not answer.
    pub fn new(dir: &Path, file: impl ReadOnlyFile, outside: Outside) -> Result<Self, MountError> {
        let (place, size) = (dir.to_owned(), file.size());
        let session_error = |source| MountError::Session { dir: dir.to_owned(), source };
        let (dir, device) = outside.run(move || attach(&place)).map_err(session_error)??;
        let session_error = |source| MountError::Session { dir: dir.clone(), source };
        let mut mount = Self { dir: dir.clone(), outside: None, session: None };
        let outside = mount.outside.insert(outside);
        let session = fuse::Session::start(file, device).map_err(session_error)?;
        let serve = move || {
            // Better with them than not at all.
            let _ = crate::survive::drop_capabilities();
            session.run()
        };
        mount.session = Some(std::thread::Builder::new().name("fuse".into()).spawn(serve).map_err(session_error)?);
        // Answers come only when all of it works.
        let looked_at = dir.clone();
        let looked = outside.run(move || Ok(looked_at.join(FILE_NAME).metadata()?.len()));
        if looked.flatten().map_err(session_error)? != size {
            return Err(session_error(io::Error::other("the file in it has another length")));
        }
        Ok(mount)
    }

    /// From now on others unmount it.
    pub fn settle(&mut self) {
        self.outside = None;
    }

    /// Waits until somebody has unmounted it and the last user has closed it.
    ///
    /// # Errors
    /// The connection to the kernel broke.
    pub fn wait(mut self) -> io::Result<()> {
        self.settle();
        match self.session.take() {
            Some(session) => session.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the mount panicked"))),
            None => Ok(()),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After `wait` it is gone already, and somebody else's mount may be in its place.
        if let Some(outside) = self.outside.take() {
            let dir = self.dir.clone();
            // Not mounted any more is as good.
            let _ = outside.run(move || umount2(&dir, MntFlags::MNT_DETACH));
        }
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
    }
}

/// Mounts on `dir`; whoever looks at it waits until the device is served. Returns where it is, and the device.
fn attach(dir: &Path) -> Result<(PathBuf, File), MountError> {
    let dir = dir.canonicalize().map_err(|source| MountError::Directory { dir: dir.to_owned(), source })?;
    let device = open_device().map_err(MountError::Device)?;
    let options = format!("fd={},rootmode=40500,user_id=0,group_id=0,default_permissions", device.as_raw_fd());
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some("moor-tether"), &dir, Some(KIND), flags, Some(options.as_str()))
        .map_err(|error| MountError::Mount { dir: dir.clone(), source: error.into() })?;
    Ok((dir, device))
}

/// /dev/fuse; its module is loaded where it is not there yet.
fn open_device() -> io::Result<File> {
    let open = || OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_CLOEXEC).open("/dev/fuse");
    open().or_else(|error| {
        if !matches!(error.kind(), io::ErrorKind::NotFound) && error.raw_os_error() != Some(nix::libc::ENODEV) {
            return Err(error);
        }
        crate::root::load_module("fuse");
        open()
    })
}

/// Ends the mount on `dir`; its process ends by itself then.
///
/// # Errors
/// It is in use, or none.
pub fn unmount(dir: &Path) -> Result<(), MountError> {
    umount2(dir, MntFlags::UMOUNT_NOFOLLOW).map_err(|error| match error {
        nix::errno::Errno::EBUSY => MountError::Busy(dir.to_owned()),
        nix::errno::Errno::EINVAL => {
            MountError::Unmount { dir: dir.to_owned(), source: io::Error::other("nothing is mounted there") }
        }
        other => MountError::Unmount { dir: dir.to_owned(), source: other.into() },
    })
}
