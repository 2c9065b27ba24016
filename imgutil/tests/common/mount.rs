//! The kernel's squashfs as the oracle: mounted through a loop device, unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted squashfs.
pub struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    pub fn new(image: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "squashfs", "-o", "loop,ro"]).arg(image).arg(directory.path()));
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.directory.path()).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("cannot unmount {}", self.directory.path().display());
        }
    }
}

/// Runs a tool that must succeed.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed: {text}");
    text
}

/// Packs with squashfs-tools, as the peer to compare with.
pub fn mksquashfs(tree: &Path, directory: &Path) -> PathBuf {
    let image = directory.join("peer.squashfs");
    run(Command::new("mksquashfs").arg(tree).arg(&image).args(["-comp", "zstd", "-no-progress", "-quiet"]));
    image
}
