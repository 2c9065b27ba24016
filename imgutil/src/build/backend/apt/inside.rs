//! Packages for a tree that is there already, by the tree's own apt: from the repositories that it has, and those of the recipe.

use super::super::Context;
use super::output::{Counter, explain};
use crate::build::BuildError;
use crate::build::inside::Inside;
use crate::build::near::near;
use crate::build::output::Meaning;
use crate::build::tree::Tree;
use crate::exec::Outcome;
use crate::recipe::is_same_package;
use std::ffi::OsString;

/// Keeps apt from choosing what the recipe does not want; there while packages are installed.
const PREFERENCES: &str = "/etc/apt/preferences.d/imgutil-build";

/// Installs the plan's packages, and removes those that it does not want.
pub(super) fn add(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let plan = context.plan;
    if plan.packages.is_empty() && plan.remove.is_empty() {
        return Ok(());
    }
    let tree = Tree::open(&context.work.root())?;
    if !tree.exists("/usr/bin/apt-get") {
        return Err(BuildError::NoManager { os: plan.os.name.clone(), manager: "apt" });
    }
    context.tools.stage("fetching the lists of packages")?;
    // Without the mode a repository that does not answer is merely a warning.
    let update = ["apt-get", "--quiet", "-o", "APT::Update::Error-Mode=any", "update"];
    apt(context, "fetching the lists of packages", &mut Counter::default(), &update)?;

    if !plan.remove.is_empty() {
        remove(context)?;
        let never = format!("Package: {}\nPin: release *\nPin-Priority: -1\n", plan.remove.join(" "));
        tree.write_text(PREFERENCES, &never)?;
    }
    context.tools.stage("installing the packages")?;
    let mut install = vec!["apt-get", "--quiet", "--yes", "--no-install-recommends"];
    // A file that the image's maker has changed stays as it is; nobody is there to be asked.
    install.extend(["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold", "install", "--"]);
    install.extend(plan.packages.iter().map(String::as_str));
    apt(context, "installing the packages", &mut Counter::default(), &install)?;
    tree.remove(PREFERENCES)
}

/// Takes away what is installed of the packages that are not wanted.
fn remove(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let query = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}:${Architecture}\\n"].map(OsString::from);
    let text = Inside::default().answer(context, "listing the packages", &query)?;
    let installed: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    let is_there = |name: &&str| installed.iter().any(|there| is_same_package(name, there));
    let mut purge = vec!["apt-get", "--quiet", "--yes", "purge", "--"];
    let fixed = purge.len();
    purge.extend(context.plan.remove.iter().map(String::as_str).filter(is_there));
    if purge.len() == fixed {
        return Ok(());
    }
    context.tools.stage("removing packages")?;
    apt(context, "removing packages", &mut Counter::default(), &purge)
}

/// Runs a tool of the image's; its failure is the build's, in words that tell the reason.
fn apt(
    context: &mut Context<'_, '_>,
    doing: &str,
    meaning: &mut dyn Meaning,
    command: &[&str],
) -> Result<(), BuildError> {
    let command: Vec<OsString> = command.iter().map(OsString::from).collect();
    let mut inside = Inside::with_repositories_of(context.plan);
    // The initramfs is made once, at the end, not after the kernel and again after the last package.
    inside.environment.push(("INITRD".to_owned(), "No".to_owned()));
    let (finished, tail) = inside.run(context, meaning, &command)?;
    if finished.outcome == Outcome::Exited(0) {
        return Ok(());
    }
    match explain(doing, tail, None, &context.work.root()) {
        BuildError::UnknownPackage { name, others, .. } => {
            // Only helps the error along: without the names it is the same.
            let names = ["apt-cache", "pkgnames"].map(OsString::from);
            let known = Inside::default().answer(context, "listing the names of packages", &names).unwrap_or_default();
            let near = near(&name, known.lines());
            Err(BuildError::UnknownPackage { name, near, others })
        }
        error => Err(error),
    }
}
