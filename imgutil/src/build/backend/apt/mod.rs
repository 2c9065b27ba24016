//! Debian and Ubuntu: apt works out the packages, mmdebstrap installs them. Signatures are always checked: nothing here can
//! switch that off, except for a repository of which the recipe says that it has none.

mod index;
mod inside;
mod mmdebstrap;
mod output;
mod resolve;

use super::{Backend, Context, Installed, Package, Resolved, check_keys_and_machine};
use crate::build::BuildError;
use crate::build::lay::copy_file;
use crate::build::plan::{Plan, Repository};
use crate::build::sources::of_path;
use crate::build::tree::Tree;
use std::fmt::Write as _;
use std::path::Path;

/// The back end.
pub(super) struct Apt;

impl Backend for Apt {
    fn check_host(&self, plan: &Plan) -> Result<(), BuildError> {
        for (tool, package) in [(mmdebstrap::TOOL, "mmdebstrap"), (resolve::TOOL, "apt")] {
            if !Path::new(tool).exists() {
                return Err(BuildError::NoTool { tool: package, package });
            }
        }
        let refuse = |repository: &Repository, problem: &str| {
            Err(BuildError::Repository { uri: repository.uri.clone(), problem: problem.to_owned() })
        };
        for repository in &plan.repositories {
            if repository.suites.is_empty() {
                return refuse(repository, "an archive of apt has suites: name them in 'suites'");
            }
        }
        check_names(plan)?;
        check_keys_and_machine(plan)
    }

    fn resolve(&self, context: &mut Context<'_, '_>) -> Result<Resolved, BuildError> {
        resolve::update(context)?;
        resolve::resolve(context)
    }

    fn install(&self, context: &mut Context<'_, '_>, packages: &[Package]) -> Result<(), BuildError> {
        resolve::update(context)?;
        resolve::narrow(context, packages)?;
        mmdebstrap::run(context)
    }

    fn maker(&self) -> Result<String, BuildError> {
        Ok(format!("mmdebstrap {}", of_path(Path::new(mmdebstrap::TOOL))?))
    }

    fn installed(&self, context: &mut Context<'_, '_>) -> Result<Vec<Installed>, BuildError> {
        index::installed(&context.work.root().join("var/lib/dpkg/status"))
    }

    fn add(&self, context: &mut Context<'_, '_>) -> Result<(), BuildError> {
        check_names(context.plan)?;
        inside::add(context)
    }

    fn write_repositories(&self, plan: &Plan, tree: &Tree) -> Result<(), BuildError> {
        if plan.keeps_repositories {
            if plan.repositories.is_empty() {
                return Ok(());
            }
        } else {
            tree.remove("/etc/apt/sources.list")?;
            for name in tree.list("/etc/apt/sources.list.d")? {
                tree.remove(Path::new("/etc/apt/sources.list.d").join(name))?;
            }
        }
        let mut text = String::new();
        for repository in &plan.repositories {
            let key = trust_in_image(tree, repository)?;
            let components = if repository.components.is_empty() {
                String::new()
            } else {
                format!("Components: {}\n", repository.components.join(" "))
            };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "Types: deb\nURIs: {}\nSuites: {}\n{components}{key}\n\n",
                repository.uri,
                repository.suites.join(" ")
            );
        }
        let name = if plan.keeps_repositories { "recipe" } else { "image" };
        tree.write_text(format!("/etc/apt/sources.list.d/{name}.sources"), text.trim_end_matches('\n'))
    }
}

/// Fails if a package has a name that apt would take for something else.
fn check_names(plan: &Plan) -> Result<(), BuildError> {
    let names = plan.packages.iter().chain(&plan.remove);
    match names.into_iter().find(|name| !is_debian_name(name)) {
        Some(name) => Err(BuildError::PackageName(name.clone())),
        None => Ok(()),
    }
}

/// The field that ties a repository to its key, in the image: a key that a package of the image has, or one that is laid in.
fn trust_in_image(tree: &Tree, repository: &Repository) -> Result<String, BuildError> {
    let place = |extension: &str| format!("/etc/apt/keyrings/{}.{extension}", repository.name);
    if repository.unsigned {
        return Ok("Trusted: yes".to_owned());
    }
    let key = match &repository.key_in_image {
        Some(path) if tree.exists(path) => path.clone(),
        _ => {
            let place = place(repository.key.extension().and_then(|end| end.to_str()).unwrap_or("asc"));
            copy_file(tree, Path::new(&place), &repository.key, 0o644, (0, 0))?;
            place
        }
    };
    Ok(format!("Signed-By: {key}"))
}

/// Whether a path can stand in the options of a line of sources.list.
fn is_plain(path: &Path) -> bool {
    !path.as_os_str().as_encoded_bytes().iter().any(|byte| byte.is_ascii_whitespace() || b"[]".contains(byte))
}

/// The lines of sources.list, as apt on the host is to read them.
fn sources(plan: &Plan) -> Result<Vec<String>, BuildError> {
    let mut lines = Vec::new();
    for repository in &plan.repositories {
        let trust = if repository.unsigned {
            "trusted=yes".to_owned()
        } else if is_plain(&repository.key) {
            format!("signed-by={}", repository.key.display())
        } else {
            let problem = format!(
                "apt takes no key whose path has blanks or brackets ('{}'): give the key, or the tree, another place",
                repository.key.display()
            );
            return Err(BuildError::Repository { uri: repository.uri.clone(), problem });
        };
        let components = repository.components.join(" ");
        for suite in &repository.suites {
            lines.push(format!("deb [{trust}] {} {suite} {components}", repository.uri));
        }
    }
    Ok(lines)
}

/// Whether apt would take this as a package (deb-control(5)): name, optional architecture, optional version or release.
fn is_debian_name(name: &str) -> bool {
    let name = &name[..name.find([':', '=', '/']).unwrap_or(name.len())];
    name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::is_debian_name;

    #[test]
    fn names_of_packages_are_debians() {
        for name in ["vim", "g++", "libc6:amd64", "linux-image-6.1.0-50-amd64=6.1.1-1~x", "a2/stable"] {
            assert!(is_debian_name(name), "{name}");
        }
        for name in ["Vim", "NetworkManager", "@core", "x_y", "a", "=1"] {
            assert!(!is_debian_name(name), "{name}");
        }
    }
}
