//! PID 1 of an image: sets everything up, starts the command, reaps, passes signals on, and cleans up when the command or
//! `imgutil` has ended. When this process ends, the kernel kills all others in the image and frees its mounts.

use super::channel::{Channel, Message};
use super::command::{Prepared, leave_standard_streams};
use super::dev::Terminal;
use super::devices::Guard;
use super::foreign::Emulator;
use super::mounts::Detached;
use super::plant::{Planted, Sources};
use super::repository::Shown;
use super::root;
use super::{Options, Root, Window, sys};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Everything that was prepared before the fork.
pub(super) struct Plan<'a> {
    pub(super) options: &'a Options,
    pub(super) command: &'a Prepared,
    pub(super) sources: &'a Sources,
    /// Held with a shared lock while somebody runs in the tree.
    pub(super) lock: Option<&'a OwnedFd>,
    /// `/dev/null` of the host.
    pub(super) null: &'a OwnedFd,
    /// Repositories beside the image's own.
    pub(super) shown: &'a [Shown],
    /// What has to be registered to run the image's programs.
    pub(super) emulator: Option<&'a Emulator>,
    /// Whether PID 1 is root of a user namespace, not of the host.
    pub(super) in_user_namespace: bool,
}

/// What was made outside of the image's own namespaces, and must be taken away.
pub(super) struct Holdings {
    /// Places in the tree.
    pub(super) planted: Planted,
    /// The control group.
    pub(super) guard: Guard,
    /// Registrations of emulators, which last as long as this.
    pub(super) formats: Option<Detached>,
}

/// The process between `imgutil` and PID 1 that makes the user namespace: a thread cannot, and PID 1 must be born into it.
pub(super) fn run_in_user_namespace(plan: &Plan<'_>, channel: &Channel) -> u8 {
    match start_in_user_namespace(plan, channel) {
        Ok(child) => {
            // From here on the end of PID 1 is what `imgutil` waits for on the socket: this process must not hold it.
            let _ = sys::close_all_from(3, &[], false);
            // Nothing to report: what happened is said by PID 1.
            while matches!(waitpid(child, None), Err(Errno::EINTR)) {}
            0
        }
        Err(reason) => {
            let _ = channel.send(&Message::Failed(reason));
            1
        }
    }
}

/// Makes this process root of a new user namespace, whose ids the other end of `channel` maps.
pub(super) fn enter_user_namespace(channel: &Channel) -> Result<(), String> {
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| format!("cannot make a user namespace: {error}"))?;
    channel.send(&Message::NeedsIds).map_err(|error| error.to_string())?;
    let Ok(Some(Message::IdsAreMapped)) = channel.receive() else {
        return Err("the ids of the user namespace were not mapped".to_owned());
    };
    // The user's other groups mean nothing in the image, and would open files of the host to it.
    nix::unistd::setgroups(&[]).map_err(|error| format!("cannot leave the user's groups: {error}"))?;
    nix::unistd::setresgid(0.into(), 0.into(), 0.into())
        .map_err(|error| format!("cannot become root's group: {error}"))?;
    nix::unistd::setresuid(0.into(), 0.into(), 0.into()).map_err(|error| format!("cannot become root: {error}"))
}

fn start_in_user_namespace(plan: &Plan<'_>, channel: &Channel) -> Result<Pid, String> {
    enter_user_namespace(channel)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|error| format!("cannot make a process-id namespace: {error}"))?;
    // PID 1 says nothing before its number has been said: it waits for the end of this pipe.
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|error| format!("cannot make a pipe: {error}"))?;
    let child = sys::fork_into(|| {
        let mut keep = plan.kept(channel);
        keep.push(wait.as_fd());
        match sys::close_all_from(3, &keep, false) {
            Ok(()) => {
                let _ = rustix::io::retry_on_intr(|| rustix::io::read(&wait, &mut [0_u8; 1]));
                run(plan, channel)
            }
            Err(error) => {
                let _ = channel.send(&Message::Failed(format!("cannot prepare PID 1: {error}")));
                1
            }
        }
    })
    .map_err(|error| format!("cannot fork: {error}"))?;
    channel.send(&Message::Started(child)).map_err(|error| error.to_string())?;
    drop(go);
    Ok(child)
}

impl Plan<'_> {
    /// The descriptors that PID 1 keeps.
    fn kept<'b>(&'b self, channel: &'b Channel) -> Vec<BorrowedFd<'b>> {
        let mut keep = vec![channel.as_fd(), self.null.as_fd()];
        keep.extend(self.lock.map(AsFd::as_fd));
        keep.extend(self.options.stdio.iter().flatten().map(AsFd::as_fd));
        keep
    }
}

/// The whole life of PID 1. Its exit status means nothing: what happened is said over `channel`.
pub(super) fn run(plan: &Plan<'_>, channel: &Channel) -> u8 {
    let mut holdings = Holdings { planted: Planted::default(), guard: Guard::MountsOnly(String::new()), formats: None };
    let ended = live(plan, channel, &mut holdings);
    // Whoever still runs in the image could write to the places that are about to be removed.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    while !matches!(waitpid(Pid::from_raw(-1), None), Err(Errno::ECHILD)) {}
    let Holdings { mut planted, guard, formats: _formats } = holdings;
    if last_in_tree(plan) {
        planted.remove();
    }
    if let Err(error) = guard.remove() {
        planted.warnings.push(format!("cannot remove the control group of the image: {error}"));
    }
    for warning in planted.warnings.drain(..) {
        // Without a reader there is nobody to tell.
        let _ = channel.send(&Message::Warning(warning));
    }
    let last = match ended {
        Ok(Some(WaitStatus::Signaled(_, signal, _))) => {
            Message::Signaled(u8::try_from(signal as i32).unwrap_or(u8::MAX))
        }
        Ok(Some(WaitStatus::Exited(_, code))) => Message::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
        Ok(_) => return 1,
        Err(reason) => Message::Failed(reason),
    };
    let _ = channel.send(&last);
    0
}

/// Whether nobody else uses the places in the tree: another `exec` in the same tree takes them away when it ends.
fn last_in_tree(plan: &Plan<'_>) -> bool {
    plan.lock.is_none_or(|lock| rustix::fs::flock(lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok())
}

/// From the first step to the command's end; `None` if `imgutil` ended before.
fn live(plan: &Plan<'_>, channel: &Channel, holdings: &mut Holdings) -> Result<Option<WaitStatus>, String> {
    keep_only_what_is_needed(plan, channel).map_err(|error| format!("cannot prepare PID 1: {error}"))?;
    // Nothing ends this process with `imgutil` but what it sees on the channel: a kill in the middle of the set-up would leave
    // places in the tree.
    if gone(channel) {
        return Ok(None);
    }
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|error| format!("cannot watch signals: {error}"))?;
    let terminal = match &plan.options.root {
        Root::Tree(tree) => root::enter_tree(tree, plan, holdings),
        Root::Host => root::enter_host(plan, holdings).map(|()| None),
    }
    .map_err(|error| error.to_string())?;
    for warning in holdings.planted.warnings.drain(..) {
        channel.send(&Message::Warning(warning)).map_err(|error| error.to_string())?;
    }
    if gone(channel) {
        return Ok(None);
    }

    let terminal = terminal.map(|terminal| hand_over(terminal, plan.options.terminal.as_ref(), channel)).transpose()?;
    let command = sys::fork_into(|| {
        let (code, reason) = plan.command.become_it(&holdings.guard, terminal.as_ref(), plan.options.stdio.as_ref());
        let _ = channel.send(&Message::NotStarted(reason));
        code
    })
    .map_err(|error| format!("cannot start the command: {error}"))?;
    leave_standard_streams(plan.null.as_fd()).map_err(|error| format!("cannot leave the standard streams: {error}"))?;
    watch(command, channel, &signals)
}

/// Own session, so that the terminal's signals come once, through `imgutil`; no descriptor but those that are needed.
fn keep_only_what_is_needed(plan: &Plan<'_>, channel: &Channel) -> io::Result<()> {
    nix::unistd::setsid()?;
    rustix::process::umask(rustix::fs::Mode::empty());
    sys::close_all_from(3, &plan.kept(channel), false)?;
    sys::close_all_from(3, &[], true)
}

fn gone(channel: &Channel) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::empty())];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// Gives the host end of the terminal to `imgutil`, after the terminal looks like the user's.
fn hand_over(terminal: Terminal, window: Option<&Window>, channel: &Channel) -> Result<OwnedFd, String> {
    if let Some(window) = window {
        // A terminal without size or settings still works: then the defaults stand.
        let _ = rustix::termios::tcsetwinsize(&terminal.slave, window.size);
        let _ = rustix::termios::tcsetattr(&terminal.slave, rustix::termios::OptionalActions::Now, &window.settings);
    }
    channel
        .send(&Message::Terminal(terminal.master))
        .map_err(|error| format!("cannot hand over the terminal: {error}"))?;
    // Kept open as long as PID 1 lives: a command that closes its terminal and opens it again must find it.
    Ok(terminal.slave)
}

/// Waits for the command; meanwhile reaps what was left to this process and passes signals on.
fn watch(command: Pid, channel: &Channel, signals: &SignalFd) -> Result<Option<WaitStatus>, String> {
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            // No event is asked for: the end of the other side is always told.
            PollFd::new(channel.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("cannot wait for the command: {error}")),
        }
        if fds[1].any().unwrap_or(true) {
            return Ok(None);
        }
        while let Ok(Some(info)) = signals.read_signal() {
            let Ok(signal) = i32::try_from(info.ssi_signo).map_err(|_| Errno::EINVAL).and_then(Signal::try_from) else {
                continue;
            };
            if signal == Signal::SIGCHLD {
                if let Some(status) = reap(command) {
                    return Ok(Some(status));
                }
            } else if kill(Pid::from_raw(-command.as_raw()), signal) == Err(Errno::ESRCH) {
                // It has not made its session yet. The signal waits until it has become the command.
                let _ = kill(command, signal);
            }
        }
    }
}

/// Collects every child that has ended; the command's status if it is among them.
fn reap(command: Pid) -> Option<WaitStatus> {
    let mut ended = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(_) => return ended,
            Ok(status) if status.pid() == Some(command) => ended = Some(status),
            Ok(_) => {}
        }
    }
}

/// `/dev/null` of the host, above the standard streams.
pub(super) fn open_null() -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/null")?;
    // A caller may run without standard streams; then the number would be one of theirs.
    Ok(rustix::io::fcntl_dupfd_cloexec(&file, 3)?)
}
