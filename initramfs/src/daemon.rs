//! Going to the background: the program starts itself once more under the name that systemd spares, and waits until that process says
//! that the mount answers. No fork: a process with threads cannot.

use crate::survive::NAME;
use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

/// How the C library gives out memory in the background process. All of it is locked, and of locked memory the library can give nothing back from
/// the middle of its heaps: what was taken once stays. Buffers of a chunk are therefore pieces of their own (from 64 KiB on), which go back whole,
/// and small things lie in two heaps, not in one for each thread. Set from here, because the library reads it when a program starts.
const MEMORY: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536:glibc.malloc.arena_max=2");

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
    let mut child = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args(arguments)
        .env(MEMORY.0, MEMORY.1)
        .stdout(Stdio::piped())
        .spawn()?;
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
