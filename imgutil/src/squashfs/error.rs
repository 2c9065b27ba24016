//! What can go wrong when a squashfs is written or read, and libsquashfs's numbers in words.

use std::io;

/// A failure of the squashfs layer.
#[derive(Debug, thiserror::Error)]
pub enum SquashfsError {
    /// The output took no more bytes.
    #[error("cannot {step}: {cause}")]
    Output {
        /// What was being written.
        step: &'static str,
        /// Why the output refused; in the message.
        #[source]
        cause: io::Error,
    },
    /// libsquashfs refused.
    #[error("cannot {step}: libsquashfs says: {reason} ({code})")]
    Library {
        /// What was being done.
        step: &'static str,
        /// Its number in words.
        reason: &'static str,
        /// Its number (`sqfs/error.h`).
        code: i32,
    },
    /// The tree holds more than the format can.
    #[error("a squashfs cannot hold this tree: {0}")]
    Limit(&'static str),
    /// The image could not be read.
    #[error("cannot read {what} at offset {offset} of the squashfs: {cause}")]
    Input {
        /// Which structure.
        what: &'static str,
        /// Where it is, in bytes from the start of the squashfs.
        offset: u64,
        /// Why; in the message.
        #[source]
        cause: io::Error,
    },
    /// The image's structures contradict each other.
    #[error("the squashfs is damaged: {what} at offset {offset}: {why}; make or fetch the image again")]
    Corrupt {
        /// Which structure.
        what: &'static str,
        /// Where it is, in bytes from the start of the squashfs or of the table.
        offset: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A feature that this program does not know.
    #[error("this squashfs cannot be read: {0}")]
    Unsupported(String),
}

impl SquashfsError {
    /// A refusal of the library at `step`.
    pub(super) fn library(step: &'static str, code: i32) -> Self {
        let reason = match code {
            -1 => "out of memory",
            -2 => "input or output failed",
            -3 => "the compressor failed",
            -4 => "internal error",
            -5 => "corrupted data",
            -6 => "not supported",
            -7 => "too large",
            -8 => "out of bounds",
            -16 => "invalid argument",
            -17 => "calls in the wrong order",
            _ => "unknown error",
        };
        Self::Library { step, reason, code }
    }
}
