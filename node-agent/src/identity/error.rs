//! Why a node has no identity or no session now, in the kinds that the boot's state machine decides by.

use moor_api::client::ClientError;
use moor_api::problem::Problem;
use std::io;
use std::path::PathBuf;

/// Enrolment, a session or the closing of the boot stage did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The member refused; its words say why and what to do.
    #[error("{0}")]
    Refused(Problem),
    /// The connection to the member broke: try again, or another member.
    #[error("{0}")]
    Connection(#[source] ClientError),
    /// The member's answer is not what the API says.
    #[error("the member's answer is not understood: {0}")]
    Answer(String),
    /// The TPM refused or does not work.
    #[error("TPM: {doing}: {cause}")]
    Tpm {
        /// What was being done, as a phrase with a verb.
        doing: &'static str,
        /// What the TPM or its library says.
        cause: String,
    },
    /// The firmware announces a TPM 2.0 that no driver serves.
    #[error(
        "the firmware announces a TPM 2.0, but no driver made '{device}' within {seconds} s: load its module in the initramfs \
         (tpm_crb or tpm_tis), or switch the TPM off in the firmware's set-up to boot without one"
    )]
    NoDriver {
        /// The device that was waited for.
        device: PathBuf,
        /// How long.
        seconds: u64,
    },
    /// The node is enrolled by a TPM, and this machine shows none.
    #[error(
        "node '{0}' is enrolled by its TPM, but this machine has none: switch the TPM on in the firmware's set-up, or bind the node to \
         another identity with 'moor node trust rearm {0}'"
    )]
    NoTpm(String),
    /// The node is enrolled by a soft key, and this machine proves itself by its TPM.
    #[error(
        "node '{0}' is enrolled by a soft key, but this machine has a TPM: bind the node to it with 'moor node trust rearm {0}'"
    )]
    NoSoftKey(String),
    /// The file of the soft key.
    #[error("soft key '{}': {doing}: {cause}", path.display())]
    SoftKey {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The soft key's file holds something else.
    #[error("soft key '{}': {reason}", path.display())]
    BadSoftKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: &'static str,
    },
    /// The cryptographic library failed.
    #[error("the cryptographic library failed at {0}")]
    Crypto(&'static str),
}

impl IdentityError {
    /// Whether the same call may succeed later or at another member, with nothing changed here.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused(problem) => problem.status >= 500 || problem.status == 429,
            Self::Connection(error) => error.is_transient(),
            _ => false,
        }
    }

    /// The member's refusal, when it is one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        if let Self::Refused(problem) = self { Some(problem) } else { None }
    }
}

impl From<ClientError> for IdentityError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Problem(problem) => Self::Refused(problem),
            ClientError::Answer { .. } => Self::Answer(error.to_string()),
            other => Self::Connection(other),
        }
    }
}

/// Names what was being done with the TPM when it failed.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, IdentityError>;
}

impl<T, E: std::error::Error> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, IdentityError> {
        self.map_err(|error| wrong(doing, chain(&error)))
    }
}

/// All causes in one line: where the library does not know a response code, its number is in the last one.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// A TPM that answers, but wrongly.
pub(super) fn wrong(doing: &'static str, cause: impl Into<String>) -> IdentityError {
    IdentityError::Tpm { doing, cause: cause.into() }
}
