//! The base of a Debian or Ubuntu tree by mmdebstrap: archives, packages, and the node's files planted before the kernel
//! is installed. Signatures are always checked: nothing here can switch that off.

use super::os::Os;
use super::tools::Tools;
use super::workdir::WorkDir;
use super::{BuildError, Plan};
use crate::exec::{ExecError, Machine, Options, Outcome};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const TOOL: &str = "/usr/bin/mmdebstrap";
/// Comes with mmdebstrap: makes /bin, /lib and /sbin links from the start where the release has them, so that no package is
/// needed to convert them.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/maybe-merged-usr";

/// A line of apt's sources.
pub(super) struct Source {
    pub(super) uri: String,
    pub(super) suites: Vec<String>,
    pub(super) components: Vec<String>,
    /// Key file on the host.
    pub(super) key: PathBuf,
}

/// The archives of a plan, the distribution's own first.
pub(super) fn sources(os: &Os, plan: &Plan) -> Vec<Source> {
    let recipe = &plan.recipe;
    let archive = recipe.mirror.clone().unwrap_or_else(|| os.mirror.archive.clone());
    let own = |uri: String, suites: Vec<String>| Source {
        uri,
        suites,
        components: os.components.clone(),
        key: PathBuf::from(&os.keyring),
    };
    let mut all = vec![own(archive, vec![os.release.clone(), os.mirror.updates.clone()])];
    let security = recipe.security_mirror.clone().unwrap_or_else(|| os.mirror.security.clone());
    if !security.is_empty() {
        all.push(own(security, vec![os.mirror.security_suite.clone()]));
    }
    for repository in &recipe.repositories {
        all.push(Source {
            uri: repository.uri.clone(),
            suites: repository.suites.clone(),
            components: repository.components.clone(),
            key: recipe.directory.join(&repository.key),
        });
    }
    all
}

/// Checks on the host what the tool would only complain about later and in other words.
pub(super) fn check_host(sources: &[Source], os: &Os, plan: &Plan) -> Result<(), BuildError> {
    if !Path::new(TOOL).exists() {
        return Err(BuildError::NoTool);
    }
    if let Some(source) = sources.iter().find(|source| !source.key.is_file()) {
        let package = (source.key == Path::new(&os.keyring)).then(|| os.keyring_package.clone());
        return Err(BuildError::NoKey { uri: source.uri.clone(), key: source.key.clone(), package });
    }
    Machine::named(&plan.arch)?.runner()?;
    Ok(())
}

/// Fills `work.root()` with the packages of the plan.
pub(super) fn run(
    tools: &mut Tools<'_>,
    work: &WorkDir,
    os: &Os,
    plan: &Plan,
    sources: &[Source],
) -> Result<(), BuildError> {
    let command = command(work, os, plan, sources);
    tools.stage("starting mmdebstrap")?;
    let (finished, tail) = tools.run(|streams| {
        let mut options = Options::on_host(command, streams);
        options.machine = Some(Machine::named(&plan.arch)?);
        options.environment = vec![
            // The initramfs is made once, at the end, not after the kernel and again after the last package.
            ("INITRD".to_owned(), "No".to_owned()),
            ("TMPDIR".to_owned(), work.temporary().display().to_string()),
        ];
        Ok(options)
    })?;
    match finished {
        Ok(finished) if finished.outcome == Outcome::Exited(0) => Ok(()),
        Ok(_) => {
            let unknown = tail.unknown_packages();
            if let Some((name, others)) = unknown.split_first() {
                let near = super::names::near(&work.root(), name);
                return Err(BuildError::UnknownPackage { name: name.clone(), near, others: others.to_vec() });
            }
            if let Some(what) = tail.untrusted() {
                return Err(BuildError::Untrusted(what));
            }
            if let Some((address, reason)) = tail.unreachable() {
                return Err(BuildError::Unreachable { address, reason });
            }
            Err(BuildError::Tool { doing: "installing the packages".to_owned(), reason: tail.reason(), tail })
        }
        Err(ExecError::NotStarted { .. }) => Err(BuildError::NoTool),
        Err(error) => Err(error.into()),
    }
}

fn command(work: &WorkDir, os: &Os, plan: &Plan, sources: &[Source]) -> Vec<OsString> {
    let packages = plan.packages.join(" ");
    // Fails in seconds, before anything is installed, and names every unknown package.
    let check = format!("APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get --simulate install {packages} >/dev/null");
    let mut command: Vec<OsString> = vec![
        TOOL.into(),
        "--mode=root".into(),
        "--format=directory".into(),
        "--variant=minbase".into(),
        "--verbose".into(),
        format!("--architectures={}", plan.arch).into(),
        format!("--keyring={}", os.keyring).into(),
        format!("--include={}", plan.packages.join(",")).into(),
        format!("--hook-directory={MERGED_USR}").into(),
        format!("--extract-hook={check}").into(),
    ];
    if plan.node_files.is_some() {
        // After the essential packages, so that /usr and its links are there, and before the kernel, whose scripts make the
        // initramfs with what is planted here.
        let stage = quoted(&work.stage());
        let plant = format!(
            "tar -C {stage} --numeric-owner -cf - . | tar -C \"$1\" --numeric-owner --keep-directory-symlink \
             --no-overwrite-dir -xpf -"
        );
        command.push(format!("--essential-hook={plant}").into());
    }
    command.extend([os.release.clone().into(), work.root().into_os_string()]);
    for source in sources {
        for suite in &source.suites {
            let components = source.components.join(" ");
            let key = source.key.display();
            command.push(format!("deb [signed-by={key}] {} {suite} {components}", source.uri).into());
        }
    }
    command
}

/// A path as one word of sh.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}
