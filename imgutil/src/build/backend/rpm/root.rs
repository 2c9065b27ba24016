//! Running tools on a root that is under construction: those of the host that install into it, and those of the image itself.

use super::Places;
use crate::build::BuildError;
use crate::build::backend::Context;
use crate::build::output::{Meaning, Tail};
use crate::build::plan::Plan;
use crate::build::tree::Tree;
use crate::exec::{Options, Outcome};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What a package's script finds in the root while it runs: processes of its own, devices that do no harm, and nothing of the
/// host's kernel settings. All of it is gone with the mount namespace. `/sys` is an empty directory that may be written to, because
/// the package `filesystem` sets its owner.
const ENTER: &str = r#"root=$1
shift
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
[ ! -e "$root/proc/sysrq-trigger" ] || mount --bind /dev/null "$root/proc/sysrq-trigger"
for place in sys run dev; do
    mount -t tmpfs -o mode=755 imgutil "$root/$place"
done
for device in null zero full random urandom tty; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
exec "$@"
"#;

/// Directories that something is mounted on, with the modes that the package `filesystem` gives them.
const PLACES: [(&str, u32); 4] = [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755)];

/// Makes the directories of [`ENTER`] in a new root. Where the database is not in `/var/lib/rpm`, that is a link to it, as the
/// releases that moved it have it.
pub(in super::super) fn make_places(root: &Path, plan: &Plan) -> Result<(), BuildError> {
    // Its own path is the build's; what is in it may be links of packages.
    std::fs::create_dir_all(root).map_err(|error| BuildError::io("make", root, error))?;
    let (tree, database) = (Tree::open(root)?, &plan.os.rpm.database);
    for (name, mode) in PLACES {
        tree.make_directory(name, mode, (0, 0))?;
    }
    tree.have_directory(database)?;
    tree.have_directory("/var/lib")?;
    tree.symlink_if_free("/var/lib/rpm", format!("../..{database}"))
}

/// Runs a tool of the host's on `root`. Whether it succeeded, and what it printed last; its standard output goes to `output`, if
/// that is given.
pub(in super::super) fn run(
    context: &mut Context<'_, '_>,
    root: &Path,
    meaning: &mut dyn Meaning,
    command: Vec<OsString>,
    output: Option<File>,
) -> Result<(bool, Tail), BuildError> {
    let places = Places::of(context.work);
    let mut all: Vec<OsString> = ["sh", "-ec", ENTER, "sh"].map(OsString::from).to_vec();
    all.push(root.into());
    all.extend(command);
    let mut environment = vec![
        ("HOME".to_owned(), places.home().display().to_string()),
        // What the tools print is searched for reasons.
        ("LC_ALL".to_owned(), "C.UTF-8".to_owned()),
        ("ZYPP_CONF".to_owned(), places.config().join("zypp.conf").display().to_string()),
        // Scripts of packages: no service is started, and the kernel's own scripts leave initramfs and boot loader to the build.
        ("SYSTEMD_OFFLINE".to_owned(), "1".to_owned()),
        ("KERNEL_INSTALL_BYPASS".to_owned(), "1".to_owned()),
        // dnf is written in Python, whose sets are in another order each time without this.
        ("PYTHONHASHSEED".to_owned(), "0".to_owned()),
    ];
    // The time of installation that RPM writes into its database.
    environment.extend(context.epoch.map(|seconds| ("SOURCE_DATE_EPOCH".to_owned(), seconds.to_string())));
    let output = output.map(OwnedFd::from);
    let (finished, tail) = context.tools.run(meaning, |[input, usual, errors]| {
        let mut options = Options::on_host(all, [input, output.unwrap_or(usual), errors]);
        options.environment = environment;
        Ok(options)
    })?;
    Ok((finished?.outcome == Outcome::Exited(0), tail))
}
