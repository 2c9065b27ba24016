//! The user's terminal while a command runs in an image: raw mode, and the bytes that go to and fro.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Size and settings of the user's terminal.
#[derive(Clone)]
pub struct Window {
    pub(super) size: Winsize,
    pub(super) settings: Termios,
}

/// Why the terminal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PtyError {
    /// A terminal call failed.
    #[error("cannot {0} the terminal: {1}")]
    Call(&'static str, io::Error),
}

impl Window {
    /// Looks at the terminal on standard input. `None` unless both standard input and output are terminals: with either
    /// redirected the command belongs to a script.
    pub fn of_this_process() -> Result<Option<Self>, PtyError> {
        let (input, output) = (std::io::stdin(), std::io::stdout());
        if !rustix::termios::isatty(&input) || !rustix::termios::isatty(&output) {
            return Ok(None);
        }
        let size = tcgetwinsize(&input).map_err(|error| PtyError::Call("read the size of", error.into()))?;
        let settings = tcgetattr(&input).map_err(|error| PtyError::Call("read the settings of", error.into()))?;
        Ok(Some(Self { size, settings }))
    }
}

/// Raw mode on standard input; ends when this is dropped, also by an error.
pub(super) struct Raw(Termios);

impl Raw {
    pub(super) fn enter(window: &Window) -> Result<Self, PtyError> {
        let mut raw = window.settings.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw)
            .map_err(|error| PtyError::Call("set raw mode on", error.into()))?;
        Ok(Self(window.settings.clone()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done if the terminal has gone away.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// The relay between the user's terminal and the image's.
pub(super) struct Relay {
    master: OwnedFd,
    /// Typed, but not yet taken by the image's terminal.
    pending: Vec<u8>,
    /// The user's terminal has hung up.
    input_ended: bool,
}

impl Relay {
    pub(super) fn new(master: OwnedFd) -> Result<Self, PtyError> {
        // A command that does not read must not stop its own output from being shown.
        rustix::io::ioctl_fionbio(&master, true).map_err(|error| PtyError::Call("prepare", error.into()))?;
        Ok(Self { master, pending: Vec::new(), input_ended: false })
    }

    pub(super) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Whether more input may be read.
    pub(super) fn wants_input(&self) -> bool {
        self.pending.is_empty() && !self.input_ended
    }

    /// Whether input waits for the image's terminal.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Reads what was typed. `false` when the user's terminal is gone.
    pub(super) fn take_input(&mut self) -> bool {
        let mut buffer = [0; 1024];
        match rustix::io::read(std::io::stdin(), &mut buffer) {
            Ok(count) if count > 0 => self.pending.extend_from_slice(&buffer[..count]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.input_ended = true,
        }
        !self.input_ended
    }

    /// Gives waiting input to the image's terminal.
    pub(super) fn flush_input(&mut self) {
        match rustix::io::write(&self.master, &self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.pending.clear(),
        }
    }

    /// Shows what the command has written, as much as there is. `false` at its end.
    pub(super) fn show_output(&mut self) -> Result<bool, PtyError> {
        let mut buffer = [0; 16384];
        loop {
            match rustix::io::read(&self.master, &mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => write_all(&buffer[..count])?,
                Err(rustix::io::Errno::AGAIN) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                // EIO: nobody holds the other end any more.
                Err(_) => return Ok(false),
            }
        }
    }

    /// Takes the size of the user's terminal over; the kernel tells the command.
    pub(super) fn resize(&self) {
        if let Ok(size) = tcgetwinsize(std::io::stdin()) {
            // A size that does not arrive spoils the picture, not the work.
            let _ = tcsetwinsize(&self.master, size);
        }
    }
}

/// Writes past the standard library's line buffer: a prompt has no newline.
fn write_all(mut bytes: &[u8]) -> Result<(), PtyError> {
    while !bytes.is_empty() {
        match nix::unistd::write(std::io::stdout(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let stdout = std::io::stdout();
                let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
                // Woken early, the loop tries again.
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            Err(error) => return Err(PtyError::Call("write to", error.into())),
        }
    }
    Ok(())
}
