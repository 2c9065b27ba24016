//! Reads the files of a scanned tree ahead of the compression, and decides which of them are duplicates.
//!
//! Whether a file is a duplicate is decided before a byte of it is handed on, because the sealed output cannot take anything back:
//! equal size first, then SHA-256. A file that changes meanwhile ends the pack with an error.

use super::scan::{self, Tree, join, open_directory};
use crate::inodes::{InodeIndex, Kind};
use crate::scrub::{KEY_BOUND, KeyGuard};
use anyhow::{Context as _, Result, bail};
use aws_lc_rs::digest;
use rustix::fs::{Advice, Mode, OFlags, SeekFrom};
use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender};

/// Bytes in a batch. Files up to this size are read once, larger possible duplicates twice.
const BATCH: usize = 1 << 20;
/// Small files of one batch, at most: their records take memory too.
const OPS: usize = 16_384;

type Hash = [u8; 32];

/// Contents of files, or parts of them, in order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) ops: Vec<Op>,
    pub(super) bytes: Vec<u8>,
}

/// What is to be done with a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Op {
    /// The content of this inode begins.
    Begin(InodeIndex),
    /// It goes on with these bytes of the batch.
    Data(Range<usize>),
    /// It goes on with so many zeros.
    Zeros(u64),
    /// It ends.
    End(InodeIndex),
    /// This inode's content is that of another, which was handed on before.
    Same(InodeIndex, InodeIndex),
}

/// The one that reads.
pub(super) struct Reading<'a> {
    tree: &'a Tree,
    guard: Option<KeyGuard<'a>>,
    out: SyncSender<Batch>,
    reuse: Receiver<Batch>,
    batch: Batch,
    /// Whether only one file has this size.
    sizes: HashMap<u64, bool>,
    known: HashMap<(u64, Hash), InodeIndex>,
    done: Vec<bool>,
}

/// The other side has ended, and has the reason.
struct Ended;

impl<'a> Reading<'a> {
    pub(super) fn new(
        tree: &'a Tree,
        guard: Option<KeyGuard<'a>>,
        out: SyncSender<Batch>,
        reuse: Receiver<Batch>,
    ) -> Self {
        let mut sizes = HashMap::new();
        for inode in &tree.inodes {
            if let Kind::File(size) = inode.kind {
                sizes.entry(size).and_modify(|unique: &mut bool| *unique = false).or_insert(true);
            }
        }
        let done = vec![false; tree.inodes.len()];
        let batch = Batch { ops: Vec::new(), bytes: Vec::with_capacity(BATCH) };
        Self { tree, guard, out, reuse, batch, sizes, known: HashMap::new(), done }
    }

    /// Reads everything below `root`.
    pub(super) fn run(mut self, root: BorrowedFd<'_>) -> Result<()> {
        if self.directory(root, InodeIndex(0), Path::new("/"))?.is_ok() {
            if let Some(guard) = self.guard.take() {
                guard.finish()?;
            }
            // If nobody takes it, the other side knows why.
            let _ = self.send();
        }
        Ok(())
    }

    fn directory(&mut self, fd: BorrowedFd<'_>, index: InodeIndex, path: &Path) -> Result<Result<(), Ended>> {
        let tree = self.tree;
        let Kind::Directory(entries) = &tree.inodes[index.0 as usize].kind else { return Ok(Ok(())) };
        for (name, child) in entries {
            let inode = &tree.inodes[child.0 as usize];
            let sent = match &inode.kind {
                Kind::Directory(below) if !below.is_empty() => {
                    let path = join(path, name);
                    let context = || format!("cannot open the directory '{}'", path.display());
                    let fd = open_directory(fd, name).with_context(context)?;
                    if scan::identity_of(&fd)?.0 != tree.identities[child.0 as usize] {
                        bail!(
                            "'{}' was replaced while the tree was packed: pack a tree that is not in use",
                            path.display()
                        );
                    }
                    self.directory(fd.as_fd(), *child, &path)?
                }
                Kind::File(size) if !std::mem::replace(&mut self.done[child.0 as usize], true) => {
                    let path = join(path, name);
                    let context = || format!("cannot pack '{}'", path.display());
                    self.file(fd, name, *child, *size, &path).with_context(context)?
                }
                _ => Ok(()),
            };
            if sent.is_err() {
                return Ok(sent);
            }
        }
        Ok(Ok(()))
    }

    /// Hands on one file, or says what content it shares.
    fn file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        index: InodeIndex,
        size: u64,
        path: &Path,
    ) -> Result<Result<(), Ended>> {
        if size == 0 {
            // All empty files share one content.
            self.whole(index, size, Some([0; 32]), 0);
            return Ok(Ok(()));
        }
        let mut file = self.open(parent, name, index, size)?;
        let is_unique = self.sizes.get(&size).copied().unwrap_or(true);
        if size <= BATCH as u64 {
            let length = usize::try_from(size)?;
            if (self.batch.bytes.len() + length > BATCH || self.batch.ops.len() > OPS) && self.send().is_err() {
                return Ok(Err(Ended));
            }
            let start = self.batch.bytes.len();
            self.batch.bytes.resize(start + length, 0);
            file.read_exact(&mut self.batch.bytes[start..]).map_err(shorter)?;
            let bytes = &self.batch.bytes[start..];
            let hash = (!is_unique).then(|| finish(digest::digest(&digest::SHA256, bytes)));
            if let Some(guard) = &mut self.guard {
                guard.look(path, bytes)?;
                if guard.refuses() {
                    self.batch.bytes.truncate(start);
                    return Ok(Ok(()));
                }
            }
            self.whole(index, size, hash, length);
            return Ok(Ok(()));
        }
        self.large(&mut file, index, size, is_unique, path)
    }

    /// Hands on a file whose `length` bytes are the last ones of the batch.
    fn whole(&mut self, index: InodeIndex, size: u64, hash: Option<Hash>, length: usize) {
        let start = self.batch.bytes.len() - length;
        if let Some(hash) = hash {
            if let Some(other) = self.known.get(&(size, hash)) {
                self.batch.bytes.truncate(start);
                self.batch.ops.push(Op::Same(index, *other));
                return;
            }
            self.known.insert((size, hash), index);
        }
        self.batch.ops.push(Op::Begin(index));
        if length > 0 {
            self.batch.ops.push(Op::Data(start..start + length));
        }
        self.batch.ops.push(Op::End(index));
    }

    /// A file that fills several batches.
    fn large(
        &mut self,
        file: &mut File,
        index: InodeIndex,
        size: u64,
        is_unique: bool,
        path: &Path,
    ) -> Result<Result<(), Ended>> {
        // Only advice: a file system that does not take it reads as it would.
        let _ = rustix::fs::fadvise(&*file, 0, None, Advice::Sequential);
        if self.send().is_err() {
            return Ok(Err(Ended));
        }
        if let Some(guard) = &mut self.guard {
            self.batch.bytes.resize(KEY_BOUND, 0);
            file.read_exact(&mut self.batch.bytes).map_err(shorter)?;
            guard.look(path, &self.batch.bytes)?;
            self.batch.bytes.clear();
            if guard.refuses() {
                return Ok(Ok(()));
            }
            rustix::fs::seek(&*file, SeekFrom::Start(0))?;
        }
        let hash = if is_unique { None } else { Some(self.hash(file, size)?) };
        if let Some(hash) = hash {
            if let Some(other) = self.known.get(&(size, hash)) {
                self.batch.ops.push(Op::Same(index, *other));
                return Ok(Ok(()));
            }
            self.known.insert((size, hash), index);
            rustix::fs::seek(&*file, SeekFrom::Start(0))?;
        }
        self.batch.ops.push(Op::Begin(index));
        let mut context = hash.map(|_| digest::Context::new(&digest::SHA256));
        let sent = self.pieces(file, size, |this, piece| match piece {
            Piece::Zeros(length) => {
                if let Some(context) = &mut context {
                    update_zeros(context, length);
                }
                this.batch.ops.push(Op::Zeros(length));
                Ok(())
            }
            Piece::Read => {
                if let Some(context) = &mut context {
                    context.update(&this.batch.bytes);
                }
                this.batch.ops.push(Op::Data(0..this.batch.bytes.len()));
                this.send()
            }
        })?;
        if sent.is_err() {
            return Ok(sent);
        }
        if let (Some(context), Some(hash)) = (context, hash)
            && finish(context.finish()) != hash
        {
            bail!("it changed while it was read: pack a tree that is not in use");
        }
        self.batch.ops.push(Op::End(index));
        Ok(Ok(()))
    }

    fn hash(&mut self, file: &mut File, size: u64) -> Result<Hash> {
        let mut context = digest::Context::new(&digest::SHA256);
        let _: Result<(), Ended> = self.pieces(file, size, |this, piece| {
            match piece {
                Piece::Zeros(length) => update_zeros(&mut context, length),
                Piece::Read => {
                    context.update(&this.batch.bytes);
                    this.batch.bytes.clear();
                }
            }
            Ok(())
        })?;
        Ok(finish(context.finish()))
    }

    /// Hands the batch on and begins another.
    fn send(&mut self) -> Result<(), Ended> {
        if self.batch.ops.is_empty() {
            self.batch.bytes.clear();
            return Ok(());
        }
        let mut next = self.reuse.try_recv().unwrap_or_else(|_| Batch { ops: Vec::new(), bytes: Vec::new() });
        next.ops.clear();
        next.bytes.clear();
        next.bytes.reserve(BATCH);
        self.out.send(std::mem::replace(&mut self.batch, next)).map_err(|_| Ended)
    }

    /// Calls with the file's parts in order; what was read is in the batch, which the callee empties. Holes are not read.
    fn pieces(
        &mut self,
        file: &mut File,
        size: u64,
        mut take: impl FnMut(&mut Self, Piece) -> Result<(), Ended>,
    ) -> Result<Result<(), Ended>> {
        let mut position = 0;
        while position < size {
            let (hole_end, data_end) = next_data(file, position, size)?;
            if hole_end > position && take(self, Piece::Zeros(hole_end - position)).is_err() {
                return Ok(Err(Ended));
            }
            position = hole_end;
            while position < data_end {
                let step = usize::try_from((data_end - position).min(BATCH as u64))?;
                self.batch.bytes.resize(step, 0);
                file.read_exact(&mut self.batch.bytes).map_err(shorter)?;
                if take(self, Piece::Read).is_err() {
                    return Ok(Err(Ended));
                }
                position += step as u64;
            }
        }
        Ok(Ok(()))
    }

    fn open(&self, parent: BorrowedFd<'_>, name: &CStr, index: InodeIndex, size: u64) -> Result<File> {
        // NONBLOCK: a pipe that was put in the file's place must not make us wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
        let (identity, stat) = scan::identity_of(&file)?;
        if identity != self.tree.identities[index.0 as usize] || stat.stx_size != size {
            bail!("it was replaced or changed while the tree was packed: pack a tree that is not in use");
        }
        Ok(file)
    }
}

/// A part of a large file.
enum Piece {
    Zeros(u64),
    /// The bytes of the batch.
    Read,
}

/// Where the next data begins and ends at or after `position`; the file's offset is then at the beginning.
fn next_data(file: &File, position: u64, size: u64) -> Result<(u64, u64)> {
    use rustix::io::Errno;
    let begin = match rustix::fs::seek(file, SeekFrom::Data(position)) {
        Ok(begin) => begin.min(size),
        Err(Errno::NXIO) => return Ok((size, size)),
        // A file system that knows no holes: all is data.
        Err(Errno::INVAL | Errno::NOTSUP) => {
            rustix::fs::seek(file, SeekFrom::Start(position))?;
            return Ok((position, size));
        }
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(begin)).unwrap_or(size).clamp(begin, size);
    rustix::fs::seek(file, SeekFrom::Start(begin))?;
    Ok((begin, end))
}

fn update_zeros(context: &mut digest::Context, length: u64) {
    static ZEROS: [u8; 65_536] = [0; 65_536];
    let mut rest = length;
    while rest > 0 {
        #[allow(clippy::cast_possible_truncation)] // at most the length of ZEROS
        let step = rest.min(ZEROS.len() as u64) as usize;
        context.update(&ZEROS[..step]);
        rest -= step as u64;
    }
}

fn shorter(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        anyhow::anyhow!("it became shorter while it was read: pack a tree that is not in use")
    } else {
        error.into()
    }
}

fn finish(digest: digest::Digest) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}
