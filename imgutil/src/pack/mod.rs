//! Packs a tree: scan, squashfs, seal, and the files beside the image; or all of it to a server.

mod contents;
mod describe;
mod image;
mod scan;
mod squash;
mod upload;

pub(crate) use describe::newest_kernel;
pub(crate) use image::signature_path;
pub use image::{Destination, PackOptions, Packed, pack_to_files};
pub use scan::Warnings;
pub use squash::{Squashed, squash};
pub use upload::{Server, pack_to_server};
