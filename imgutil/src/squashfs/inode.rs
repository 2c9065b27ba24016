//! Inodes as they are stored, read into types.

use super::error::SquashfsError;
use super::format::{self, NO_INDEX, decode_device, u16_at, u32_at, u64_at};
use super::metadata::{Blocks, Place, Source};

/// An inode that was read.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Permission bits with setuid, setgid, sticky; no type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Unix seconds.
    pub mtime: u32,
    /// Its number.
    pub number: u32,
    /// How many names it says it has.
    pub links: u32,
    /// What it is.
    pub kind: InodeKind,
    pub(super) xattrs: u32,
}

/// What an inode is.
#[derive(Debug, Clone)]
pub enum InodeKind {
    /// A directory.
    Directory(Listing),
    /// A regular file.
    File(FileData),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// Where a directory's entries are.
#[derive(Debug, Clone, Copy)]
pub struct Listing {
    pub(super) start_block: u32,
    pub(super) offset: u16,
    /// In bytes, without the 3 that the format adds.
    pub(super) size: u32,
}

/// Where a file's bytes are.
#[derive(Debug, Clone)]
pub struct FileData {
    /// Length in bytes.
    pub size: u64,
    pub(super) start: u64,
    /// How many blocks it has, and where their stored sizes are (0 for a block of zeros). They are read when they are wanted: a
    /// hostile image may list more than fit into memory.
    pub(super) blocks: u64,
    pub(super) list: Place,
    /// Index of the fragment block and offset in it, for the last part of the file.
    pub(super) fragment: Option<(u32, u32)>,
}

const WHAT: &str = "an inode";
/// The longest symbolic link that Linux makes or reads is `PATH_MAX`.
const MAX_TARGET: u32 = 4096;

/// Reads the inode at `place`. `ids` is the table of owners.
pub(super) fn read<S: Source>(
    blocks: &mut Blocks<S>,
    mut place: Place,
    ids: &[u32],
    block_size: u32,
) -> Result<Inode, SquashfsError> {
    let start = place.block;
    let corrupt = |why| SquashfsError::Corrupt { what: WHAT, offset: start, why };
    let place = &mut place;
    let base: [u8; 16] = blocks.take(WHAT, place)?;
    let kind = u16_at(&base, 0);
    let id = |at| {
        let index = usize::from(u16_at(&base, at));
        ids.get(index).copied().ok_or_else(|| corrupt("its owner is not in the table of owners"))
    };
    let mut inode = Inode {
        mode: u16_at(&base, 2) & 0o7777,
        uid: id(4)?,
        gid: id(6)?,
        mtime: u32_at(&base, 8),
        number: u32_at(&base, 12),
        links: 1,
        kind: InodeKind::Fifo,
        xattrs: NO_INDEX,
    };
    let extended = kind > format::KIND_SOCKET;
    let basic = if extended { kind - format::KIND_SOCKET } else { kind };
    match basic {
        format::KIND_DIRECTORY => directory(blocks, place, extended, &mut inode)?,
        format::KIND_FILE => file(blocks, place, extended, block_size, &mut inode)?,
        format::KIND_SYMLINK => {
            let body: [u8; 8] = blocks.take(WHAT, place)?;
            inode.links = u32_at(&body, 0);
            let size = u32_at(&body, 4);
            if size > MAX_TARGET {
                return Err(corrupt("a symbolic link is too long"));
            }
            let mut target = vec![0; size as usize];
            blocks.read(WHAT, place, &mut target)?;
            if target.is_empty() || target.contains(&0) {
                return Err(corrupt("a symbolic link's target is empty or has a zero byte"));
            }
            if extended {
                inode.xattrs = u32::from_le_bytes(blocks.take(WHAT, place)?);
            }
            inode.kind = InodeKind::Symlink(target);
        }
        format::KIND_BLOCK | format::KIND_CHAR => {
            let body: [u8; 8] = blocks.take(WHAT, place)?;
            inode.links = u32_at(&body, 0);
            let (major, minor) = decode_device(u32_at(&body, 4));
            inode.kind = if basic == format::KIND_BLOCK {
                InodeKind::BlockDevice(major, minor)
            } else {
                InodeKind::CharDevice(major, minor)
            };
            if extended {
                inode.xattrs = u32::from_le_bytes(blocks.take(WHAT, place)?);
            }
        }
        format::KIND_FIFO | format::KIND_SOCKET => {
            inode.links = u32::from_le_bytes(blocks.take(WHAT, place)?);
            inode.kind = if basic == format::KIND_FIFO { InodeKind::Fifo } else { InodeKind::Socket };
            if extended {
                inode.xattrs = u32::from_le_bytes(blocks.take(WHAT, place)?);
            }
        }
        _ => return Err(corrupt("its type is unknown")),
    }
    Ok(inode)
}

/// The rest of a directory's inode.
fn directory<S: Source>(
    blocks: &mut Blocks<S>,
    place: &mut Place,
    extended: bool,
    inode: &mut Inode,
) -> Result<(), SquashfsError> {
    let (size, start_block, offset);
    if extended {
        let body: [u8; 24] = blocks.take(WHAT, place)?;
        inode.links = u32_at(&body, 0);
        (size, start_block, offset) = (u32_at(&body, 4), u32_at(&body, 8), u16_at(&body, 18));
        inode.xattrs = u32_at(&body, 20);
    } else {
        let body: [u8; 16] = blocks.take(WHAT, place)?;
        inode.links = u32_at(&body, 4);
        (size, start_block, offset) = (u32::from(u16_at(&body, 8)), u32_at(&body, 0), u16_at(&body, 10));
    }
    let why = "a directory has an impossible size";
    let size = size.checked_sub(3).ok_or(SquashfsError::Corrupt { what: WHAT, offset: place.block, why })?;
    inode.kind = InodeKind::Directory(Listing { start_block, offset, size });
    Ok(())
}

/// The rest of a regular file's inode.
fn file<S: Source>(
    blocks: &mut Blocks<S>,
    place: &mut Place,
    extended: bool,
    block_size: u32,
    inode: &mut Inode,
) -> Result<(), SquashfsError> {
    let mut file = FileData { size: 0, start: 0, blocks: 0, list: *place, fragment: None };
    let fragment;
    if extended {
        let body: [u8; 40] = blocks.take(WHAT, place)?;
        (file.start, file.size) = (u64_at(&body, 0), u64_at(&body, 8));
        inode.links = u32_at(&body, 24);
        fragment = (u32_at(&body, 28), u32_at(&body, 32));
        inode.xattrs = u32_at(&body, 36);
    } else {
        let body: [u8; 16] = blocks.take(WHAT, place)?;
        (file.start, file.size) = (u32_at(&body, 0).into(), u32_at(&body, 12).into());
        fragment = (u32_at(&body, 4), u32_at(&body, 8));
    }
    if i64::try_from(file.size).is_err() {
        let why = "a file has an impossible size";
        return Err(SquashfsError::Corrupt { what: WHAT, offset: place.block, why });
    }
    file.fragment = (fragment.0 != NO_INDEX).then_some(fragment);
    let whole = file.size / u64::from(block_size);
    file.blocks = if file.fragment.is_some() { whole } else { file.size.div_ceil(u64::from(block_size)) };
    file.list = *place;
    inode.kind = InodeKind::File(file);
    Ok(())
}
