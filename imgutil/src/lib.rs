//! The library behind `imgutil`: builds root images, starts them like containers, packs, unpacks and checks them.

pub mod build;
pub mod cmd;
pub mod exec;
pub mod pack;
pub mod progress;
pub mod recipe;
pub mod squashfs;
pub mod unpack;
