//! The initramfs of every kernel in a tree, made by the tool that the packages brought: once, after everything that goes into it.

use super::BuildError;
use super::backend::Context;
use super::inside::in_tree;
use super::os::InitramfsTool;
use super::tree::Tree;
use std::ffi::OsString;

/// Makes them. Gives the versions of the kernels, in the order of their names; none without a kernel.
pub(super) fn make(context: &mut Context<'_, '_>, tree: &Tree) -> Result<Vec<String>, BuildError> {
    let kernels = kernels(tree)?;
    if kernels.is_empty() {
        return Ok(kernels);
    }
    let tool = tool(tree, context.plan.os.initramfs.tool).ok_or(BuildError::NoInitramfsTool)?;
    for kernel in &kernels {
        context.tools.stage("making the initramfs")?;
        let file = context.plan.os.initramfs.file.replace("{kernel}", kernel);
        let (name, command) = match tool {
            InitramfsTool::InitramfsTools => ("update-initramfs", vec!["update-initramfs", "-c", "-k", kernel]),
            // Made on a builder for other machines: nothing of the builder's hardware goes in.
            InitramfsTool::Dracut => {
                ("dracut", vec!["dracut", "--force", "--no-hostonly", "--reproducible", &file, kernel.as_str()])
            }
        };
        let command: Vec<OsString> = command.into_iter().map(OsString::from).collect();
        in_tree(context, &format!("making the initramfs of kernel {kernel}"), &command)?;
        if !tree.exists(&file) {
            return Err(BuildError::NoInitramfs { tool: name, kernel: kernel.clone() });
        }
    }
    Ok(kernels)
}

/// The kernels in `/boot`.
pub(super) fn kernels(tree: &Tree) -> Result<Vec<String>, BuildError> {
    let names = tree.list("/boot")?;
    Ok(names.iter().filter_map(|name| name.strip_prefix("vmlinuz-")).map(str::to_owned).collect())
}

/// The tool that is there; the distribution's own where both are.
fn tool(tree: &Tree, own: InitramfsTool) -> Option<InitramfsTool> {
    let is_there = |tool: InitramfsTool| match tool {
        InitramfsTool::InitramfsTools => tree.exists("/usr/sbin/update-initramfs"),
        InitramfsTool::Dracut => tree.exists("/usr/bin/dracut") || tree.exists("/usr/sbin/dracut"),
    };
    [own, InitramfsTool::InitramfsTools, InitramfsTool::Dracut].into_iter().find(|tool| is_there(*tool))
}
