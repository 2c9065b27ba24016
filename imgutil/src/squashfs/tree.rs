//! Second half of writing: inodes, directories, xattrs and the tables that follow them.
//!
//! Children are written before their directory, because an entry names where its inode is.
#![allow(unsafe_code)] // calls into libsquashfs

use super::compressor::destroy;
use super::data::{ContentId, Contents, FragTable, Parts};
use super::error::SquashfsError;
use super::ffi;
use super::format::{self, SUPERBLOCK_SIZE};
use std::ffi::CStr;
use std::io::Write;
use std::ptr::NonNull;

/// What every inode has.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    /// Permission bits with setuid, setgid, sticky; no type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Unix seconds; the format holds 1970 to 2106.
    pub mtime: u32,
    /// Inode number, from 1, each used once and none left out.
    pub number: u32,
    /// Names of this inode (for a directory: 2 and one per subdirectory).
    pub links: u32,
    /// Its xattrs, from [`TreeWriter::xattrs`].
    pub xattrs: XattrId,
}

/// A stored set of xattrs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrId(u32);

impl XattrId {
    /// No xattrs.
    pub const NONE: Self = Self(0xFFFF_FFFF);
}

/// Where an inode was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeRef(u64);

/// Inodes without content.
#[derive(Debug, Clone, Copy)]
pub enum Special<'a> {
    /// A symbolic link and where it points.
    Symlink(&'a [u8]),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Its name.
    pub name: &'a CStr,
    /// Its inode's number.
    pub number: u32,
    /// Its inode's place.
    pub inode: InodeRef,
    /// Its `st_mode`, of which the type counts.
    pub mode: u32,
}

/// Writes everything but contents.
pub struct TreeWriter<W: Write> {
    // Order of fields is order of destruction, as in `DataWriter`.
    directories: DirWriter,
    directory_table: MetaWriter,
    inode_table: MetaWriter,
    xattrs: XattrWriter,
    ids: IdTable,
    fragments: FragTable,
    contents: Contents,
    parts: Parts<W>,
    inode_count: u32,
}

macro_rules! owned {
    ($($name:ident, $what:literal);*) => { $(
        #[doc = concat!("Owns ", $what, ".")]
        struct $name(NonNull<ffi::$name>);
        impl $name {
            fn own(object: *mut ffi::$name) -> Result<Self, SquashfsError> {
                NonNull::new(object).map(Self).ok_or_else(|| SquashfsError::library(concat!("set up ", $what), -1))
            }
        }
        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: owned and alive.
                unsafe { destroy(self.0.as_ptr()) }
            }
        }
    )* };
}
owned!(DirWriter, "the directory writer"; MetaWriter, "a table of metadata"; XattrWriter, "the table of xattrs";
       IdTable, "the table of owners");

impl<W: Write> TreeWriter<W> {
    pub(super) fn new(mut parts: Parts<W>, contents: Contents, fragments: FragTable) -> Result<Self, SquashfsError> {
        parts.superblock.inode_table_start = parts.sink.position();
        let (file, compressor) = (parts.file.as_ptr(), parts.compressor.as_ptr());
        // SAFETY: `file` and `compressor` are alive and outlive the writers (field order, shared objects do not move); the
        // directory writer is destroyed before the table it writes into.
        unsafe {
            let inode_table = MetaWriter::own(ffi::sqfs_meta_writer_create(file, compressor, 0))?;
            let directory_table =
                MetaWriter::own(ffi::sqfs_meta_writer_create(file, compressor, ffi::META_WRITER_KEEP_IN_MEMORY))?;
            let directories = DirWriter::own(ffi::sqfs_dir_writer_create(
                directory_table.0.as_ptr(),
                ffi::DIR_WRITER_CREATE_EXPORT_TABLE,
            ))?;
            let xattrs = XattrWriter::own(ffi::sqfs_xattr_writer_create(0))?;
            let ids = IdTable::own(ffi::sqfs_id_table_create(0))?;
            Ok(Self {
                directories,
                directory_table,
                inode_table,
                xattrs,
                ids,
                fragments,
                contents,
                parts,
                inode_count: 0,
            })
        }
    }

    /// Stores a set of xattrs (full names, values); equal sets are stored once.
    pub fn xattrs<'a>(
        &mut self,
        pairs: impl IntoIterator<Item = (&'a CStr, &'a [u8])>,
    ) -> Result<XattrId, SquashfsError> {
        let step = "store extended attributes";
        let writer = self.xattrs.0.as_ptr();
        let mut id = XattrId::NONE.0;
        // SAFETY: the writer is alive; it copies key and value.
        unsafe {
            self.parts.check(step, ffi::sqfs_xattr_writer_begin(writer, 0))?;
            for (key, value) in pairs {
                let code = ffi::sqfs_xattr_writer_add(writer, key.as_ptr(), value.as_ptr().cast(), value.len());
                self.parts.check(step, code)?;
            }
            self.parts.check(step, ffi::sqfs_xattr_writer_end(writer, &raw mut id))?;
        }
        Ok(XattrId(id))
    }

    /// Writes the inode of a regular file.
    pub fn file(&mut self, attributes: &Attributes, content: ContentId) -> Result<InodeRef, SquashfsError> {
        let inode = self.contents.inode(content);
        if inode.is_null() {
            return Err(SquashfsError::Limit("a file's content was never written"));
        }
        let base = self.base(attributes, 0)?;
        // SAFETY: the block processor is done, so the inode is ours; it is a file's, whose extended form has `file_ext`.
        // It is put back as it was, because further files may share the content.
        unsafe {
            self.parts.check("write a file's inode", ffi::sqfs_inode_make_extended(inode))?;
            let kind = (*inode).base.kind;
            (*inode).base = ffi::InodeBase { kind, ..base };
            (*inode).data.file_ext.nlink = attributes.links;
            (*inode).data.file_ext.xattr_idx = attributes.xattrs.0;
            self.parts.check("write a file's inode", ffi::sqfs_inode_make_basic(inode))?;
        }
        let place = self.write(inode)?;
        // SAFETY: as above.
        unsafe {
            self.parts.check("write a file's inode", ffi::sqfs_inode_make_extended(inode))?;
        }
        Ok(place)
    }

    /// Writes the inode of a symlink, device, pipe or socket.
    pub fn special(&mut self, attributes: &Attributes, special: Special<'_>) -> Result<InodeRef, SquashfsError> {
        const EXTENDED: u16 = 7; // an extended kind is the basic kind and 7
        let target = if let Special::Symlink(target) = special { target } else { &[] };
        let size = u32::try_from(target.len()).map_err(|_| SquashfsError::Limit("a symbolic link is too long"))?;
        let (nlink, xattr_idx) = (attributes.links, attributes.xattrs.0);
        let (kind, data) = match special {
            Special::Symlink(_) => (
                format::KIND_SYMLINK,
                ffi::InodeData { slink: ffi::InodeSlink { nlink, target_size: size, xattr_idx } },
            ),
            Special::BlockDevice(major, minor) => (
                format::KIND_BLOCK,
                ffi::InodeData { dev: ffi::InodeDev { nlink, devno: format::encode_device(major, minor)?, xattr_idx } },
            ),
            Special::CharDevice(major, minor) => (
                format::KIND_CHAR,
                ffi::InodeData { dev: ffi::InodeDev { nlink, devno: format::encode_device(major, minor)?, xattr_idx } },
            ),
            Special::Fifo => (format::KIND_FIFO, ffi::InodeData { ipc: ffi::InodeIpc { nlink, xattr_idx } }),
            Special::Socket => (format::KIND_SOCKET, ffi::InodeData { ipc: ffi::InodeIpc { nlink, xattr_idx } }),
        };
        let kind = if attributes.xattrs == XattrId::NONE { kind } else { kind + EXTENDED };
        let base = self.base(attributes, kind)?;
        let header = ffi::Inode { base, payload_bytes_available: size, payload_bytes_used: size, data };
        // The structure has a flexible end for the link's target, so it is put together in a buffer of its alignment.
        let mut buffer = vec![0_u64; (size_of::<ffi::Inode>() + target.len()).div_ceil(8)];
        let inode: *mut ffi::Inode = buffer.as_mut_ptr().cast();
        // SAFETY: the buffer is aligned to 8 and holds the structure and the target behind it.
        unsafe {
            inode.write(header);
            std::ptr::copy_nonoverlapping(target.as_ptr(), inode.add(1).cast::<u8>(), target.len());
        }
        self.write(inode)
    }

    /// Writes a directory: its listing and its inode. `entries` must be sorted by the bytes of their names.
    pub fn directory<'a>(
        &mut self,
        attributes: &Attributes,
        parent: u32,
        entries: impl IntoIterator<Item = Entry<'a>>,
    ) -> Result<InodeRef, SquashfsError> {
        let step = "write a directory";
        let base = self.base(attributes, 0)?;
        let writer = self.directories.0.as_ptr();
        // SAFETY: the writer is alive and copies names; the inode it makes is ours, of a kind that its `base.kind` says,
        // and freed once.
        unsafe {
            self.parts.check(step, ffi::sqfs_dir_writer_begin(writer, 0))?;
            for entry in entries {
                #[allow(clippy::cast_possible_truncation)] // st_mode has 16 bits
                let mode = entry.mode as u16;
                let code =
                    ffi::sqfs_dir_writer_add_entry(writer, entry.name.as_ptr(), entry.number, entry.inode.0, mode);
                self.parts.check(step, code)?;
            }
            self.parts.check(step, ffi::sqfs_dir_writer_end(writer))?;
            let inode = ffi::sqfs_dir_writer_create_inode(writer, 0, attributes.xattrs.0, parent);
            if inode.is_null() {
                return Err(SquashfsError::library(step, -1));
            }
            let kind = (*inode).base.kind;
            (*inode).base = ffi::InodeBase { kind, ..base };
            if kind == format::KIND_DIRECTORY {
                (*inode).data.dir.nlink = attributes.links;
            } else {
                (*inode).data.dir_ext.nlink = attributes.links;
            }
            let place = self.write(inode);
            ffi::sqfs_free(inode.cast());
            place
        }
    }

    /// Writes the tables. Gives the output back with the superblock that belongs at its start; `bytes_used` in it is the
    /// output's length, to which padding may be added.
    pub fn finish(mut self, root: InodeRef, root_number: u32) -> Result<(W, [u8; SUPERBLOCK_SIZE]), SquashfsError> {
        let step = "write the tables";
        let (file, compressor) = (self.parts.file.as_ptr(), self.parts.compressor.as_ptr());
        self.parts.superblock.inode_count = self.inode_count;
        self.parts.superblock.root_inode_ref = root.0;
        let mut superblock = self.parts.superblock.clone();
        // SAFETY: all objects are alive; `superblock` is a valid structure that the calls fill in.
        unsafe {
            self.parts.check(step, ffi::sqfs_meta_writer_flush(self.inode_table.0.as_ptr()))?;
            superblock.directory_table_start = self.parts.sink.position();
            self.parts.check(step, ffi::sqfs_meta_writer_flush(self.directory_table.0.as_ptr()))?;
            self.parts.check(step, ffi::sqfs_meta_write_write_to_file(self.directory_table.0.as_ptr()))?;
            let code = ffi::sqfs_frag_table_write(self.fragments.0.as_ptr(), file, &raw mut superblock, compressor);
            self.parts.check(step, code)?;
            let code = ffi::sqfs_dir_writer_write_export_table(
                self.directories.0.as_ptr(),
                file,
                compressor,
                root_number,
                root.0,
                &raw mut superblock,
            );
            self.parts.check(step, code)?;
            let code = ffi::sqfs_id_table_write(self.ids.0.as_ptr(), file, &raw mut superblock, compressor);
            self.parts.check(step, code)?;
            let code = ffi::sqfs_xattr_writer_flush(self.xattrs.0.as_ptr(), file, &raw mut superblock, compressor);
            self.parts.check(step, code)?;
        }
        superblock.bytes_used = self.parts.sink.position();
        let Self { directories, directory_table, inode_table, parts, .. } = self;
        drop((directories, directory_table, inode_table));
        let Parts { sink, file, compressor, .. } = parts;
        drop((file, compressor));
        let out = sink.into_inner().ok_or(SquashfsError::Limit("the output is still in use"))?;
        Ok((out, format::encode_superblock(&superblock)))
    }

    /// The fields all inodes share; owners become indices of the table of owners.
    fn base(&mut self, attributes: &Attributes, kind: u16) -> Result<ffi::InodeBase, SquashfsError> {
        let index = |id: u32| {
            let mut index = 0;
            // SAFETY: the table is alive.
            match unsafe { ffi::sqfs_id_table_id_to_index(self.ids.0.as_ptr(), id, &raw mut index) } {
                0 => Ok(index),
                _ => Err(SquashfsError::Limit("it has more than 65,535 different owners and groups")),
            }
        };
        let (uid_idx, gid_idx) = (index(attributes.uid)?, index(attributes.gid)?);
        Ok(ffi::InodeBase {
            kind,
            mode: attributes.mode & 0o7777,
            uid_idx,
            gid_idx,
            mod_time: attributes.mtime,
            inode_number: attributes.number,
        })
    }

    /// Writes an inode and says where it is.
    fn write(&mut self, inode: *const ffi::Inode) -> Result<InodeRef, SquashfsError> {
        let (mut block, mut offset) = (0, 0);
        // SAFETY: the table is alive; the callers pass a complete inode.
        let code = unsafe {
            ffi::sqfs_meta_writer_get_position(self.inode_table.0.as_ptr(), &raw mut block, &raw mut offset);
            ffi::sqfs_meta_writer_write_inode(self.inode_table.0.as_ptr(), inode)
        };
        self.parts.check("write an inode", code)?;
        self.inode_count += 1;
        Ok(InodeRef((block << 16) | u64::from(offset)))
    }
}
