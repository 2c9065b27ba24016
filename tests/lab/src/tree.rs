//! The Debian root trees that VM tests and the demo boot: built once by `imgutil build`, kept under `target`, and brought up to
//! date the way a user would (new agent laid in, the initramfs made anew by `imgutil exec`) when only our programs changed.

use crate::bins::Bins;
use crate::process::{run, run_shown, tied};
use anyhow::Context as _;
use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// What the tree is built for.
pub const OS: &str = "debian-12";

/// Makes every initramfs with dracut, which apt puts in the place of initramfs-tools.
const TO_DRACUT: &str =
    "apt-get -q update && INITRD=No apt-get -q install -y --no-install-recommends dracut && apt-get clean";
const DRACUT: &str = "for kernel in /lib/modules/*; do kernel=${kernel##*/}; dracut -q --force /boot/initrd.img-$kernel $kernel || exit; done";
const RPM_DRACUT: &str = "for kernel in /lib/modules/*; do kernel=${kernel##*/}; dracut -q --force /boot/initramfs-$kernel.img $kernel || exit; done";
const INITRAMFS_TOOLS: &str = "update-initramfs -u -k all";

/// What a machine needs that runs from disks, and that makes them.
const DISK_TOOLS: &str = "lvm2 thin-provisioning-tools mdadm cryptsetup-bin btrfs-progs xfsprogs dosfstools fdisk";

/// What makes the tree's initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initramfs {
    /// Debian's own.
    InitramfsTools,
    /// With systemd in the initramfs.
    Dracut,
}

/// Returns an up-to-date tree. `say` is told each step, in words.
///
/// # Errors
/// A step failed; with what it printed.
pub fn debian(bins: &Bins, initramfs: Initramfs, say: &mut dyn FnMut(&str)) -> anyhow::Result<PathBuf> {
    let cache = bins.cache();
    std::fs::create_dir_all(&cache).with_context(|| format!("making '{}'", cache.display()))?;
    // Two tests may want it at once.
    let lock = std::fs::File::create(cache.join("tree.lock"))?;
    lock.lock().context("locking the tree")?;

    let (stage, planted) = stage(bins, &cache)?;
    let base = cache.join(format!("{OS}-{:016x}", hash_of(&[bins.workspace.join("imgutil/os")])?));
    let make = |tree: &Path| -> anyhow::Result<()> {
        run_shown(
            tied(bins.path("imgutil")).args(["build", "--no-cache", "--os", OS, "--node-files"]).arg(&stage).arg(tree),
        )
        .context("imgutil build")
    };
    if !base.exists() {
        say("building a Debian 12 root tree from the archive (imgutil build)");
        make(&base)?;
        mark(&base, &planted)?;
    }
    let (tree, command) = match initramfs {
        Initramfs::InitramfsTools => (base, INITRAMFS_TOOLS),
        Initramfs::Dracut => {
            let name = base.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let tree = base.with_file_name(format!("dracut-{name}"));
            if !tree.exists() {
                say("putting dracut in the place of initramfs-tools (apt by imgutil exec)");
                with_dracut(bins, &base, &tree)?;
            }
            (tree, DRACUT)
        }
    };
    plant(bins, &tree, (&stage, &planted), command, say)?;
    Ok(tree)
}

/// Returns an up-to-date tree that dnf has made: of Debian's packages, packed again as signed RPMs (`tests/rpm`).
///
/// # Errors
/// A step failed; with what it printed.
pub fn rpm(bins: &Bins, say: &mut dyn FnMut(&str)) -> anyhow::Result<PathBuf> {
    let cache = bins.cache().join("rpm");
    std::fs::create_dir_all(&cache).with_context(|| format!("making '{}'", cache.display()))?;
    let lock = std::fs::File::create(cache.join("lock"))?;
    lock.lock().context("locking the tree")?;

    let (generator, repository) = (bins.workspace.join("tests/rpm/debian-repository"), cache.join("repository"));
    say("packing Debian's packages again as signed RPMs (tests/rpm/debian-repository)");
    run(tied(&generator).arg(&repository).arg(cache.join("debs"))).context("making the RPM repository")?;
    let (stage, planted) = stage(bins, &cache)?;
    let made_from = [generator, bins.workspace.join("imgutil/src/build/backend")];
    let tree = cache.join(format!("tree-{:016x}", hash_of(&made_from)?));
    if !tree.exists() {
        say("building a tree of them (imgutil build, dnf)");
        run_shown(
            tied(bins.path("imgutil"))
                .args(["build", "--no-cache", "--os"])
                .arg(repository.join("os.toml"))
                .arg("--node-files")
                .arg(&stage)
                .arg(&tree),
        )
        .context("imgutil build")?;
        mark(&tree, &planted)?;
    }
    plant(bins, &tree, (&stage, &planted), RPM_DRACUT, say)?;
    Ok(tree)
}

/// Lays out in a folder, whose lock the caller holds, what an image gets of Mooring. Where, and its fingerprint.
fn stage(bins: &Bins, folder: &Path) -> anyhow::Result<(PathBuf, String)> {
    let stage = folder.join("node-files");
    run(tied(bins.workspace.join("packaging/stage-node")).arg(&stage).arg(&bins.dir))
        .context("staging the node's files")?;
    let planted = format!("{:016x}", hash_of(std::slice::from_ref(&stage))?);
    Ok((stage, planted))
}

/// Brings a tree up to date whose agent is another one, and makes its initramfs anew.
fn plant(
    bins: &Bins,
    tree: &Path,
    (stage, planted): (&Path, &str),
    command: &str,
    say: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    if std::fs::read_to_string(marker(tree)).ok().as_deref() == Some(planted) {
        return Ok(());
    }
    say("laying the newly compiled agent into the cached tree and making its initramfs anew (imgutil exec)");
    // A marker that is gone says that the tree is half updated, should this be interrupted.
    let _ = std::fs::remove_file(marker(tree));
    run(tied("cp").args(["-a", "--no-preserve=ownership", "--remove-destination"]).arg(stage.join(".")).arg(tree))
        .context("copying the node's files into the tree")?;
    exec(bins, tree, command)?;
    mark(tree, planted)
}

/// Returns a tree whose initramfs finds its root on LVM or a partition, with the tools for all kinds of disks.
///
/// # Errors
/// A step failed; with what it printed.
pub fn on_disks(bins: &Bins, say: &mut dyn FnMut(&str)) -> anyhow::Result<PathBuf> {
    let base = debian(bins, Initramfs::InitramfsTools, say)?;
    let lock = std::fs::File::create(bins.cache().join("tree.lock"))?;
    lock.lock().context("locking the tree")?;
    let base_name = base.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // Whose agent it has does not matter: none of ours runs there.
    let tree = base.with_file_name(format!("disks-{base_name}"));
    if marker(&tree).exists() {
        return Ok(tree);
    }
    say(&format!("installing {DISK_TOOLS} in a copy of the tree (apt by imgutil exec)"));
    run(tied("rm").arg("-rf").arg(&tree))?;
    run(tied("cp").args(["-a", "--reflink=auto"]).arg(&base).arg(&tree)).context("copying the tree")?;
    // The packages make the initramfs anew.
    let install =
        format!("apt-get -q update && apt-get -q install -y --no-install-recommends {DISK_TOOLS} && apt-get clean");
    exec(bins, &tree, &install)?;
    mark(&tree, DISK_TOOLS)?;
    Ok(tree)
}

/// A copy of `base` with dracut. It appears under its name when it is whole.
fn with_dracut(bins: &Bins, base: &Path, tree: &Path) -> anyhow::Result<()> {
    let unfinished = tree.with_extension("new");
    run(tied("rm").arg("-rf").arg(&unfinished))?;
    run(tied("cp").args(["-a", "--reflink=auto"]).arg(base).arg(&unfinished)).context("copying the tree")?;
    exec(bins, &unfinished, TO_DRACUT)?;
    std::fs::rename(&unfinished, tree).context("giving the tree its name")
}

fn exec(bins: &Bins, tree: &Path, command: &str) -> anyhow::Result<()> {
    run_shown(tied(bins.path("imgutil")).arg("exec").arg(tree).args(["--", "sh", "-c", command]))
        .with_context(|| format!("imgutil exec: {command}"))
}

/// Says which programs of ours a tree holds.
fn marker(tree: &Path) -> PathBuf {
    tree.with_extension("planted")
}

fn mark(tree: &Path, planted: &str) -> anyhow::Result<()> {
    std::fs::write(marker(tree), planted).with_context(|| format!("marking '{}'", tree.display()))
}

/// A fingerprint of the names and contents of files and folders.
fn hash_of(paths: &[PathBuf]) -> anyhow::Result<u64> {
    let mut hasher = std::hash::DefaultHasher::new();
    for path in paths {
        feed(path, &mut hasher)?;
    }
    Ok(hasher.finish())
}

fn feed(path: &Path, hasher: &mut std::hash::DefaultHasher) -> anyhow::Result<()> {
    let meta = std::fs::symlink_metadata(path).with_context(|| format!("reading '{}'", path.display()))?;
    path.file_name().hash(hasher);
    if meta.is_dir() {
        let mut children: Vec<PathBuf> =
            std::fs::read_dir(path)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
        children.sort();
        for child in children {
            feed(&child, hasher)?;
        }
    } else if meta.is_symlink() {
        std::fs::read_link(path)?.hash(hasher);
    } else {
        std::fs::read(path)?.hash(hasher);
    }
    Ok(())
}
