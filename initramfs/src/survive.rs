//! What keeps the process alive that serves the root file system: against the switch to it, against the kernel's reclaim, and against
//! a shutdown that needs its files to the last.

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use std::fs::File;
use std::io;

/// systemd kills what is left of the initramfs at `switch_root` and everything at shutdown, except processes of root whose argv[0]
/// begins with `@` (systemd: killall.c; <https://systemd.io/ROOT_STORAGE_DAEMONS/>).
pub const NAME: &str = "@moor-tether";

/// Signals that end or stop a process and that somebody may send to all.
const SHRUGGED_OFF: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGPIPE];

/// Must run before the first other thread: the signal mask is inherited. Each step that this machine refuses is returned; none is a
/// reason not to serve.
pub fn prepare() -> Vec<String> {
    let mut refused = Vec::new();
    let mut note = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            refused.push(format!("{what}: {error}"));
        }
    };
    note("a session of its own", nix::unistd::setsid().map(drop).map_err(io::Error::from));
    // Blocked, not ignored: needs no handler, and nothing ever takes them out again.
    note(
        "ignoring SIGTERM and SIGHUP",
        SHRUGGED_OFF.into_iter().collect::<SigSet>().thread_block().map_err(io::Error::from),
    );
    note("its name", nix::sys::prctl::set_name(c"moor-tether").map_err(io::Error::from));
    note("exemption from the out-of-memory killer", std::fs::write("/proc/self/oom_score_adj", "-1000"));
    // Allocations of a process that I/O depends on must not wait for that I/O (PR_SET_IO_FLUSHER).
    note("the rights of an I/O flusher", rustix::process::configure_io_flusher_behavior(true).map_err(io::Error::from));
    // What there is now, code above all, becomes resident. What comes later stays once it was touched: FUSE's request buffers are
    // 16 MiB each, of which a page or two are ever used.
    note("locking its memory", mlockall(MlockAllFlags::MCL_CURRENT).map_err(io::Error::from));
    let later = MlockAllFlags::MCL_FUTURE | MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    note("locking its later memory", mlockall(later).map_err(io::Error::from));
    refused
}

/// Lets go of the standard streams, which may be a console that goes away or a pipe whose reader waits for its end, and of the
/// directory it was started in.
///
/// # Errors
/// There is no /dev/null.
pub fn let_go() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}
