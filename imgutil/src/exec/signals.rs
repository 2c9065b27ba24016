//! Watching this process' own signals, so that they can be passed on or end a build in an orderly way.

use super::sys::Handlers;
use nix::sys::signal::Signal;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The signals a user or a supervisor sends to a program; each is passed on to the command in the image.
pub const PASSED_ON: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Those of them by which somebody asks a program to end.
pub const ASK_FOR_THE_END: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Why signals cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch signals: {0}")]
pub struct SignalError(#[from] io::Error);

/// The signals this process received while this value lives. At most one exists in a process.
pub struct SignalWatch {
    pipe: OwnedFd,
    _handlers: Handlers,
}

impl SignalWatch {
    /// Begins to watch `signals`; those that were ignored when the program started stay ignored.
    pub fn start(signals: &[Signal]) -> Result<Self, SignalError> {
        use rustix::pipe::{PipeFlags, pipe_with};
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(Self { pipe: read, _handlers: Handlers::install(signals, write)? })
    }

    /// The signals that came since the last call, in order.
    #[must_use]
    pub fn take(&self) -> Vec<Signal> {
        let mut buffer = [0; 64];
        let Ok(count) = rustix::io::read(&self.pipe, &mut buffer) else { return Vec::new() };
        buffer[..count].iter().filter_map(|number| Signal::try_from(i32::from(*number)).ok()).collect()
    }
}

impl AsFd for SignalWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
