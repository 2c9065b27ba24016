//! From a tree of packages to an image: repositories, users, files, services, commands and initramfs of the recipe, and then
//! everything out that must differ from node to node.

use super::backend::{Backend, Context};
use super::output::NoMeaning;
use super::tree::Tree;
use super::{BuildError, accounts, epoch, initramfs, lay, plan};
use crate::exec::{Options, Outcome};
use crate::recipe::Base;
use std::ffi::OsString;
use std::path::Path;

/// Files that belong to one machine or to the build, not to the image, whatever the family.
const PER_MACHINE: [&str; 6] = [
    "/etc/hostname",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/root/.bash_history",
    // Keeps inode numbers and times of every library; ldconfig makes it again.
    "/var/cache/ldconfig/aux-cache",
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
    accounts::make(context, &tree)?;
    lay::files(&tree, &plan.files)?;
    set_locale(context, &tree)?;
    set_timezone(context, &tree)?;
    for unit in plan.services.iter().chain(units) {
        in_tree(context, &format!("enabling '{unit}'"), &["systemctl", "enable", unit].map(OsString::from))?;
    }
    for unit in &plan.disable {
        in_tree(context, &format!("disabling '{unit}'"), &["systemctl", "disable", unit].map(OsString::from))?;
    }
    for command in &plan.run {
        context.tools.stage("running the recipe's commands")?;
        in_tree(context, &format!("the command '{command}'"), &["sh", "-ec", command].map(OsString::from))?;
    }
    let kernels = initramfs::make(context, &tree)?;
    if plan.base == Base::Node && kernels.is_empty() {
        return Err(BuildError::NoKernel);
    }
    context.tools.stage("taking out what must differ from node to node")?;
    backend.clean(&tree)?;
    make_impersonal(&tree)?;
    if let Some(seconds) = context.epoch {
        epoch::apply(&tree, &context.work.root(), seconds)?;
    }
    Ok(kernels)
}

/// Runs a command in the tree; its failure is the build's.
pub(super) fn in_tree(context: &mut Context<'_, '_>, doing: &str, command: &[OsString]) -> Result<(), BuildError> {
    let (work, epoch) = (context.work, context.epoch);
    let (finished, tail) = context.tools.run(&mut NoMeaning, |streams| {
        let mut options = Options::in_tree(&work.root(), command.to_vec())?;
        options.set_name(work.tree());
        options.stdio = Some(streams);
        options.environment.extend(epoch.map(|seconds| ("SOURCE_DATE_EPOCH".to_owned(), seconds.to_string())));
        Ok(options)
    })?;
    let finished = finished?;
    for warning in &finished.warnings {
        tracing::warn!("{doing}: {warning}");
    }
    let reason = match finished.outcome {
        Outcome::Exited(0) => return Ok(()),
        Outcome::Exited(code) => format!("exit status {code}: {}", tail.reason()),
        Outcome::Signaled(number) => format!("ended by signal {number}"),
    };
    Err(BuildError::tool(doing, &reason, tail, &work.root()))
}

/// The system's locale, made first where it is none that every system has.
fn set_locale(context: &mut Context<'_, '_>, tree: &Tree) -> Result<(), BuildError> {
    let plan = context.plan;
    let Some(locale) = &plan.locale else { return Ok(()) };
    if !plan::is_built_in(locale) && tree.exists("/usr/sbin/locale-gen") {
        let charset = locale.split(['.', '@']).nth(1).unwrap_or("ISO-8859-1");
        tree.write_text("/etc/locale.gen", &format!("{locale} {charset}\n"))?;
        in_tree(context, &format!("making the locale '{locale}'"), &["locale-gen"].map(OsString::from))?;
    }
    tree.write_text(&plan.os.locale.file, &format!("LANG={locale}\n"))
}

fn set_timezone(context: &Context<'_, '_>, tree: &Tree) -> Result<(), BuildError> {
    let Some(zone) = &context.plan.timezone else { return Ok(()) };
    let file = format!("/usr/share/zoneinfo/{zone}");
    if !tree.exists(&file) {
        return Err(BuildError::Setting(format!(
            "the image has no time zone '{zone}': correct the name, or add the package tzdata"
        )));
    }
    tree.symlink("/etc/localtime", &file, (0, 0))?;
    if tree.exists("/etc/timezone") {
        tree.write_text("/etc/timezone", &format!("{zone}\n"))?;
    }
    Ok(())
}

/// Takes out what belongs to one machine.
pub(super) fn make_impersonal(tree: &Tree) -> Result<(), BuildError> {
    for path in PER_MACHINE {
        tree.remove(path)?;
    }
    // Empty, not missing: systemd then makes one at boot without treating it as a first boot (machine-id(5)).
    tree.write("/etc/machine-id", 0o444, (0, 0), &mut std::io::empty())?;
    for name in tree.list("/etc/ssh")?.iter().filter(|name| name.starts_with("ssh_host_")) {
        tree.remove(Path::new("/etc/ssh").join(name))?;
    }
    // Debian's root has no usable password from the start ("*"); the agent sets one on the node.
    Ok(())
}
