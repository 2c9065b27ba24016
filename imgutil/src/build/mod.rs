//! `build`: makes a root tree from repositories of packages. Here are its input and the order of its steps: `plan` puts recipe
//! and data of the operating system together, `base` gets the packages (chosen and installed by a `backend`, held to a `lock`,
//! kept in a `cache`), `finish` turns them into an image, by `scrub` at the end; `imported` begins with a container image instead;
//! `inside` runs the image's own commands; `workdir` keeps the unfinished tree apart.

mod accounts;
mod backend;
mod base;
pub mod cache;
mod epoch;
mod error;
mod finish;
mod imported;
mod initramfs;
mod inside;
mod lay;
mod lock;
mod near;
mod os;
mod output;
mod plan;
mod scrub;
mod sources;
mod stage;
mod tools;
mod tree;
mod workdir;

pub use error::BuildError;
pub use os::is_path as is_os_file;
pub use output::Tail;
pub(crate) use workdir::empty as empty_directory;

use crate::exec::{Machine, SignalWatch};
use crate::oci::{Digest, Source};
use crate::recipe::Recipe;
use crate::scrub::LeftOut;
use backend::Context;
use std::io;
use std::path::PathBuf;
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
    /// A container image that it begins with, instead of a distribution's packages.
    pub from: Option<FromImage>,
    /// Directory with the node's files in the layout of the target's root, planted before the kernel is installed. Without
    /// it an image of base `node` cannot boot as a node.
    pub node_files: Option<PathBuf>,
    /// File that holds every package in its exact version. Without it the newest are taken, and none is written.
    pub lock: Option<PathBuf>,
    /// What the lock is for.
    pub lock_mode: LockMode,
    /// Directory of base trees that were built before.
    pub cache: Option<PathBuf>,
    /// Nothing in the tree is to be newer than this, in seconds since 1970; the lock's date if left out.
    pub epoch: Option<i64>,
}

impl Options {
    /// A node of the usual system, without lock and cache.
    #[must_use]
    pub fn new(tree: PathBuf) -> Self {
        let (recipe, lock_mode) = (Recipe::default(), LockMode::default());
        Self { tree, recipe, from: None, node_files: None, lock: None, lock_mode, cache: None, epoch: None }
    }
}

/// A container image that a tree begins with.
#[derive(Debug, Clone)]
pub struct FromImage {
    /// Where it is.
    pub source: Source,
    /// Nothing of the recipe but its architecture counts: the tree has what the image has.
    pub as_it_is: bool,
}

/// What a build does with a lock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LockMode {
    /// Takes its packages if it answers what the recipe asks, and otherwise chooses anew; writes it if anything changed.
    #[default]
    Use,
    /// Builds exactly it, or nothing.
    Exact,
    /// Chooses anew and writes it.
    Update,
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
    /// Day of the lock whose packages it has; the newest packages otherwise.
    pub locked: Option<String>,
    /// The container image that it began with.
    pub image: Option<Digest>,
    /// What was taken out at the end.
    pub taken_out: LeftOut,
    /// How long it took.
    pub took: Duration,
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
    if let Some(from) = &options.from {
        return imported::build(options, from, progress, signals);
    }
    let name = options.recipe.os.as_deref().unwrap_or(DEFAULT_OS);
    let os = os::find(name)?;
    let mut plan = plan::Plan::new(options, os)?;
    let backend = backend::get(plan.os.backend);
    backend.check_host(&plan)?;

    let work = workdir::WorkDir::create(&options.tree)?;
    for repository in &mut plan.repositories {
        repository.stage_key(&work)?;
    }
    let mut units = Vec::new();
    if let Some(node_files) = &plan.node_files {
        stage::copy(node_files, &work.stage(), Machine::named(&plan.arch.machine)?)?;
        units = stage::units_to_enable(&work.stage())?;
    }
    let locking = base::Locking::begin(options, &plan, &work)?;
    let cache = options.cache.as_deref().and_then(cache::Cache::open);
    let locked = locking.day();
    let built = (|| {
        let mut tools = tools::Tools::new(&work.log(), progress, signals)?;
        if let Some(difference) = &locking.outdated {
            tools.stage(&format!("choosing the packages anew: {difference}"))?;
        }
        let epoch = locking.epoch(options.epoch);
        let mut context = Context { tools: &mut tools, work: &work, plan: &plan, epoch };
        let base = base::make(&mut context, backend, &locking, cache.as_ref())?;
        backend.write_repositories(&plan, &tree::Tree::open(&work.root())?)?;
        let finished = finish::run(&mut context, &units);
        let finished = if base.is_kept { finished.map_err(BuildError::with_base_kept) } else { finished }?;
        locking.end(&plan, base)?;
        Ok(finished)
    })();
    let finish::Finished { kernels, taken_out } = match built {
        Ok(finished) => finished,
        Err(error) => {
            keep_log(&work, &error);
            return Err(error);
        }
    };
    let tree = work.publish()?;
    let (os, arch) = (plan.os.name, plan.arch.name);
    Ok(Built { tree, os, arch, kernels, locked, image: None, taken_out, took: started.elapsed() })
}

/// A release of an operating system that can be built.
#[derive(Debug, Clone, serde::Serialize)]
pub struct KnownOs {
    /// As given to `--os`.
    pub name: String,
    /// Its architectures, in its own words.
    pub architectures: Vec<String>,
    /// Whether an image of it has been built and booted where Mooring is made.
    pub tested: bool,
}

/// All releases that can be built.
#[must_use]
pub fn known_os() -> Vec<KnownOs> {
    let known = |os: os::Os| KnownOs { architectures: os.architectures(), tested: os.tested, name: os.name };
    os::all().into_iter().map(known).collect()
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
