//! A container image becomes a node: `imgutil build --from` installs kernel, agent and initramfs by the image's own package manager.
//! The tree is looked at, and with `make test-full` it boots.

use moor_lab::process::{run, run_shown, tied};
use moor_lab::{Bins, container};
use std::path::Path;

fn folder() -> anyhow::Result<tempfile::TempDir> {
    let work = tempfile::Builder::new().prefix("moor-container-").tempdir()?;
    std::fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    Ok(work)
}

/// What a node has to have; the container had none of it.
fn check(bins: &Bins, tree: &Path) -> anyhow::Result<()> {
    let in_tree = |command: &str| -> anyhow::Result<String> {
        let output = run(tied(bins.path("imgutil")).arg("exec").arg(tree).args(["--", "sh", "-c", command]))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let kernel = in_tree("ls /usr/lib/modules")?;
    for file in [format!("boot/vmlinuz-{kernel}"), format!("boot/initrd.img-{kernel}"), "usr/bin/moor-agent".into()] {
        assert!(tree.join(&file).is_file(), "{file} is missing");
    }
    assert!(in_tree(&format!("lsinitramfs /boot/initrd.img-{kernel}"))?.contains("usr/bin/moor-agent"));
    assert_eq!(in_tree("systemctl is-enabled ssh.service moor-agent.service | sort -u")?, "enabled");
    assert_eq!(
        in_tree("systemctl is-enabled greeting.service systemd-timesyncd.service || true")?,
        "enabled\ndisabled"
    );
    assert_eq!(in_tree("dpkg --audit; cat /etc/hello")?, "Hello, world!");
    assert_eq!(std::fs::read_to_string(tree.join("etc/motd"))?, container::MOTD);
    assert!(!tree.join("usr/sbin/policy-rc.d").exists(), "services may start on a node");
    assert_eq!(std::fs::read(tree.join("etc/machine-id"))?, b"");
    Ok(())
}

#[test]
fn a_container_image_becomes_a_node() -> anyhow::Result<()> {
    let (bins, work) = (Bins::find()?, folder()?);
    let tree = container::node(&bins, work.path())?;
    check(&bins, &tree)
}

#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_boots_a_container_image() -> anyhow::Result<()> {
    let (bins, work) = (Bins::find()?, folder()?);
    let tree = container::node(&bins, work.path())?;
    check(&bins, &tree)?;
    let (image, key) = (work.path().join("image.moor"), work.path().join("image.key"));
    let mut pack = tied(bins.path("imgutil"));
    run_shown(pack.arg("pack").arg(&tree).arg("-o").arg(&image).arg("--key-file").arg(&key).args(["--level", "1"]))?;
    // It prints the verdict, and ends with 0 if that is good.
    run_shown(tied(bins.path("imgutil")).arg("test").arg(&image).arg("--key-file").arg(&key))?;
    Ok(())
}
