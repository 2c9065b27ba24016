//! Packs a tree: scan, squashfs, seal, and the files beside the image; or all of it to a server.

mod attributes;
mod contents;
mod describe;
mod flushing;
mod image;
mod look;
mod read;
mod scan;
mod selinux;
mod squash;
mod to_server;

pub(crate) use describe::{initramfs_names, newest_kernel, newest_version, os_name};
pub(crate) use image::signature_path;
pub use image::{Destination, PackOptions, Packed, pack_to_files};
pub(crate) use image::{appear, check_names};
pub(crate) use look::{Looked, look_at_tree};
pub use scan::Warnings;
pub use selinux::Labels;
pub use squash::{SquashOptions, Squashed, squash};
pub use to_server::pack_to_server;
