//! What is to be built, worked out of the options and the data of the operating system. Nothing is looked at or fetched here.

use super::os::{Os, OsArch, OsRepository};
use super::{BuildError, Options};
use crate::recipe::{Base, Recipe, is_package_name};
use std::path::{Path, PathBuf};

/// Options and the data of the operating system, put together.
pub(super) struct Plan {
    pub(super) os: Os,
    pub(super) recipe: Recipe,
    /// The node's files, where they are to be planted.
    pub(super) node_files: Option<PathBuf>,
    pub(super) arch: Arch,
    /// The distribution's own first.
    pub(super) repositories: Vec<Repository>,
    /// Packages to ask for: what they depend on comes with them.
    pub(super) packages: Vec<String>,
    pub(super) services: Vec<String>,
}

/// An architecture by both of its names.
pub(super) struct Arch {
    /// As `uname -m` says it.
    pub(super) machine: String,
    /// As the distribution says it.
    pub(super) name: String,
}

/// A place that packages come from.
pub(super) struct Repository {
    /// Short, unique, fit for a file name.
    pub(super) name: String,
    pub(super) uri: String,
    /// For apt.
    pub(super) suites: Vec<String>,
    /// For apt.
    pub(super) components: Vec<String>,
    /// File with its public keys, on the host.
    pub(super) key: PathBuf,
    /// Where the image has that file from a package of its own; otherwise it is laid in.
    pub(super) key_in_image: Option<String>,
    /// The host's package that brings the file.
    pub(super) key_package: Option<String>,
    /// Whether its index is signed, where the back end has a choice; packages always are.
    pub(super) signed_metadata: bool,
}

impl Plan {
    pub(super) fn new(options: &Options, os: Os) -> Result<Self, BuildError> {
        let recipe = options.recipe.clone();
        let (machine, os_arch) = find_arch(&os, recipe.arch.as_deref().unwrap_or(std::env::consts::ARCH))?;
        let mut packages = os.packages.minimal.clone();
        let mut services = Vec::new();
        if recipe.base == Base::Node {
            packages.extend(os.packages.node.iter().chain(&os_arch.kernel).cloned());
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
            arch: Arch { machine: machine.to_owned(), name: os_arch.name.clone() },
            repositories: repositories(&os, os_arch, &recipe),
            node_files: options.node_files.clone(),
            packages,
            services,
            recipe,
            os,
        })
    }
}

/// The architecture called `name`, by either of its names.
fn find_arch<'a>(os: &'a Os, name: &str) -> Result<(&'a str, &'a OsArch), BuildError> {
    os.arch.iter().find(|(machine, arch)| *machine == name || arch.name == name).map_or_else(
        || {
            let known = os.architectures();
            Err(BuildError::UnknownArch { os: os.name.clone(), arch: name.to_owned(), known })
        },
        |(machine, arch)| Ok((machine.as_str(), arch)),
    )
}

fn repositories(os: &Os, arch: &OsArch, recipe: &Recipe) -> Vec<Repository> {
    let mirror = recipe.mirror.as_ref().or(arch.mirror.as_ref()).unwrap_or(&os.mirror);
    let security = recipe.security_mirror.as_ref().or(arch.security_mirror.as_ref()).or(os.security_mirror.as_ref());
    let mut all = Vec::new();
    for repository in &os.repositories {
        let security = security.map_or("", String::as_str);
        if repository.uri.contains("{security-mirror}") && security.is_empty() {
            continue;
        }
        let uri = repository
            .uri
            .replace("{mirror}", mirror.trim_end_matches('/'))
            .replace("{security-mirror}", security.trim_end_matches('/'))
            .replace("{release}", &os.release)
            .replace("{arch}", &arch.name);
        all.push(Repository {
            name: format!("{}-{}", os.name, repository.name),
            uri,
            suites: repository.suites.clone(),
            components: repository.components.clone(),
            key: key_on_host(repository),
            key_in_image: Some(repository.key_in_image.as_ref().unwrap_or(&repository.key).clone()),
            key_package: Some(repository.key_package.clone()),
            signed_metadata: repository.signed_metadata,
        });
    }
    for (index, repository) in recipe.repositories.iter().enumerate() {
        all.push(Repository {
            name: format!("recipe-{index}"),
            uri: repository.uri.clone(),
            suites: repository.suites.clone(),
            components: repository.components.clone(),
            key: recipe.directory.join(&repository.key),
            key_in_image: None,
            key_package: None,
            signed_metadata: repository.signed_metadata,
        });
    }
    all
}

/// Where the host has the keys: a host of the same family may have them where the image has them.
fn key_on_host(repository: &OsRepository) -> PathBuf {
    let places = [Some(&repository.key), repository.key_in_image.as_ref()];
    let found = places.into_iter().flatten().find(|place| Path::new(place).is_file());
    PathBuf::from(found.unwrap_or(&repository.key))
}

#[cfg(test)]
mod tests {
    use super::super::os;
    use super::*;

    fn plan(os_name: &str, recipe: &str) -> Plan {
        let recipe = Recipe::parse(recipe, std::path::Path::new("r.toml")).unwrap();
        let options = Options { tree: PathBuf::from("tree"), recipe, node_files: None };
        Plan::new(&options, os::find(os_name, Path::new("")).unwrap()).unwrap()
    }

    fn uris(plan: &Plan) -> Vec<&str> {
        plan.repositories.iter().map(|repository| repository.uri.as_str()).collect()
    }

    #[test]
    fn mirrors_take_the_place_of_the_distributions_own() {
        let own = ["http://deb.debian.org/debian", "http://deb.debian.org/debian-security"];
        assert_eq!(uris(&plan("debian-12", "arch = \"amd64\"")), own);
        let changed = plan("debian-12", "arch = \"x86_64\"\nmirror = \"http://m/debian/\"\nsecurity-mirror = \"\"");
        assert_eq!((uris(&changed), changed.arch.name.as_str()), (vec!["http://m/debian"], "amd64"));
        let ports = plan("ubuntu-24.04", "arch = \"arm64\"");
        assert_eq!((uris(&ports)[0], ports.arch.machine.as_str()), ("http://ports.ubuntu.com/ubuntu-ports", "aarch64"));
    }
}
