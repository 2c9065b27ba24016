//! Why a tree was not built.

use super::output::Tail;
use crate::exec::{ExecError, ForeignError};
use crate::oci::OciError;
use nix::sys::signal::Signal;
use std::io;
use std::path::{Path, PathBuf};

/// Why a tree was not built. Nothing is left under its name.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Not root.
    #[error("building an image needs root (no support for ordinary users yet): use sudo")]
    NotRoot,
    /// Something has the tree's name.
    #[error("'{0}' exists: build makes a new tree; remove it or choose another name")]
    Exists(PathBuf),
    /// Another build of the same tree runs.
    #[error("another build of '{tree}' is running ('{work}' is locked)")]
    Busy {
        /// The tree.
        tree: PathBuf,
        /// The directory it works in.
        work: PathBuf,
    },
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
    /// No such data file.
    #[error("unknown operating system '{name}': known are {}", known.join(", "))]
    UnknownOs {
        /// As given.
        name: String,
        /// What could have been given.
        known: Vec<String>,
    },
    /// A data file of the user's cannot be used.
    #[error("the description of an operating system '{path}': {reason}")]
    OsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, in one line.
        reason: String,
    },
    /// A container image of a system of which nothing is known.
    #[error(
        "the image is of '{0}', of which nothing is known: say with --os which system it is like (imgutil build --list-os), or \
         describe it in a file, or leave the recipe out"
    )]
    UnknownImage(String),
    /// A container image of another system than the recipe says.
    #[error("the image is of {image}, the recipe for {recipe}: leave 'os' out of the recipe, or take another image")]
    OtherSystem {
        /// What the image says.
        image: String,
        /// What the recipe says.
        recipe: String,
    },
    /// A container image without what installs packages.
    #[error(
        "the image has no {manager}, which installs the packages of {os}: take an image with it, or ask for no packages"
    )]
    NoManager {
        /// The system.
        os: String,
        /// What is missing.
        manager: &'static str,
    },
    /// No kernel for it.
    #[error("{os} is not known for architecture '{arch}': known are {}", known.join(", "))]
    UnknownArch {
        /// The operating system.
        os: String,
        /// As given.
        arch: String,
        /// What could have been given.
        known: Vec<String>,
    },
    /// A container image cannot be used.
    #[error(transparent)]
    Image(#[from] OciError),
    /// The host cannot run its programs.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// Not a name at all.
    #[error("'{0}' is no package name")]
    PackageName(String),
    /// The repositories do not have it.
    #[error(
        "unknown package '{name}': none of the repositories has it{}{}; correct the name, or add the repository that has it",
        if near.is_empty() { String::new() } else { format!(" (did you mean {}?)", near.join(", ")) },
        if others.is_empty() { String::new() } else { format!(", nor '{}'", others.join("', '")) }
    )]
    UnknownPackage {
        /// The first one that is unknown.
        name: String,
        /// Names like it.
        near: Vec<String>,
        /// The others that are unknown.
        others: Vec<String>,
    },
    /// A version that was asked for exactly is in no repository any more.
    #[error(
        "{name} {version} is gone from the repositories: {}{}; build with --update-lock to take what is there, or from a \
         mirror that keeps old versions",
        if there.is_empty() { "they have no version of it".to_owned() } else { format!("they have {}", there.join(" and ")) },
        if *others == 0 { String::new() } else { format!(" (and {others} more packages are gone)") }
    )]
    VersionGone {
        /// The package.
        name: String,
        /// The version that was asked for.
        version: String,
        /// Its versions in the repositories.
        there: Vec<String>,
        /// So many other packages are gone too.
        others: usize,
    },
    /// A version that was asked for exactly is there, as another file.
    #[error(
        "{name} {version} in the repositories is not the file that the lock names (its SHA-256 differs): build with \
         --update-lock to take what is there, if you trust the repository"
    )]
    OtherFile {
        /// The package.
        name: String,
        /// The version that was asked for.
        version: String,
    },
    /// Another version, a package that was not chosen, or a chosen one that is not there.
    #[error(
        "{} was installed, {}: this is a fault of imgutil or of a package's scripts",
        installed.as_ref().map_or(format!("no {name}"), |version| format!("{name} {version}")),
        chosen.as_ref().map_or("which was not chosen".to_owned(), |version| format!("where {version} was chosen"))
    )]
    NotAsChosen {
        /// The package.
        name: String,
        /// Its version in the tree.
        installed: Option<String>,
        /// The version that was to be there; none: it was not to be there.
        chosen: Option<String>,
    },
    /// The node's files are not there.
    #[error(
        "cannot read the node's files in '{0}': {1}; install the package mooring-node, or name the directory with \
         --node-files, or build with --minimal"
    )]
    NodeFiles(PathBuf, io::Error),
    /// They are another architecture's.
    #[error(
        "the node's file '{}' is a program for {files}, and the image for {image}: name a directory with those for {image} \
         with --node-files, or build with --minimal", path.display()
    )]
    NodeFilesFor {
        /// The program.
        path: PathBuf,
        /// Its architecture.
        files: &'static str,
        /// The image's.
        image: &'static str,
    },
    /// A tool of the host's is not there.
    #[error("{tool} is not installed: install the package {package}")]
    NoTool {
        /// The program.
        tool: &'static str,
        /// What brings it on Debian.
        package: &'static str,
    },
    /// The public key of a repository is not there.
    #[error(
        "the key '{key}' that signs '{uri}' is missing: {}",
        package.as_ref().map_or("check the recipe's 'key'".to_owned(), |package| format!("install the package {package}"))
    )]
    NoKey {
        /// The repository.
        uri: String,
        /// Where its key should be.
        key: PathBuf,
        /// What brings it.
        package: Option<String>,
    },
    /// A repository lacks something the back end wants.
    #[error("repository '{uri}': {problem}")]
    Repository {
        /// Its address.
        uri: String,
        /// What is wrong, with what to do.
        problem: String,
    },
    /// A repository does not answer.
    #[error("cannot fetch {address}: {reason}; check the mirror's address and the network")]
    Unreachable {
        /// What was asked for.
        address: String,
        /// The tool's words.
        reason: String,
    },
    /// A repository or package is not signed by the key it must be signed by.
    #[error("a repository is not signed by its key, so nothing of it was used: {0}")]
    Untrusted(String),
    /// An index or a package is not what the index above it, which is signed, names.
    #[error(
        "{0} is not the file that the signed index names, so nothing of it was used: it was changed or damaged, or the archive is \
         just being updated; build again in some minutes, or take another mirror"
    )]
    Altered(String),
    /// A setting of the recipe cannot be made in this image.
    #[error("{0}")]
    Setting(String),
    /// The lock cannot be used or written.
    #[error("lock '{path}': {message}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why not.
        message: String,
    },
    /// `--locked`, and the recipe is not what was locked.
    #[error(
        "the recipe does not match its lock '{path}': {difference}; build without --locked to take the change, or with \
         --update-lock to choose all packages anew"
    )]
    Unlocked {
        /// The lock.
        path: PathBuf,
        /// What is different.
        difference: String,
    },
    /// No room.
    #[error("the file system of '{0}' is full: make room there, or build elsewhere")]
    Full(PathBuf),
    /// Too little room to begin.
    #[error(
        "the file system of '{place}' has {free} MiB free, too few to begin (at least {least}): make room there, or build elsewhere"
    )]
    NoRoom {
        /// Where it is to be built.
        place: PathBuf,
        /// MiB that are free there.
        free: u64,
        /// MiB that have to be.
        least: u64,
    },
    /// A tool failed in another way.
    #[error("{doing} failed: {reason}")]
    Tool {
        /// What was being done.
        doing: String,
        /// The line that most likely says why.
        reason: String,
        /// The last lines it printed.
        tail: Tail,
    },
    /// A tool printed something that cannot be understood.
    #[error("{tool} answered with what is not understood: {answer}")]
    Answer {
        /// The program.
        tool: &'static str,
        /// What it printed, or what is wrong with it.
        answer: String,
    },
    /// No kernel came with the packages.
    #[error("the packages brought no kernel into /boot: add one that does, or say base = \"minimal\" (--minimal)")]
    NoKernel,
    /// Nothing would be started when the kernel is up.
    #[error("the packages brought no /sbin/init: add one that does, as systemd-sysv")]
    NoInit,
    /// There is nothing that makes an initramfs.
    #[error(
        "the packages brought neither update-initramfs nor dracut: add one of the packages initramfs-tools, dracut"
    )]
    NoInitramfsTool,
    /// The tool made nothing.
    #[error("{tool} made no initramfs for kernel {kernel}")]
    NoInitramfs {
        /// Which tool.
        tool: &'static str,
        /// For which kernel.
        kernel: String,
    },
    /// Somebody asked it to end.
    #[error("interrupted by {signal}: {}", if *base_kept { BASE_KEPT } else { NOTHING_LEFT })]
    Interrupted {
        /// What ended it.
        signal: Signal,
        /// Whether the tree with its packages is in the cache.
        base_kept: bool,
    },
    /// A command could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

const NOTHING_LEFT: &str = "nothing is left of it, and the next build begins anew";
const BASE_KEPT: &str =
    "nothing is left but the installed packages in the cache, and the next build goes on from there";

impl BuildError {
    /// The same, once the installed packages are in the cache.
    pub(super) fn with_base_kept(self) -> Self {
        match self {
            Self::Interrupted { signal, .. } => Self::Interrupted { signal, base_kept: true },
            other => other,
        }
    }

    /// A tool's failure; a full disk is said to be one. `place` is where it wrote.
    pub(super) fn tool(doing: &str, reason: &str, tail: Tail, place: &Path) -> Self {
        // The kernel's words, and RPM's.
        let full = ["No space left on device", "more space on the ", "more space needed on the "];
        if tail.lines().any(|line| full.iter().any(|words| line.contains(words))) {
            return Self::Full(place.to_path_buf());
        }
        Self::Tool { doing: doing.to_owned(), reason: reason.to_owned(), tail }
    }

    pub(super) fn io(doing: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { doing, path: path.as_ref().to_path_buf(), source }
    }
}
