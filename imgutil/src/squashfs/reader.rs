//! Reads a squashfs: inodes, directories, file contents and xattrs, each checked before it is believed.

use super::compressor::Compressor;
use super::error::SquashfsError;
use super::format::{NO_INDEX, NO_TABLE, SUPERBLOCK_SIZE, Superblock, u16_at, u32_at, u64_at};
use super::inode::{self, FileData, Inode, Listing};
use super::metadata::{Blocks, Place, Source};
use std::ffi::CString;
use std::rc::Rc;

/// Fragment blocks kept unpacked.
const CACHED_FRAGMENTS: usize = 8;
/// The largest value of an xattr that Linux takes (`XATTR_SIZE_MAX`).
const MAX_XATTR: u32 = 65_536;
/// The longest list of names that Linux gives (`XATTR_LIST_MAX`).
const MAX_NAMES: usize = 65_536;
/// No file system that we know of takes as much for one inode.
const MAX_VALUES: usize = 16 << 20;

/// An open squashfs.
pub struct Reader<S> {
    blocks: Blocks<S>,
    superblock: Superblock,
    ids: Vec<u32>,
    unpacked_fragments: Vec<(u32, Rc<Vec<u8>>)>,
    xattrs: Option<XattrTable>,
    buffer: Vec<u8>,
}

/// Where the sets of xattrs are.
struct XattrTable {
    /// The metadata that holds names and values.
    pairs: u64,
    /// How many sets there are, and where the list of their table's blocks begins.
    sets: u32,
    list: u64,
}

/// Where an inode is; equal for two names of one inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InodePlace(u64);

/// A name in a directory.
#[derive(Debug, Clone)]
pub struct DirectoryEntry {
    /// Neither empty, `.` nor `..`, no slash, no zero byte, at most 255 bytes.
    pub name: CString,
    /// Its inode.
    pub inode: InodePlace,
}

/// A part of a file's contents.
#[derive(Debug, Clone, Copy)]
pub enum Piece<'a> {
    /// So many zero bytes that are stored nowhere.
    Hole(u64),
    /// Bytes.
    Data(&'a [u8]),
}

impl<S: Source> Reader<S> {
    /// Opens the squashfs that `source` holds.
    pub fn open(source: S) -> Result<Self, SquashfsError> {
        let what = "the superblock";
        let size = source.size();
        let mut bytes = [0; SUPERBLOCK_SIZE];
        if size < SUPERBLOCK_SIZE as u64 {
            return Err(SquashfsError::Corrupt { what, offset: 0, why: "it is shorter than a superblock" });
        }
        source.read_exact_at(&mut bytes, 0).map_err(|cause| SquashfsError::Input { what, offset: 0, cause })?;
        let superblock = Superblock::parse(&bytes, size)?;
        let decoder = Compressor::decoder(superblock.compression, superblock.block_size).map_err(|_| {
            SquashfsError::Unsupported(format!("its compression (number {}) is unknown", superblock.compression))
        })?;
        let mut blocks = Blocks::new(source, decoder);

        let mut ids = Vec::new();
        let count = u32::from(superblock.id_count);
        table(&mut blocks, "the table of owners", superblock.id_table, count, 4, |entry| ids.push(u32_at(entry, 0)))?;
        let xattrs = read_xattr_table(&mut blocks, &superblock)?;
        Ok(Self { blocks, superblock, ids, unpacked_fragments: Vec::new(), xattrs, buffer: Vec::new() })
    }

    /// How many inodes the superblock counts.
    pub fn inode_count(&self) -> u32 {
        self.superblock.inode_count
    }

    /// Where the root directory's inode is.
    pub fn root(&self) -> InodePlace {
        InodePlace(self.superblock.root_inode)
    }

    /// Reads an inode.
    pub fn inode(&mut self, place: InodePlace) -> Result<Inode, SquashfsError> {
        let place = Place::of_reference(self.superblock.inode_table, place.0, "an inode")?;
        if place.block >= self.superblock.directory_table {
            let why = "it is not inside the inode table";
            return Err(SquashfsError::Corrupt { what: "an inode", offset: place.block, why });
        }
        inode::read(&mut self.blocks, place, &self.ids, self.superblock.block_size)
    }

    /// Goes through a directory's entries, in order: [`Entries::next`] reads one after the other, because a hostile image may list
    /// more of them than fit into memory.
    pub fn entries(&self, listing: &Listing) -> Entries {
        let block = self.superblock.directory_table.saturating_add(listing.start_block.into());
        Entries {
            start: block,
            place: Place { block, offset: usize::from(listing.offset) },
            rest: listing.size,
            header: None,
            last: None,
        }
    }

    /// Calls with the contents of a file, in order.
    pub fn contents<E: From<SquashfsError>>(
        &mut self,
        file: &FileData,
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        const WHAT: &str = "a file's block";
        let block_size = u64::from(self.superblock.block_size);
        let mut position = file.start;
        let mut rest = file.size;
        let mut list = file.list;
        for _ in 0..file.blocks {
            let stored = u32::from_le_bytes(self.blocks.take(WHAT, &mut list)?);
            let length = rest.min(block_size);
            rest -= length;
            if stored == 0 {
                take(Piece::Hole(length))?;
                continue;
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            self.blocks.data(WHAT, position, stored, &mut buffer, self.superblock.block_size as usize)?;
            if buffer.len() as u64 != length {
                let why = "it holds another number of bytes than the file has there";
                return Err(SquashfsError::Corrupt { what: WHAT, offset: position, why }.into());
            }
            take(Piece::Data(&buffer))?;
            self.buffer = buffer;
            position += u64::from(stored & 0xFF_FFFF);
        }
        if let Some((index, offset)) = file.fragment {
            let block = self.fragment(index)?;
            let begin = offset as usize;
            // Less than a block is left, so it fits in memory.
            #[allow(clippy::cast_possible_truncation)]
            let bytes = begin.checked_add(rest as usize).and_then(|end| block.get(begin..end));
            let Some(bytes) = bytes else {
                let why = "a file's end is outside of its fragment block";
                return Err(SquashfsError::Corrupt { what: "a fragment", offset: index.into(), why }.into());
            };
            take(Piece::Data(bytes))?;
        }
        Ok(())
    }

    fn fragment(&mut self, index: u32) -> Result<Rc<Vec<u8>>, SquashfsError> {
        const WHAT: &str = "a fragment block";
        if let Some((_, block)) = self.unpacked_fragments.iter().find(|(known, _)| *known == index) {
            return Ok(Rc::clone(block));
        }
        if index >= self.superblock.fragment_count {
            let why = "a file names a fragment block that is not in the table";
            return Err(SquashfsError::Corrupt { what: WHAT, offset: index.into(), why });
        }
        let entry: [u8; 16] =
            table_entry(&mut self.blocks, "the fragment table", self.superblock.fragment_table, index)?;
        let (start, stored) = (u64_at(&entry, 0), u32_at(&entry, 8));
        let mut bytes = Vec::new();
        self.blocks.data(WHAT, start, stored, &mut bytes, self.superblock.block_size as usize)?;
        let block = Rc::new(bytes);
        if self.unpacked_fragments.len() == CACHED_FRAGMENTS {
            self.unpacked_fragments.remove(0);
        }
        self.unpacked_fragments.push((index, Rc::clone(&block)));
        Ok(block)
    }

    /// The xattrs of an inode: full names and values.
    pub fn xattrs(&mut self, inode: &Inode) -> Result<Vec<(CString, Vec<u8>)>, SquashfsError> {
        const WHAT: &str = "extended attributes";
        /// The value is elsewhere; in its place stands a reference.
        const ELSEWHERE: u16 = 0x100;
        if inode.xattrs == NO_INDEX {
            return Ok(Vec::new());
        }
        let corrupt = |why| SquashfsError::Corrupt { what: WHAT, offset: inode.xattrs.into(), why };
        let Some(table) = &self.xattrs else { return Err(corrupt("the squashfs has no table of them")) };
        let base = table.pairs;
        if inode.xattrs >= table.sets {
            return Err(corrupt("the set is not in the table"));
        }
        let list = table.list;
        let set: [u8; 16] = table_entry(&mut self.blocks, "the table of extended attributes", list, inode.xattrs)?;
        let (reference, count) = (u64_at(&set, 0), u32_at(&set, 8));
        let (mut names, mut values) = (0, 0);
        let mut place = Place::of_reference(base, reference, WHAT)?;
        let mut pairs = Vec::new();
        for _ in 0..count {
            let header: [u8; 4] = self.blocks.take(WHAT, &mut place)?;
            let kind = u16_at(&header, 0);
            let mut name = match kind & 0xFF {
                0 => b"user.".to_vec(),
                1 => b"trusted.".to_vec(),
                2 => b"security.".to_vec(),
                _ => return Err(corrupt("a name has an unknown prefix")),
            };
            let prefix = name.len();
            let length = usize::from(u16_at(&header, 2));
            if length == 0 || length > 255 {
                return Err(corrupt("a name is empty or too long"));
            }
            name.resize(prefix + length, 0);
            names += name.len() + 1;
            if names > MAX_NAMES {
                return Err(corrupt("an inode has more names than Linux lists"));
            }
            self.blocks.read(WHAT, &mut place, &mut name[prefix..])?;
            let name = CString::new(name).map_err(|_| corrupt("a name has a zero byte"))?;
            let mut value_place = place;
            if kind & ELSEWHERE != 0 {
                // Four bytes of length (8), then the reference.
                let reference: [u8; 12] = self.blocks.take(WHAT, &mut place)?;
                value_place = Place::of_reference(base, u64_at(&reference, 4), WHAT)?;
            }
            let length = u32::from_le_bytes(self.blocks.take(WHAT, &mut value_place)?);
            if length > MAX_XATTR {
                return Err(corrupt("a value is larger than 64 KiB"));
            }
            values += length as usize;
            if values > MAX_VALUES {
                return Err(corrupt("an inode has more than 16 MiB of values"));
            }
            let mut value = vec![0; length as usize];
            self.blocks.read(WHAT, &mut value_place, &mut value)?;
            if kind & ELSEWHERE == 0 {
                place = value_place;
            }
            pairs.push((name, value));
        }
        Ok(pairs)
    }
}

/// Reads a table of `count` entries of `size` bytes: metadata blocks whose places stand in a list at `list`.
fn table<S: Source>(
    blocks: &mut Blocks<S>,
    what: &'static str,
    list: u64,
    count: u32,
    size: usize,
    mut take: impl FnMut(&[u8]),
) -> Result<(), SquashfsError> {
    let per_block = super::format::METADATA_SIZE / size;
    let mut rest = count as usize;
    let mut at = list;
    let mut entry = vec![0; size];
    while rest > 0 {
        let mut place = [0; 8];
        blocks.raw(what, at, &mut place)?;
        let mut place = Place { block: u64::from_le_bytes(place), offset: 0 };
        for _ in 0..rest.min(per_block) {
            blocks.read(what, &mut place, &mut entry)?;
            take(&entry);
        }
        rest = rest.saturating_sub(per_block);
        at += 8;
    }
    Ok(())
}

/// One entry of a table of entries of 16 bytes, whose blocks' places stand in a list at `list`. Read when it is wanted: the counts in
/// a superblock are only as true as the image, and 4 billion entries would fill the memory.
fn table_entry<S: Source>(
    blocks: &mut Blocks<S>,
    what: &'static str,
    list: u64,
    index: u32,
) -> Result<[u8; 16], SquashfsError> {
    const PER_BLOCK: u32 = 512;
    let mut place = [0; 8];
    let at = list.checked_add(u64::from(index / PER_BLOCK) * 8);
    let at =
        at.ok_or(SquashfsError::Corrupt { what, offset: list, why: "it reaches beyond the end of the squashfs" })?;
    blocks.raw(what, at, &mut place)?;
    let mut place = Place { block: u64::from_le_bytes(place), offset: (index % PER_BLOCK) as usize * 16 };
    blocks.take(what, &mut place)
}

/// Where a directory's entries are read.
pub struct Entries {
    start: u64,
    place: Place,
    rest: u32,
    /// Entries that are left of the header that was read, and the block of their inodes.
    header: Option<(u32, u64)>,
    last: Option<CString>,
}

impl Entries {
    /// The next entry; `None` after the last one.
    pub fn next<S: Source>(&mut self, reader: &mut Reader<S>) -> Result<Option<DirectoryEntry>, SquashfsError> {
        const WHAT: &str = "a directory";
        let start = self.start;
        let corrupt = |why| SquashfsError::Corrupt { what: WHAT, offset: start, why };
        let (left, inode_block) = match self.header.take() {
            Some(header) => header,
            None if self.rest == 0 => return Ok(None),
            None => {
                self.rest = self.rest.checked_sub(12).ok_or_else(|| corrupt("a header is cut off"))?;
                let header: [u8; 12] = reader.blocks.take(WHAT, &mut self.place)?;
                let count = u32_at(&header, 0);
                if count > 255 {
                    return Err(corrupt("a header counts more than 256 entries"));
                }
                (count + 1, u64::from(u32_at(&header, 4)))
            }
        };
        let entry: [u8; 8] = reader.blocks.take(WHAT, &mut self.place)?;
        let length = u32::from(u16_at(&entry, 6)) + 1;
        if length > 255 {
            return Err(corrupt("a name is too long"));
        }
        self.rest = self.rest.checked_sub(8 + length).ok_or_else(|| corrupt("an entry is cut off"))?;
        let mut name = vec![0; length as usize];
        reader.blocks.read(WHAT, &mut self.place, &mut name)?;
        if name == b"." || name == b".." || name.contains(&b'/') {
            return Err(corrupt("a name is '.', '..' or has a slash"));
        }
        let name = CString::new(name).map_err(|_| corrupt("a name has a zero byte"))?;
        if self.last.as_ref().is_some_and(|last| *last >= name) {
            return Err(corrupt("the names are not in order"));
        }
        self.last = Some(name.clone());
        if left > 1 {
            self.header = Some((left - 1, inode_block));
        }
        let inode = InodePlace((inode_block << 16) | u64::from(u16_at(&entry, 0)));
        Ok(Some(DirectoryEntry { name, inode }))
    }
}

fn read_xattr_table<S: Source>(
    blocks: &mut Blocks<S>,
    superblock: &Superblock,
) -> Result<Option<XattrTable>, SquashfsError> {
    let what = "the table of extended attributes";
    if superblock.xattr_table == NO_TABLE {
        return Ok(None);
    }
    let mut header = [0; 16];
    blocks.raw(what, superblock.xattr_table, &mut header)?;
    let list = superblock.xattr_table + 16;
    Ok(Some(XattrTable { pairs: u64_at(&header, 0), sets: u32_at(&header, 8), list }))
}
