//! One of the two that are compared: everything about its files but their bytes, which are only hashed where they have to be.

use super::Total;
use crate::pack::{Looked, look_at_tree};
use crate::sbom::database::{self, Installed, TreeFiles};
use crate::sbom::image_files::ImageFiles;
use crate::scrub::ViewOptions;
use crate::squashfs::{Inode, InodeKind, InodePlace, Piece, Reader, SquashfsError};
use crate::unpack::{SquashfsIn, open_with_any};
use anyhow::{Context as _, Result, bail};
use aws_lc_rs::digest;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A file, as far as it is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a regular file; otherwise 0.
    pub size: u64,
    /// Unix seconds.
    pub mtime: u32,
    /// Where a link points.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "crate::lossy::option")]
    pub target: Option<PathBuf>,
    /// Major and minor of a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<(u32, u32)>,
    /// Extended attributes; values in hexadecimal.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
}

impl Entry {
    /// What differs, but for the bytes of files.
    pub(super) fn compare(&self, other: &Self, times: bool) -> Vec<&'static str> {
        [
            ("type", self.kind != other.kind),
            ("size", self.size != other.size),
            ("mode", self.mode != other.mode),
            ("owner", (self.uid, self.gid) != (other.uid, other.gid)),
            ("target", self.target != other.target),
            ("device", self.device != other.device),
            ("xattrs", self.xattrs != other.xattrs),
            ("mtime", times && self.mtime != other.mtime),
        ]
        .into_iter()
        .filter_map(|(what, differs)| differs.then_some(what))
        .collect()
    }
}

/// An image or a tree.
pub struct Side {
    pub(super) entries: BTreeMap<PathBuf, Entry>,
    pub(super) packages: Vec<Installed>,
    /// Of files with several names each name, and which file it is.
    pub(super) linked: HashMap<PathBuf, u64>,
    total: Total,
    contents: Contents,
}

enum Contents {
    Tree(OwnedFd),
    Image {
        parts: Vec<Reader<SquashfsIn>>,
        /// Where each regular file is: in which part, and where there.
        places: HashMap<PathBuf, (usize, InodePlace)>,
        hashes: HashMap<(usize, InodePlace), [u8; 32]>,
    },
}

impl Side {
    /// Opens an image file, or a directory as a tree. A tree is seen as the packer sees it if `scrub` is set.
    pub fn open(path: &Path, key_files: &[PathBuf], scrub: bool) -> Result<Self> {
        if path.is_dir() { Self::tree(path, scrub) } else { Self::image(path, key_files) }
    }

    fn tree(path: &Path, scrub: bool) -> Result<Self> {
        let options = ViewOptions { scrub, ..ViewOptions::default() };
        let Looked { root, entries, linked, bytes } = look_at_tree(path, &options)?;
        let packages = database::installed(&TreeFiles::new(root.as_fd()))?;
        let total = Total { files: entries.len() as u64, bytes, packages: packages.len() };
        Ok(Self { entries, packages, linked, total, contents: Contents::Tree(root) })
    }

    fn image(path: &Path, key_files: &[PathBuf]) -> Result<Self> {
        let open = || SquashfsIn::all(open_with_any(path, key_files)?, path);
        let context = || format!("cannot read image '{}'", path.display());
        let packages = ImageFiles::open(open()?).and_then(|files| database::installed(&files)).with_context(context)?;
        let (mut parts, mut entries) = (Vec::new(), BTreeMap::<PathBuf, Entry>::new());
        let mut places = HashMap::<PathBuf, (usize, InodePlace)>::new();
        let (mut linked, mut numbers) = (HashMap::<PathBuf, u64>::new(), HashMap::new());
        for (mount, source) in open()? {
            let mut walk = Walk::begin(source).with_context(context)?;
            let root = walk.reader.root();
            walk.inode(root, mount.clone()).with_context(context)?;
            // It covers what the file system that it is mounted in has there.
            entries.retain(|path, _| !path.starts_with(&mount));
            places.retain(|path, _| !path.starts_with(&mount));
            entries.append(&mut walk.entries);
            linked.retain(|path, _| !path.starts_with(&mount));
            for (path, place) in walk.linked {
                let next = numbers.len() as u64;
                linked.insert(path, *numbers.entry((parts.len(), place)).or_insert(next));
            }
            places.extend(walk.places.into_iter().map(|(path, place)| (path, (parts.len(), place))));
            parts.push(walk.reader);
        }
        // A file with several names counts once.
        let mut counted = HashSet::new();
        let once = places.iter().filter(|(_, place)| counted.insert(**place));
        let bytes = once.filter_map(|(path, _)| entries.get(path)).map(|entry| entry.size).sum();
        let total = Total { files: entries.len() as u64, bytes, packages: packages.len() };
        let contents = Contents::Image { parts, places, hashes: HashMap::new() };
        Ok(Self { entries, packages, linked, total, contents })
    }

    pub(super) fn total(&self) -> Total {
        self.total
    }

    /// SHA-256 of a regular file's bytes.
    pub(super) fn hash(&mut self, path: &Path) -> Result<[u8; 32]> {
        match &mut self.contents {
            Contents::Tree(root) => hash_in_tree(root, path),
            Contents::Image { parts, places, hashes } => {
                let place = *places.get(path).context("a file has no place")?;
                if let Some(hash) = hashes.get(&place) {
                    return Ok(*hash);
                }
                let (part, inode) = place;
                let reader = &mut parts[part];
                let InodeKind::File(file) = reader.inode(inode)?.kind else { bail!("it is no regular file") };
                let mut context = digest::Context::new(&digest::SHA256);
                reader.contents::<SquashfsError>(&file, |piece| {
                    match piece {
                        Piece::Hole(length) => zeros(&mut context, length),
                        Piece::Data(bytes) => context.update(bytes),
                    }
                    Ok(())
                })?;
                let hash = finish(context);
                hashes.insert(place, hash);
                Ok(hash)
            }
        }
        .with_context(|| format!("cannot read '{}'", path.display()))
    }
}

fn hash_in_tree(root: &OwnedFd, path: &Path) -> Result<[u8; 32]> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let mut file = File::from(crate::in_root::openat2(root, path, flags, Mode::empty(), resolve)?);
    let (mut context, mut buffer) = (digest::Context::new(&digest::SHA256), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(finish(context)),
            length => context.update(&buffer[..length]),
        }
    }
}

fn zeros(context: &mut digest::Context, mut length: u64) {
    static ZEROS: [u8; 65_536] = [0; 65_536];
    while length > 0 {
        #[allow(clippy::cast_possible_truncation)] // at most the length of ZEROS
        let step = length.min(ZEROS.len() as u64) as usize;
        context.update(&ZEROS[..step]);
        length -= step as u64;
    }
}

fn finish(context: digest::Context) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

/// Goes through a file system of an image.
struct Walk {
    reader: Reader<SquashfsIn>,
    entries: BTreeMap<PathBuf, Entry>,
    places: HashMap<PathBuf, InodePlace>,
    /// Names of files that have several.
    linked: HashMap<PathBuf, InodePlace>,
    /// Directories that were entered.
    seen: HashSet<InodePlace>,
}

impl Walk {
    fn begin(source: SquashfsIn) -> Result<Self> {
        let reader = Reader::open(source)?;
        Ok(Self {
            reader,
            entries: BTreeMap::new(),
            places: HashMap::new(),
            linked: HashMap::new(),
            seen: HashSet::new(),
        })
    }

    fn inode(&mut self, place: InodePlace, path: PathBuf) -> Result<()> {
        const DEPTH: usize = 1026;
        let inode = self.reader.inode(place)?;
        let entry = self.entry(&inode)?;
        if inode.links > 1 && entry.kind != Kind::Directory {
            self.linked.insert(path.clone(), place);
        }
        match &inode.kind {
            InodeKind::Directory(listing) => {
                if !self.seen.insert(place) || path.components().count() > DEPTH {
                    bail!("'{}': a directory contains itself, or they are nested too deep", path.display());
                }
                let mut entries = self.reader.entries(listing);
                while let Some(child) = entries.next(&mut self.reader)? {
                    self.inode(child.inode, path.join(OsStr::from_bytes(child.name.to_bytes())))?;
                }
            }
            InodeKind::File(_) => {
                self.places.insert(path.clone(), place);
            }
            _ => {}
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    fn entry(&mut self, inode: &Inode) -> Result<Entry> {
        let mut entry = Entry {
            kind: Kind::Directory,
            mode: inode.mode.into(),
            uid: inode.uid,
            gid: inode.gid,
            size: 0,
            mtime: inode.mtime,
            target: None,
            device: None,
            xattrs: BTreeMap::new(),
        };
        match &inode.kind {
            InodeKind::Directory(_) => {}
            InodeKind::File(file) => (entry.kind, entry.size) = (Kind::File, file.size),
            InodeKind::Symlink(target) => {
                entry.kind = Kind::Symlink;
                entry.target = Some(PathBuf::from(OsStr::from_bytes(target)));
                entry.mode = 0o777;
            }
            InodeKind::BlockDevice(major, minor) => {
                (entry.kind, entry.device) = (Kind::BlockDevice, Some((*major, *minor)));
            }
            InodeKind::CharDevice(major, minor) => {
                (entry.kind, entry.device) = (Kind::CharDevice, Some((*major, *minor)));
            }
            InodeKind::Fifo => entry.kind = Kind::Fifo,
            InodeKind::Socket => entry.kind = Kind::Socket,
        }
        for (name, value) in self.reader.xattrs(inode)? {
            entry.xattrs.insert(name.to_string_lossy().into_owned(), hex::encode(value));
        }
        Ok(entry)
    }
}
