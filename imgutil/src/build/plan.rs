//! What is to be built, worked out of the options and the data of the operating system. Nothing is looked at or fetched here.

use super::os::{Os, OsArch, OsRepository};
use super::workdir::WorkDir;
use super::{BuildError, Options};
use crate::recipe::{Base, File, Group, Item, Key, PackageWord, Recipe, Target, User, is_same_package, name_and_arch};
use std::path::{Path, PathBuf};

/// Options and the data of the operating system, put together: what does not count for this target is left out.
pub(super) struct Plan {
    pub(super) os: Os,
    pub(super) arch: Arch,
    pub(super) base: Base,
    /// The node's files, where they are to be planted.
    pub(super) node_files: Option<PathBuf>,
    /// The distribution's own first.
    pub(super) repositories: Vec<Repository>,
    /// The tree has repositories of its own, and `repositories` are added to them.
    pub(super) keeps_repositories: bool,
    /// Packages to ask for: what they depend on comes with them.
    pub(super) packages: Vec<String>,
    /// Packages that must not come, whoever asks for them.
    pub(super) remove: Vec<String>,
    pub(super) groups: Vec<Group>,
    pub(super) users: Vec<User>,
    pub(super) files: Vec<File>,
    pub(super) services: Vec<String>,
    pub(super) disable: Vec<String>,
    pub(super) locale: Option<String>,
    pub(super) timezone: Option<String>,
    pub(super) run: Vec<String>,
    /// The files that the recipe was read from, the one that was named last.
    pub(super) recipe_files: Vec<PathBuf>,
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
    /// The public key itself, where the recipe holds it: `key` is then the file that it is written to.
    pub(super) key_text: Option<String>,
    /// The recipe says of this repository that nobody signs it: there is no key.
    pub(super) unsigned: bool,
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
        let target = Target { os: &os.name, machine, arch: &os_arch.name };
        let base = recipe.base.unwrap_or_default();
        let (packages, remove) = packages(&os, os_arch, &recipe, (base, options.from.is_some()), target);
        // A container image knows where its packages come from, unless the recipe says it.
        let keeps_repositories = options.from.is_some() && recipe.mirror.is_none();
        let mut repositories = repositories(&os, os_arch, &recipe, target);
        repositories.retain(|repository| !keeps_repositories || !repository.is_distribution());
        let mut services = if base == Base::Node { os.services.node.clone() } else { Vec::new() };
        services.extend(counting(&recipe.services, target).map(|name| name.0.clone()));
        let disable: Vec<String> = counting(&recipe.disable, target).map(|name| name.0.clone()).collect();
        services.retain(|name| !disable.contains(name));
        Ok(Self {
            arch: Arch { machine: machine.to_owned(), name: os_arch.name.clone() },
            base,
            repositories,
            keeps_repositories,
            node_files: options.node_files.clone(),
            packages,
            remove,
            services,
            disable,
            run: counting(&recipe.run, target).map(|command| command.0.clone()).collect(),
            files: recipe.files.iter().filter(|file| file.when.holds(target)).cloned().collect(),
            groups: recipe.groups,
            users: recipe.users,
            locale: recipe.locale.map(|name| name.0),
            timezone: recipe.timezone.map(|name| name.0),
            recipe_files: recipe.read_from,
            os,
        })
    }
}

impl Repository {
    /// Whether it is one of the distribution's own.
    fn is_distribution(&self) -> bool {
        self.key_in_image.is_some()
    }

    /// Writes the key that the recipe holds itself to a file, for tools that want one.
    pub(super) fn stage_key(&mut self, work: &WorkDir) -> Result<(), BuildError> {
        if let Some(text) = &self.key_text {
            self.key = work.path().join(format!("{}.asc", self.name));
            std::fs::write(&self.key, text).map_err(|error| BuildError::io("write", &self.key, error))?;
        }
        Ok(())
    }
}

/// The entries whose condition is true.
fn counting<'a, T>(items: &'a [Item<T>], target: Target<'a>) -> impl Iterator<Item = &'a T> {
    items.iter().filter(move |item| item.when.holds(target)).map(|item| &item.value)
}

/// Packages to ask for and packages to leave out. A later word of the recipe wins over an earlier one. A tree that is `there` already
/// has its package manager.
fn packages(
    os: &Os,
    arch: &OsArch,
    recipe: &Recipe,
    (base, there): (Base, bool),
    target: Target<'_>,
) -> (Vec<String>, Vec<String>) {
    let mut wanted = if there { Vec::new() } else { os.packages.minimal.clone() };
    if base == Base::Node {
        wanted.extend(os.packages.node.iter().chain(&arch.kernel).cloned());
    }
    if let Some(locale) = recipe.locale.as_ref().filter(|locale| !is_built_in(&locale.0)) {
        let language = locale.0.split(['_', '.', '@']).next().unwrap_or_default();
        wanted.extend(os.locale.packages.iter().map(|name| name.replace("{language}", language)));
    }
    let mut removed: Vec<String> = Vec::new();
    // Whatever version was wanted: what must not come has none.
    let leave_out = |word: &str, wanted: &mut Vec<String>, removed: &mut Vec<String>| {
        let word = word.trim_start_matches('-').split(['=', '/']).next().unwrap_or_default();
        wanted.retain(|known| !is_same_package(known, word));
        if !removed.iter().any(|known| known == word) {
            removed.push(word.to_owned());
        }
    };
    for PackageWord(word) in counting(&recipe.packages, target) {
        if word.starts_with('-') {
            leave_out(word, &mut wanted, &mut removed);
            continue;
        }
        removed.retain(|known| !is_same_package(known, word));
        // Another version of the same takes its place.
        match wanted.iter_mut().find(|known| name_and_arch(known) == name_and_arch(word)) {
            Some(known) => known.clone_from(word),
            None => wanted.push(word.clone()),
        }
    }
    for PackageWord(word) in counting(&recipe.remove, target) {
        leave_out(word, &mut wanted, &mut removed);
    }
    (wanted, removed)
}

/// Whether every system has this locale without a package.
pub(super) fn is_built_in(locale: &str) -> bool {
    matches!(locale, "C" | "POSIX" | "C.UTF-8" | "C.utf8")
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

fn repositories(os: &Os, arch: &OsArch, recipe: &Recipe, target: Target<'_>) -> Vec<Repository> {
    let own = |uri: &crate::recipe::Uri| uri.0.clone();
    let mirror = recipe.mirror.as_ref().map(own).or(arch.mirror.clone()).unwrap_or(os.mirror.clone());
    let security =
        recipe.security_mirror.as_ref().map(own).or(arch.security_mirror.clone()).or(os.security_mirror.clone());
    let security = security.unwrap_or_default();
    let mut all = Vec::new();
    for repository in &os.repositories {
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
            key_text: None,
            unsigned: false,
            key_in_image: Some(repository.key_in_image.as_ref().unwrap_or(&repository.key).clone()),
            key_package: Some(repository.key_package.clone()),
            signed_metadata: repository.signed_metadata,
        });
    }
    for (index, repository) in recipe.repositories.iter().enumerate() {
        if !repository.when.holds(target) {
            continue;
        }
        all.push(Repository {
            name: format!("recipe-{index}"),
            uri: repository.uri.clone(),
            suites: repository.suites.clone(),
            components: repository.components.clone(),
            key: if let Key::File(path) = &repository.key { path.clone() } else { PathBuf::new() },
            key_text: if let Key::Text(text) = &repository.key { Some(text.clone()) } else { None },
            unsigned: repository.key == Key::Unsigned,
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
    use super::super::{FromImage, os};
    use super::*;

    fn plan(os_name: &str, recipe: &str) -> Plan {
        let recipe = Recipe::parse(recipe, std::path::Path::new("r.toml")).unwrap();
        let options = Options { recipe, ..Options::new(PathBuf::from("tree")) };
        Plan::new(&options, os::find(os_name).unwrap()).unwrap()
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

    #[test]
    fn an_image_keeps_its_repositories_unless_the_recipe_names_a_mirror() {
        let plan = |recipe: &str| {
            let own = "[[repository]]\nuri = \"http://own\"\nsuites = [\"./\"]\nunsigned = true\n";
            let recipe = Recipe::parse(&format!("{recipe}\n{own}"), std::path::Path::new("r.toml")).unwrap();
            let from = Some(FromImage { source: "image.tar".parse().unwrap(), as_it_is: false });
            let options = Options { recipe, from, ..Options::new(PathBuf::from("tree")) };
            Plan::new(&options, os::find("debian-12").unwrap()).unwrap()
        };
        let kept = plan("base = \"minimal\"\npackages = [\"vim\"]");
        assert_eq!((uris(&kept), kept.keeps_repositories), (vec!["http://own"], true));
        assert_eq!(kept.packages, ["vim"]);
        let replaced = plan("mirror = \"http://m\"\nsecurity-mirror = \"\"\narch = \"amd64\"");
        assert_eq!((uris(&replaced), replaced.keeps_repositories), (vec!["http://m", "http://own"], false));
        assert!(replaced.packages.contains(&"linux-image-amd64".to_owned()), "a node boots");
    }

    #[test]
    fn what_does_not_count_for_the_target_is_left_out_and_the_last_word_wins() {
        let plan = plan(
            "debian-12",
            r#"
            arch = "amd64"
            base = "minimal"
            packages = ["vim", "-nano", { name = "less", version = "13" }, "-ca-certificates", "nano", "-vim", "zsh"]
            remove = ["zsh"]
            services = ["a.service", { name = "b.service", arch = "arm64" }, "c.service"]
            disable = ["c.service"]
            locale = "de_DE.UTF-8"
            run = [{ command = "false", os = "ubuntu" }]
            "#,
        );
        assert_eq!(plan.packages, ["apt", "debian-archive-keyring", "locales", "nano"]);
        assert_eq!(plan.remove, ["ca-certificates", "vim", "zsh"]);
        assert_eq!((plan.services, plan.disable), (vec!["a.service".to_owned()], vec!["c.service".to_owned()]));
        assert!(plan.run.is_empty());
    }

    #[test]
    fn a_package_is_the_same_with_a_version_or_an_architecture_behind_it() {
        let chosen = |packages: &str, remove: &str| {
            let recipe = format!("arch = \"amd64\"\nbase = \"minimal\"\npackages = [{packages}]\nremove = [{remove}]");
            let plan = plan("debian-12", &recipe);
            let mut own = plan.packages;
            own.retain(|name| !["apt", "debian-archive-keyring", "ca-certificates"].contains(&name.as_str()));
            (own.join(" "), plan.remove.join(" "))
        };
        for (packages, remove, expected) in [
            (r#""vim=9", "-vim""#, "", ("", "vim")),
            (r#""vim:amd64", "nano""#, r#""vim""#, ("nano", "vim")),
            (r#""vim", "-vim:amd64""#, "", ("", "vim:amd64")),
            (r#""vim:i386", "-vim:amd64""#, "", ("vim:i386", "vim:amd64")),
            (r#""vim=9", "-vim=8""#, "", ("", "vim")),
            (r#""-vim", "vim/stable""#, "", ("vim/stable", "")),
            (r#""vim", "vim=9", "vim:i386""#, "", ("vim=9 vim:i386", "")),
            (r#""vim-tiny", "-vim""#, "", ("vim-tiny", "vim")),
        ] {
            let found = chosen(packages, remove);
            assert_eq!((found.0.as_str(), found.1.as_str()), expected, "{packages} {remove}");
        }
    }
}
