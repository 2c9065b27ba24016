//! `--try`: a command works on a layer over the tree (overlayfs); afterwards its changes are told (`changes`) and become the tree's
//! own (`keep`) or go away.
//!
//! The layer lies beside the tree, on its file system, so that keeping moves files by rename. From the moment the user has
//! decided to keep, a journal lies there too: whoever finds one whose writer is gone finishes the work.

mod changes;
mod files;
mod keep;

pub use changes::{Change, Kind, State};

use super::session::in_the_images_name;
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// Written when the decision to keep is made.
const JOURNAL: &str = "keeping";

/// Why trying, or keeping, did not work.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A file operation failed.
    #[error("cannot {doing} '{path}': {source}")]
    Io {
        /// What was being done, as a verb phrase.
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else works in the tree.
    #[error("'{0}' is in use by another imgutil, and a trial wants it alone: wait for that to end")]
    Busy(PathBuf),
    /// No place for the layer.
    #[error(
        "'{0}' is the root of a file system, so nothing beside it is on the same one: --try needs a tree that is a directory \
         of its file system"
    )]
    NoPlace(PathBuf),
    /// Keeping stopped in the middle.
    #[error(
        "{reason}; the rest of the changes is in '{layer}': the next imgutil exec of this tree goes on with keeping them"
    )]
    HalfKept {
        /// What happened.
        reason: String,
        /// Where they are.
        layer: PathBuf,
    },
    /// The child that works in the image's name failed.
    #[error("{0}")]
    Child(String),
}

impl TrialError {
    fn io(doing: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.as_ref().to_path_buf(), source: source.into() }
    }
}

/// A layer over a tree that is held alone.
pub struct Trial {
    tree: PathBuf,
    directory: PathBuf,
    lock: OwnedFd,
}

impl Trial {
    /// Takes the tree and makes an empty layer. What a trial that was killed has left is dropped; what one was keeping is kept.
    pub fn begin(tree: &Path) -> Result<Self, TrialError> {
        let lock = hold(tree)?;
        let directory = layer_of(tree);
        let device = |path: &Path| {
            rustix::fs::stat(path).map(|stat| stat.st_dev).map_err(|error| TrialError::io("look at", path, error))
        };
        if device(tree)? != device(tree.parent().unwrap_or(tree))? {
            return Err(TrialError::NoPlace(tree.to_path_buf()));
        }
        let trial = Self { tree: tree.to_path_buf(), directory, lock };
        trial.finish_or_drop()?;
        rustix::fs::mkdir(&trial.directory, Mode::RWXU)
            .map_err(|error| TrialError::io("make the directory", &trial.directory, error))?;
        for part in [trial.upper(), trial.work()] {
            rustix::fs::mkdir(&part, Mode::from_raw_mode(0o755))
                .map_err(|error| TrialError::io("make the directory", &part, error))?;
        }
        trial.like_the_tree()?;
        Ok(trial)
    }

    /// The layer's root is what the command sees as `/`: it begins with what the tree's root has.
    fn like_the_tree(&self) -> Result<(), TrialError> {
        self.inside(|tree, upper| {
            let stat = rustix::fs::fstat(tree).map_err(|error| error.to_string())?;
            files::copy_attributes(tree, &stat, upper).map_err(|error| error.to_string())
        })
    }

    /// Where the command's changes are.
    pub(super) fn upper(&self) -> PathBuf {
        self.directory.join("upper")
    }

    /// Where overlayfs works.
    pub(super) fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    pub(super) fn lock(&self) -> &OwnedFd {
        &self.lock
    }

    /// What the command has changed, sorted by path.
    pub fn changes(&self) -> Result<Vec<Change>, TrialError> {
        let linked = self.work().join("index").exists();
        self.inside(|tree, upper| changes::compare(tree, upper, linked).map_err(|error| error.to_string()))
    }

    /// Makes the changes the tree's own.
    pub fn keep(self) -> Result<(), TrialError> {
        let linked = self.work().join("index").exists();
        // The links are found before anything moves, and noted: after a crash nobody could find them.
        let links: Vec<changes::Link> =
            self.inside(|tree, upper| changes::links(tree, upper, linked).map_err(|error| error.to_string()))?;
        let journal = self.directory.join(JOURNAL);
        let text = serde_json::to_vec(&links).map_err(|error| TrialError::io("write", &journal, error))?;
        sync(&self.directory)?;
        crate::files::write_whole(&journal, 0o600, &text).map_err(|error| TrialError::Child(format!("{error:#}")))?;
        self.finish_keeping(&links)
    }

    fn finish_keeping(&self, links: &[changes::Link]) -> Result<(), TrialError> {
        let trash = self.directory.join("trash");
        self.inside(|tree, upper| {
            std::fs::create_dir_all(&trash).map_err(|error| error.to_string())?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let trash = rustix::fs::open(&trash, flags, Mode::empty()).map_err(|error| error.to_string())?;
            keep::keep(tree, upper, trash.as_fd(), links).map_err(|error| error.to_string())
        })
        .map_err(|error| TrialError::HalfKept { reason: error.to_string(), layer: self.directory.clone() })?;
        sync(&self.tree)?;
        let journal = self.directory.join(JOURNAL);
        std::fs::remove_file(&journal).map_err(|error| TrialError::io("remove", &journal, error))?;
        self.remove()
    }

    /// Lets the changes go.
    pub fn drop_changes(self) -> Result<(), TrialError> {
        self.remove()
    }

    fn remove(&self) -> Result<(), TrialError> {
        let failed =
            |error: String| TrialError::Child(format!("cannot remove '{}': {error}", self.directory.display()));
        // The parts belong to the image's users, the directory itself to the caller.
        let removed: Result<(), TrialError> = in_the_images_name(|| {
            for name in ["upper", "work", "trash"] {
                files::remove(CWD, self.directory.join(name).as_os_str()).map_err(|error| error.to_string())?;
            }
            Ok(())
        })
        .map_err(failed);
        removed?;
        std::fs::remove_dir_all(&self.directory).map_err(|error| failed(error.to_string()))
    }

    /// What an earlier trial has left.
    fn finish_or_drop(&self) -> Result<(), TrialError> {
        if !self.directory.exists() {
            return Ok(());
        }
        match std::fs::read(self.directory.join(JOURNAL)) {
            Ok(text) => {
                let links: Vec<changes::Link> = serde_json::from_slice(&text)
                    .map_err(|error| TrialError::io("read the journal in", &self.directory, error))?;
                self.finish_keeping(&links)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.remove(),
            Err(error) => Err(TrialError::io("read the journal in", &self.directory, error)),
        }
    }

    /// Does something with the tree and the layer, as root of the image.
    fn inside<T: serde::Serialize + serde::de::DeserializeOwned>(
        &self,
        job: impl FnOnce(std::os::fd::BorrowedFd<'_>, std::os::fd::BorrowedFd<'_>) -> Result<T, String>,
    ) -> Result<T, TrialError> {
        let upper = self.upper();
        in_the_images_name(|| {
            let open = |path: &Path| {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty())
                    .map_err(|error| format!("cannot open '{}': {error}", path.display()))
            };
            job(open(&self.tree)?.as_fd(), open(&upper)?.as_fd())
        })
        .map_err(TrialError::Child)
    }
}

/// Finishes what a trial was keeping in `tree` when it was killed. Whether there was something.
pub(super) fn finish_interrupted(tree: &Path) -> Result<bool, TrialError> {
    let directory = layer_of(tree);
    if !directory.join(JOURNAL).exists() {
        return Ok(false);
    }
    let trial = Trial { tree: tree.to_path_buf(), directory, lock: hold(tree)? };
    trial.finish_or_drop()?;
    Ok(true)
}

/// The tree, locked for us alone.
fn hold(tree: &Path) -> Result<OwnedFd, TrialError> {
    let lock = rustix::fs::open(tree, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| TrialError::io("open", tree, error))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(TrialError::Busy(tree.to_path_buf())),
        Err(error) => Err(TrialError::io("lock", tree, error)),
    }
}

/// `.NAME.imgutil-try` beside `NAME`.
fn layer_of(tree: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(tree.file_name().unwrap_or_default());
    name.push(".imgutil-try");
    tree.with_file_name(name)
}

fn sync(directory: &Path) -> Result<(), TrialError> {
    rustix::fs::open(directory, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(rustix::fs::syncfs)
        .map_err(|error| TrialError::io("write out", directory, error))
}
