//! TPM 2.0 in pure Rust, for both sides: structures, key templates, credentials made by a server, quotes checked by a server.
//!
//! The numbers and layouts are those of the TPM 2.0 Library Specification, Part 2 (structures), and its Part 1 (credential protection,
//! key derivation). Nothing here talks to a TPM.

pub mod credential;
mod der;
pub mod public;
pub mod quote;
pub mod template;
mod wire;

pub use public::Public;
pub use quote::{Bank, Expected, QuoteError, Verified};

/// A TPM structure is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TpmError {
    /// It ends too early.
    #[error("{0}: it ends too early")]
    Truncated(&'static str),
    /// Bytes follow its end.
    #[error("{0}: bytes follow its end")]
    Trailing(&'static str),
    /// A field is longer than a TPM structure may be.
    #[error("a field is longer than 65535 bytes")]
    TooLong,
    /// An algorithm or type that is not supported.
    #[error("{what} {value:#06x} is not supported")]
    Unsupported {
        /// What it is.
        what: &'static str,
        /// Its number.
        value: u32,
    },
    /// A key does not have the properties it must have.
    #[error("the attestation key {0}")]
    Template(&'static str),
    /// The key is not a valid one.
    #[error("the key is not usable: {0}")]
    Key(&'static str),
    /// The cryptographic library failed.
    #[error("the cryptographic library failed at {0}")]
    Crypto(&'static str),
}

/// The content of a sized buffer (`TPM2B_…`) that stands alone; `what` names it in the error.
///
/// # Errors
/// It is shorter or longer than its size field says.
pub fn content<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a [u8], TpmError> {
    let mut reader = wire::Reader::new(bytes, what);
    let content = reader.sized()?;
    reader.end()?;
    Ok(content)
}

/// Algorithm numbers (Part 2, table "`TPM_ALG_ID` Constants").
pub mod alg {
    /// RSA.
    pub const RSA: u16 = 0x0001;
    /// AES.
    pub const AES: u16 = 0x0006;
    /// SHA-256.
    pub const SHA256: u16 = 0x000B;
    /// SHA-384.
    pub const SHA384: u16 = 0x000C;
    /// None.
    pub const NULL: u16 = 0x0010;
    /// ECDSA.
    pub const ECDSA: u16 = 0x0018;
    /// Elliptic curves.
    pub const ECC: u16 = 0x0023;
    /// Cipher feedback.
    pub const CFB: u16 = 0x0043;
}
