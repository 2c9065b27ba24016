//! Releases of Debian other than the one that all tests boot: built from the archive, packed, and booted by `imgutil test`.

use moor_lab::Bins;
use moor_lab::process::{run, run_shown, tied};

/// Builds a node of that release with a package more, and tests its image. What is printed is the verdict.
fn boots(os: &str) -> anyhow::Result<()> {
    let (bins, work) = (Bins::find()?, tempfile::Builder::new().prefix("moor-release-").tempdir()?);
    std::fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let (stage, tree) = (work.path().join("node-files"), work.path().join("tree"));
    run(tied(bins.workspace.join("packaging/stage-node")).arg(&stage).arg(&bins.dir))?;
    let mut build = tied(bins.path("imgutil"));
    build.args(["build", "--no-cache", "--os", os, "-p", "htop", "--node-files"]).arg(&stage).arg(&tree);
    run_shown(&mut build)?;
    let (image, key) = (work.path().join("image.moor"), work.path().join("image.key"));
    let mut pack = tied(bins.path("imgutil"));
    run_shown(pack.arg("pack").arg(&tree).arg("-o").arg(&image).arg("--key-file").arg(&key).args(["--level", "1"]))?;
    // It ends with 0 if the verdict is good.
    run_shown(tied(bins.path("imgutil")).arg("test").arg(&image).arg("--key-file").arg(&key))?;
    Ok(())
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn debian_13_is_built_and_boots() -> anyhow::Result<()> {
    boots("debian-13")
}
