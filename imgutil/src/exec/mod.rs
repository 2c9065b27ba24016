//! `exec`: runs a command in a root tree like in a container.
//!
//! The host's side is `session`, PID 1 of the image is `init`; between them runs `channel`. One module per concept of
//! the kernel: `root` (namespaces, `pivot_root`, `/proc`, `/sys`, `/run`), `user` (ids of an ordinary user), `mounts`, `dev`,
//! `devices` (which ones may be opened) with `bpf`, `caps`, `pty`, `signals`; `plant` holds what an image sees only while a
//! command runs, `bind` the user's own binds, `repository` the repositories that he adds, `trial` changes that are looked at before they are kept, `foreign` images of
//! other architectures.

mod bind;
mod bpf;
mod caps;
mod channel;
mod command;
mod dev;
mod devices;
mod foreign;
mod init;
mod mounts;
mod plant;
mod pty;
mod repository;
mod root;
mod session;
mod signals;
mod sys;
mod trial;
mod user;

pub use bind::{Bind, BindError};
pub use command::CommandError;
pub use foreign::{ForeignError, Machine};
pub use pty::{PtyError, Window};
pub use repository::{Repository, RepositoryError};
pub use signals::{ASK_FOR_THE_END, PASSED_ON, SignalError, SignalWatch};
pub use trial::{Change, Kind, State, Trial, TrialError};
pub use user::UserError;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Which files the command sees.
#[derive(Debug)]
pub enum Root {
    /// Those of an image tree, with few capabilities and devices.
    Tree(PathBuf),
    /// Those of the host, with all rights, but mounts and processes of its own that end with it: for tools that mount.
    Host,
}

/// The network that a command sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// The host's, in which package managers fetch.
    #[default]
    Host,
    /// None but its own loopback.
    None,
}

/// What to run, and where.
pub struct Options {
    /// The files.
    pub root: Root,
    /// Name of the image, used as host name and in the prompt.
    pub name: Option<String>,
    /// Parts of the host to show.
    pub binds: Vec<Bind>,
    /// Repositories to show beside the image's own.
    pub repositories: Vec<Repository>,
    /// Its network.
    pub network: Network,
    /// The layer that takes its changes; they go into the tree if `None`.
    pub trial: Option<Arc<Trial>>,
    /// For a command among the host's files: programs of this architecture must run too. Of a tree it is found out.
    pub machine: Option<Machine>,
    /// Program and arguments; empty means the image's shell.
    pub command: Vec<OsString>,
    /// Variables beside the usual ones.
    pub environment: Vec<(String, String)>,
    /// The user's terminal, if the command is to have one.
    pub terminal: Option<Window>,
    /// Standard streams without a terminal; those of this process if `None`. Each must be above 2.
    pub stdio: Option<[OwnedFd; 3]>,
    /// After a signal that asks for its end was passed on, the command has this long before it is killed; for ever if `None`.
    pub patience: Option<Duration>,
}

impl Options {
    /// A command in an image, without a terminal.
    pub fn in_tree(tree: &Path, command: Vec<OsString>) -> Result<Self, ExecError> {
        let error = |source| ExecError::Tree { path: tree.to_path_buf(), source };
        let tree = tree.canonicalize().map_err(error)?;
        if !tree.metadata().map_err(error)?.is_dir() {
            return Err(ExecError::Tree { path: tree, source: io::ErrorKind::NotADirectory.into() });
        }
        if tree == Path::new("/") {
            return Err(ExecError::OwnRoot);
        }
        let mut options = Self {
            root: Root::Tree(tree.clone()),
            name: None,
            binds: Vec::new(),
            repositories: Vec::new(),
            network: Network::Host,
            trial: None,
            machine: None,
            command,
            environment: Vec::new(),
            terminal: None,
            stdio: None,
            patience: None,
        };
        options.set_name(&tree);
        Ok(options)
    }

    /// Names the image by the last part of `path`.
    pub fn set_name(&mut self, path: &Path) {
        self.name = path.file_name().map(|name| host_name(&name.to_string_lossy()));
    }

    /// A command among the host's files, whose mounts and processes end with it.
    #[must_use]
    pub fn on_host(command: Vec<OsString>, stdio: [OwnedFd; 3]) -> Self {
        Self {
            root: Root::Host,
            name: None,
            binds: Vec::new(),
            repositories: Vec::new(),
            network: Network::Host,
            trial: None,
            machine: None,
            command,
            environment: Vec::new(),
            terminal: None,
            stdio: Some(stdio),
            patience: None,
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With this status.
    Exited(u8),
    /// By this signal.
    Signaled(u8),
}

impl Outcome {
    /// The status as a shell gives it: 128 and the signal's number for a command that a signal ended.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(number) => number.saturating_add(128),
        }
    }
}

/// The end of a command that could be started.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub outcome: Outcome,
    /// What the user should know beside that.
    pub warnings: Vec<String>,
    /// Signals that were passed on to it.
    pub passed_on: Vec<nix::sys::signal::Signal>,
}

/// Why a command did not run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Not root, where an ordinary user's own namespaces do not help.
    #[error("running a tool with the host's files needs root: use sudo")]
    NotRoot,
    /// No user namespace for an ordinary user.
    #[error(transparent)]
    User(#[from] UserError),
    /// A repository that the user added cannot be shown.
    #[error(transparent)]
    Repository(Box<RepositoryError>),
    /// The image's programs do not run here.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// What an interrupted trial was keeping could not be kept.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// The tree cannot be opened.
    #[error("cannot use '{path}' as an image tree: {source}")]
    Tree {
        /// The tree as given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The tree is `/`.
    #[error("'/' is the running system, not an image tree")]
    OwnRoot,
    /// Something holds the tree exclusively.
    #[error("'{0}' is in use by another imgutil that changes it: wait for it to end")]
    Busy(PathBuf),
    /// A step on the host's side failed.
    #[error("cannot {0}: {1}")]
    Start(&'static str, io::Error),
    /// PID 1 could not set up the image.
    #[error("{0}")]
    SetUp(String),
    /// The command itself could not be started.
    #[error("{reason}")]
    NotStarted {
        /// 127 if it was not found, else 126: what a shell returns.
        code: u8,
        /// Why.
        reason: String,
    },
    /// PID 1 was killed from outside.
    #[error("the image's first process was killed from outside ({0}): the command's status is unknown")]
    Lost(String),
    /// The command cannot be expressed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The terminal failed.
    #[error(transparent)]
    Pty(#[from] PtyError),
}

impl From<RepositoryError> for ExecError {
    fn from(error: RepositoryError) -> Self {
        Self::Repository(Box::new(error))
    }
}

/// Runs a command and waits until it and everything it started have ended.
///
/// `signals` are passed on to the command while it runs. Afterwards no process, mount or namespace of it is left, whether
/// this returns, fails, or the calling process is killed.
pub fn run(options: &Options, signals: Option<&SignalWatch>) -> Result<Finished, ExecError> {
    if matches!(options.root, Root::Host) && !rustix::process::geteuid().is_root() {
        return Err(ExecError::NotRoot);
    }
    std::thread::scope(|scope| {
        let session = std::thread::Builder::new()
            .name("exec".to_owned())
            .spawn_scoped(scope, || session::run(options, signals))
            .map_err(|error| ExecError::Start("start a thread", error))?;
        session.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A host name from a directory's name: letters, digits and hyphens, 63 at most.
fn host_name(text: &str) -> String {
    let name: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .skip_while(|c| *c == '-')
        .take(63)
        .collect();
    let name = name.trim_end_matches('-');
    if name.is_empty() { "image".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_valid_whatever_the_directory_is_called() {
        for (directory, name) in
            [("debian-12", "debian-12"), ("my tree.v2", "my-tree-v2"), (".partial", "partial"), ("…", "image")]
        {
            assert_eq!(host_name(directory), name);
        }
        assert_eq!(host_name(&"a".repeat(100)).len(), 63);
    }

    #[test]
    fn a_signal_is_told_like_a_shell_does() {
        assert_eq!(Outcome::Signaled(15).code(), 143);
        assert_eq!(Outcome::Exited(3).code(), 3);
    }
}
