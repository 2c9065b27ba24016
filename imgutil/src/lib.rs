//! The library behind `imgutil`: builds root images, starts them like containers, packs, unpacks and checks them.

pub mod build;
pub mod cmd;
pub mod exec;
mod files;
mod in_root;
pub mod inspect;
mod key_file;
pub mod oci;
pub mod pack;
pub mod progress;
pub mod recipe;
pub mod squashfs;
pub mod trial;
pub mod unpack;
