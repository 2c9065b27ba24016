//! Debian and Ubuntu: apt works out the packages, mmdebstrap installs them. Signatures are always checked: nothing here can
//! switch that off, except for a repository of which the recipe says that it has none.

mod index;
mod mmdebstrap;
mod output;
mod resolve;

use super::{Backend, Context, Installed, Package, Resolved, check_keys_and_machine};
use crate::build::BuildError;
use crate::build::finish::copy_in;
use crate::build::plan::{Plan, Repository};
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
        if let Some(repository) = plan.repositories.iter().find(|repository| repository.suites.is_empty()) {
            let problem = "an archive of apt has suites: name them in 'suites'".to_owned();
            return Err(BuildError::Repository { uri: repository.uri.clone(), problem });
        }
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

    fn installed(&self, context: &mut Context<'_, '_>) -> Result<Vec<Installed>, BuildError> {
        index::installed(&context.work.root().join("var/lib/dpkg/status"))
    }

    fn write_repositories(&self, plan: &Plan, tree: &Tree) -> Result<(), BuildError> {
        tree.remove("/etc/apt/sources.list")?;
        for name in tree.list("/etc/apt/sources.list.d")? {
            tree.remove(Path::new("/etc/apt/sources.list.d").join(name))?;
        }
        let mut text = String::new();
        for repository in &plan.repositories {
            let key = key_in_image(tree, repository)?;
            let components = if repository.components.is_empty() {
                String::new()
            } else {
                format!("Components: {}\n", repository.components.join(" "))
            };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "Types: deb\nURIs: {}\nSuites: {}\n{components}Signed-By: {key}\n\n",
                repository.uri,
                repository.suites.join(" ")
            );
        }
        tree.write_text("/etc/apt/sources.list.d/image.sources", text.trim_end_matches('\n'))
    }

    fn clean(&self, tree: &Tree) -> Result<(), BuildError> {
        for path in [
            "/var/log/alternatives.log",
            "/var/log/apt/eipp.log.xz",
            "/var/log/apt/history.log",
            "/var/log/apt/term.log",
            "/var/log/bootstrap.log",
            "/var/log/dpkg.log",
        ] {
            tree.remove(path)?;
        }
        for directory in ["/var/lib/apt/lists", "/var/cache/apt", "/var/cache/apt/archives"] {
            for name in tree.list(directory)?.iter().filter(|name| !matches!(name.as_str(), "partial" | "archives")) {
                tree.remove(Path::new(directory).join(name))?;
            }
        }
        Ok(())
    }
}

/// The repository's key in the image: where a package of the image has it, or laid in.
fn key_in_image(tree: &Tree, repository: &Repository) -> Result<String, BuildError> {
    if let Some(path) = &repository.key_in_image
        && tree.exists(path)
    {
        return Ok(path.clone());
    }
    let extension = repository.key.extension().and_then(|end| end.to_str()).unwrap_or("asc");
    let place = format!("/etc/apt/keyrings/{}.{extension}", repository.name);
    copy_in(tree, Path::new(&place), &repository.key, 0o644)?;
    Ok(place)
}

/// The lines of sources.list, as apt on the host is to read them.
fn sources(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    for repository in &plan.repositories {
        let (key, components) = (repository.key.display(), repository.components.join(" "));
        for suite in &repository.suites {
            lines.push(format!("deb [signed-by={key}] {} {suite} {components}", repository.uri));
        }
    }
    lines
}
