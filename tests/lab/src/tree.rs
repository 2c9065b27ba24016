//! The Debian root tree that VM tests and the demo boot: built once by `imgutil build`, kept under `target`, and brought up to
//! date the way a user would (new agent laid in, `update-initramfs` run by `imgutil exec`) when only our programs changed.

use crate::bins::Bins;
use crate::process::{run, run_shown, tied};
use anyhow::Context as _;
use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// What the tree is built for.
pub const OS: &str = "debian-12";

/// Returns an up-to-date tree. `say` is told each step, in words.
///
/// # Errors
/// A step failed; with what it printed.
pub fn debian(bins: &Bins, say: &mut dyn FnMut(&str)) -> anyhow::Result<PathBuf> {
    let cache = bins.cache();
    std::fs::create_dir_all(&cache).with_context(|| format!("making '{}'", cache.display()))?;
    // Two tests may want it at once.
    let lock = std::fs::File::create(cache.join("tree.lock"))?;
    lock.lock().context("locking the tree")?;

    let stage = cache.join("node-files");
    run(tied(bins.workspace.join("packaging/stage-node")).arg(&stage).arg(&bins.dir))
        .context("staging the node's files")?;
    let recipe = [bins.workspace.join("imgutil/os")];
    let tree = cache.join(format!("{OS}-{:016x}", hash_of(&recipe)?));
    let marker = tree.with_extension("planted");
    let planted = format!("{:016x}", hash_of(std::slice::from_ref(&stage))?);

    if !tree.exists() {
        say("building a Debian 12 root tree from the archive (imgutil build)");
        run_shown(
            tied(bins.path("imgutil")).args(["build", "--no-cache", "--os", OS, "--node-files"]).arg(&stage).arg(&tree),
        )
        .context("imgutil build")?;
        std::fs::write(&marker, &planted)?;
    } else if std::fs::read_to_string(&marker).ok().as_deref() != Some(planted.as_str()) {
        say("laying the newly compiled agent into the cached tree (update-initramfs by imgutil exec)");
        // A marker that is gone says that the tree is half updated, should this be interrupted.
        let _ = std::fs::remove_file(&marker);
        run(tied("cp").args(["-a", "--no-preserve=ownership", "--remove-destination"]).arg(stage.join(".")).arg(&tree))
            .context("copying the node's files into the tree")?;
        run_shown(tied(bins.path("imgutil")).arg("exec").arg(&tree).args([
            "--",
            "update-initramfs",
            "-u",
            "-k",
            "all",
        ]))
        .context("imgutil exec update-initramfs")?;
        std::fs::write(&marker, &planted)?;
    }
    Ok(tree)
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
