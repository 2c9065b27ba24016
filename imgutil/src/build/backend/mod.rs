//! What is different between families of distributions: how packages are chosen, installed and listed. A back end does its
//! part of a build when it is told, and knows nothing of recipes, locks and caches; the order is kept in `build`.

mod apt;
mod dnf;
mod rpm;
mod zypper;

use super::BuildError;
use super::os::BackendName;
use super::plan::{Plan, Repository};
use super::tools::Tools;
use super::tree::Tree;
use super::workdir::WorkDir;
use crate::exec::Machine;
use serde::{Deserialize, Serialize};

/// A package in exactly one version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Package {
    pub(super) name: String,
    /// In the words of the back end: epoch and release included.
    pub(super) version: String,
    /// In the distribution's words.
    pub(super) arch: String,
    /// SHA-256 of the package's file, hexadecimal, as the signed index of its repository says it.
    pub(super) sha256: String,
    /// Where its file is.
    pub(super) uri: String,
}

impl Package {
    /// The same without its file.
    pub(super) fn installed(&self) -> Installed {
        Installed { name: self.name.clone(), version: self.version.clone(), arch: self.arch.clone() }
    }
}

/// A package that a tree has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Installed {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) arch: String,
}

/// The state of a repository when packages were chosen from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Snapshot {
    /// Its signed index, in the back end's words.
    pub(super) index: String,
    /// That index's own date, as it says it.
    pub(super) date: String,
    /// SHA-256 of that index, hexadecimal.
    pub(super) sha256: String,
}

/// Everything that would be installed, and what that was worked out from.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) packages: Vec<Package>,
    pub(super) snapshots: Vec<Snapshot>,
}

/// What a back end works with.
pub(super) struct Context<'a, 'b> {
    pub(super) tools: &'a mut Tools<'b>,
    pub(super) work: &'a WorkDir,
    pub(super) plan: &'a Plan,
    /// Nothing in the image is to be newer than this, in seconds since 1970.
    pub(super) epoch: Option<i64>,
}

/// One family of distributions.
///
/// `check_host` comes first and once. After it either `resolve` and then `install` with what it gave, or `install` alone
/// with what a lock says. The rest is asked of a tree with packages, wherever that came from.
pub(super) trait Backend: Send + Sync {
    /// Checks what the tools would only complain about later and in other words: that they are there, that every repository
    /// has a key. Nothing is fetched.
    fn check_host(&self, plan: &Plan) -> Result<(), BuildError>;

    /// Fetches the signed indexes of the repositories and works out every package that `plan.packages` make necessary, none of
    /// `plan.remove` among them.
    fn resolve(&self, context: &mut Context<'_, '_>) -> Result<Resolved, BuildError>;

    /// Fills `work.root()` with exactly `packages`. The node's files in `work.stage()`, if there are any, are planted before the
    /// kernel's scripts run; no initramfs is made. A package that is in no repository any more is `BuildError::VersionGone`.
    fn install(&self, context: &mut Context<'_, '_>, packages: &[Package]) -> Result<(), BuildError>;

    /// What besides the packages decides what `install` makes: the tool's version, and how it is used.
    fn maker(&self) -> Result<String, BuildError>;

    /// The packages in `work.root()`, sorted.
    fn installed(&self, context: &mut Context<'_, '_>) -> Result<Vec<Installed>, BuildError>;

    /// Installs `plan.packages`, and what they make necessary, in a tree that is there already, with the tree's own package manager:
    /// from the repositories that the tree has. What it has of `plan.remove` is removed. No initramfs is made.
    fn add(&self, context: &mut Context<'_, '_>) -> Result<(), BuildError>;

    /// Writes the image's own list of repositories, each tied to its key; in place of any other, unless the plan says that those stay.
    fn write_repositories(&self, plan: &Plan, tree: &Tree) -> Result<(), BuildError>;
}

/// The back end of that name.
pub(super) fn get(name: BackendName) -> &'static dyn Backend {
    match name {
        BackendName::Apt => &apt::Apt,
        BackendName::Dnf => &dnf::Dnf,
        BackendName::Zypper => &zypper::Zypper,
    }
}

/// Checks common to all back ends: every key is there, and programs of the architecture can run.
fn check_keys_and_machine(plan: &Plan) -> Result<(), BuildError> {
    let missing =
        |repository: &&Repository| !repository.unsigned && repository.key_text.is_none() && !repository.key.is_file();
    if let Some(repository) = plan.repositories.iter().find(missing) {
        return Err(BuildError::NoKey {
            uri: repository.uri.clone(),
            key: repository.key.clone(),
            package: repository.key_package.clone(),
        });
    }
    Machine::named(&plan.arch.machine)?.runner()?;
    Ok(())
}
