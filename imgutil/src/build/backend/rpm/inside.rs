//! Packages for a tree that is there already, by the tree's own dnf or zypper: from the repositories that it has, and those of the
//! recipe.

use super::super::{Context, Installed};
use super::{QUERY, kernels_to_boot, parse_query};
use crate::build::BuildError;
use crate::build::inside::Inside;
use crate::build::output::{Meaning, NoMeaning, Tail};
use crate::build::tree::Tree;
use crate::exec::Outcome;
use crate::recipe::name_and_arch;
use std::ffi::OsString;

/// Runs the image's own package manager. The inner error is its failure.
pub(in super::super) fn manage(
    context: &mut Context<'_, '_>,
    meaning: &mut dyn Meaning,
    command: &[&str],
) -> Result<Result<(), Tail>, BuildError> {
    let command: Vec<OsString> = command.iter().map(OsString::from).collect();
    let mut inside = Inside::with_repositories_of(context.plan);
    inside.environment.extend(
        [
            // What the tools print is searched for reasons.
            ("LC_ALL", "C.UTF-8"),
            // Scripts of packages leave initramfs and boot loader to the build.
            ("SYSTEMD_OFFLINE", "1"),
            ("KERNEL_INSTALL_BYPASS", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    let (finished, tail) = inside.run(context, meaning, &command)?;
    Ok(if finished.outcome == Outcome::Exited(0) { Ok(()) } else { Err(tail) })
}

/// Enters the keys of the recipe's repositories into the image's database: no tool takes one by itself.
pub(in super::super) fn take_keys(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let tree = Tree::open(&context.work.root())?;
    for repository in &context.plan.repositories {
        let key = super::key_in_image(&tree, repository)?;
        let command = ["rpmkeys", "--import", key.as_str()].map(OsString::from);
        Inside::default().succeed(context, &format!("taking the key of '{}'", repository.uri), &command)?;
    }
    Ok(())
}

/// Which of the packages that the plan does not want the image has.
pub(in super::super) fn unwanted(context: &mut Context<'_, '_>) -> Result<Vec<String>, BuildError> {
    if context.plan.remove.is_empty() {
        return Ok(Vec::new());
    }
    let command = ["rpm", "-qa", "--qf", QUERY].map(OsString::from);
    let text = Inside::default().answer(context, "listing the packages", &command)?;
    let there: Vec<Installed> = parse_query(&text)?;
    let mut unwanted = Vec::new();
    for (name, arch) in context.plan.remove.iter().map(|word| name_and_arch(word)) {
        let is_it = |package: &&Installed| package.name == name && arch.is_none_or(|arch| package.arch == arch);
        // In RPM's words, which has a point before the architecture.
        unwanted.extend(there.iter().find(is_it).map(|package| match arch {
            Some(arch) => format!("{}.{arch}", package.name),
            None => package.name.clone(),
        }));
    }
    Ok(unwanted)
}

/// What comes after the packages: their kernels where they are looked for.
pub(in super::super) fn settle(context: &Context<'_, '_>) -> Result<(), BuildError> {
    kernels_to_boot(&Tree::open(&context.work.root())?)
}

/// Prints a list of names; empty if that fails, because names near an unknown one merely help.
pub(in super::super) fn names(context: &mut Context<'_, '_>, command: &[&str]) -> String {
    let command: Vec<OsString> = command.iter().map(OsString::from).collect();
    let inside = Inside::with_repositories_of(context.plan);
    inside.answer(context, "listing the names of packages", &command).unwrap_or_default()
}

/// Runs something whose progress nobody knows.
pub(in super::super) fn manage_quietly(
    context: &mut Context<'_, '_>,
    command: &[&str],
) -> Result<Result<(), Tail>, BuildError> {
    manage(context, &mut NoMeaning, command)
}
