//! `build`: makes a root tree from repositories of packages. Here are its input and the order of its steps: `plan` puts recipe
//! and data of the operating system together, a `backend` chooses and installs the packages, `finish` turns them into an image;
//! `workdir` keeps the unfinished tree apart.

mod backend;
mod error;
mod finish;
mod imported;
mod initramfs;
mod near;
mod os;
mod output;
mod plan;
mod stage;
mod tools;
mod tree;
mod workdir;

pub use error::BuildError;
pub use imported::{Imported, import};
pub use os::is_path as is_os_file;
pub use output::Tail;
pub(crate) use workdir::empty as empty_directory;

use crate::exec::SignalWatch;
use crate::recipe::Recipe;
use backend::{Context, Installed, Package};
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
    let os = os::find(name, &options.recipe.directory)?;
    let plan = plan::Plan::new(options, os)?;
    let backend = backend::get(plan.os.backend);
    backend.check_host(&plan)?;

    let work = workdir::WorkDir::create(&options.tree)?;
    let mut units = Vec::new();
    if let Some(node_files) = &plan.node_files {
        stage::copy(node_files, &work.stage())?;
        units = stage::units_to_enable(&work.stage())?;
    }
    let built = (|| {
        let mut tools = tools::Tools::new(&work.log(), progress, signals)?;
        let mut context = Context { tools: &mut tools, work: &work, plan: &plan };
        let resolved = backend.resolve(&mut context)?;
        for snapshot in &resolved.snapshots {
            tracing::debug!("{} of {}, SHA-256 {}", snapshot.index, snapshot.date, snapshot.sha256);
        }
        backend.install(&mut context, &resolved.packages)?;
        check_installed(&resolved.packages, &backend.installed(&mut context)?)?;
        finish::run(&mut context, backend, &units)
    })();
    let kernels = match built {
        Ok(kernels) => kernels,
        Err(error) => {
            keep_log(&work, &error);
            return Err(error);
        }
    };
    let tree = work.publish()?;
    Ok(Built { tree, os: plan.os.name, arch: plan.arch.name, kernels, took: started.elapsed() })
}

/// Nothing may be installed but what was chosen, in that version.
fn check_installed(chosen: &[Package], installed: &[Installed]) -> Result<(), BuildError> {
    let same = |package: &Package, there: &Installed| package.name == there.name && package.arch == there.arch;
    for there in installed {
        match chosen.iter().find(|package| same(package, there)) {
            Some(package) if package.version == there.version => {}
            other => {
                return Err(BuildError::NotAsChosen {
                    name: there.name.clone(),
                    installed: there.version.clone(),
                    chosen: other.map(|package| package.version.clone()),
                });
            }
        }
    }
    Ok(())
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
