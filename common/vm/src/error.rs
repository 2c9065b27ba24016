//! What can go wrong with a machine.

use std::io;
use std::path::{Path, PathBuf};

/// Why a machine is not there.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A program cannot be started.
    #[error("cannot start {program}: {source}{}", if source.kind() == io::ErrorKind::NotFound { "; install it" } else { "" })]
    Start {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program ended with another status than 0.
    #[error("{command} ended with {status}\n{said}")]
    Failed {
        /// With its arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What it printed.
        said: String,
    },
    /// A program that should run on ended.
    #[error("{what} ended\n{said}")]
    Ended {
        /// Which.
        what: String,
        /// The end of its log.
        said: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    TimedOut {
        /// What.
        what: String,
        /// The limit.
        seconds: u64,
    },
    /// A file operation failed.
    #[error("cannot {doing} '{}': {source}", path.display())]
    Io {
        /// What was being done, as a verb phrase.
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No network namespace.
    #[error("cannot make a network namespace: {0}; it needs root")]
    Namespace(io::Error),
}

impl VmError {
    /// A failed file operation, for `map_err`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}
