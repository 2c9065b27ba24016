//! Reads the files of a scanned tree and stores their contents, each different content once.
//!
//! Whether a file is a duplicate is decided before a byte of it is written, because the sealed output cannot take
//! anything back: equal size first, then SHA-256. A file that changes meanwhile ends the pack with an error.

use super::scan::{self, InodeIndex, Kind, Tree, join, open_directory};
use crate::progress::Progress;
use crate::squashfs::{ContentId, DataWriter};
use anyhow::{Context as _, Result, bail};
use aws_lc_rs::digest;
use rustix::fs::{Mode, OFlags, SeekFrom};
use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

/// Bytes read at a time. Files up to this size are read once, larger possible duplicates twice.
const BUFFER: usize = 1 << 20;

type Hash = [u8; 32];

/// Stores the contents of all regular files, in the order of the tree.
pub(super) fn store<W: Write>(
    tree: &Tree,
    root: BorrowedFd<'_>,
    writer: &mut DataWriter<W>,
    progress: &Progress,
) -> Result<Vec<Option<ContentId>>> {
    let mut sizes = HashMap::new();
    for inode in &tree.inodes {
        if let Kind::File(size) = inode.kind {
            sizes.entry(size).and_modify(|unique: &mut bool| *unique = false).or_insert(true);
        }
    }
    let mut store = Store {
        tree,
        writer,
        progress,
        sizes,
        known: HashMap::new(),
        contents: vec![None; tree.inodes.len()],
        buffer: vec![0; BUFFER],
    };
    store.directory(root, InodeIndex(0), Path::new("/"))?;
    Ok(store.contents)
}

struct Store<'a, W: Write> {
    tree: &'a Tree,
    writer: &'a mut DataWriter<W>,
    progress: &'a Progress,
    /// Whether only one file has this size.
    sizes: HashMap<u64, bool>,
    known: HashMap<(u64, Hash), ContentId>,
    contents: Vec<Option<ContentId>>,
    buffer: Vec<u8>,
}

impl<W: Write> Store<'_, W> {
    fn directory(&mut self, fd: BorrowedFd<'_>, index: InodeIndex, path: &Path) -> Result<()> {
        let tree = self.tree;
        let Kind::Directory(entries) = &tree.inodes[index.0 as usize].kind else { return Ok(()) };
        for (name, child) in entries {
            let inode = &tree.inodes[child.0 as usize];
            match &inode.kind {
                Kind::Directory(below) if !below.is_empty() => {
                    let path = join(path, name);
                    let context = || format!("cannot open the directory '{}'", path.display());
                    let fd = open_directory(fd, name).with_context(context)?;
                    if scan::identity_of(&fd)?.0 != inode.identity {
                        bail!(
                            "'{}' was replaced while the tree was packed: pack a tree that is not in use",
                            path.display()
                        );
                    }
                    self.directory(fd.as_fd(), *child, &path)?;
                }
                Kind::File(size) if self.contents[child.0 as usize].is_none() => {
                    let path = join(path, name);
                    let content = self
                        .file(fd, name, *child, *size)
                        .with_context(|| format!("cannot pack '{}'", path.display()))?;
                    self.contents[child.0 as usize] = Some(content);
                    self.progress.advance(*size);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Stores one file, or finds the content that it shares.
    fn file(&mut self, parent: BorrowedFd<'_>, name: &CStr, index: InodeIndex, size: u64) -> Result<ContentId> {
        if size == 0 {
            return self.empty();
        }
        let mut file = self.open(parent, name, index, size)?;
        if self.sizes.get(&size).copied().unwrap_or(true) {
            return Ok(self.copy(&mut file, size, false)?.0);
        }
        let hash = if size <= BUFFER as u64 { self.read_small(&mut file, size)? } else { self.hash(&mut file, size)? };
        if let Some(content) = self.known.get(&(size, hash)) {
            return Ok(*content);
        }
        let content = if size <= BUFFER as u64 {
            let content = self.writer.begin_file()?;
            #[allow(clippy::cast_possible_truncation)] // compared with BUFFER above
            self.writer.append(&self.buffer[..size as usize])?;
            self.writer.end_file()?;
            content
        } else {
            rustix::fs::seek(&file, SeekFrom::Start(0))?;
            let (content, stored) = self.copy(&mut file, size, true)?;
            if stored != Some(hash) {
                bail!("it changed while it was read: pack a tree that is not in use");
            }
            content
        };
        self.known.insert((size, hash), content);
        Ok(content)
    }

    /// All empty files share one content.
    fn empty(&mut self) -> Result<ContentId> {
        let key = (0, [0; 32]);
        if let Some(content) = self.known.get(&key) {
            return Ok(*content);
        }
        let content = self.writer.begin_file()?;
        self.writer.end_file()?;
        self.known.insert(key, content);
        Ok(content)
    }

    fn open(&self, parent: BorrowedFd<'_>, name: &CStr, index: InodeIndex, size: u64) -> Result<File> {
        // NONBLOCK: a pipe that was put in the file's place must not make us wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
        let (identity, stat) = scan::identity_of(&file)?;
        if identity != self.tree.inodes[index.0 as usize].identity || stat.stx_size != size {
            bail!("it was replaced or changed while the tree was packed: pack a tree that is not in use");
        }
        Ok(file)
    }

    fn read_small(&mut self, file: &mut File, size: u64) -> Result<Hash> {
        let size = usize::try_from(size)?;
        let buffer = &mut self.buffer[..size];
        file.read_exact(buffer).map_err(shorter)?;
        Ok(finish(sha256(buffer)))
    }

    fn hash(&mut self, file: &mut File, size: u64) -> Result<Hash> {
        let mut context = digest::Context::new(&digest::SHA256);
        self.pieces(file, size, |_, piece| {
            context.update(piece);
            Ok(())
        })?;
        Ok(finish(context.finish()))
    }

    /// Stores a whole file, and says its hash if asked.
    fn copy(&mut self, file: &mut File, size: u64, hash: bool) -> Result<(ContentId, Option<Hash>)> {
        let mut context = hash.then(|| digest::Context::new(&digest::SHA256));
        let content = self.writer.begin_file()?;
        self.pieces(file, size, |writer, piece| {
            if let Some(context) = &mut context {
                context.update(piece);
            }
            Ok(writer.append(piece)?)
        })?;
        self.writer.end_file()?;
        Ok((content, context.map(|context| finish(context.finish()))))
    }

    /// Calls with the file's bytes in order. Holes are not read from the disk.
    fn pieces(
        &mut self,
        file: &mut File,
        size: u64,
        mut take: impl FnMut(&mut DataWriter<W>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut position = 0;
        while position < size {
            let (hole_end, data_end) = next_data(file, position, size)?;
            let mut zeros = hole_end - position;
            if zeros > 0 {
                self.buffer.fill(0);
            }
            while zeros > 0 {
                let step = zeros.min(BUFFER as u64);
                take(self.writer, &self.buffer[..usize::try_from(step)?])?;
                zeros -= step;
            }
            position = hole_end;
            while position < data_end {
                let step = usize::try_from((data_end - position).min(BUFFER as u64))?;
                file.read_exact(&mut self.buffer[..step]).map_err(shorter)?;
                take(self.writer, &self.buffer[..step])?;
                position += step as u64;
            }
        }
        Ok(())
    }
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

fn shorter(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        anyhow::anyhow!("it became shorter while it was read: pack a tree that is not in use")
    } else {
        error.into()
    }
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

fn finish(digest: digest::Digest) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}
