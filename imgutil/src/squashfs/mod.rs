//! Squashfs: written through libsquashfs into an output that only grows, read by a parser of our own in safe Rust.
//!
//! The library writes (its block processor, metadata, xattr and directory writers); nothing of it ever parses an image,
//! because images come from elsewhere and two advisories on its readers are open. Only its decompressors are used there.

mod compressor;
mod data;
mod error;
mod ffi;
mod format;
mod inode;
mod metadata;
#[cfg(test)]
pub(crate) mod peer;
mod reader;
mod sink;
mod tree;
mod workers;

pub use data::{Compression, ContentId, DataWriter, WriterOptions};
pub use error::SquashfsError;
pub use format::{BLOCK_SIZE, SUPERBLOCK_SIZE};
pub use inode::{FileData, Inode, InodeKind, Listing};
pub use metadata::Source;
pub use reader::{DirectoryEntry, Entries, InodePlace, Piece, Reader};
pub use tree::{Attributes, Entry, InodeRef, Special, TreeWriter, XattrId};
pub use workers::MEMORY;
