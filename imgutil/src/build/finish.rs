//! From a tree of packages to an image: archives, files, users, services, commands and initramfs of the recipe, and then
//! everything out that must differ from node to node.

use super::bootstrap::Source;
use super::tools::Tools;
use super::tree::Tree;
use super::workdir::WorkDir;
use super::{BuildError, Plan};
use crate::exec::{Options, Outcome};
use crate::recipe::{Base, File, User};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

/// Files that belong to one machine or to the build, not to the image.
const PER_MACHINE: [&str; 11] = [
    "/etc/hostname",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/log/alternatives.log",
    "/var/log/apt/eipp.log.xz",
    "/var/log/apt/history.log",
    "/var/log/apt/term.log",
    "/var/log/bootstrap.log",
    "/var/log/dpkg.log",
    "/root/.bash_history",
];

/// Everything after the packages. Gives the versions of the kernels in the image.
pub(super) fn run(
    tools: &mut Tools<'_>,
    work: &WorkDir,
    plan: &Plan,
    sources: &[Source],
    units: &[String],
) -> Result<Vec<String>, BuildError> {
    let tree = Tree::open(&work.root())?;
    tools.stage("applying the recipe")?;
    write_sources(&tree, plan, sources)?;
    // A resolver file of the host's is none of the image's; the agent writes it on the node, exec covers it.
    tree.write_text("/etc/resolv.conf", "# Written by the node's agent at boot.\n")?;
    for file in &plan.recipe.files {
        lay_in(&tree, &plan.recipe.directory, file)?;
    }
    if let Some(locale) = &plan.recipe.locale {
        tree.write_text("/etc/default/locale", &format!("LANG={locale}\n"))?;
    }
    for user in &plan.recipe.users {
        in_tree(tools, work, &format!("making the user '{}'", user.name), &useradd(user))?;
    }
    for unit in plan.services.iter().chain(units) {
        in_tree(tools, work, &format!("enabling '{unit}'"), &["systemctl", "enable", unit].map(OsString::from))?;
    }
    for command in &plan.recipe.run {
        tools.stage("running the recipe's commands")?;
        in_tree(tools, work, &format!("the command '{command}'"), &["sh", "-ec", command].map(OsString::from))?;
    }
    let kernels = kernels(&tree)?;
    if tree.exists("/usr/sbin/update-initramfs") {
        for version in &kernels {
            tools.stage("making the initramfs")?;
            let command = ["update-initramfs", "-c", "-k", version].map(OsString::from);
            in_tree(tools, work, &format!("making the initramfs of kernel {version}"), &command)?;
            if !tree.exists(format!("/boot/initrd.img-{version}")) {
                return Err(BuildError::NoInitramfs(version.clone()));
            }
        }
    }
    if plan.recipe.base == Base::Node && kernels.is_empty() {
        return Err(BuildError::NoKernel);
    }
    tools.stage("taking out what must differ from node to node")?;
    make_impersonal(&tree)?;
    Ok(kernels)
}

/// Runs a command in the tree; its failure is the build's.
fn in_tree(tools: &mut Tools<'_>, work: &WorkDir, doing: &str, command: &[OsString]) -> Result<(), BuildError> {
    let (finished, tail) = tools.run(|streams| {
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

/// The image's own list of archives, each tied to its key.
fn write_sources(tree: &Tree, plan: &Plan, sources: &[Source]) -> Result<(), BuildError> {
    tree.remove("/etc/apt/sources.list")?;
    for name in tree.list("/etc/apt/sources.list.d")? {
        tree.remove(Path::new("/etc/apt/sources.list.d").join(name))?;
    }
    let mut text = String::new();
    for (index, source) in sources.iter().enumerate() {
        let key = if source.key == Path::new(&plan.keyring) {
            plan.keyring.clone()
        } else {
            let extension = source.key.extension().and_then(|end| end.to_str()).unwrap_or("asc");
            let place = format!("/etc/apt/keyrings/recipe-{index}.{extension}");
            copy_in(tree, Path::new(&place), &source.key, 0o644)?;
            place
        };
        let components = if source.components.is_empty() {
            String::new()
        } else {
            format!("Components: {}\n", source.components.join(" "))
        };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "Types: deb\nURIs: {}\nSuites: {}\n{components}Signed-By: {key}\n\n",
            source.uri,
            source.suites.join(" ")
        );
    }
    tree.write_text("/etc/apt/sources.list.d/image.sources", text.trim_end_matches('\n'))
}

fn copy_in(tree: &Tree, place: &Path, source: &Path, mode: u32) -> Result<(), BuildError> {
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

/// The kernels in `/boot`, oldest name first.
fn kernels(tree: &Tree) -> Result<Vec<String>, BuildError> {
    let names = tree.list("/boot")?;
    Ok(names.iter().filter_map(|name| name.strip_prefix("vmlinuz-")).map(str::to_owned).collect())
}

fn make_impersonal(tree: &Tree) -> Result<(), BuildError> {
    for path in PER_MACHINE {
        tree.remove(path)?;
    }
    // Empty, not missing: systemd then makes one at boot without treating it as a first boot (machine-id(5)).
    tree.write("/etc/machine-id", 0o444, &mut std::io::empty())?;
    for name in tree.list("/etc/ssh")?.iter().filter(|name| name.starts_with("ssh_host_")) {
        tree.remove(Path::new("/etc/ssh").join(name))?;
    }
    for directory in ["/var/lib/apt/lists", "/var/cache/apt", "/var/cache/apt/archives", "/var/cache/ldconfig"] {
        for name in tree.list(directory)?.iter().filter(|name| !matches!(name.as_str(), "partial" | "archives")) {
            tree.remove(Path::new(directory).join(name))?;
        }
    }
    // Debian's root has no usable password from the start ("*"); the agent sets one on the node.
    Ok(())
}
