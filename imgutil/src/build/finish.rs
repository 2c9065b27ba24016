//! From a tree of packages to an image: archives, files, users, services, commands and initramfs of the recipe, and then
//! everything out that must differ from node to node.

use super::BuildError;
use super::backend::{Backend, Context};
use super::initramfs;
use super::output::NoMeaning;
use super::tree::Tree;
use crate::exec::{Options, Outcome};
use crate::recipe::{Base, File, User};
use std::ffi::OsString;
use std::path::Path;

/// Files that belong to one machine or to the build, not to the image, whatever the family.
const PER_MACHINE: [&str; 5] = [
    "/etc/hostname",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/root/.bash_history",
];

/// Everything after the packages. Gives the versions of the kernels in the image.
pub(super) fn run(
    context: &mut Context<'_, '_>,
    backend: &dyn Backend,
    units: &[String],
) -> Result<Vec<String>, BuildError> {
    let plan = context.plan;
    let tree = Tree::open(&context.work.root())?;
    context.tools.stage("applying the recipe")?;
    backend.write_repositories(plan, &tree)?;
    // A resolver file of the host's is none of the image's; the agent writes it on the node, exec covers it.
    tree.write_text("/etc/resolv.conf", "# Written by the node's agent at boot.\n")?;
    for file in &plan.recipe.files {
        lay_in(&tree, &plan.recipe.directory, file)?;
    }
    if let Some(locale) = &plan.recipe.locale {
        tree.write_text("/etc/default/locale", &format!("LANG={locale}\n"))?;
    }
    for user in &plan.recipe.users {
        in_tree(context, &format!("making the user '{}'", user.name), &useradd(user))?;
    }
    for unit in plan.services.iter().chain(units) {
        in_tree(context, &format!("enabling '{unit}'"), &["systemctl", "enable", unit].map(OsString::from))?;
    }
    for command in &plan.recipe.run {
        context.tools.stage("running the recipe's commands")?;
        in_tree(context, &format!("the command '{command}'"), &["sh", "-ec", command].map(OsString::from))?;
    }
    let kernels = initramfs::make(context, &tree)?;
    if plan.recipe.base == Base::Node && kernels.is_empty() {
        return Err(BuildError::NoKernel);
    }
    context.tools.stage("taking out what must differ from node to node")?;
    backend.clean(&tree)?;
    make_impersonal(&tree)?;
    Ok(kernels)
}

/// Runs a command in the tree; its failure is the build's.
pub(super) fn in_tree(context: &mut Context<'_, '_>, doing: &str, command: &[OsString]) -> Result<(), BuildError> {
    let work = context.work;
    let (finished, tail) = context.tools.run(&mut NoMeaning, |streams| {
        let mut options = Options::in_tree(&work.root(), command.to_vec())?;
        options.set_name(work.tree());
        options.stdio = Some(streams);
        Ok(options)
    })?;
    let finished = finished?;
    for warning in &finished.warnings {
        tracing::warn!("{doing}: {warning}");
    }
    match finished.outcome {
        Outcome::Exited(0) => Ok(()),
        Outcome::Exited(code) => {
            let reason = format!("exit status {code}: {}", tail.reason());
            Err(BuildError::Tool { doing: doing.to_owned(), reason, tail })
        }
        Outcome::Signaled(number) => {
            Err(BuildError::Tool { doing: doing.to_owned(), reason: format!("ended by signal {number}"), tail })
        }
    }
}

/// Copies a file of the host into the tree.
pub(super) fn copy_in(tree: &Tree, place: &Path, source: &Path, mode: u32) -> Result<(), BuildError> {
    let mut file = std::fs::File::open(source).map_err(|error| BuildError::io("read", source, error))?;
    tree.write(place, mode, &mut file)
}

fn lay_in(tree: &Tree, directory: &Path, file: &File) -> Result<(), BuildError> {
    let mode = file.mode.unwrap_or(0o644);
    match (&file.source, &file.content) {
        (Some(source), _) => copy_in(tree, &file.path, &directory.join(source), mode),
        (None, content) => tree.write(&file.path, mode, &mut content.as_deref().unwrap_or_default().as_bytes()),
    }
}

/// A user with a home and without a password.
fn useradd(user: &User) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec!["useradd".into(), "--create-home".into()];
    if let Some(uid) = user.uid {
        command.extend(["--uid".into(), uid.to_string().into()]);
    }
    if !user.groups.is_empty() {
        command.extend(["--groups".into(), user.groups.join(",").into()]);
    }
    command.extend(["--shell".into(), user.shell.clone().unwrap_or_else(|| "/bin/bash".to_owned()).into()]);
    command.push(user.name.clone().into());
    command
}

/// Takes out what belongs to one machine.
pub(super) fn make_impersonal(tree: &Tree) -> Result<(), BuildError> {
    for path in PER_MACHINE {
        tree.remove(path)?;
    }
    // Empty, not missing: systemd then makes one at boot without treating it as a first boot (machine-id(5)).
    tree.write("/etc/machine-id", 0o444, &mut std::io::empty())?;
    for name in tree.list("/etc/ssh")?.iter().filter(|name| name.starts_with("ssh_host_")) {
        tree.remove(Path::new("/etc/ssh").join(name))?;
    }
    tree.remove("/var/cache/ldconfig/aux-cache")?;
    // Debian's root has no usable password from the start ("*"); the agent sets one on the node.
    Ok(())
}
