//! The whole image in memory, as plaintext: a squashfs in a file system of its own (tmpfs), which a loop device can be put on. It takes as
//! much memory as the sealed image would, for it is compressed as it is, and in return nothing has to run: no FUSE, no key, no process
//! that must not end. Afterwards the servers may all go.

use crate::mount::FILE_NAME;
use crate::reader::{ReadError, Reader};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Type and source of the mount, as /proc/self/mountinfo shows them.
pub const KIND: &str = "tmpfs";
/// See [`KIND`].
pub const SOURCE: &str = "moor-image";
/// Read in one go.
const PIECE: u64 = 1 << 20;
/// Reads side by side: enough that several servers have something to do, whatever the way to them is like.
const SIDE_BY_SIDE: usize = 12;
/// A cache that holds all that is on its way: what falls out of it is fetched once more.
pub const CACHE: u64 = 2 * PIECE * SIDE_BY_SIDE as u64;
/// How often progress is told: in so many parts.
const PARTS: u64 = 10;

/// The image is not in memory.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// There is no place for it.
    #[error("cannot make a place for the image at '{}': {source}", dir.display())]
    Place {
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Memory ended, or something like it.
    #[error("cannot write the image into memory: {0}")]
    Write(#[source] io::Error),
    /// The image itself is bad.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A task of this process is gone.
    #[error("a task that fetches the image ended: {0}")]
    Task(String),
}

/// A place in memory for an image. Dropped before [`Self::keep`], it is gone with all that is in it.
pub struct Ram {
    dir: PathBuf,
    file: Arc<File>,
    is_kept: bool,
}

impl Ram {
    /// Mounts a place for `size` bytes on `dir`.
    ///
    /// # Errors
    /// No such directory; the kernel refuses.
    pub fn new(dir: &Path, size: u64) -> Result<Self, RamError> {
        let failed = |source| RamError::Place { dir: dir.to_owned(), source };
        let dir = dir.canonicalize().map_err(failed)?;
        // A page for the directory, and the file in whole ones.
        let options = format!("mode=0700,nr_inodes=16,size={}", size.next_multiple_of(4096) + 65_536);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
        mount(Some(SOURCE), &dir, Some(KIND), flags, Some(options.as_str())).map_err(|error| failed(error.into()))?;
        let make = || -> io::Result<File> {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(dir.join(FILE_NAME))?;
            file.set_len(size)?;
            Ok(file)
        };
        match make() {
            Ok(file) => Ok(Self { dir, file: Arc::new(file), is_kept: false }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = umount2(&dir, MntFlags::MNT_DETACH);
                Err(failed(error))
            }
        }
    }

    /// Brings the whole image, every byte of it verified, from all servers at one time. An outage is waited out, and what is there is not
    /// fetched again. `told` hears of each part: bytes that are there.
    ///
    /// # Errors
    /// The image itself is bad; there is no memory for it.
    pub async fn fill(&self, reader: &Reader, told: impl Fn(u64)) -> Result<(), RamError> {
        let size = reader.size();
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks: JoinSet<Result<(), RamError>> = JoinSet::new();
        let (sender, mut arrived) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..SIDE_BY_SIDE {
            let (reader, file, next, sender) = (reader.clone(), self.file.clone(), next.clone(), sender.clone());
            tasks.spawn(async move {
                loop {
                    let at = next.fetch_add(PIECE, Ordering::Relaxed);
                    if at >= size {
                        return Ok(());
                    }
                    let length = usize::try_from(PIECE).unwrap_or(usize::MAX);
                    let bytes = reader.read(at, length).await?;
                    file.write_all_at(&bytes, at).map_err(RamError::Write)?;
                    // Whoever counts them has failed with another task.
                    let _ = sender.send(bytes.len() as u64);
                }
            });
        }
        drop(sender);
        let (mut have, mut said) = (0, 0);
        loop {
            tokio::select! {
                Some(bytes) = arrived.recv() => {
                    have += bytes;
                    if have * PARTS / size.max(1) > said {
                        said = have * PARTS / size.max(1);
                        told(have);
                    }
                }
                ended = tasks.join_next() => match ended {
                    Some(Ok(result)) => result?,
                    Some(Err(error)) => return Err(RamError::Task(error.to_string())),
                    None => return Ok(()),
                },
            }
        }
    }

    /// It stays when this process ends.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = umount2(&self.dir, MntFlags::MNT_DETACH)
        {
            tracing::warn!("cannot take '{}' out of memory: {error}", self.dir.display());
        }
    }
}
