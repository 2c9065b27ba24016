//! Mounts of tests, which end with them, and the kernel's squashfs as the oracle: mounted through a loop device.

use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Gives the calling thread, and what it starts from here on, mounts of its own. They end with the last of these, also when the whole
/// test program is killed, and with them their loop devices: none stays on the host.
pub fn own_mounts() {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// A mounted squashfs. Call [`own_mounts`] before.
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
