//! The host's side of a running command: starts PID 1, relays terminal and signals, and collects how it ended.

use super::channel::{Channel, Message};
use super::command::Prepared;
use super::foreign::{Emulator, Machine, Runner};
use super::init::{self, Plan};
use super::plant::Sources;
use super::pty::{Raw, Relay};
use super::signals::{ASK_FOR_THE_END, SignalWatch};
use super::user::{self, Mapping, UserError};
use super::{ExecError, Finished, Options, Outcome, Root, sys, trial};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::Seek as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// So long a command waits for another that is about to leave the tree.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// Starts the command and stays until it and all it left running have ended.
///
/// Must be called on a thread of its own: a new process-id namespace is entered by this thread's children, for ever.
pub(super) fn run(options: &Options, signals: Option<&SignalWatch>) -> Result<Finished, ExecError> {
    let to_terminal = options.terminal.is_some() && rustix::termios::isatty(std::io::stderr());
    let command = Prepared::new(options, to_terminal)?;
    let mut warnings = Vec::new();
    let lock = match (&options.root, &options.trial) {
        (Root::Tree(_), Some(_)) | (Root::Host, _) => None,
        (Root::Tree(tree), None) => {
            if trial::finish_interrupted(tree)? {
                warnings.push("a trial was ended while it kept its changes: that is finished now".to_owned());
            }
            Some(lock(tree)?)
        }
    };
    let mut shown = Vec::new();
    if let Root::Tree(tree) = &options.root {
        for (number, repository) in options.repositories.iter().enumerate() {
            shown.push(repository.shown(number, tree, options.trial.as_ref())?);
        }
    }
    let sources = match &options.root {
        Root::Tree(tree) => Sources::read(tree, options.network, shown.iter().flat_map(|shown| &shown.over)),
        Root::Host => Sources::nothing(),
    };
    let emulator = emulator(options)?;
    let mapping = mapping(&options.root, emulator.is_some())?;
    let null = init::open_null().map_err(|error| ExecError::Start("open /dev/null", error))?;
    let (here, there) = Channel::pair().map_err(|error| ExecError::Start("make a socket", error))?;
    let plan = Plan {
        options,
        command: &command,
        sources: &sources,
        lock: lock.as_ref().or(options.trial.as_ref().map(|trial| trial.lock())),
        null: &null,
        emulator: emulator.as_ref(),
        shown: &shown,
        in_user_namespace: mapping.is_some(),
    };

    if mapping.is_none() {
        nix::sched::unshare(CloneFlags::CLONE_NEWPID)
            .map_err(|error| ExecError::Start("make a process-id namespace", error.into()))?;
    }
    let child = {
        // The handlers of this program must not run in the child, which has its memory but is another process.
        let _blocked = Blocked::all()?;
        let start = if mapping.is_none() { init::run } else { init::run_in_user_namespace };
        sys::fork_into(|| start(&plan, &there)).map_err(|error| ExecError::Start("fork", error))?
    };
    drop(there);
    let followed = match &mapping {
        None => follow(options, signals, &here, child),
        Some(mapping) => start_mapped(mapping, &here, child).and_then(|started| match started {
            Ok(init) => follow(options, signals, &here, init),
            Err(failed) => Ok(failed),
        }),
    };
    // If following failed, closing the socket ends PID 1, and with it the image's processes.
    drop(here);
    let status = waitpid(child, None).map_err(|error| ExecError::Start("wait for PID 1", error.into()))?;
    let mut heard = followed?;
    heard.warnings.splice(0..0, warnings);
    if let Some(mapping) = mapping {
        heard.warnings.extend(mapping.warning());
        if let (Some(reason), Some(advice)) = (&mut heard.failed, user::advice()) {
            reason.push_str("; ");
            reason.push_str(&advice);
        }
    }
    heard.finish(status)
}

/// What runs the image's programs, if that has to be registered for this command.
fn emulator(options: &Options) -> Result<Option<Emulator>, ExecError> {
    let machine = match &options.root {
        Root::Tree(tree) => {
            let root = rustix::fs::open(tree, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| ExecError::Tree { path: tree.clone(), source: error.into() })?;
            Machine::of_tree(root.as_fd())
        }
        Root::Host => options.machine,
    };
    // A tree without a program that is known: whatever it holds is tried.
    Ok(match machine.map(Machine::runner).transpose()? {
        Some(Runner::Own(emulator)) => Some(emulator),
        Some(Runner::Host) | None => None,
    })
}

/// The ids of the user namespace, if there is to be one: for an ordinary user his own, for root (who needs one only for what
/// it carries) all.
fn mapping(root: &Root, wanted: bool) -> Result<Option<Mapping>, ExecError> {
    if rustix::process::geteuid().is_root() {
        return Ok(wanted.then(Mapping::identity));
    }
    let mapping = Mapping::of_this_user()?;
    if let Root::Tree(tree) = root {
        let owner = rustix::fs::stat(tree)
            .map_err(|error| ExecError::Tree { path: tree.clone(), source: error.into() })?
            .st_uid;
        if !mapping.knows(owner) {
            return Err(UserError::Owner { tree: tree.clone(), owner, user: user::own_name() }.into());
        }
    }
    Ok(Some(mapping))
}

/// Does `job` as somebody who may do in a tree what the image's root may: root himself, or an ordinary user as root of his user
/// namespace, in a process of its own. `job` must keep to what [`sys::fork_into`] asks.
pub(super) fn in_the_images_name<T: Serialize + DeserializeOwned>(
    job: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    if rustix::process::geteuid().is_root() {
        return job();
    }
    let mapping = Mapping::of_this_user().map_err(|error| error.to_string())?;
    let (here, there) = Channel::pair().map_err(|error| format!("cannot make a socket: {error}"))?;
    let mut answer = tempfile::tempfile().map_err(|error| format!("cannot make a file: {error}"))?;
    let child = {
        let _blocked = Blocked::all().map_err(|error| error.to_string())?;
        sys::fork_into(|| {
            let done = init::enter_user_namespace(&there).and_then(|()| job());
            u8::from(serde_json::to_writer(&answer, &done).is_err())
        })
        .map_err(|error| format!("cannot fork: {error}"))?
    };
    drop(there);
    let mapped = match here.receive() {
        Ok(Some(Message::NeedsIds)) => mapping
            .apply(child)
            .map_err(|error| error.to_string())
            .and_then(|()| here.send(&Message::IdsAreMapped).map_err(|error| error.to_string())),
        // It has ended already, and its answer says why.
        _ => Ok(()),
    };
    drop(here);
    let status = waitpid(child, None).map_err(|error| format!("cannot wait for a process: {error}"))?;
    mapped?;
    answer.rewind().map_err(|error| format!("cannot read an answer: {error}"))?;
    serde_json::from_reader::<_, Result<T, String>>(&answer)
        .map_err(|error| format!("a process of this program failed ({status:?}): {error}"))?
}

/// Maps the ids of the user namespace that `child` makes. PID 1, or what was heard when it could not be started.
fn start_mapped(mapping: &Mapping, channel: &Channel, child: Pid) -> Result<Result<Pid, Heard>, ExecError> {
    let hear = || channel.receive().map_err(|error| ExecError::Start("hear from PID 1", error));
    let mut heard = Heard::default();
    loop {
        match hear()? {
            Some(Message::NeedsIds) => {
                mapping.apply(child)?;
                channel.send(&Message::IdsAreMapped).map_err(|error| ExecError::Start("start PID 1", error))?;
            }
            Some(Message::Started(init)) => return Ok(Ok(init)),
            Some(Message::Failed(reason)) => heard.failed = Some(reason),
            Some(_) => {}
            None => return Ok(Err(heard)),
        }
    }
}

/// All signals blocked on this thread; as before when dropped.
struct Blocked(SigSet);

impl Blocked {
    fn all() -> Result<Self, ExecError> {
        let mut old = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut old))
            .map_err(|error| ExecError::Start("block signals", error.into()))?;
        Ok(Self(old))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // Cannot fail: the mask came from the kernel.
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&self.0), None);
    }
}

/// A shared lock on the tree's root: several commands may run in a tree, but none while it is built.
fn lock(tree: &Path) -> Result<OwnedFd, ExecError> {
    let fd = rustix::fs::open(tree, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| ExecError::Tree { path: tree.to_path_buf(), source: error.into() })?;
    // A command that ends holds the tree alone while it takes its places away: that passes.
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(fd),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ExecError::Busy(tree.to_path_buf())),
            Err(error) => return Err(ExecError::Start("lock the tree", error.into())),
        }
    }
}

/// What PID 1 has said so far.
#[derive(Default)]
struct Heard {
    outcome: Option<Outcome>,
    failed: Option<String>,
    not_started: Option<String>,
    warnings: Vec<String>,
    passed_on: Vec<Signal>,
}

impl Heard {
    fn finish(self, status: nix::sys::wait::WaitStatus) -> Result<Finished, ExecError> {
        if let Some(reason) = self.failed {
            return Err(ExecError::SetUp(reason));
        }
        match (self.outcome, self.not_started) {
            (Some(Outcome::Exited(code)), Some(reason)) => Err(ExecError::NotStarted { code, reason }),
            (Some(outcome), _) => Ok(Finished { outcome, warnings: self.warnings, passed_on: self.passed_on }),
            (None, _) => Err(ExecError::Lost(format!("{status:?}"))),
        }
    }
}

/// How long to wait for what happens next.
fn timeout(end: Option<Instant>) -> PollTimeout {
    // One millisecond more, so that it is over afterwards.
    let left = |end: Instant| end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    end.map_or(PollTimeout::NONE, |end| left(end).try_into().unwrap_or(PollTimeout::MAX))
}

/// Relays until PID 1 has closed its end.
fn follow(options: &Options, signals: Option<&SignalWatch>, channel: &Channel, child: Pid) -> Result<Heard, ExecError> {
    let mut heard = Heard::default();
    let mut relay: Option<Relay> = None;
    let mut raw = None;
    let mut end: Option<Instant> = None;
    let stdin = std::io::stdin();
    loop {
        let mut fds = vec![PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        let watched = signals.map(|signals| {
            fds.push(PollFd::new(signals.as_fd(), PollFlags::POLLIN));
            fds.len() - 1
        });
        let mut keyboard = None;
        let mut screen = None;
        if let Some(relay) = &relay {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, relay.wants_to_write());
            fds.push(PollFd::new(relay.master(), events));
            screen = Some(fds.len() - 1);
            if relay.wants_input() {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
                keyboard = Some(fds.len() - 1);
            }
        }
        match poll(&mut fds, timeout(end)) {
            // The kernel kills all of its namespace with PID 1.
            Ok(0) if end.is_some_and(|end| Instant::now() >= end) => {
                let _ = kill(child, Signal::SIGKILL);
                let number = u8::try_from(Signal::SIGKILL as i32).unwrap_or(u8::MAX);
                (heard.outcome, end) = (Some(Outcome::Signaled(number)), None);
            }
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(ExecError::Start("wait for the command", error.into())),
        }
        let ready = |index: Option<usize>| index.is_some_and(|index| fds[index].any().unwrap_or(true));
        let (message, signal, screen, keyboard) = (ready(Some(0)), ready(watched), ready(screen), ready(keyboard));
        drop(fds);

        if let (true, Some(signals)) = (signal, signals) {
            for signal in signals.take() {
                pass_on(signal, child, relay.as_ref());
                heard.passed_on.push(signal);
                if let (Some(patience), true) = (options.patience, ASK_FOR_THE_END.contains(&signal)) {
                    end = end.or(Some(Instant::now() + patience));
                }
            }
        }
        if let Some(relay) = &mut relay {
            if keyboard && !relay.take_input() {
                // The user's terminal has gone: so does the command's.
                let _ = kill(child, Signal::SIGHUP);
            }
            if relay.wants_to_write() {
                relay.flush_input();
            }
            if screen {
                relay.show_output()?;
            }
        }
        if !message {
            continue;
        }
        match channel.receive().map_err(|error| ExecError::Start("hear from PID 1", error))? {
            Some(Message::Terminal(master)) => {
                relay = Some(Relay::new(master)?);
                raw = options.terminal.as_ref().map(Raw::enter).transpose()?;
            }
            Some(Message::Failed(reason)) => heard.failed = Some(reason),
            Some(Message::NotStarted(reason)) => heard.not_started = Some(reason),
            Some(Message::Warning(warning)) => heard.warnings.push(warning),
            Some(Message::Exited(code)) => heard.outcome = Some(Outcome::Exited(code)),
            Some(Message::Signaled(number)) => heard.outcome = Some(Outcome::Signaled(number)),
            // Said before PID 1 has begun.
            Some(Message::NeedsIds | Message::IdsAreMapped | Message::Started(_)) => {}
            None => break,
        }
    }
    if let Some(relay) = &mut relay {
        drain(relay)?;
    }
    drop(raw);
    Ok(heard)
}

/// Shows what was written last. All holders of the terminal are dead, so its end comes at once.
fn drain(relay: &mut Relay) -> Result<(), ExecError> {
    while relay.show_output()? {
        let mut fds = [PollFd::new(relay.master(), PollFlags::POLLIN)];
        if matches!(poll(&mut fds, PollTimeout::from(1000_u16)), Ok(0)) {
            break;
        }
    }
    Ok(())
}

/// Gives a signal to PID 1, which gives it to the command's process group. A new window size goes to the terminal instead:
/// the kernel tells the foreground group.
fn pass_on(signal: Signal, child: Pid, relay: Option<&Relay>) {
    // ESRCH: it has just ended; its last messages are on their way.
    match (signal, relay) {
        (Signal::SIGWINCH, Some(relay)) => relay.resize(),
        (Signal::SIGWINCH, None) => {}
        (Signal::SIGTERM, Some(_)) => {
            // An interactive shell ignores SIGTERM, but not the loss of its terminal.
            let _ = kill(child, Signal::SIGTERM);
            let _ = kill(child, Signal::SIGHUP);
        }
        (signal, _) => {
            let _ = kill(child, signal);
        }
    }
}
