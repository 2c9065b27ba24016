//! The command itself: its environment, where it is found, and the last steps before it replaces the forked process.

use super::caps;
use super::devices::Guard;
use super::sys;
use super::{Options, Root};
use nix::errno::Errno;
use nix::sched::CloneFlags;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Where commands are looked for, in the image's view.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables that are passed on, because fetching would fail without them.
const PASSED_ON: [&str; 8] =
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY"];

/// Why a command cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A NUL byte in an argument or a variable.
    #[error("the command has an argument with a NUL byte: {0:?}")]
    Nul(OsString),
}

/// A command with everything that `execve` takes, prepared before the fork.
pub(super) struct Prepared {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Files to try, in order.
    candidates: Vec<CString>,
    confined: bool,
    stderr_to_terminal: bool,
}

impl Prepared {
    /// Prepares the command of `options`, or the image's shell if it is empty.
    pub(super) fn new(options: &Options, stderr_to_terminal: bool) -> Result<Self, CommandError> {
        let Options { root, command, .. } = options;
        let shell;
        let command = if command.is_empty() {
            shell = default_shell(root, options.terminal.is_some());
            shell.as_slice()
        } else {
            command.as_slice()
        };
        let name = &command[0];
        let candidates = if name.as_bytes().contains(&b'/') {
            vec![c_string(name)?]
        } else {
            PATH.split(':')
                .map(|directory| c_string(Path::new(directory).join(name).as_os_str()))
                .collect::<Result<_, _>>()?
        };
        Ok(Self {
            arguments: command.iter().map(|argument| c_string(argument)).collect::<Result<_, _>>()?,
            environment: environment(options)?,
            candidates,
            confined: matches!(root, Root::Tree(_)),
            stderr_to_terminal,
        })
    }

    /// Becomes the command. Returns only on failure: the exit status (127 not found, 126 not runnable) and the reason.
    pub(super) fn become_it(
        &self,
        guard: &Guard,
        terminal: Option<&OwnedFd>,
        stdio: Option<&[OwnedFd; 3]>,
    ) -> (u8, String) {
        if let Err(reason) = self.settle(guard, terminal, stdio) {
            return (126, reason);
        }
        let name = self.arguments[0].to_string_lossy();
        let mut worst = Errno::ENOENT;
        for candidate in &self.candidates {
            let Err(error) = nix::unistd::execve(candidate, &self.arguments, &self.environment);
            if !matches!(error, Errno::ENOENT | Errno::ENOTDIR) {
                worst = error;
            }
        }
        match worst {
            Errno::ENOENT => (127, format!("there is no command '{name}' in the image")),
            Errno::ENOEXEC => (
                126,
                format!(
                    "cannot run '{name}': it is no program that this machine, or an emulator for this image, can run"
                ),
            ),
            error => (126, format!("cannot run '{name}': {}", error.desc())),
        }
    }

    /// Session, standard streams, control group, capabilities, signals: everything that differs from PID 1.
    fn settle(&self, guard: &Guard, terminal: Option<&OwnedFd>, stdio: Option<&[OwnedFd; 3]>) -> Result<(), String> {
        nix::unistd::setsid().map_err(|error| format!("cannot start a session: {error}"))?;
        let streams = || -> std::io::Result<()> {
            if let Some(terminal) = terminal {
                rustix::process::ioctl_tiocsctty(terminal)?;
                nix::unistd::dup2_stdin(terminal)?;
                nix::unistd::dup2_stdout(terminal)?;
                if self.stderr_to_terminal {
                    nix::unistd::dup2_stderr(terminal)?;
                }
            } else if let Some([input, output, error]) = stdio {
                nix::unistd::dup2_stdin(input)?;
                nix::unistd::dup2_stdout(output)?;
                nix::unistd::dup2_stderr(error)?;
            }
            Ok(())
        };
        streams().map_err(|error| format!("cannot set the standard streams: {error}"))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        if self.confined {
            guard.join().map_err(|error| format!("cannot join the control group that keeps devices away: {error}"))?;
            // The group it has just joined is the root of what it sees.
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| format!("cannot make a control-group namespace: {error}"))?;
            caps::drop_all_but_kept().map_err(|error| error.to_string())?;
        }
        sys::default_signals().map_err(|error| format!("cannot reset signals: {error}"))
    }
}

/// Where the file is planted that bash reads on a terminal.
pub(super) const SHELL_FILE: &str = "imgutil/bashrc";

/// Bash if the image has it, else `sh`. A shell on a terminal reads a planted file instead of the user's own, so that the prompt
/// names the image whatever the distribution's files set; others are login shells.
fn default_shell(root: &Root, terminal: bool) -> Vec<OsString> {
    let bash = match root {
        Root::Tree(tree) => tree.join("usr/bin/bash").exists() || tree.join("bin/bash").exists(),
        Root::Host => true,
    };
    match (bash, terminal) {
        (true, true) => vec!["/bin/bash".into(), "--rcfile".into(), format!("/run/{SHELL_FILE}").into()],
        (true, false) => vec!["/bin/bash".into(), "-l".into()],
        (false, _) => vec!["/bin/sh".into()],
    }
}

/// What that file says: the image's own files, then the prompt. `None` if no shell will read it.
pub(super) fn shell_file(options: &Options) -> Option<String> {
    let name = options.name.as_ref().filter(|_| options.command.is_empty() && options.terminal.is_some())?;
    // A host name: it has no character that means anything to a shell. Debian's own prompt shows `debian_chroot`, which is set.
    Some(format!(
        "[ ! -r /etc/profile ] || . /etc/profile\n\
         [ ! -r ~/.bashrc ] || . ~/.bashrc\n\
         case $PS1 in *debian_chroot* | *'(image '*) ;; *) PS1=\"(image {name}) $PS1\" ;; esac\n"
    ))
}

fn environment(options: &Options) -> Result<Vec<CString>, CommandError> {
    let mut all: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &str, value: &OsStr| {
        all.retain(|(existing, _)| existing != name);
        all.push((name.into(), value.to_owned()));
    };
    for (name, value) in [
        ("PATH", PATH),
        ("HOME", "/root"),
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("SHELL", "/bin/sh"),
        ("LANG", "C.UTF-8"),
    ] {
        set(name, value.as_ref());
    }
    for name in PASSED_ON {
        if let Some(value) = std::env::var_os(name) {
            set(name, &value);
        }
    }
    if options.terminal.is_some() {
        set("TERM", &std::env::var_os("TERM").unwrap_or_else(|| "linux".into()));
    } else {
        // Nobody is there to answer a package's questions.
        set("DEBIAN_FRONTEND", "noninteractive".as_ref());
    }
    if let Some(name) = &options.name {
        // How programs learn that they run in a container (systemd: CONTAINER_INTERFACE).
        set("container", "imgutil".as_ref());
        // Debian's bash shows this before the prompt; other shells take PS1 as it is.
        set("debian_chroot", OsStr::new(&format!("image {name}")));
        set("PS1", OsStr::new(&format!("(image {name}) # ")));
    }
    for (name, value) in &options.environment {
        set(name, value.as_ref());
    }
    all.into_iter()
        .map(|(name, value)| {
            let mut line = name.into_vec();
            line.push(b'=');
            line.extend_from_slice(value.as_bytes());
            CString::new(line).map_err(|error| CommandError::Nul(OsString::from_vec(error.into_vec())))
        })
        .collect()
}

fn c_string(text: &OsStr) -> Result<CString, CommandError> {
    CString::new(text.as_bytes()).map_err(|_| CommandError::Nul(text.to_owned()))
}

/// Points the three standard streams of PID 1 at nothing, so that the command's readers see the end when the command
/// closes them.
pub(super) fn leave_standard_streams(null: BorrowedFd<'_>) -> nix::Result<()> {
    debug_assert!(null.as_raw_fd() > 2);
    nix::unistd::dup2_stdin(null)?;
    nix::unistd::dup2_stdout(null)?;
    nix::unistd::dup2_stderr(null)
}
