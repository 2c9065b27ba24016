//! From a stream of files to a squashfs: contents are written as they arrive, inodes when all are there. What does not belong into an
//! image is left out on the way, wherever it is mounted.

use super::tar::{Entry, Kind, Piece, Reader, TarError};
use super::tree::{Tree, What, Xattrs};
use crate::progress::Progress;
use crate::scrub::{self, Candidate, View, ViewPlace};
use crate::squashfs::{
    Attributes, BLOCK_SIZE, Compression, ContentId, DataWriter, Entry as Name, InodeRef, SUPERBLOCK_SIZE, Special,
    TreeWriter, WriterOptions, XattrId,
};
use anyhow::{Context as _, Result, bail};
use aws_lc_rs::digest;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Files up to this size are held in memory until it is decided what becomes of them, and stored once if they are equal.
const SMALL: usize = 1 << 20;
/// The squashfs ends on a multiple of this.
const PADDING: u64 = 4096;

/// A squashfs that was written.
pub(super) struct Part {
    /// Belongs at its beginning, where zeros were written.
    pub(super) superblock: [u8; SUPERBLOCK_SIZE],
    /// Bytes of it, padding included.
    pub(super) length: u64,
    pub(super) inodes: u64,
    /// What a squashfs cannot hold.
    pub(super) acls: Vec<PathBuf>,
    /// Private keys that were left out, and files like them that belong to the system's programs.
    pub(super) keys: Vec<PathBuf>,
    /// Other names of what was left out.
    pub(super) unlinked: Vec<PathBuf>,
}

/// Whose files these are.
pub(super) struct Place<'a> {
    /// Where the file system is mounted in its system.
    pub(super) mount: &'a str,
    /// What its system's image lacks; one for all file systems.
    pub(super) view: &'a mut View,
    pub(super) level: u32,
    pub(super) progress: &'a Progress,
}

/// Writes what comes from `input` to `out`.
pub(super) fn squash<W: Write, R: Read>(input: R, out: W, place: &mut Place<'_>) -> Result<(W, Part)> {
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
    let options = WriterOptions {
        compression: Compression::Zstd(place.level),
        block_size: BLOCK_SIZE,
        workers: u32::try_from(workers)?,
        modified: now()?,
    };
    let mount = Path::new(place.mount);
    let mut stream = Stream {
        writer: DataWriter::new(out, options)?,
        view: &mut *place.view,
        progress: place.progress,
        mount: mount.to_owned(),
        places: HashMap::new(),
        left_out: HashSet::new(),
        known: HashMap::new(),
        buffer: vec![0; SMALL],
        keys: Vec::new(),
        unlinked: Vec::new(),
    };
    stream.enter(mount);
    let mut tree = Tree::default();
    let mut reader = Reader::new(input);
    while let Some(entry) = reader.next()? {
        stream.take(entry, &mut reader, &mut tree)?;
    }
    // Behind the archive's end tar fills its last record.
    std::io::copy(&mut reader.into_inner(), &mut std::io::sink()).context("cannot read the end of the stream")?;
    if tree.nodes.is_empty() {
        bail!("no file came");
    }
    let Stream { writer, mount, keys, unlinked, .. } = stream;
    let mut inodes = Inodes::new(&tree, writer.finish_data()?)?;
    let root_number = u32::try_from(tree.nodes.len()).context("too many inodes for a squashfs")?;
    let root = inodes.directory(0, root_number, root_number + 1)?;
    let (mut out, superblock) = inodes.writer.finish(root, root_number)?;
    let used = u64::from_le_bytes(superblock[40..48].try_into().context("superblock")?);
    let length = used.next_multiple_of(PADDING);
    out.write_all(&vec![0; usize::try_from(length - used)?]).context("cannot write the end of the squashfs")?;
    let acls = tree.acls.iter().map(|path| full(&mount, path)).collect();
    Ok((out, Part { superblock, length, inodes: tree.nodes.len() as u64, acls, keys, unlinked }))
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

struct Stream<'a, W: Write> {
    writer: DataWriter<W>,
    view: &'a mut View,
    progress: &'a Progress,
    mount: PathBuf,
    /// Directories that came, as the patterns see them.
    places: HashMap<Vec<Vec<u8>>, ViewPlace>,
    /// Directories that were left out, with all that follows of them.
    left_out: HashSet<Vec<Vec<u8>>>,
    known: HashMap<[u8; 32], ContentId>,
    buffer: Vec<u8>,
    keys: Vec<PathBuf>,
    unlinked: Vec<PathBuf>,
}

impl<W: Write> Stream<'_, W> {
    /// Goes down to the mount point, as the patterns see it: a rule for /var/log counts on a file system of its own too.
    fn enter(&mut self, mount: &Path) {
        let mut place = self.view.root();
        for name in mount.iter().skip(1) {
            place = self.view.step(&place, name.as_bytes());
        }
        self.places.insert(Vec::new(), place);
    }

    fn take<R: Read>(&mut self, entry: Entry, reader: &mut Reader<R>, tree: &mut Tree) -> Result<()> {
        let path = full(&self.mount, &entry.path);
        let context = || format!("cannot take '{}'", path.display());
        let Some((name, parent)) = entry.path.split_last() else {
            return tree.add(entry, None).map(drop).with_context(context);
        };
        if self.left_out.contains(parent) {
            if entry.kind == Kind::Directory {
                self.left_out.insert(entry.path);
            }
            return Ok(());
        }
        let Some(place) = self.places.get(parent) else { bail!("'{}' comes before its directory", path.display()) };
        let size = if let Kind::File(size) = entry.kind { Some(size) } else { None };
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
                self.left_out.insert(entry.path);
            }
            return Ok(());
        }
        if is_directory {
            self.places.insert(entry.path.clone(), below);
        }
        let content = match (size, small) {
            (None, _) => None,
            _ if verdict == scrub::Verdict::Empty => Some(self.store(&[])?),
            (Some(_), Some(bytes)) => {
                if self.holds_key(&path, &bytes) {
                    return Ok(());
                }
                Some(self.store(&bytes)?)
            }
            (Some(size), None) => match self.pass_on(reader, size, &path).with_context(context)? {
                Some(content) => Some(content),
                None => return Ok(()),
            },
        };
        self.progress.advance(size.unwrap_or(0));
        if !tree.add(entry, content).with_context(context)? {
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

    /// Whether a file is to be left out because its first bytes are a private key. Below /usr lies what programs ship.
    fn holds_key(&mut self, path: &Path, bytes: &[u8]) -> bool {
        let found = scrub::find_key(bytes).is_some();
        if found {
            self.keys.push(path.to_owned());
        }
        found && !path.starts_with("/usr")
    }

    /// Stores a large file as it comes, unless its first bytes are a private key.
    fn pass_on<R: Read>(&mut self, reader: &mut Reader<R>, size: u64, path: &Path) -> Result<Option<ContentId>> {
        let zeros = vec![0; SMALL];
        let mut buffer = std::mem::take(&mut self.buffer);
        let (mut content, mut left_out) = (None, false);
        let passed = reader.contents(&mut buffer, |piece| {
            if let (None, Piece::Data(bytes)) = (content, piece) {
                left_out = left_out || self.holds_key(path, bytes);
            }
            if left_out {
                return Ok(());
            }
            if content.is_none() {
                content = Some(self.writer.begin_file(size)?);
            }
            match piece {
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
        Ok(content)
    }
}

fn read_small<R: Read>(reader: &mut Reader<R>, size: u64, buffer: &mut [u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(size)?);
    reader.contents(buffer, |piece| {
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(data),
            // Below SMALL: the map was checked.
            Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap_or_default(), 0),
        }
        Ok::<(), TarError>(())
    })?;
    Ok(bytes)
}

/// Writes inodes and directories, children first.
struct Inodes<'a, W: Write> {
    tree: &'a Tree,
    writer: TreeWriter<W>,
    xattrs: Vec<XattrId>,
    written: Vec<Option<(u32, InodeRef)>>,
    next_number: u32,
}

impl<'a, W: Write> Inodes<'a, W> {
    fn new(tree: &'a Tree, mut writer: TreeWriter<W>) -> Result<Self> {
        let mut store =
            |set: &Xattrs| writer.xattrs(set.iter().map(|(name, value)| (name.as_c_str(), value.as_slice())));
        let xattrs = tree.xattrs.iter().map(&mut store).collect::<Result<_, _>>()?;
        Ok(Self { tree, writer, xattrs, written: vec![None; tree.nodes.len()], next_number: 1 })
    }

    fn directory(&mut self, index: usize, number: u32, parent: u32) -> Result<InodeRef> {
        let tree = self.tree;
        let What::Directory(children) = &tree.nodes[index].what else {
            bail!("an inode that is no directory has entries")
        };
        for child in children.values() {
            if self.written[*child].is_some() {
                continue;
            }
            let own = self.next_number;
            self.next_number += 1;
            let place = if let What::Directory(_) = tree.nodes[*child].what {
                self.directory(*child, own, number)?
            } else {
                self.leaf(*child, own)?
            };
            self.written[*child] = Some((own, place));
        }
        let mut entries = Vec::with_capacity(children.len());
        for (name, child) in children {
            let (number, inode) = self.written[*child].context("an entry's inode was not written")?;
            entries.push(Name { name, number, inode, mode: kind_bits(&tree.nodes[*child].what) });
        }
        let attributes = self.attributes(index, number);
        Ok(self.writer.directory(&attributes, parent, entries)?)
    }

    fn leaf(&mut self, index: usize, number: u32) -> Result<InodeRef> {
        let attributes = self.attributes(index, number);
        let special = match &self.tree.nodes[index].what {
            What::File(content) => return Ok(self.writer.file(&attributes, *content)?),
            What::Directory(_) => bail!("a directory is no leaf"),
            What::Symlink(target) => Special::Symlink(target),
            What::BlockDevice(major, minor) => Special::BlockDevice(*major, *minor),
            What::CharDevice(major, minor) => Special::CharDevice(*major, *minor),
            What::Fifo => Special::Fifo,
        };
        Ok(self.writer.special(&attributes, special)?)
    }

    fn attributes(&self, index: usize, number: u32) -> Attributes {
        let node = &self.tree.nodes[index];
        Attributes {
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            number,
            links: node.links,
            xattrs: node.xattrs.map_or(XattrId::NONE, |set| self.xattrs[set]),
        }
    }
}

/// The type in `st_mode`.
fn kind_bits(what: &What) -> u32 {
    use rustix::fs::FileType;
    let kind = match what {
        What::Directory(_) => FileType::Directory,
        What::File(_) => FileType::RegularFile,
        What::Symlink(_) => FileType::Symlink,
        What::BlockDevice(..) => FileType::BlockDevice,
        What::CharDevice(..) => FileType::CharacterDevice,
        What::Fifo => FileType::Fifo,
    };
    rustix::fs::Mode::empty().as_raw_mode() | kind.as_raw_mode()
}
