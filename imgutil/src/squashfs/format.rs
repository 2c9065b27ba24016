//! Numbers of the squashfs format, version 4.0, and its superblock, as `Documentation/filesystems/squashfs.rst` and
//! `fs/squashfs/squashfs_fs.h` of Linux have them. All integers are little-endian.

use super::error::SquashfsError;
use super::ffi;

/// Size of the superblock in bytes.
pub const SUPERBLOCK_SIZE: usize = 96;
/// Size of data blocks that the writer makes unless it is told otherwise, in bytes.
pub const BLOCK_SIZE: u32 = 128 * 1024;
/// `hsqs`.
pub(super) const MAGIC: u32 = 0x7371_7368;
/// A metadata block holds at most so many bytes.
pub(super) const METADATA_SIZE: usize = 8192;
/// "There is none": a table's start.
pub(super) const NO_TABLE: u64 = u64::MAX;
/// "There is none": a fragment or a set of xattrs.
pub(super) const NO_INDEX: u32 = u32::MAX;

pub(super) const FLAG_COMPRESSOR_OPTIONS: u16 = 0x0400;

pub(super) const KIND_DIRECTORY: u16 = 1;
pub(super) const KIND_FILE: u16 = 2;
pub(super) const KIND_SYMLINK: u16 = 3;
pub(super) const KIND_BLOCK: u16 = 4;
pub(super) const KIND_CHAR: u16 = 5;
pub(super) const KIND_FIFO: u16 = 6;
pub(super) const KIND_SOCKET: u16 = 7;

/// A device number as the kernel's `new_encode_dev` makes it: 12 bits of major, 20 bits of minor.
pub(super) fn encode_device(major: u32, minor: u32) -> Result<u32, SquashfsError> {
    if major > 0xFFF || minor > 0xF_FFFF {
        return Err(SquashfsError::Limit("a device has a major above 4,095 or a minor above 1,048,575"));
    }
    Ok((minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12))
}

/// Major and minor of a stored device number (`new_decode_dev`).
pub(super) fn decode_device(number: u32) -> (u32, u32) {
    ((number & 0xF_FF00) >> 8, (number & 0xFF) | ((number >> 12) & 0xF_FF00))
}

/// The superblock's bytes.
pub(super) fn encode_superblock(fields: &ffi::Super) -> [u8; SUPERBLOCK_SIZE] {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    let mut at = 0;
    let mut put = |field: &[u8]| {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    };
    for field in
        [fields.magic, fields.inode_count, fields.modification_time, fields.block_size, fields.fragment_entry_count]
    {
        put(&field.to_le_bytes());
    }
    for field in [
        fields.compression_id,
        fields.block_log,
        fields.flags,
        fields.id_count,
        fields.version_major,
        fields.version_minor,
    ] {
        put(&field.to_le_bytes());
    }
    for field in [
        fields.root_inode_ref,
        fields.bytes_used,
        fields.id_table_start,
        fields.xattr_id_table_start,
        fields.inode_table_start,
        fields.directory_table_start,
        fields.fragment_table_start,
        fields.export_table_start,
    ] {
        put(&field.to_le_bytes());
    }
    bytes
}

/// A superblock that was read and checked as far as it can be by itself.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) inode_count: u32,
    pub(super) block_size: u32,
    pub(super) fragment_count: u32,
    pub(super) compression: u16,
    pub(super) id_count: u16,
    pub(super) root_inode: u64,
    pub(super) bytes_used: u64,
    pub(super) id_table: u64,
    pub(super) xattr_table: u64,
    pub(super) inode_table: u64,
    pub(super) directory_table: u64,
    pub(super) fragment_table: u64,
}

impl Superblock {
    /// Reads it; `size` is that of what holds the squashfs, in bytes.
    pub(super) fn parse(bytes: &[u8; SUPERBLOCK_SIZE], size: u64) -> Result<Self, SquashfsError> {
        let corrupt = |offset, why| SquashfsError::Corrupt { what: "the superblock", offset, why };
        if u32_at(bytes, 0) != MAGIC {
            return Err(corrupt(0, "the magic number is missing: this is no squashfs"));
        }
        if (u16_at(bytes, 28), u16_at(bytes, 30)) != (4, 0) {
            return Err(SquashfsError::Unsupported("it is not version 4.0 of the format".to_owned()));
        }
        let superblock = Self {
            inode_count: u32_at(bytes, 4),
            block_size: u32_at(bytes, 12),
            fragment_count: u32_at(bytes, 16),
            compression: u16_at(bytes, 20),
            id_count: u16_at(bytes, 26),
            root_inode: u64_at(bytes, 32),
            bytes_used: u64_at(bytes, 40),
            id_table: u64_at(bytes, 48),
            xattr_table: u64_at(bytes, 56),
            inode_table: u64_at(bytes, 64),
            directory_table: u64_at(bytes, 72),
            fragment_table: u64_at(bytes, 80),
        };
        let log = u32::from(u16_at(bytes, 22));
        if !(12..=20).contains(&log) || superblock.block_size != 1 << log {
            return Err(corrupt(12, "the block size is not a power of two from 4 KiB to 1 MiB"));
        }
        if superblock.bytes_used > size {
            return Err(corrupt(40, "it says that the squashfs is longer than what is there"));
        }
        let end = superblock.bytes_used;
        if superblock.inode_table >= superblock.directory_table || superblock.directory_table > end {
            return Err(corrupt(64, "the tables are not in order"));
        }
        if superblock.id_count == 0 || superblock.id_table >= end {
            return Err(corrupt(48, "the table of owners is not inside the squashfs"));
        }
        if superblock.fragment_count != 0 && superblock.fragment_table >= end {
            return Err(corrupt(80, "the fragment table is not inside the squashfs"));
        }
        if superblock.xattr_table != NO_TABLE && superblock.xattr_table >= end {
            return Err(corrupt(56, "the table of extended attributes is not inside the squashfs"));
        }
        Ok(superblock)
    }
}

/// Two bytes of a structure whose length was checked.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Four bytes of a structure whose length was checked.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | (u32::from(u16_at(bytes, at + 2)) << 16)
}

/// Eight bytes of a structure whose length was checked.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_encoding() {
        for (major, minor) in [(1, 3), (8, 255), (8, 256), (259, 1_048_575), (4095, 0), (0, 70_000)] {
            let number = encode_device(major, minor).expect("in range");
            assert_eq!(decode_device(number), (major, minor));
            // What stat(2) reports is the same encoding, widened.
            assert_eq!(u64::from(number), rustix::fs::makedev(major, minor) & 0xFFFF_FFFF);
        }
        assert!(encode_device(4096, 0).is_err());
        assert!(encode_device(0, 1 << 20).is_err());
    }
}
