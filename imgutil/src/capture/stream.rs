//! From a stream of files to a squashfs: contents are written as they arrive, inodes when all are there. What does not belong into an
//! image is left out on the way, wherever it is mounted.

use super::guard::{Guard, Look};
use super::tree::{self, Names, Tree};
use crate::inodes::{self, Written};
use crate::progress::Progress;
use crate::scrub::{self, Candidate, View, ViewPlace};
use crate::squashfs::{BLOCK_SIZE, Compression, ContentId, DataWriter, MEMORY, SUPERBLOCK_SIZE, WriterOptions};
use crate::tar::{Entry, Kind, Piece, Reader, STREAM, TarError};
use anyhow::{Context as _, Result, bail};
use aws_lc_rs::digest;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Files up to this size are held in memory until it is decided what becomes of them, and stored once if they are equal.
const SMALL: usize = 1 << 20;

/// A squashfs that was written.
pub(super) struct Part {
    /// Belongs at its beginning, where zeros were written.
    pub(super) superblock: [u8; SUPERBLOCK_SIZE],
    /// Bytes of it, padding included.
    pub(super) length: u64,
    pub(super) inodes: u64,
    /// What a squashfs cannot hold.
    pub(super) acls: Vec<PathBuf>,
    /// Other names of what was left out.
    pub(super) unlinked: Vec<PathBuf>,
}

/// Whose files these are.
pub(super) struct Place<'a, 'n> {
    /// Where the file system is mounted in its system.
    pub(super) mount: &'a str,
    /// What its system's image lacks; one for all file systems.
    pub(super) view: &'a mut View,
    /// Once it has found a key, files are only looked at.
    pub(super) guard: &'a mut Guard<'n>,
    pub(super) level: u32,
    pub(super) progress: &'a Progress,
}

/// Writes what comes from `input` to `out`.
pub(super) fn squash<W: Write, R: Read>(input: R, out: W, place: &mut Place<'_, '_>) -> Result<(W, Part)> {
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
    let options = WriterOptions {
        compression: Compression::Zstd(place.level),
        block_size: BLOCK_SIZE,
        workers: u32::try_from(workers)?,
        memory: MEMORY,
        modified: now()?,
    };
    let mount = Path::new(place.mount);
    let mut stream = Stream {
        writer: DataWriter::new(out, options)?,
        view: &mut *place.view,
        guard: &mut *place.guard,
        progress: place.progress,
        mount: mount.to_owned(),
        places: HashMap::new(),
        left_out: HashSet::new(),
        known: HashMap::new(),
        buffer: vec![0; SMALL],
        unlinked: Vec::new(),
    };
    stream.enter(mount);
    let mut tree = Tree::default();
    let mut reader = Reader::new(input, STREAM);
    while let Some(entry) = reader.next().map_err(explained)? {
        stream.take(entry, &mut reader, &mut tree)?;
    }
    // Behind the archive's end tar fills its last record.
    reader.finish().context("cannot read the end of the stream")?;
    if tree.inodes.is_empty() {
        bail!("no file came");
    }
    let Stream { writer, mount, unlinked, .. } = stream;
    let acls = tree.acls.iter().map(|path| full(&mount, path)).collect();
    let (inodes, xattrs, contents) = tree.finish();
    let Written { out, superblock, length } = inodes::write(&inodes, &xattrs, &contents, writer.finish_data()?)?;
    Ok((out, Part { superblock, length, inodes: inodes.len() as u64, acls, unlinked }))
}

/// What a stream that breaks off most likely means.
fn explained(error: TarError) -> anyhow::Error {
    let cut_off = matches!(&error, TarError::Read(error) if error.kind() == std::io::ErrorKind::UnexpectedEof);
    let error = anyhow::Error::new(error);
    if cut_off {
        error.context("the stream of files ends in the middle: the connection broke, or tar failed on the node")
    } else {
        error.context("the stream of files is damaged")
    }
}

fn now() -> Result<u32> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(u32::try_from(now.as_secs()).unwrap_or(u32::MAX))
}

fn full(mount: &Path, parts: &[Vec<u8>]) -> PathBuf {
    let mut path = mount.to_owned();
    path.extend(parts.iter().map(|part| OsStr::from_bytes(part)));
    path
}

struct Stream<'a, 'n, W: Write> {
    writer: DataWriter<W>,
    view: &'a mut View,
    guard: &'a mut Guard<'n>,
    progress: &'a Progress,
    mount: PathBuf,
    /// Directories that came, as the patterns see them.
    places: HashMap<Names, ViewPlace>,
    /// Directories that were left out, with all that follows of them.
    left_out: HashSet<Names>,
    known: HashMap<[u8; 32], ContentId>,
    buffer: Vec<u8>,
    unlinked: Vec<PathBuf>,
}

impl<W: Write> Stream<'_, '_, W> {
    /// Goes down to the mount point, as the patterns see it: a rule for /var/log counts on a file system of its own too.
    fn enter(&mut self, mount: &Path) {
        let mut place = self.view.root();
        for name in mount.iter().skip(1) {
            place = self.view.step(&place, name.as_bytes());
        }
        self.places.insert(Vec::new(), place);
    }

    fn take<R: Read>(&mut self, entry: Entry, reader: &mut Reader<R>, tree: &mut Tree) -> Result<()> {
        let names = tree::names(&entry.path)?;
        let path = full(&self.mount, &names);
        let context = || format!("cannot take '{}'", path.display());
        let Some((name, parent)) = names.split_last() else {
            return tree.add(names, entry, None).map(drop).with_context(context);
        };
        if self.left_out.contains(parent) {
            if entry.kind == Kind::Directory {
                self.left_out.insert(names);
            }
            return Ok(());
        }
        let Some(place) = self.places.get(parent) else { bail!("'{}' comes before its directory", path.display()) };
        let size = (entry.kind == Kind::File).then_some(entry.size);
        let small = match size {
            Some(size) if size <= SMALL as u64 => Some(read_small(reader, size, &mut self.buffer)?),
            _ => None,
        };
        let candidate = Candidate {
            path: &path,
            name,
            is_directory: entry.kind == Kind::Directory,
            is_regular: size.is_some(),
            bytes: size.unwrap_or(0),
        };
        let (verdict, below) =
            self.view.judge(place, &candidate, || Ok(small.clone().unwrap_or_default())).with_context(context)?;
        let is_directory = candidate.is_directory;
        if verdict == scrub::Verdict::LeaveOut {
            if is_directory {
                self.left_out.insert(names);
            }
            return Ok(());
        }
        if is_directory {
            self.places.insert(names.clone(), below);
        }
        let content = match (size, small) {
            (None, _) => None,
            _ if verdict == scrub::Verdict::Empty => Some(self.store(&[])?),
            (Some(_), Some(bytes)) => {
                self.guard.look(&path, &bytes).with_context(context)?;
                if self.guard.refuses() { None } else { Some(self.store(&bytes)?) }
            }
            (Some(size), None) => self.pass_on(reader, size, &path).with_context(context)?,
        };
        self.progress.advance(size.unwrap_or(0));
        if size.is_some() && content.is_none() {
            // There is no image any more, only a list of keys.
            return Ok(());
        }
        if !tree.add(names, entry, content).with_context(context)? {
            self.unlinked.push(path);
        }
        Ok(())
    }

    /// Stores a small file, or finds the one that is equal.
    fn store(&mut self, bytes: &[u8]) -> Result<ContentId> {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
        if let Some(content) = self.known.get(&hash) {
            return Ok(*content);
        }
        let content = self.writer.begin_file(bytes.len() as u64)?;
        if !bytes.is_empty() {
            self.writer.append(bytes)?;
        }
        self.writer.end_file()?;
        self.known.insert(hash, content);
        Ok(content)
    }

    /// Stores a large file as it comes, unless there is no image to store it in.
    fn pass_on<R: Read>(&mut self, reader: &mut Reader<R>, size: u64, path: &Path) -> Result<Option<ContentId>> {
        let zeros = vec![0; SMALL];
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut look = Look::at(path);
        let content = if self.guard.refuses() { None } else { Some(self.writer.begin_file(size)?) };
        let passed = reader.pieces(&mut buffer, |piece| {
            self.guard.pass(&mut look, piece);
            match piece {
                _ if content.is_none() => {}
                Piece::Data(bytes) => self.writer.append(bytes)?,
                Piece::Hole(mut length) => {
                    while length > 0 {
                        let step = length.min(SMALL as u64);
                        self.writer.append(&zeros[..usize::try_from(step)?])?;
                        length -= step;
                    }
                }
            }
            Ok::<(), anyhow::Error>(())
        });
        self.buffer = buffer;
        passed?;
        if content.is_some() {
            self.writer.end_file()?;
        }
        self.guard.passed(look)?;
        Ok(content)
    }
}

fn read_small<R: Read>(reader: &mut Reader<R>, size: u64, buffer: &mut [u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(size)?);
    reader.pieces(buffer, |piece| {
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(data),
            // Below SMALL: the map was checked.
            Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap_or_default(), 0),
        }
        Ok::<(), TarError>(())
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
    use std::process::Command;

    /// What real tar says of a tree.
    fn tar(tree: &Path) -> Vec<u8> {
        let output =
            Command::new("tar").args(super::super::node::TAR).arg("-C").arg(tree).args(["-cf", "-", "."]).output();
        let output = output.expect("tar runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut reader = Reader::new(bytes, STREAM);
        let mut entries = Vec::new();
        let mut buffer = vec![0; 4096];
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            reader.pieces(&mut buffer, |piece| {
                match piece {
                    Piece::Hole(length) => data.resize(data.len() + usize::try_from(length).expect("fits"), 0),
                    Piece::Data(bytes) => data.extend_from_slice(bytes),
                }
                Ok::<(), TarError>(())
            })?;
            entries.push((entry, data));
        }
        Ok(entries)
    }

    #[test]
    fn what_tar_writes_is_read_back() {
        let work = tempfile::tempdir().expect("directory");
        let tree = work.path();
        let long = "n".repeat(200);
        std::fs::create_dir(tree.join("d")).expect("makes");
        std::fs::write(tree.join("d").join(&long), "long name").expect("writes");
        std::fs::hard_link(tree.join("d").join(&long), tree.join("other")).expect("links");
        symlink("x".repeat(300), tree.join("link")).expect("links");
        let sparse = std::fs::File::create(tree.join("sparse")).expect("makes");
        sparse.write_all_at(b"in the middle", 3 << 20).expect("writes");
        sparse.set_len(8 << 20).expect("grows");
        std::fs::set_permissions(tree.join("sparse"), std::fs::Permissions::from_mode(0o4751)).expect("sets");
        rustix::fs::setxattr(tree.join("other"), "user.note", b"a=b\nc\0d", rustix::fs::XattrFlags::empty())
            .expect("sets");
        rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("makes");

        let bytes = tar(tree);
        assert!(bytes.len() < 1 << 20, "the holes were sent: {}", bytes.len());
        let entries = read(&bytes).expect("reads");
        let find = |name: &str| {
            let names = tree::names(name.as_bytes()).expect("a path");
            let found = entries.iter().find(|(entry, _)| tree::names(&entry.path).is_ok_and(|path| path == names));
            found.unwrap_or_else(|| panic!("no '{name}'"))
        };
        assert_eq!(find(".").0.kind, Kind::Directory);
        assert_eq!(find("d").0.kind, Kind::Directory);
        let link = &find("link").0;
        assert_eq!((link.kind, link.target.clone()), (Kind::Symlink, "x".repeat(300).into_bytes()));
        assert_eq!(find("fifo").0.kind, Kind::Fifo);
        let (entry, data) = find("sparse");
        assert_eq!((entry.kind, entry.size, entry.mode, data.len()), (Kind::File, 8 << 20, 0o4751, 8 << 20));
        assert!(data.iter().enumerate().all(|(at, byte)| (3 << 20..(3 << 20) + 13).contains(&at) || *byte == 0));
        assert_eq!(&data[3 << 20..(3 << 20) + 13], b"in the middle");
        // Of two names, the one that comes second points to the first.
        let (first, second) = (find(&format!("d/{long}")), find("other"));
        let (contents, other) = if first.0.kind == Kind::File { (first, second) } else { (second, first) };
        assert_eq!((contents.0.kind, contents.0.size, other.0.kind), (Kind::File, 9, Kind::HardLink));
        assert_eq!(contents.1, b"long name");
        let xattrs = &contents.0.xattrs;
        assert!(xattrs.contains(&(c"user.note".to_owned(), b"a=b\nc\0d".to_vec())), "{xattrs:?}");
    }

    #[test]
    fn a_damaged_stream_is_refused() {
        let work = tempfile::tempdir().expect("directory");
        std::fs::write(work.path().join("file"), vec![7; 3000]).expect("writes");
        let good = tar(work.path());
        assert!(read(&good).is_ok());
        // Behind the last entry there are only zeros, of which the first block is the end of the archive.
        let end = good.iter().rposition(|byte| *byte != 0).expect("an entry");
        for length in (0..end).step_by(97) {
            assert!(read(&good[..length]).is_err(), "cut at {length}");
        }
        let mut bad = good.clone();
        bad[0] ^= 1;
        assert!(matches!(read(&bad), Err(TarError::Header(0))));
    }
}
