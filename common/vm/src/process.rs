//! Child processes that cannot outlive the thread that started them, and commands whose failure shows what they printed.

use crate::VmError;
use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A command that is killed when the calling thread ends (`setpriv` keeps the process id, so the child is the program itself).
#[must_use]
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// The same as an unprivileged numeric user without groups.
#[must_use]
pub fn tied_as(uid: u32, program: impl AsRef<OsStr>) -> Command {
    let id = uid.to_string();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all", "--pdeathsig", "KILL", "--"])
        .arg(program);
    command.stdin(Stdio::null());
    command
}

/// A child that is killed and reaped on drop.
pub struct Guard(Option<Child>);

impl Guard {
    /// Takes it over.
    #[must_use]
    pub fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Its process id; `None` once it was reaped.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.0.as_ref().map(Child::id)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.0.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end by SIGTERM, then waits; kills it after `limit`.
    pub fn terminate(&mut self, limit: Duration) {
        if let Some(child) = self.0.as_mut() {
            if let Ok(pid) = i32::try_from(child.id()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
            }
            let end = Instant::now() + limit;
            while Instant::now() < end {
                if !matches!(child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.kill();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a command runs, behind `setpriv` and `nsenter` and their arguments.
fn program_of(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let last = words.iter().rposition(|word| *word == "--").map_or(0, |at| at + 1);
    words.get(last).map(|word| word.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Starts a command.
///
/// # Errors
/// It cannot be started.
pub fn spawn(command: &mut Command) -> Result<Child, VmError> {
    command.spawn().map_err(|source| VmError::Start { program: program_of(command), source })
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or its status is not 0; then with what it printed.
pub fn run(command: &mut Command) -> Result<Output, VmError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| VmError::Start { program: program_of(command), source })?;
    if !output.status.success() {
        return Err(VmError::Failed {
            command: format!("{command:?}"),
            status: output.status.to_string(),
            said: format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
        });
    }
    Ok(output)
}

/// Runs a command that takes a while to its end; its progress goes to this program's standard error.
///
/// # Errors
/// It cannot be started, or its status is not 0.
pub fn run_shown(command: &mut Command) -> Result<(), VmError> {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|source| VmError::Start { program: program_of(command), source })?;
    if !status.success() {
        let command = format!("{command:?}");
        return Err(VmError::Failed { command, status: status.to_string(), said: String::new() });
    }
    Ok(())
}

/// Runs a command and returns its standard output as text, without the last newline.
///
/// # Errors
/// As [`run`].
pub fn text(command: &mut Command) -> Result<String, VmError> {
    let output = run(command)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Asks `ready` every 50 ms until it says so.
///
/// # Errors
/// It did not within `limit`, or `ready` failed; `what` names it.
pub fn wait_for<E: From<VmError>>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<bool, E>,
) -> Result<(), E> {
    let end = Instant::now() + limit;
    loop {
        if ready()? {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(VmError::TimedOut { what: what.to_owned(), seconds: limit.as_secs() }.into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The last `lines` lines of a text.
#[must_use]
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_named_with_what_it_said() {
        let error = run(tied("sh").args(["-c", "echo no such image >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("ended with exit status: 3") && error.contains("no such image"), "{error}");
        let mut missing = Command::new("/nonexistent/program");
        let error = spawn(&mut missing).map(drop).unwrap_err().to_string();
        assert!(error.starts_with("cannot start /nonexistent/program: ") && error.ends_with("; install it"), "{error}");
        assert_eq!(program_of(tied_as(1, "moord").args(["run"])), "moord");
    }

    #[test]
    fn a_child_ends_with_its_guard() {
        let child = spawn(tied("sleep").arg("60")).unwrap();
        let path = format!("/proc/{}", child.id());
        let mut guard = Guard::new(child);
        assert!(guard.is_running());
        drop(guard);
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn waiting_ends_at_the_limit() {
        let error = wait_for::<VmError>("a miracle", Duration::from_millis(100), || Ok(false)).unwrap_err();
        assert_eq!(error.to_string(), "a miracle did not happen within 0 s");
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
    }
}
