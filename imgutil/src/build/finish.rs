//! From a tree of packages to an image: users, files, services, commands and initramfs of the recipe, and then
//! everything out that must differ from node to node.

use super::backend::Context;
use super::inside::in_tree;
use super::tree::Tree;
use super::{BuildError, accounts, epoch, initramfs, lay, plan, scrub};
use crate::recipe::{Base, File};
use crate::scrub::LeftOut;
use std::ffi::OsString;
use std::path::Path;

/// What finishing a tree gave.
pub(super) struct Finished {
    /// Versions of the kernels in the image.
    pub(super) kernels: Vec<String>,
    /// What was taken out of it.
    pub(super) taken_out: LeftOut,
}

/// Everything after the packages.
pub(super) fn run(context: &mut Context<'_, '_>, units: &[String]) -> Result<Finished, BuildError> {
    let plan = context.plan;
    let tree = Tree::open(&context.work.root())?;
    context.tools.stage("applying the recipe")?;
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
    // Before the initramfs, which takes its time.
    if plan.base == Base::Node && initramfs::kernels(&tree)?.is_empty() {
        return Err(BuildError::NoKernel);
    }
    if plan.base == Base::Node && !tree.exists("/sbin/init") {
        return Err(BuildError::NoInit);
    }
    let kernels = initramfs::make(context, &tree)?;
    context.tools.stage("taking out what must differ from node to node")?;
    let taken_out = make_impersonal(&tree, &context.work.root(), &plan.files)?;
    if let Some(seconds) = context.epoch {
        epoch::apply(&tree, &context.work.root(), seconds)?;
    }
    Ok(Finished { kernels, taken_out })
}

/// The system's locale, made first where it is none that every system has.
fn set_locale(context: &mut Context<'_, '_>, tree: &Tree) -> Result<(), BuildError> {
    let plan = context.plan;
    let Some(locale) = &plan.locale else { return Ok(()) };
    if !plan::is_built_in(locale) && tree.exists("/usr/sbin/locale-gen") {
        let supported = tree.read_text("/usr/share/i18n/SUPPORTED")?;
        let charset = charset(&supported, locale);
        tree.write_text("/etc/locale.gen", &format!("{locale} {charset}\n"))?;
        in_tree(context, &format!("making the locale '{locale}'"), &["locale-gen"].map(OsString::from))?;
    }
    tree.write_text(&plan.os.locale.file, &format!("LANG={locale}\n"))
}

/// The character set of a locale, by the lines of `supported` (`de_DE@euro ISO-8859-15`): its name alone does not tell. A name that is
/// not among them is one of the other spellings of UTF-8 (`de_DE.utf8`).
fn charset<'a>(supported: &'a str, locale: &str) -> &'a str {
    let mut pairs = supported.lines().filter_map(|line| line.split_once(' '));
    pairs.find(|(name, _)| *name == locale).map_or("UTF-8", |(_, charset)| charset.trim())
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

/// Takes out of the tree, whose root is `root`, what must differ from node to node and what tools have left; what the recipe laid in
/// stays.
pub(super) fn make_impersonal(tree: &Tree, root: &Path, laid: &[File]) -> Result<LeftOut, BuildError> {
    let taken_out = scrub::apply(root, laid)?;
    // Empty, not missing: systemd then makes one at boot without treating it as a first boot (machine-id(5)).
    tree.write("/etc/machine-id", 0o444, (0, 0), &mut std::io::empty())?;
    // Debian's root has no usable password from the start ("*"); the agent sets one on the node.
    Ok(taken_out)
}

#[cfg(test)]
mod tests {
    use super::charset;

    #[test]
    fn the_character_set_of_a_locale_is_the_one_that_glibc_pairs_it_with() {
        let supported = "de_DE.UTF-8 UTF-8\nde_DE ISO-8859-1\nde_DE@euro ISO-8859-15\nja_JP.EUC-JP EUC-JP\n";
        for (locale, expected) in [
            ("de_DE.UTF-8", "UTF-8"),
            ("de_DE", "ISO-8859-1"),
            ("de_DE@euro", "ISO-8859-15"),
            ("ja_JP.EUC-JP", "EUC-JP"),
            ("de_DE.utf8", "UTF-8"),
            ("de", "UTF-8"),
        ] {
            assert_eq!(charset(supported, locale), expected, "{locale}");
        }
        assert_eq!(charset("", "de_DE.UTF-8"), "UTF-8");
    }
}
