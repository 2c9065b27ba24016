//! The admin's scripts of a phase: fetched from a member, run one after the other within limits, their output kept on the server.
//! One that fails is the failure of the phase.

use crate::boot::reporter::{MAX_LOG, Reporter};
use crate::child::{Tail, ended};
use crate::members::Members;
use crate::tree::{Tree, TreeError};
use moor_api::client::ClientError;
use moor_api::deploy::{DeployDocument, MAX_SCRIPT, PhaseName};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, chdir, chroot};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use tokio::process::Command;

/// Where scripts lie while they run, in the root they run on: `/run` is mounted `noexec` by initramfs-tools.
const DIRECTORY: &str = "/var/lib/mooring/scripts";

/// How long one may run.
const LIMIT: Duration = Duration::from_mins(15);

/// Most bytes of output that are kept, its last ones; name and end of the script go with them.
const MAX_OUTPUT: usize = MAX_LOG - (1 << 10);

/// A phase failed.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The document names a script in an impossible way.
    #[error("script '{0}' of phase '{1}' has no valid name")]
    Name(String, &'static str),
    /// It cannot be fetched.
    #[error("script '{name}' of phase '{phase}' cannot be fetched: {cause}")]
    Fetch {
        /// The phase.
        phase: &'static str,
        /// The script.
        name: String,
        /// Why.
        cause: ClientError,
    },
    /// It cannot be put where it runs.
    #[error(transparent)]
    Store(#[from] TreeError),
    /// It cannot be started or waited for.
    #[error("script '{name}' of phase '{phase}' cannot be run: {cause}")]
    Run {
        /// The phase.
        phase: &'static str,
        /// The script.
        name: String,
        /// Why.
        cause: std::io::Error,
    },
    /// It ended with another status than 0, or not in time.
    #[error("script '{name}' of phase '{phase}' {ended}{}", last_line(.output))]
    Failed {
        /// The phase.
        phase: &'static str,
        /// The script.
        name: String,
        /// How it ended.
        ended: String,
        /// What it printed last.
        output: String,
    },
}

fn last_line(output: &str) -> String {
    let line = output.lines().rev().find(|line| !line.trim().is_empty());
    line.map_or_else(String::new, |line| format!(": {}", crate::console::one_line(line.trim())))
}

/// What a phase runs on.
pub struct Phase<'a> {
    /// Which.
    pub name: PhaseName,
    /// What the scripts are told.
    pub document: &'a DeployDocument,
    /// The root they run in; absent: the one the agent runs in.
    pub root: Option<&'a Path>,
}

impl Phase<'_> {
    /// Its scripts, in order.
    #[must_use]
    pub fn scripts(&self) -> Vec<&str> {
        let of_phase = self.document.phases.iter().filter(|phase| phase.phase == self.name);
        of_phase.flat_map(|phase| phase.scripts.iter().map(String::as_str)).collect()
    }

    /// Runs its scripts but the first `done`, which have run, and counts on in `done`: who calls again after a failure runs none twice.
    ///
    /// # Errors
    /// The first that fails.
    pub async fn run(
        &self,
        members: &mut Members,
        reporter: &mut Reporter,
        done: &mut usize,
    ) -> Result<(), ScriptError> {
        for name in self.scripts().into_iter().skip(*done) {
            self.one(members, reporter, name).await?;
            *done += 1;
        }
        Ok(())
    }

    async fn one(&self, members: &mut Members, reporter: &mut Reporter, name: &str) -> Result<(), ScriptError> {
        let phase = self.name.as_str();
        if name.is_empty() || name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains('\0') {
            return Err(ScriptError::Name(name.chars().take(80).collect(), phase));
        }
        let fetched = members.call(async |member| member.script(self.name, name, MAX_SCRIPT).await).await;
        let text = fetched.map_err(|cause| ScriptError::Fetch { phase, name: name.to_owned(), cause })?;
        let path = format!("{DIRECTORY}/{phase}/{name}");
        let tree = Tree::open(self.root.unwrap_or(Path::new("/")))?;
        tree.make_directory(DIRECTORY, 0o700)?;
        tree.write(&path, 0o700, &text)?;
        let run = |cause| ScriptError::Run { phase, name: name.to_owned(), cause };
        let (how, output) = self.execute(&path).await.map_err(run)?;
        reporter.log(Some(self.name), &format!("--- {name}: {}\n{output}", how.as_deref().unwrap_or("done")));
        // A member that is away for a moment gets it later, and does not fail the phase.
        reporter.flush(members).await;
        match how {
            None => Ok(()),
            Some(ended) => Err(ScriptError::Failed { phase, name: name.to_owned(), ended, output }),
        }
    }

    /// Runs one; returns how it ended, when not well, and its output.
    async fn execute(&self, path: &str) -> std::io::Result<(Option<String>, String)> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run-script");
        if let Some(root) = self.root {
            command.arg("--root").arg(root);
        }
        command.arg(path).env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", "/root").env("LANG", "C.UTF-8");
        command.env("MOOR_PHASE", self.name.as_str()).env("MOOR_NODE", self.document.node.name.as_str());
        command.env("MOOR_NODE_ID", self.document.node.id.to_string());
        command.env("MOOR_PROFILE", self.document.profile.name.as_str());
        // A group of its own: what it leaves in the background ends with it.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::from(writer.try_clone()?)).stderr(Stdio::from(writer));
        let mut child = command.spawn()?;
        // The command holds the pipe's other end, which would keep it open.
        drop(command);
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let mut output = Tail::keeping(Some(Receiver::from_owned_fd(OwnedFd::from(reader))?), MAX_OUTPUT);
        let finished = tokio::time::timeout(LIMIT, async {
            loop {
                tokio::select! {
                    status = child.wait() => break status,
                    () = output.read() => (),
                }
            }
        })
        .await;
        if let Some(group) = group {
            let _ = killpg(group, Signal::SIGKILL);
        }
        let _ = tokio::time::timeout(Duration::from_millis(500), async {
            while output.open() {
                output.read().await;
            }
        })
        .await;
        let how = match finished {
            Ok(status) => {
                let status = status?;
                (!status.success()).then(|| ended(status))
            }
            Err(_) => Some(format!("did not end within {} minutes", LIMIT.as_secs() / 60)),
        };
        let mut text = output.text();
        if output.dropped > 0 {
            text.insert_str(0, &format!("[{} bytes before are left out]\n", output.dropped));
        }
        Ok((how, text))
    }
}

/// Becomes the script: the end of `moor-agent run-script`, in a process of its own. With a root, the script sees that root and the
/// kernel's file systems in it; what it mounts there goes with it.
///
/// # Errors
/// Only where it fails; otherwise it does not return.
pub fn become_script(root: Option<&Path>, script: &Path) -> anyhow::Result<std::convert::Infallible> {
    use anyhow::Context as _;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("limiting core dumps")?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    if let Some(root) = root {
        unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
        for name in ["dev", "proc", "sys", "run"] {
            let target: PathBuf = root.join(name);
            // The target's last part must not be a link: it is taken as it stands, in this namespace alone.
            if std::fs::symlink_metadata(&target).is_ok_and(|meta| meta.is_dir()) {
                let source = Path::new("/").join(name);
                mount(Some(&source), &target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                    .with_context(|| format!("binding '/{name}' into the root"))?;
            }
        }
        chroot(root).with_context(|| format!("changing the root to '{}'", root.display()))?;
    }
    chdir("/").context("changing to '/'")?;
    Err(std::process::Command::new(script).exec()).with_context(|| format!("executing '{}'", script.display()))
}
