//! The packages of a tree by mmdebstrap, with the node's files planted before the kernel is installed.

use super::super::Context;
use super::output::{Counter, explain};
use super::{resolve, sources};
use crate::build::BuildError;
use crate::exec::{ExecError, Machine, Options, Outcome};
use std::ffi::OsString;
use std::path::Path;

pub(super) const TOOL: &str = "/usr/bin/mmdebstrap";
/// Comes with mmdebstrap: makes /bin, /lib and /sbin links from the start where the release has them, so that no package is
/// needed to convert them.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/merged-usr";

/// Fills `work.root()` from the narrowed package lists.
pub(super) fn run(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let command = command(context)?;
    let temporary = context.work.temporary();
    let machine = Machine::named(&context.plan.arch.machine)?;
    context.tools.stage("starting mmdebstrap")?;
    let (finished, tail) = context.tools.run(&mut Counter::default(), |streams| {
        let mut options = Options::on_host(command, streams);
        options.machine = Some(machine);
        options.environment = vec![
            // The initramfs is made once, at the end, not after the kernel and again after the last package.
            ("INITRD".to_owned(), "No".to_owned()),
            ("TMPDIR".to_owned(), temporary.display().to_string()),
        ];
        Ok(options)
    })?;
    match finished {
        Ok(finished) if finished.outcome == Outcome::Exited(0) => Ok(()),
        Ok(_) => Err(explain("installing the packages", tail, None, &context.work.root())),
        Err(ExecError::NotStarted { .. }) => Err(BuildError::NoTool { tool: "mmdebstrap", package: "mmdebstrap" }),
        Err(error) => Err(error.into()),
    }
}

fn command(context: &Context<'_, '_>) -> Result<Vec<OsString>, BuildError> {
    let (work, plan) = (context.work, context.plan);
    let lists = quoted(&resolve::narrowed_lists(work));
    let mut command: Vec<OsString> = vec![
        TOOL.into(),
        "--mode=root".into(),
        "--format=directory".into(),
        "--variant=minbase".into(),
        "--verbose".into(),
        format!("--architectures={}", plan.arch.name).into(),
        format!("--include={}", plan.packages.join(",")).into(),
        // What apt may choose from is settled: the lists are fetched and narrowed already.
        "--skip=update".into(),
        format!("--setup-hook=mkdir -p \"$1\"/var/lib/apt/lists && cp {lists}/* \"$1\"/var/lib/apt/lists/").into(),
    ];
    if resolve::is_merged(context)? {
        command.push(format!("--setup-hook={MERGED_USR}/setup00.sh").into());
        command.push(format!("--essential-hook={MERGED_USR}/essential00.sh").into());
    }
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
    // No suite: with one, mmdebstrap would look for essential packages in that suite alone, and the newest version of one may be
    // in another (updates, security).
    command.extend(["".into(), work.root().into_os_string()]);
    command.extend(sources(plan)?.into_iter().map(OsString::from));
    Ok(command)
}

/// A path as one word of sh.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}
