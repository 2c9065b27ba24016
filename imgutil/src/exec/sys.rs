//! The kernel calls of `exec` that no safe wrapper covers: fork, `close_range`, `mount_setattr`, the flags of a network
//! interface, signal dispositions.
//!
//! `unsafe` is allowed here and nowhere else in `exec`: nix leaves `fork`, `sigaction` and `signal` to their callers, and
//! neither nix nor rustix knows `mount_setattr` and `close_range`.
#![allow(unsafe_code)]

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// Forks; the child runs `child` and leaves with the status it returns, without unwinding into the caller's frames.
///
/// The caller may have other threads. glibc makes `malloc` usable in the child; `child` must take no other lock that a
/// thread could have held: no standard stream, no `tracing`, no environment.
pub(super) fn fork_into(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    // SAFETY: the contract above is what `fork` in a program with threads asks for; the child never returns from here.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(child),
        nix::unistd::ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(u8::MAX);
            // SAFETY: `_exit` takes no pointer. Exit handlers belong to the parent's program and must not run here.
            unsafe { libc::_exit(i32::from(code)) }
        }
    }
}

/// Marks every descriptor from `first` on close-on-exec (`true`) or closes it now (`false`), except those in `keep`.
pub(super) fn close_all_from(first: u32, keep: &[BorrowedFd<'_>], on_exec: bool) -> io::Result<()> {
    let flags = if on_exec { libc::CLOSE_RANGE_CLOEXEC } else { 0 };
    let mut kept: Vec<u32> =
        keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).filter(|fd| *fd >= first).collect();
    kept.sort_unstable();
    let mut start = first;
    for fd in kept.into_iter().map(Some).chain([None]) {
        let end = fd.map_or(u32::MAX, |fd| fd.saturating_sub(1));
        if fd.is_none_or(|fd| fd > start) {
            // SAFETY: takes integers only. The descriptors belong to the forked copy of a caller whose values are never
            // dropped here (`fork_into` leaves by `_exit`), so nothing closes them a second time.
            if unsafe { libc::syscall(libc::SYS_close_range, start, end, flags) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        if let Some(fd) = fd {
            start = fd + 1;
        }
    }
    Ok(())
}

/// `struct mount_attr` of `mount_setattr`(2).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets `attributes` on the mount behind `mount` and, if `recursive`, on every mount below it.
pub(super) fn mount_setattr(mount: BorrowedFd<'_>, attributes: u32, recursive: bool) -> io::Result<()> {
    let attr = MountAttr { attr_set: u64::from(attributes), ..MountAttr::default() };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, `attr` is the kernel's structure and its size is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            std::mem::size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Brings up `lo` of this network namespace (netdevice(7)).
pub(super) fn bring_up_loopback() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: a C structure of plain integers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: the request is the kernel's structure, with a NUL-terminated name; the kernel writes its flags.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has filled in this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= i16::try_from(libc::IFF_UP).unwrap_or_default() };
    // SAFETY: as for the call above.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives SIGPIPE its default action back, which the Rust runtime had set to "ignore", and the signals that are passed on theirs, and
/// unblocks every signal. One that came meanwhile does then what it does to the command: with this program's handler in place, which
/// only an exec takes away, it would be lost. What was ignored when the program started stays so.
pub(super) fn default_signals() -> io::Result<()> {
    // SAFETY: SIG_DFL is no handler function: nothing of ours runs in signal context.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in super::signals::PASSED_ON {
        // SAFETY: as above.
        let old = unsafe { nix::sys::signal::sigaction(signal, &default) }?;
        if matches!(old.handler(), SigHandler::SigIgn) {
            // SAFETY: restores what was there.
            unsafe { nix::sys::signal::sigaction(signal, &old) }?;
        }
    }
    SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Where `note` writes; -1 while nobody watches.
static NOTE_TO: AtomicI32 = AtomicI32::new(-1);

/// The signal handler: one byte, the signal's number, into a non-blocking pipe.
extern "C" fn note(signal: libc::c_int) {
    let fd = NOTE_TO.load(Ordering::Relaxed);
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: errno is thread-local and valid; it is kept, because the interrupted code may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: write(2) is async-signal-safe; the buffer is one valid byte. A full pipe drops the byte: as many signals wait.
    unsafe { libc::write(fd, (&raw const byte).cast(), 1) };
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Handlers that note signals into a pipe; the old dispositions come back when it is dropped.
pub(super) struct Handlers {
    old: Vec<(Signal, SigAction)>,
    _pipe: OwnedFd,
}

impl Handlers {
    /// Installs the handler for `signals`. Only one instance may live in a process: a second gets `AlreadyExists`.
    pub(super) fn install(signals: &[Signal], pipe: OwnedFd) -> io::Result<Self> {
        if NOTE_TO.compare_exchange(-1, pipe.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "this process watches its signals already"));
        }
        let mut handlers = Self { old: Vec::with_capacity(signals.len()), _pipe: pipe };
        let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
        for signal in signals {
            // SAFETY: `note` does only what is allowed in a signal handler.
            let old = unsafe { nix::sys::signal::sigaction(*signal, &action) }?;
            if matches!(old.handler(), SigHandler::SigIgn) {
                // Started with the signal ignored (nohup): it stays so.
                // SAFETY: restores what was there.
                unsafe { nix::sys::signal::sigaction(*signal, &old) }?;
            } else {
                handlers.old.push((*signal, old));
            }
        }
        Ok(handlers)
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for (signal, old) in &self.old {
            // SAFETY: the disposition was read from the kernel by `install`. It cannot fail for a signal it took before.
            let _ = unsafe { nix::sys::signal::sigaction(*signal, old) };
        }
        NOTE_TO.store(-1, Ordering::SeqCst);
    }
}
