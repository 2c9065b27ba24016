//! The lock: every package of a build in one version with its digest, what it was chosen from, and the digests of all that the
//! recipe brings. A build with the same lock has the same packages; with the same sources it makes the same image.

use super::BuildError;
use super::backend::{Package, Snapshot};
use super::plan::Plan;
use super::sources::Source;
use crate::files::write_whole;
use aws_lc_rs::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use std::path::Path;
use time::OffsetDateTime;

/// What this program writes and reads.
const VERSION: u32 = 1;
/// Largest lock that is read, in bytes: 100,000 packages have 30 MB.
const SIZE_LIMIT: u64 = 64 << 20;
const HEADER: &str = "# Written by imgutil build: the packages and sources of an image. Keep it beside the recipe, under version control.\n\
    # `imgutil build --locked` builds exactly this; `--update-lock` writes it anew with what the repositories have now.\n\n";

/// What a build was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Lock {
    version: u32,
    /// When the packages were chosen, in seconds since 1970: the image's files are not newer.
    pub(super) date: i64,
    os: String,
    arch: String,
    /// Digest of what was asked for and from where: another question needs another lock.
    request: String,
    /// Digest of the node's files, where they are part of the image.
    node_files: Option<String>,
    #[serde(rename = "source", default)]
    sources: Vec<Source>,
    #[serde(rename = "snapshot", default)]
    snapshots: Vec<Snapshot>,
    #[serde(rename = "package", default)]
    pub(super) packages: Vec<Package>,
}

/// What a lock is compared with: the recipe as it is now.
pub(super) struct Wanted {
    pub(super) request: String,
    pub(super) node_files: Option<String>,
    pub(super) sources: Vec<Source>,
}

impl Lock {
    /// Reads the lock at `path`; `None` if there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, BuildError> {
        use std::io::Read as _;
        let failed = |message: String| BuildError::Lock { path: path.to_path_buf(), message };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(BuildError::io("read the lock", path, error)),
        };
        let mut text = String::new();
        let length = file
            .take(SIZE_LIMIT + 1)
            .read_to_string(&mut text)
            .map_err(|error| BuildError::io("read the lock", path, error))?;
        if length as u64 > SIZE_LIMIT {
            return Err(failed("it is larger than 64 MiB".to_owned()));
        }
        let mut lock: Self = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            failed(format!("line {line}: {}", error.message().lines().collect::<Vec<_>>().join(" ")))
        })?;
        if lock.version != VERSION {
            return Err(failed(format!("it has version {}, this imgutil knows {VERSION}", lock.version)));
        }
        lock.packages.sort_unstable();
        Ok(Some(lock))
    }

    /// The lock of a build that has just chosen its packages.
    pub(super) fn new(
        plan: &Plan,
        wanted: Wanted,
        date: i64,
        packages: Vec<Package>,
        snapshots: Vec<Snapshot>,
    ) -> Self {
        Self {
            version: VERSION,
            date,
            os: plan.os.name.clone(),
            arch: plan.arch.name.clone(),
            request: wanted.request,
            node_files: wanted.node_files,
            sources: wanted.sources,
            snapshots,
            packages,
        }
    }

    /// The same packages, with the sources as they are now.
    pub(super) fn with_sources(self, wanted: Wanted) -> Self {
        Self { sources: wanted.sources, node_files: wanted.node_files, ..self }
    }

    /// Whether this lock answers the question that the recipe asks; otherwise what is different.
    pub(super) fn answers(&self, plan: &Plan, wanted: &Wanted) -> Result<(), String> {
        if (&self.os, &self.arch) != (&plan.os.name, &plan.arch.name) {
            return Err(format!("it is for {} {}, not for {} {}", self.os, self.arch, plan.os.name, plan.arch.name));
        }
        if self.request != wanted.request {
            let own = if plan.os.description.is_some() { ", or the description of its system," } else { "" };
            return Err(format!("the packages or repositories of the recipe{own} have changed"));
        }
        Ok(())
    }

    /// Whether everything that the recipe brings is what it was.
    pub(super) fn same_sources(&self, wanted: &Wanted) -> Result<(), String> {
        if self.node_files != wanted.node_files {
            return Err("the node's files have changed".to_owned());
        }
        let differs = |source: &&Source| !self.sources.contains(source);
        if let Some(source) = wanted.sources.iter().find(differs) {
            return Err(format!("'{}' has changed", source.path));
        }
        match self.sources.iter().find(|source| !wanted.sources.contains(source)) {
            Some(source) => Err(format!("'{}' is no part of the recipe any more", source.path)),
            None => Ok(()),
        }
    }

    /// Writes it: whole, or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<(), BuildError> {
        let failed = |message: String| BuildError::Lock { path: path.to_path_buf(), message };
        let text = toml::to_string(self).map_err(|error| failed(error.to_string()))?;
        write_whole(path, 0o644, format!("{HEADER}{text}").as_bytes()).map_err(|error| failed(format!("{error:#}")))
    }

    /// The date for people.
    pub(super) fn day(&self) -> String {
        OffsetDateTime::from_unix_timestamp(self.date)
            .map_or_else(|_| self.date.to_string(), |date| date.date().to_string())
    }
}

/// Digest of the question that a lock answers.
pub(super) fn request(plan: &Plan) -> Result<String, BuildError> {
    let mut context = Context::new(&SHA256);
    let mut feed = |text: &str| {
        context.update(&(text.len() as u64).to_le_bytes());
        context.update(text.as_bytes());
    };
    for text in [plan.os.name.as_str(), &plan.os.release, &plan.arch.name] {
        feed(text);
    }
    // Which packages are never chosen, which services are enabled: a user's own description says more than its name and release.
    if let Some(text) = &plan.os.description {
        feed(text);
    }
    for list in [&plan.packages, &plan.remove] {
        feed(&list.len().to_string());
        for name in list {
            feed(name);
        }
    }
    for repository in &plan.repositories {
        for text in [repository.uri.as_str(), &repository.suites.join(" "), &repository.components.join(" ")] {
            feed(text);
        }
        feed(&super::sources::key_digest(repository)?);
    }
    Ok(hex::encode(context.finish()))
}
