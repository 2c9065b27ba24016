//! The base of an image: which packages it has (by a lock, or by what the repositories have now), and the tree with them (out
//! of the cache, or installed).

use super::backend::{Backend, Context, Installed, Package, Snapshot};
use super::cache::Cache;
use super::lock::{self, Lock, Wanted};
use super::plan::Plan;
use super::sources;
use super::workdir::WorkDir;
use super::{BuildError, LockMode, Options};
use aws_lc_rs::digest::{SHA256, digest};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Changes when trees of the same packages are made in another way than before.
const FORMAT: &str = "1";

/// What a build has of a lock, and what it makes of it.
pub(super) struct Locking {
    path: Option<PathBuf>,
    wanted: Wanted,
    /// A lock that answers what the recipe asks.
    old: Option<Lock>,
    /// Why the lock that is there does not.
    pub(super) outdated: Option<String>,
    /// When packages that are chosen now were chosen.
    now: i64,
}

impl Locking {
    /// Reads all that the recipe brings, and the lock if one is to be used.
    pub(super) fn begin(options: &Options, plan: &Plan, work: &WorkDir) -> Result<Self, BuildError> {
        let node_files = plan.node_files.as_ref().map(|_| sources::of_path(&work.stage())).transpose()?;
        let wanted = Wanted { request: lock::request(plan)?, node_files, sources: sources::all(plan)? };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
        let now = options.epoch.unwrap_or(now);
        let mut locking = Self { path: options.lock.clone(), wanted, old: None, outdated: None, now };
        let Some(path) = options.lock.as_deref().filter(|_| options.lock_mode != LockMode::Update) else {
            return Ok(locking);
        };
        let exact = options.lock_mode == LockMode::Exact;
        match Lock::read(path)? {
            None if exact => {
                let message = "it does not exist: build once without --locked to make it".to_owned();
                return Err(BuildError::Lock { path: path.to_path_buf(), message });
            }
            None => {}
            Some(lock) => match lock.answers(plan, &locking.wanted) {
                Ok(()) if exact => {
                    lock.same_sources(&locking.wanted).map_err(|difference| unlocked(path, difference))?;
                    locking.old = Some(lock);
                }
                Ok(()) => locking.old = Some(lock),
                Err(difference) if exact => return Err(unlocked(path, difference)),
                Err(difference) => locking.outdated = Some(difference),
            },
        }
        Ok(locking)
    }

    /// The moment that nothing in the image is newer than: as given, or the lock's.
    pub(super) fn epoch(&self, given: Option<i64>) -> Option<i64> {
        let locked = self.old.as_ref().map(|lock| lock.date);
        given.or(locked).or_else(|| self.path.is_some().then_some(self.now))
    }

    /// Day of the lock that is used.
    pub(super) fn day(&self) -> Option<String> {
        self.old.as_ref().map(Lock::day)
    }

    /// Writes the lock of what was built, unless it says that already.
    pub(super) fn end(self, plan: &Plan, base: Base) -> Result<(), BuildError> {
        let Some(path) = self.path else { return Ok(()) };
        let new = match self.old.clone() {
            Some(old) => old.with_sources(self.wanted),
            None => Lock::new(plan, self.wanted, self.now, base.packages, base.snapshots),
        };
        if self.old.as_ref() == Some(&new) { Ok(()) } else { new.write(&path) }
    }
}

fn unlocked(path: &Path, difference: String) -> BuildError {
    BuildError::Unlocked { path: path.to_path_buf(), difference }
}

/// What is installed in `work.root()`.
pub(super) struct Base {
    packages: Vec<Package>,
    snapshots: Vec<Snapshot>,
    /// Whether it is in the cache.
    pub(super) is_kept: bool,
}

/// Fills `work.root()` with the packages.
pub(super) fn make(
    context: &mut Context<'_, '_>,
    backend: &dyn Backend,
    locking: &Locking,
    cache: Option<&Cache>,
) -> Result<Base, BuildError> {
    let mut base = if let Some(lock) = &locking.old {
        Base { packages: lock.packages.clone(), snapshots: Vec::new(), is_kept: false }
    } else {
        let resolved = backend.resolve(context)?;
        Base { packages: resolved.packages, snapshots: resolved.snapshots, is_kept: false }
    };
    let key = key(context, backend, &base.packages, locking.wanted.node_files.as_deref())?;
    let restored = match cache {
        Some(cache) => cache.restore(context, &key)?,
        None => false,
    };
    if !restored {
        backend.install(context, &base.packages)?;
    }
    let installed = backend.installed(context)?;
    check(&base.packages, &installed, locking.old.is_some())?;
    if let Some(cache) = cache.filter(|_| !restored) {
        let plan = context.plan;
        let what = format!("{} {}, {} packages", plan.os.name, plan.arch.name, installed.len());
        base.is_kept = cache.store(context, &key, &what)?;
    }
    base.is_kept |= restored;
    base.packages.retain(|package| installed.iter().any(|there| is_same(package, there)));
    Ok(base)
}

fn is_same(package: &Package, there: &Installed) -> bool {
    package.name == there.name && package.arch == there.arch
}

/// Nothing may be installed but what was chosen, in that version; by a lock, all of it. (What is chosen without one may be a
/// few packages more than are needed: each tool takes its own way through alternatives.)
fn check(chosen: &[Package], installed: &[Installed], all: bool) -> Result<(), BuildError> {
    for there in installed {
        match chosen.iter().find(|package| is_same(package, there)) {
            Some(package) if package.version == there.version => {}
            other => {
                return Err(BuildError::NotAsChosen {
                    name: there.name.clone(),
                    installed: Some(there.version.clone()),
                    chosen: other.map(|package| package.version.clone()),
                });
            }
        }
    }
    let missing = chosen.iter().find(|package| !installed.iter().any(|there| is_same(package, there)));
    match missing.filter(|_| all) {
        Some(package) => Err(BuildError::NotAsChosen {
            name: package.name.clone(),
            installed: None,
            chosen: Some(package.version.clone()),
        }),
        None => Ok(()),
    }
}

/// Digest of everything that decides what the base tree is. The date is part of that: RPM's database has it as the time of
/// installation, and what an older base got at its installation would be older than in a tree that is installed anew for this date.
fn key(
    context: &Context<'_, '_>,
    backend: &dyn Backend,
    packages: &[Package],
    node_files: Option<&str>,
) -> Result<String, BuildError> {
    key_of(context.plan, &backend.maker()?, context.epoch, packages, node_files)
}

/// The same of its parts. The keys of the repositories are in it, because they are in the tree; of a user's own description of a system
/// all, because anything in it may count.
fn key_of(
    plan: &Plan,
    maker: &str,
    epoch: Option<i64>,
    packages: &[Package],
    node_files: Option<&str>,
) -> Result<String, BuildError> {
    let mut text = format!(
        "imgutil {FORMAT}\n{} {}\n{maker}\n{}\ndate {}\nwanted {}\nremoved {}\n",
        plan.os.name,
        plan.arch.name,
        node_files.unwrap_or("no node files"),
        epoch.map_or_else(|| "none".to_owned(), |seconds| seconds.to_string()),
        plan.packages.join(" "),
        plan.remove.join(" "),
    );
    if let Some(description) = &plan.os.description {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "described by {}", hex::encode(digest(&SHA256, description.as_bytes())));
    }
    for repository in &plan.repositories {
        let _ = writeln!(text, "{} {}", repository.name, sources::key_digest(repository)?);
    }
    for package in packages {
        text.push_str(&[&package.name, &package.version, &package.arch, package.sha256.as_str()].join(" "));
        text.push('\n');
    }
    Ok(hex::encode(digest(&SHA256, text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::super::os;
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn what_goes_into_a_base_tree_is_in_its_key() {
        let scratch = tempfile::tempdir().unwrap();
        let recipe = Recipe::parse("arch = \"amd64\"", Path::new("r.toml")).unwrap();
        let options = Options { recipe, ..Options::new(PathBuf::from("tree")) };
        let key = |change: &dyn Fn(&mut Plan)| {
            let mut plan = Plan::new(&options, os::find("debian-12").unwrap()).unwrap();
            let keyring = scratch.path().join("key");
            std::fs::write(&keyring, "a key").unwrap();
            for repository in &mut plan.repositories {
                repository.key.clone_from(&keyring);
            }
            change(&mut plan);
            key_of(&plan, "maker", None, &[], None).unwrap()
        };
        let same = key(&|_| {});
        assert_eq!(key(&|_| {}), same);
        let changes: [&dyn Fn(&mut Plan); 4] = [
            &|plan| std::fs::write(&plan.repositories[0].key, "another key").unwrap(),
            &|plan| plan.repositories.truncate(1),
            &|plan| plan.os.description = Some("name = \"debian-12\"".to_owned()),
            &|plan| plan.remove.push("vim".to_owned()),
        ];
        for (index, change) in changes.iter().enumerate() {
            assert_ne!(key(change), same, "change {index}");
        }
    }
}
