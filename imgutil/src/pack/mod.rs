//! Packs a tree: scan, squashfs, seal, and the files beside the image.

mod contents;
mod scan;
mod squash;

pub use scan::Warnings;
pub use squash::{Squashed, squash};
