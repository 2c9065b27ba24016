//! What can be wrong with a sealed image, each as its own variant: the message says where, and what to do.

use std::io;

/// A sealed image cannot be made, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The header is not one that this version reads.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The file is shorter or longer than its header says.
    #[error("the file has {actual} bytes, {}; fetch it again", length_text(*expected, *actual))]
    Length {
        /// By the header.
        expected: u64,
        /// On disk.
        actual: u64,
    },
    /// The digest is not the pinned one.
    #[error("the image is {actual}, not the expected {expected}: another image, or another generation of it")]
    Digest {
        /// Pinned.
        expected: String,
        /// Found.
        actual: String,
    },
    /// No trusted key signed it.
    #[error(
        "the image {digest} is not signed by any of the {trusted} trusted keys: {why}; sign it, or trust its signer"
    )]
    Untrusted {
        /// Digest of the image.
        digest: String,
        /// How many keys were trusted.
        trusted: usize,
        /// What was found instead.
        why: &'static str,
    },
    /// The signature file does not parse.
    #[error("the signature file is not readable: {0}")]
    SignatureFile(String),
    /// A key for signing or verifying does not parse.
    #[error("{0}")]
    SigningKey(String),
    /// Another lineage.
    #[error(
        "the image is of another lineage ({actual}) than expected ({expected}): it is not a generation of the same image"
    )]
    Lineage {
        /// Wanted, hexadecimal.
        expected: String,
        /// Found.
        actual: String,
    },
    /// Older than allowed.
    #[error(
        "the image has serial {actual}, older than the {minimum} that is required: a later generation was seen already"
    )]
    Serial {
        /// Smallest allowed.
        minimum: u64,
        /// Found.
        actual: u64,
    },
    /// The image is plain where a sealed one is required, or a key was given.
    #[error(
        "the image is not encrypted, though an encrypted one is expected (a key was given, or plain images are refused)"
    )]
    NotEncrypted,
    /// No key was given for a sealed image.
    #[error("the image is encrypted (key id {0}): give its key")]
    KeyNeeded(String),
    /// A key was given that is not this image's.
    #[error("wrong key: the image wants key id {wanted}, this is {given}; give the key that was made with this image")]
    WrongKey {
        /// By the header.
        wanted: String,
        /// Of the key that was given.
        given: String,
    },
    /// The key's id matches, but the header's MAC does not.
    #[error("the header MAC does not match (offset 320): the header was made without this key")]
    HeaderMac,
    /// Key material in a file does not parse.
    #[error("a key has 64 hexadecimal digits and a newline: {0}")]
    KeyText(&'static str),
    /// Stored hash and bytes differ.
    #[error("{what} is damaged (bytes {start} to {}): its hash does not match; fetch it again", end.saturating_sub(1))]
    Damaged {
        /// Which part ("chunk 7", "table page 0", "metadata").
        what: String,
        /// First byte in the file.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// Hash good, tag bad: somebody who holds no key, or misuses one, made the table.
    #[error("{what} does not decrypt (bytes {start} to {}), though its hash matches: it was forged, or made with another key", end.saturating_sub(1))]
    Forged {
        /// Which part.
        what: String,
        /// First byte in the file.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// The metadata is not what this version understands.
    #[error("the metadata is not readable: {0}")]
    Metadata(String),
    /// A value given by the caller is out of its bounds.
    #[error("{0}")]
    Argument(&'static str),
    /// The re-read after sealing found other bytes than were written.
    #[error("what was read back is not what was written (bytes {start} to {}): the disk or its memory is faulty", end.saturating_sub(1))]
    ReadBack {
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// Cryptography failed for no reason of the data (no randomness, say).
    #[error("the cryptographic library failed at {0}")]
    Crypto(&'static str),
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl ImageError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// The header breaks a rule of the format. Offsets are in bytes from the start of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not our file.
    #[error("not a sealed image: the magic at offset 0 is another; give a file that `imgutil pack` wrote")]
    Magic,
    /// A later, incompatible format.
    #[error("the image has format version {0}, this program reads version 1: update it")]
    Major(u16),
    /// The header's hash does not match.
    #[error("header hash does not match (offset 4064): the file is damaged or was changed; fetch it again")]
    HeaderHash,
    /// A fixed field has another value.
    #[error("{field} at offset {offset} is {value}, which version 1 does not allow")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Where.
        offset: usize,
        /// What was there.
        value: u64,
    },
    /// A reserved byte is not zero.
    #[error("the reserved byte at offset {0} is not zero")]
    Reserved(usize),
    /// A length or an offset is not what the others make it.
    #[error(
        "{field} at offset {offset} is {value}, it should be {expected}: the file is damaged or was changed; fetch it again"
    )]
    Layout {
        /// Name of the field.
        field: &'static str,
        /// Where.
        offset: usize,
        /// What was there.
        value: u64,
        /// What follows from the other fields.
        expected: u64,
    },
    /// Longer than a version 1 image may be.
    #[error("{field} at offset {offset} is {value}, more than the {maximum} that version 1 allows")]
    TooLarge {
        /// Name of the field.
        field: &'static str,
        /// Where.
        offset: usize,
        /// What was there.
        value: u64,
        /// Bound.
        maximum: u64,
    },
}

fn length_text(expected: u64, actual: u64) -> String {
    if expected == crate::HEADER_LENGTH as u64 {
        return "fewer than a sealed image's header: it is none, or it is truncated".to_owned();
    }
    format!("its header says {expected}: it is {}", if actual < expected { "truncated" } else { "extended" })
}
