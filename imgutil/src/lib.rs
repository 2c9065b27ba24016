//! The library behind `imgutil`: builds root images, starts them like containers, packs, unpacks and checks them.

mod boot_files;
pub mod build;
pub mod capture;
pub mod cmd;
pub mod diff;
pub mod exec;
mod files;
mod generations;
mod in_root;
mod inodes;
pub mod inspect;
mod key_file;
mod lossy;
pub mod oci;
pub mod pack;
pub mod progress;
pub mod recipe;
pub mod sbom;
pub mod scrub;
pub mod squashfs;
mod system;
mod tar;
pub mod trial;
pub mod unpack;
pub mod upload;
