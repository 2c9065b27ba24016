//! The declarations of libsquashfs 1.2 (squashfs-tools-ng) that Mooring uses, as in `/usr/include/sqfs/*.h`; no code.
//! Layouts are part of the library's stable ABI (soname 1).
#![allow(unsafe_code)] // foreign functions can be declared in no other way; only the modules beside this one call them
#![allow(missing_docs)] // named and documented in the headers

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `sqfs_object_t`: what every object begins with.
#[repr(C)]
pub(super) struct Object {
    pub(super) destroy: Option<unsafe extern "C" fn(*mut Object)>,
    pub(super) copy: Option<unsafe extern "C" fn(*const Object) -> *mut Object>,
}

/// `sqfs_file_t`.
#[repr(C)]
pub(super) struct File {
    pub(super) base: Object,
    pub(super) read_at: unsafe extern "C" fn(*mut File, u64, *mut c_void, usize) -> c_int,
    pub(super) write_at: unsafe extern "C" fn(*mut File, u64, *const c_void, usize) -> c_int,
    pub(super) get_size: unsafe extern "C" fn(*const File) -> u64,
    pub(super) truncate: unsafe extern "C" fn(*mut File, u64) -> c_int,
}

/// `sqfs_block_writer_t`.
#[repr(C)]
pub(super) struct BlockWriter {
    pub(super) base: Object,
    pub(super) write_data_block:
        unsafe extern "C" fn(*mut BlockWriter, *mut c_void, u32, u32, u32, *const u8, *mut u64) -> c_int,
    pub(super) get_block_count: unsafe extern "C" fn(*const BlockWriter) -> u64,
}

/// `sqfs_compressor_t`.
#[repr(C)]
pub(super) struct Compressor {
    pub(super) base: Object,
    pub(super) get_configuration: unsafe extern "C" fn(*const Compressor, *mut CompressorConfig),
    pub(super) write_options: unsafe extern "C" fn(*mut Compressor, *mut File) -> c_int,
    pub(super) read_options: unsafe extern "C" fn(*mut Compressor, *mut File) -> c_int,
    pub(super) do_block: unsafe extern "C" fn(*mut Compressor, *const u8, u32, *mut u8, u32) -> i32,
}

/// `sqfs_compressor_config_t`; the back end's own options are 16 bytes.
#[repr(C)]
#[derive(Default)]
pub(super) struct CompressorConfig {
    pub(super) id: u16,
    pub(super) flags: u16,
    pub(super) block_size: u32,
    pub(super) level: u32,
    pub(super) options: [u64; 2],
}

/// `sqfs_super_t`, in host byte order.
#[repr(C)]
#[derive(Debug, Clone, Default)]
pub(super) struct Super {
    pub(super) magic: u32,
    pub(super) inode_count: u32,
    pub(super) modification_time: u32,
    pub(super) block_size: u32,
    pub(super) fragment_entry_count: u32,
    pub(super) compression_id: u16,
    pub(super) block_log: u16,
    pub(super) flags: u16,
    pub(super) id_count: u16,
    pub(super) version_major: u16,
    pub(super) version_minor: u16,
    pub(super) root_inode_ref: u64,
    pub(super) bytes_used: u64,
    pub(super) id_table_start: u64,
    pub(super) xattr_id_table_start: u64,
    pub(super) inode_table_start: u64,
    pub(super) directory_table_start: u64,
    pub(super) fragment_table_start: u64,
    pub(super) export_table_start: u64,
}

/// `sqfs_block_processor_desc_t`.
#[repr(C)]
pub(super) struct BlockProcessorDesc {
    pub(super) size: u32,
    pub(super) max_block_size: u32,
    pub(super) num_workers: u32,
    pub(super) max_backlog: u32,
    pub(super) cmp: *mut Compressor,
    pub(super) wr: *mut BlockWriter,
    pub(super) tbl: *mut FragTable,
    pub(super) file: *mut File,
    pub(super) uncmp: *mut Compressor,
}

/// `sqfs_inode_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct InodeBase {
    pub(super) kind: u16,
    pub(super) mode: u16,
    pub(super) uid_idx: u16,
    pub(super) gid_idx: u16,
    pub(super) mod_time: u32,
    pub(super) inode_number: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeDev {
    pub(super) nlink: u32,
    pub(super) devno: u32,
    pub(super) xattr_idx: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeIpc {
    pub(super) nlink: u32,
    pub(super) xattr_idx: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeSlink {
    pub(super) nlink: u32,
    pub(super) target_size: u32,
    pub(super) xattr_idx: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeFileExt {
    pub(super) blocks_start: u64,
    pub(super) file_size: u64,
    pub(super) sparse: u64,
    pub(super) nlink: u32,
    pub(super) fragment_idx: u32,
    pub(super) fragment_offset: u32,
    pub(super) xattr_idx: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeDir {
    pub(super) start_block: u32,
    pub(super) nlink: u32,
    pub(super) size: u16,
    pub(super) offset: u16,
    pub(super) parent_inode: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InodeDirExt {
    pub(super) nlink: u32,
    pub(super) size: u32,
    pub(super) start_block: u32,
    pub(super) parent_inode: u32,
    pub(super) inodex_count: u16,
    pub(super) offset: u16,
    pub(super) xattr_idx: u32,
}

/// The union in `sqfs_inode_generic_t`. Kinds with and without xattrs share the fields before `xattr_idx`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union InodeData {
    pub(super) dev: InodeDev,
    pub(super) ipc: InodeIpc,
    pub(super) slink: InodeSlink,
    pub(super) file_ext: InodeFileExt,
    pub(super) dir: InodeDir,
    pub(super) dir_ext: InodeDirExt,
}

/// `sqfs_inode_generic_t` without its flexible end (`extra`), which follows it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Inode {
    pub(super) base: InodeBase,
    pub(super) payload_bytes_available: u32,
    pub(super) payload_bytes_used: u32,
    pub(super) data: InodeData,
}

macro_rules! opaque {
    ($($name:ident),*) => { $(
        /// An object of the library that is used by pointer only.
        #[repr(C)]
        pub(super) struct $name { _private: [u8; 0] }
    )* };
}
opaque!(BlockProcessor, FragTable, MetaWriter, DirWriter, XattrWriter, IdTable);

pub(super) const ERROR_IO: c_int = -2;
pub(super) const ERROR_UNSUPPORTED: c_int = -6;

pub(super) const BLK_DONT_DEDUPLICATE: u32 = 0x0008;
pub(super) const BLK_DONT_HASH: u32 = 0x0020;
pub(super) const BLK_IS_SPARSE: u32 = 0x0400;
pub(super) const BLK_FIRST_BLOCK: u32 = 0x0800;
pub(super) const BLK_LAST_BLOCK: u32 = 0x1000;
pub(super) const BLK_FRAGMENT_BLOCK: u32 = 0x4000;

pub(super) const COMP_FLAG_UNCOMPRESS: u16 = 0x8000;
pub(super) const META_WRITER_KEEP_IN_MEMORY: u32 = 1;
pub(super) const DIR_WRITER_CREATE_EXPORT_TABLE: u32 = 1;

#[link(name = "squashfs")]
unsafe extern "C" {
    pub(super) fn sqfs_free(ptr: *mut c_void);
    pub(super) fn sqfs_compressor_config_init(
        config: *mut CompressorConfig,
        id: c_uint,
        block_size: usize,
        flags: u16,
    ) -> c_int;
    pub(super) fn sqfs_compressor_create(config: *const CompressorConfig, out: *mut *mut Compressor) -> c_int;

    pub(super) fn sqfs_super_init(superblock: *mut Super, block_size: usize, mtime: u32, compressor: c_uint) -> c_int;

    pub(super) fn sqfs_frag_table_create(flags: u32) -> *mut FragTable;
    pub(super) fn sqfs_frag_table_write(
        table: *mut FragTable,
        file: *mut File,
        superblock: *mut Super,
        cmp: *mut Compressor,
    ) -> c_int;

    pub(super) fn sqfs_block_processor_create_ex(
        desc: *const BlockProcessorDesc,
        out: *mut *mut BlockProcessor,
    ) -> c_int;
    pub(super) fn sqfs_block_processor_begin_file(
        processor: *mut BlockProcessor,
        inode: *mut *mut Inode,
        user: *mut c_void,
        flags: u32,
    ) -> c_int;
    pub(super) fn sqfs_block_processor_append(
        processor: *mut BlockProcessor,
        data: *const c_void,
        size: usize,
    ) -> c_int;
    pub(super) fn sqfs_block_processor_end_file(processor: *mut BlockProcessor) -> c_int;
    pub(super) fn sqfs_block_processor_finish(processor: *mut BlockProcessor) -> c_int;

    pub(super) fn sqfs_inode_make_extended(inode: *mut Inode) -> c_int;
    pub(super) fn sqfs_inode_make_basic(inode: *mut Inode) -> c_int;

    pub(super) fn sqfs_meta_writer_create(file: *mut File, cmp: *mut Compressor, flags: u32) -> *mut MetaWriter;
    pub(super) fn sqfs_meta_writer_flush(writer: *mut MetaWriter) -> c_int;
    pub(super) fn sqfs_meta_writer_get_position(writer: *const MetaWriter, block: *mut u64, offset: *mut u32);
    pub(super) fn sqfs_meta_write_write_to_file(writer: *mut MetaWriter) -> c_int;
    pub(super) fn sqfs_meta_writer_write_inode(writer: *mut MetaWriter, inode: *const Inode) -> c_int;

    pub(super) fn sqfs_dir_writer_create(directories: *mut MetaWriter, flags: u32) -> *mut DirWriter;
    pub(super) fn sqfs_dir_writer_begin(writer: *mut DirWriter, flags: u32) -> c_int;
    pub(super) fn sqfs_dir_writer_add_entry(
        writer: *mut DirWriter,
        name: *const c_char,
        inode_number: u32,
        inode_ref: u64,
        mode: u16,
    ) -> c_int;
    pub(super) fn sqfs_dir_writer_end(writer: *mut DirWriter) -> c_int;
    pub(super) fn sqfs_dir_writer_create_inode(
        writer: *const DirWriter,
        links: usize,
        xattr: u32,
        parent: u32,
    ) -> *mut Inode;
    pub(super) fn sqfs_dir_writer_write_export_table(
        writer: *mut DirWriter,
        file: *mut File,
        cmp: *mut Compressor,
        root_number: u32,
        root_ref: u64,
        superblock: *mut Super,
    ) -> c_int;

    pub(super) fn sqfs_xattr_writer_create(flags: u32) -> *mut XattrWriter;
    pub(super) fn sqfs_xattr_writer_begin(writer: *mut XattrWriter, flags: u32) -> c_int;
    pub(super) fn sqfs_xattr_writer_add(
        writer: *mut XattrWriter,
        key: *const c_char,
        value: *const c_void,
        size: usize,
    ) -> c_int;
    pub(super) fn sqfs_xattr_writer_end(writer: *mut XattrWriter, out: *mut u32) -> c_int;
    pub(super) fn sqfs_xattr_writer_flush(
        writer: *const XattrWriter,
        file: *mut File,
        superblock: *mut Super,
        cmp: *mut Compressor,
    ) -> c_int;

    pub(super) fn sqfs_id_table_create(flags: u32) -> *mut IdTable;
    pub(super) fn sqfs_id_table_id_to_index(table: *mut IdTable, id: u32, out: *mut u16) -> c_int;
    pub(super) fn sqfs_id_table_write(
        table: *mut IdTable,
        file: *mut File,
        superblock: *mut Super,
        cmp: *mut Compressor,
    ) -> c_int;
}
