//! The sealed image container (DESIGN.md §3, docs/formats.md): a payload, usually a squashfs, in an authenticated and encrypted file
//! that is written as a stream and read at random, over HTTP ranges too.
//!
//! * [`Sealer`] makes one. [`Image`] reads one from a file. [`Verifier`] holds the same checks without any input or output, for
//!   readers that fetch the bytes themselves.
//! * [`verify_file`] names everything that is wrong with one. [`SignatureFile`] says who vouches for one.
//!
//! This crate knows neither network nor node, and does no I/O but on what it is given.

mod error;
mod hash;
mod header;
mod image;
mod keys;
mod metadata;
mod read_back;
mod report;
mod seal;
#[cfg(target_arch = "x86_64")]
mod sha;
mod sign;
#[cfg(target_arch = "x86_64")]
mod sixteen;
#[cfg(target_arch = "x86_64")]
mod two;
#[cfg(test)]
mod vectors;
mod verify;

pub use error::{FormatError, ImageError};
pub use header::{HEADER_LENGTH, Header, LEAVES_PER_PAGE, MAX_PLAINTEXT, Payload, TAG_LENGTH};
pub use image::{Image, ReadAt, read_header};
pub use keys::Dek;
pub use metadata::{Filesystem, Metadata, Package};
pub use report::{MAX_PROBLEMS, Problem, Region, Report, verify_file};
pub use seal::{PayloadSummary, SealOptions, Sealed, Sealer};
pub use sign::{PublicKey, SSHSIG_NAMESPACE, SignatureFile, SigningKey, sshsig_message};
pub use verify::{LeafPage, OpenOptions, Verifier};
