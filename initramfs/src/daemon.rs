//! Going to the background: the program starts itself once more under the name that systemd spares, and waits until that process says
//! that the mount answers. No fork: a process with threads cannot.

use crate::survive::NAME;
use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

/// What the background process says once it serves.
const READY: &str = "ready";

/// Whether this is the background process: it was started under its name.
#[must_use]
pub fn is_background() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// Starts the background process with the same arguments and standard input. Returns once it serves (success), or has ended (with its
/// own status; its message is on standard error).
///
/// # Errors
/// It cannot be started.
pub fn start() -> io::Result<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Not by its path: the program may be unlinked, as everything in an initramfs will be.
    let mut child = Command::new("/proc/self/exe").arg0(NAME).args(arguments).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line)?;
    }
    if line.trim_end() == READY {
        return Ok(ExitCode::SUCCESS);
    }
    // Whoever called makes something of the status. One that says success without having served has not succeeded.
    let status = child.wait()?.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0);
    Ok(status.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Tells whoever started this background process that it serves.
///
/// # Errors
/// Nobody listens.
pub fn say_ready() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{READY}")?;
    out.flush()
}
