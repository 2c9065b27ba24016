//! `build`: makes a root tree from an archive of packages. Here are its input, its errors and the order of its steps;
//! `bootstrap` installs the packages, `finish` turns them into an image, `workdir` keeps the unfinished tree apart.

mod bootstrap;
mod finish;
mod names;
mod os;
mod output;
mod stage;
mod tools;
mod tree;
mod workdir;

pub use output::Tail;
pub(crate) use workdir::empty as empty_directory;

use crate::exec::{ExecError, SignalWatch};
use crate::recipe::{Base, Recipe, is_package_name};
use nix::sys::signal::Signal;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the package of the node's files puts them.
pub const NODE_FILES: &str = "/usr/lib/mooring/node";
/// What is built when nothing is said.
pub const DEFAULT_OS: &str = "debian-12";

/// What to build.
#[derive(Debug, Clone)]
pub struct Options {
    /// The tree to make; must not exist.
    pub tree: PathBuf,
    /// What it is made of.
    pub recipe: Recipe,
    /// Directory with the node's files in the layout of the target's root, planted before the kernel is installed. Without
    /// it an image of base `node` cannot boot as a node.
    pub node_files: Option<PathBuf>,
}

/// What happens during a build.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A new stage, as a phrase.
    Stage(&'a str),
    /// One of many like steps.
    Item {
        /// What is done, as a verb.
        what: &'a str,
        /// To which package.
        name: &'a str,
        /// Counted from 1.
        done: usize,
        /// As far as is known.
        total: usize,
    },
}

/// A finished tree.
#[derive(Debug)]
pub struct Built {
    /// Where it is.
    pub tree: PathBuf,
    /// Its operating system, as `debian-12`.
    pub os: String,
    /// Its architecture.
    pub arch: String,
    /// Versions of its kernels.
    pub kernels: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

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
    /// The host cannot run its programs.
    #[error("this host cannot run programs for '{arch}': install qemu-user-static and binfmt-support")]
    Foreign {
        /// The architecture.
        arch: String,
    },
    /// Not a name at all.
    #[error("'{0}' is no package name")]
    PackageName(String),
    /// The archives do not have it.
    #[error(
        "unknown package '{name}': none of the archives has it{}{}; correct the name, or add the archive that has it",
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
    /// The node's files are not there.
    #[error(
        "cannot read the node's files in '{0}': {1}; install the package mooring-node, or name the directory with \
         --node-files, or build with --minimal"
    )]
    NodeFiles(PathBuf, io::Error),
    /// mmdebstrap is not there.
    #[error("mmdebstrap is not installed: apt-get install mmdebstrap")]
    NoTool,
    /// The public key of an archive is not there.
    #[error(
        "the key '{key}' that signs '{uri}' is missing: {}",
        package.as_ref().map_or("check the recipe's 'key'".to_owned(), |package| format!("install the package {package}"))
    )]
    NoKey {
        /// The archive.
        uri: String,
        /// Where its key should be.
        key: PathBuf,
        /// What brings it.
        package: Option<String>,
    },
    /// An archive does not answer.
    #[error("cannot fetch {address}: {reason}; check the mirror's address and the network")]
    Unreachable {
        /// What was asked for.
        address: String,
        /// apt's words.
        reason: String,
    },
    /// An archive is not signed by the key it must be signed by.
    #[error("an archive is not signed by its key, so nothing of it was used: {0}")]
    Untrusted(String),
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
    /// No kernel came with the packages.
    #[error("the packages brought no kernel into /boot")]
    NoKernel,
    /// update-initramfs made nothing.
    #[error("update-initramfs made no initramfs for kernel {0}")]
    NoInitramfs(String),
    /// Somebody asked it to end.
    #[error("interrupted by {0}")]
    Interrupted(Signal),
    /// A command could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

impl BuildError {
    fn io(doing: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { doing, path: path.as_ref().to_path_buf(), source }
    }
}

/// Options and the data of the operating system, put together.
pub(crate) struct Plan {
    recipe: Recipe,
    node_files: Option<PathBuf>,
    arch: String,
    packages: Vec<String>,
    services: Vec<String>,
    keyring: String,
}

impl Plan {
    fn new(options: &Options, os: &os::Os) -> Result<Self, BuildError> {
        let recipe = options.recipe.clone();
        let arch = recipe.arch.clone().unwrap_or_else(|| host_architecture().to_owned());
        let kernel = os.kernel.get(&arch).ok_or_else(|| BuildError::UnknownArch {
            os: os.name.clone(),
            arch: arch.clone(),
            known: os.kernel.keys().cloned().collect(),
        })?;
        let mut packages = os.packages.minimal.clone();
        let mut services = Vec::new();
        if recipe.base == Base::Node {
            packages.extend(os.packages.node.iter().cloned());
            packages.push(kernel.clone());
            services.clone_from(&os.services.node);
        }
        for name in &recipe.packages {
            if !is_package_name(name) {
                return Err(BuildError::PackageName(name.clone()));
            }
            if !packages.contains(name) {
                packages.push(name.clone());
            }
        }
        services.extend(recipe.services.iter().cloned());
        Ok(Self {
            recipe,
            node_files: options.node_files.clone(),
            arch,
            packages,
            services,
            keyring: os.keyring.clone(),
        })
    }
}

/// Builds a tree. `progress` hears of every step; `signals` end the build in good order.
///
/// The tree appears under its name when it is complete, by one rename. Whatever fails or ends the build before, nothing
/// is left of it; after SIGKILL of this process the next build of the same tree removes the hidden directory beside it.
pub fn build(
    options: &Options,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&SignalWatch>,
) -> Result<Built, BuildError> {
    let started = Instant::now();
    if !rustix::process::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let name = options.recipe.os.as_deref().unwrap_or(DEFAULT_OS);
    let os = os::find(name).map_err(|known| BuildError::UnknownOs { name: name.to_owned(), known })?;
    let plan = Plan::new(options, &os)?;
    let sources = bootstrap::sources(&os, &plan);
    bootstrap::check_host(&sources, &os, &plan)?;

    let work = workdir::WorkDir::create(&options.tree)?;
    let mut units = Vec::new();
    if let Some(node_files) = &plan.node_files {
        stage::copy(node_files, &work.stage())?;
        units = stage::units_to_enable(&work.stage())?;
    }
    let built = (|| {
        let mut tools = tools::Tools::new(&work.log(), progress, signals)?;
        bootstrap::run(&mut tools, &work, &os, &plan, &sources)?;
        finish::run(&mut tools, &work, &plan, &sources, &units)
    })();
    let kernels = match built {
        Ok(kernels) => kernels,
        Err(error) => {
            keep_log(&work, &error);
            return Err(error);
        }
    };
    let tree = work.publish()?;
    Ok(Built { tree, os: os.name, arch: plan.arch, kernels, took: started.elapsed() })
}

/// Keeps the whole log of a failure that its last lines may not explain, and says where.
fn keep_log(work: &workdir::WorkDir, error: &BuildError) {
    if !matches!(error, BuildError::Tool { .. }) {
        return;
    }
    let kept = tempfile::Builder::new().prefix("imgutil-build-").suffix(".log").tempfile().and_then(|mut file| {
        io::copy(&mut std::fs::File::open(work.log())?, file.as_file_mut())?;
        file.into_temp_path().keep().map_err(|error| error.error)
    });
    match kept {
        Ok(path) => tracing::warn!("the whole log is kept in '{}'", path.display()),
        Err(error) => tracing::warn!("the log cannot be kept: {error}"),
    }
}

/// This machine's architecture in Debian's words.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
