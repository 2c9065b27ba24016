//! The whole image in memory, as plaintext: a squashfs in a file system of its own (tmpfs), which a loop device can be put on. It takes as
//! much memory as the sealed image would, for it is compressed as it is, and in return nothing has to run: no FUSE, no key, no process
//! that must not end. Afterwards the servers may all go.
//!
//! A process that is killed on the way leaves the file system where it is, and the next one goes on: the image's file itself says what has
//! arrived, for what has not is a hole in it. None of it is believed: each chunk is verified once more.

use crate::mount::FILE_NAME;
use crate::progress::Progress;
use crate::reader::{ReadError, Reader};
use crate::root::mounted;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{FlockOperation, SeekFrom, flock, seek};
use rustix::io::{Errno, retry_on_intr};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Type and source of the mount, as /proc/self/mountinfo shows them.
const KIND: &str = "tmpfs";
/// See [`KIND`].
const SOURCE: &str = "moor-image";
/// Read in one go: a whole number of chunks, whatever their size.
const PIECE: u64 = 1 << 20;
/// Reads side by side: enough that several servers have something to do, whatever the way to them is like.
const SIDE_BY_SIDE: usize = 12;
/// A cache that holds all that is on its way: what falls out of it is fetched once more.
pub const CACHE: u64 = 2 * PIECE * SIDE_BY_SIDE as u64;

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
    /// Another process brings an image to the same place.
    #[error("another process brings an image to '{}': wait for it, or end it", .0.display())]
    Busy(PathBuf),
    /// What an earlier try has left cannot be read.
    #[error("cannot read what is in memory of the image already: {0}")]
    Look(#[source] io::Error),
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

/// Whether a place of [`Ram`] is mounted on `dir`, which is a path without links.
///
/// # Errors
/// The kernel does not tell what is mounted.
pub fn is_place(dir: &Path) -> io::Result<bool> {
    Ok(mounted(dir)?.is_some_and(|(kind, source)| kind == KIND && source == Path::new(SOURCE)))
}

/// The right to look for a place on a directory, and to make one there. One process has it at a time, for a place itself can be locked only once it
/// is there: two that came at once would both find none, and one would mount over the other.
pub struct Claim {
    dir: PathBuf,
    /// The directory above, locked: the same one, whatever is mounted on `dir`.
    _above: File,
}

impl Claim {
    /// On `dir`. Whoever has it already is waited for, which takes a moment: nothing is fetched meanwhile.
    ///
    /// # Errors
    /// No such directory, or the root directory.
    pub fn new(dir: &Path) -> Result<Self, RamError> {
        let failed = |source| RamError::Place { dir: dir.to_owned(), source };
        let dir = dir.canonicalize().map_err(failed)?;
        let above = dir.parent().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let above = File::open(above).map_err(failed)?;
        retry_on_intr(|| flock(&above, FlockOperation::LockExclusive)).map_err(|error| failed(error.into()))?;
        Ok(Self { dir, _above: above })
    }

    fn failed(&self, source: impl Into<io::Error>) -> RamError {
        RamError::Place { dir: self.dir.clone(), source: source.into() }
    }

    /// Mounts a place for `size` bytes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn make(&self, size: u64) -> Result<Ram, RamError> {
        let dir = &self.dir;
        // A page for the directory, and the file in whole ones.
        let options = format!("mode=0700,nr_inodes=16,size={}", size.next_multiple_of(4096) + 65_536);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
        mount(Some(SOURCE), dir, Some(KIND), flags, Some(options.as_str())).map_err(|error| self.failed(error))?;
        // From here on it goes again unless all is well.
        let make = || -> io::Result<File> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o400).open(dir.join(FILE_NAME))?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            file.set_len(size)?;
            Ok(file)
        };
        match make() {
            Ok(file) => Ok(Ram { dir: dir.clone(), file: Arc::new(file), is_kept: false }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = umount2(dir, MntFlags::MNT_DETACH);
                Err(self.failed(error))
            }
        }
    }

    /// The place that a process has left which was killed before it was done; `None` where there is none for an image of `size` bytes. One for
    /// another is taken out of memory.
    ///
    /// # Errors
    /// That process still runs; the kernel refuses.
    pub fn left(&self, size: u64) -> Result<Option<Ram>, RamError> {
        let dir = &self.dir;
        if !is_place(dir).map_err(|error| self.failed(error))? {
            return Ok(None);
        }
        let path = dir.join(FILE_NAME);
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => {
                flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
                    Errno::WOULDBLOCK => RamError::Busy(dir.clone()),
                    other => self.failed(other),
                })?;
                // Whoever had the lock until now may have taken the place away, and then this is the file of nowhere.
                if !is_at(&file, &path).map_err(|error| self.failed(error))? {
                    return Ok(None);
                }
                if file.metadata().map_err(|error| self.failed(error))?.len() == size {
                    return Ok(Some(Ram { dir: dir.clone(), file: Arc::new(file), is_kept: false }));
                }
            }
            // It came no further than that, or has just been taken away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(self.failed(error)),
        }
        match umount2(dir, MntFlags::MNT_DETACH) {
            // Nothing is mounted there any more.
            Ok(()) | Err(nix::errno::Errno::EINVAL) => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }
}

/// A place in memory for an image. Dropped before [`Self::keep`], it is gone with all that is in it.
pub struct Ram {
    dir: PathBuf,
    file: Arc<File>,
    is_kept: bool,
}

impl Ram {
    /// Bytes of memory that it takes already.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn held(&self) -> Result<u64, RamError> {
        Ok(self.file.metadata().map_err(RamError::Look)?.blocks().saturating_mul(512))
    }

    /// Brings all of the image that is not there yet, every byte of it verified, from all servers at one time. What an earlier try has left is
    /// verified once more. An outage is waited out, and what is there is not fetched again.
    ///
    /// # Errors
    /// The image itself is bad; there is no memory for it.
    pub async fn fill(&self, reader: &Reader, progress: &Arc<Progress>) -> Result<(), RamError> {
        let size = reader.size();
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks: JoinSet<Result<(), RamError>> = JoinSet::new();
        for _ in 0..SIDE_BY_SIDE {
            let (reader, file, next, progress) = (reader.clone(), self.file.clone(), next.clone(), progress.clone());
            tasks.spawn(async move {
                loop {
                    let at = next.fetch_add(PIECE, Ordering::Relaxed);
                    if at >= size {
                        return Ok(());
                    }
                    let piece = at..(at + PIECE).min(size);
                    let missing = missing(&reader, &file, piece.clone()).await?;
                    progress.found(length(&piece) - missing.iter().map(length).sum::<u64>());
                    for part in missing {
                        let bytes = reader.read(part.start, in_memory(&part)).await?;
                        file.write_all_at(&bytes, part.start).map_err(RamError::Write)?;
                        progress.fetched(bytes.len() as u64);
                    }
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| RamError::Task(error.to_string()))??;
        }
        Ok(())
    }

    /// It stays when this process ends.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // The file, and its lock, go after that: whoever gets the lock then sees that the place is gone.
        if !self.is_kept
            && let Err(error) = umount2(&self.dir, MntFlags::MNT_DETACH)
        {
            tracing::warn!("cannot take '{}' out of memory: {error}", self.dir.display());
        }
    }
}

/// Whether a file is the one that is at `path`.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let there = match path.metadata() {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let file = file.metadata()?;
    Ok((file.dev(), file.ino()) == (there.dev(), there.ino()))
}

fn length(part: &Range<u64>) -> u64 {
    part.end - part.start
}

/// The length of a part of a piece, which fits into memory.
fn in_memory(part: &Range<u64>) -> usize {
    usize::try_from(length(part).min(PIECE)).unwrap_or(usize::MAX)
}

/// What of a piece is not in memory, or is something else than the image has there: whoever wrote it was killed at any moment.
async fn missing(reader: &Reader, file: &File, piece: Range<u64>) -> Result<Vec<Range<u64>>, RamError> {
    if is_hole(file, &piece).map_err(RamError::Look)? {
        return Ok(vec![piece]);
    }
    let mut bytes = vec![0; in_memory(&piece)];
    file.read_exact_at(&mut bytes, piece.start).map_err(RamError::Look)?;
    let size = reader.header().chunk_size();
    let mut missing: Vec<Range<u64>> = Vec::new();
    let chunks = bytes.chunks(usize::try_from(size).unwrap_or(usize::MAX));
    for (chunk, plaintext) in (piece.start / size..).zip(chunks) {
        let is_there = reader.is_chunk(chunk, plaintext).await;
        // A chunk takes a millisecond on a slow machine, and what is there waits for nobody: time limits and answers have to come in between.
        tokio::task::yield_now().await;
        if is_there {
            continue;
        }
        let start = chunk * size;
        let end = start + plaintext.len() as u64;
        match missing.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => missing.push(start..end),
        }
    }
    Ok(missing)
}

/// Whether nothing was ever written to a piece.
fn is_hole(file: &File, piece: &Range<u64>) -> io::Result<bool> {
    match seek(file, SeekFrom::Data(piece.start)) {
        Ok(data) => Ok(data >= piece.end),
        // Nothing up to the end of the file.
        Err(Errno::NXIO) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
