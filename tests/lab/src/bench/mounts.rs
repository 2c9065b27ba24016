//! The ways in which a file on an HTTPS server becomes a file here: ours, and the peers'.

use super::Lab;
use super::web::Authority;
use crate::Namespace;
use crate::process::{Guard, run, tied, wait_for};
use anyhow::Context as _;
use moor_tether::state::State;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// How it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ours,
    /// With all caching off.
    Rclone,
    /// With what it has read kept on disk, and much read ahead.
    RcloneCache,
    /// With what it has read kept on disk, and little read ahead.
    RcloneSmall,
    Httpdirfs,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "moor-tether",
            Self::Rclone => "rclone",
            Self::RcloneCache => "rclone with cache",
            Self::RcloneSmall => "rclone with cache, small reads",
            Self::Httpdirfs => "httpdirfs",
        }
    }
}

/// A mounted file. Gone on drop.
pub(super) struct Remote {
    guard: Guard,
    dir: PathBuf,
    file: PathBuf,
}

/// What a mount needs to know.
pub(super) struct Source<'a> {
    pub(super) lab: &'a Lab<'a>,
    pub(super) authority: &'a Authority,
    pub(super) namespace: Option<&'a Namespace>,
    /// Key of the sealed image.
    pub(super) key: &'a Path,
}

impl Source<'_> {
    /// Mounts the sealed image (ours) or the plain file (peers) at `urls`, the folder's URLs of all servers.
    pub(super) fn mount(&self, kind: Kind, urls: &[String]) -> anyhow::Result<Remote> {
        let dir = tempfile::Builder::new().prefix("mount-").tempdir_in(self.lab.dir)?.keep();
        let (place, cache) = (dir.join("at"), dir.join("cache"));
        std::fs::create_dir(&place)?;
        std::fs::create_dir(&cache)?;
        let first = urls.first().context("no server")?;
        let mut command = match kind {
            Kind::Ours => {
                let mut command = tied(self.lab.bins.static_tether());
                command.args(["mount", "--foreground", "--key-file"]).arg(self.key);
                command.arg("--ca").arg(self.authority.file()).arg("--state").arg(dir.join("state.json"));
                for url in urls {
                    command.arg("--url").arg(format!("{url}image.moor"));
                }
                command
            }
            Kind::Rclone | Kind::RcloneCache | Kind::RcloneSmall => {
                let mut command = tied("rclone");
                command.args(["mount", ":http:", "--read-only", "--dir-cache-time", "1h", "--http-url", first]);
                command.arg("--ca-cert").arg(self.authority.file()).arg("--cache-dir").arg(&cache);
                command.arg("--config").arg(dir.join("rclone.conf"));
                command.args(match kind {
                    Kind::RcloneCache => {
                        &["--vfs-cache-mode", "full", "--buffer-size", "16M", "--vfs-read-ahead", "128M"][..]
                    }
                    Kind::RcloneSmall => {
                        &["--vfs-cache-mode", "full", "--buffer-size", "0", "--vfs-read-chunk-size", "256k"]
                    }
                    _ => &["--vfs-cache-mode", "off"],
                });
                command
            }
            Kind::Httpdirfs => {
                let mut command = tied("httpdirfs");
                command.arg("-f").arg("--cacert").arg(self.authority.file());
                command.arg(first);
                command
            }
        };
        command.arg(&place);
        let mut command = match self.namespace {
            Some(namespace) => namespace.enter(&command),
            None => command,
        };
        let errors = std::fs::File::create(dir.join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn();
        let guard = Guard::new(child.with_context(|| format!("starting {}", kind.name()))?);
        let file = place.join(if kind == Kind::Ours { "image" } else { "plain.squashfs" });
        let mut remote = Remote { guard, dir, file };
        wait_for(kind.name(), Duration::from_secs(30), || {
            anyhow::ensure!(
                remote.guard.is_running(),
                "it ended: {}",
                std::fs::read_to_string(remote.dir.join("log")).unwrap_or_default().trim()
            );
            Ok(remote.file.metadata().is_ok_and(|meta| meta.len() > 0))
        })?;
        Ok(remote)
    }

    /// Mounts the sealed image of a folder as a node does, in the background and locked into memory, reads its first bytes, and says how
    /// large the tether was.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    pub(super) fn locked_memory(&self, url: &str, bytes: u64) -> anyhow::Result<f64> {
        let dir = tempfile::Builder::new().prefix("locked-").tempdir_in(self.lab.dir)?;
        let (place, state) = (dir.path().join("at"), dir.path().join("state.json"));
        std::fs::create_dir(&place)?;
        let tether = self.lab.bins.static_tether();
        let mut command = tied(&tether);
        command.args(["mount", "--key-file"]).arg(self.key).arg("--ca").arg(self.authority.file());
        command.arg("--state").arg(&state).arg("--url").arg(format!("{url}image.moor")).arg(&place);
        run(&mut match self.namespace {
            Some(namespace) => namespace.enter(&command),
            None => command,
        })?;
        let measure = || -> anyhow::Result<f64> {
            let mut dd = tied("dd");
            dd.arg(format!("if={}", place.join("image").display())).args(["of=/dev/null", "bs=1M", "status=none"]);
            run(dd.arg(format!("count={}", bytes >> 20)))?;
            Ok(crate::process::peak(State::read(&state).context("reading a tether's state")?.pid)? as f64)
        };
        let measured = measure();
        run(tied(&tether).arg("unmount").arg(&place))?;
        measured
    }
}

impl Remote {
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        self.guard.id().context("it is gone")
    }

    /// What it said so far.
    pub(super) fn log(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(self.dir.join("log")).context("reading what a mount said")
    }

    /// What the tether says of itself.
    pub(super) fn state(&self) -> anyhow::Result<State> {
        State::read(&self.dir.join("state.json")).context("reading a tether's state")
    }

    /// Ends who serves it, whatever he waits for: who waits for him gets an error.
    pub(super) fn kill(&self) {
        if let Some(pid) = self.guard.id().and_then(|pid| i32::try_from(pid).ok()) {
            // Not there any more is as good.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // Not mounted any more is as good.
        let _ = umount2(&self.dir.join("at"), MntFlags::MNT_DETACH);
        self.guard.kill();
        // Caches of peers are as large as what they have read.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A squashfs file as a tree, through a loop device as `moor-tether root` makes it. Gone on drop.
pub(super) struct Tree {
    at: PathBuf,
}

impl Tree {
    pub(super) fn mount(lab: &Lab<'_>, file: &Path) -> anyhow::Result<Self> {
        let at = tempfile::Builder::new().prefix("tree-").tempdir_in(lab.dir)?.keep();
        let device = crate::process::text(
            tied("losetup").args(["--find", "--show", "--read-only", "--direct-io=on", "--sector-size=4096"]).arg(file),
        )?;
        let mounted = nix::mount::mount(
            Some(Path::new(&device)),
            &at,
            Some("squashfs"),
            MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
            None::<&str>,
        );
        // Freed with its last user, or now.
        run(tied("losetup").args(["--detach", &device]))?;
        mounted.with_context(|| format!("mounting '{device}'"))?;
        Ok(Self { at })
    }

    pub(super) fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Busy: it goes with its last user.
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// What was read is read anew.
pub(super) fn drop_caches() -> anyhow::Result<()> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}
