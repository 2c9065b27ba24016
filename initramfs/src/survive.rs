//! What keeps the process alive that serves the root file system: against the switch to it, against the kernel's reclaim, and against
//! a shutdown that needs its files to the last.

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use std::fs::File;
use std::io;
use std::time::Duration;

/// systemd kills what is left of the initramfs at `switch_root` and everything at shutdown, except processes of root whose argv[0]
/// begins with `@` (systemd: killall.c; <https://systemd.io/ROOT_STORAGE_DAEMONS/>).
pub const NAME: &str = "@moor-tether";

/// Signals that end or stop a process and that somebody may send to all.
const SHRUGGED_OFF: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGPIPE];

/// How long a stop may last.
const STOPPED_AT_MOST: Duration = Duration::from_millis(200);

/// Must run before the first other thread: the signal mask is inherited. [`stay_awake`] makes one. Each step that this machine refuses is returned; none is a
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
    // A core dump would have the image's key in it, and who writes it may be read from the root that has just lost its server.
    note("its memory being nobody else's", nix::sys::prctl::set_dumpable(false).map_err(io::Error::from));
    note("its name", nix::sys::prctl::set_name(c"moor-tether").map_err(io::Error::from));
    note("exemption from the out-of-memory killer", std::fs::write("/proc/self/oom_score_adj", "-1000"));
    // Allocations of a process that I/O depends on must not wait for that I/O (PR_SET_IO_FLUSHER).
    note("the rights of an I/O flusher", rustix::process::configure_io_flusher_behavior(true).map_err(io::Error::from));
    // What there is now, code above all, becomes resident. What comes later stays once it was touched: of stacks and of the allocator's
    // reserves a few pages are ever used.
    note("locking its memory", mlockall(MlockAllFlags::MCL_CURRENT).map_err(io::Error::from));
    let later = MlockAllFlags::MCL_FUTURE | MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    note("locking its later memory", mlockall(later).map_err(io::Error::from));
    refused
}

/// Whether the death of the process that has started this one ends this one too (`PR_SET_PDEATHSIG`).
///
/// # Errors
/// The kernel refuses.
pub fn end_with_parent(ends: bool) -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(ends.then_some(Signal::SIGKILL))?)
}

/// Drops the calling thread's capabilities, and with them those of threads that it starts later: of all that root may, a tether that
/// serves needs to lock memory, and nothing else. Everything it uses is open, and belongs to its user.
///
/// # Errors
/// The kernel refuses.
pub fn drop_capabilities() -> io::Result<()> {
    let kept = CapabilitySet::IPC_LOCK;
    let now = capabilities(None)?;
    let (effective, permitted) = (now.effective & kept, now.permitted & kept);
    let sets = CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}

/// Undoes every SIGSTOP within a moment. systemd-shutdown stops all processes while it looks through them, this one too, and it looks
/// for `/etc/initrd-release` meanwhile (systemd: killall.c, `in_initrd`): on a root that this process serves, both would wait for ever.
///
/// SIGSTOP can be neither blocked nor ignored, but any SIGCONT ends it, also the kernel's own from a timer. A signal that nobody takes
/// stops the timer (Linux 6.13 and newer, where it is ignored), so SIGCONT is blocked and a thread takes each one. Must run before any
/// thread that goes on.
///
/// # Errors
/// There is no such timer, or no thread.
pub fn stay_awake() -> io::Result<()> {
    let wakes = SigSet::from(Signal::SIGCONT);
    wakes.thread_block()?;
    let event = SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGCONT, si_value: 0 });
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, event)?;
    timer.set(Expiration::Interval(STOPPED_AT_MOST.into()), TimerSetTimeFlags::empty())?;
    // It ends with the process.
    std::mem::forget(timer);
    std::thread::Builder::new().name("awake".into()).stack_size(64 << 10).spawn(move || {
        // Better with them than not at all.
        let _ = drop_capabilities();
        // Fails for an empty set only.
        while wakes.wait().is_ok() {}
    })?;
    Ok(())
}

/// Lets go of the standard streams, which may be a console that goes away or a pipe whose reader waits for its end, and of the
/// directory it was started in. `null` is /dev/null.
///
/// # Errors
/// There is no way to.
pub fn let_go(null: &File) -> io::Result<()> {
    std::env::set_current_dir("/")?;
    nix::unistd::dup2_stdin(null)?;
    nix::unistd::dup2_stdout(null)?;
    nix::unistd::dup2_stderr(null)?;
    Ok(())
}
