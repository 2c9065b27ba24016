//! The messages between PID 1 of the image and `imgutil`, over a socket whose end also tells each side that the other is gone.

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::unistd::Pid;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Longest text that is carried; longer ones are cut.
const TEXT_LIMIT: usize = 4096;

/// What PID 1 reports, and one answer.
#[derive(Debug)]
pub(super) enum Message {
    /// A user namespace was made; its ids are to be mapped.
    NeedsIds,
    /// To the image's side: the ids are mapped.
    IdsAreMapped,
    /// PID 1 is this process, in the host's numbers.
    Started(Pid),
    /// The image's terminal: its host end.
    Terminal(OwnedFd),
    /// The image could not be entered.
    Failed(String),
    /// The command could not be started.
    NotStarted(String),
    /// The command could run, but the user should know this.
    Warning(String),
    /// The command ended with this status.
    Exited(u8),
    /// The command was ended by this signal.
    Signaled(u8),
}

/// One end of the socket.
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Both ends; messages keep their borders.
    pub(super) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(one), Self(other)))
    }

    /// Sends one message.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let code;
        let number;
        let (kind, body, fd): (u8, &[u8], Option<i32>) = match message {
            Message::NeedsIds => (b'U', &[], None),
            Message::IdsAreMapped => (b'M', &[], None),
            Message::Started(process) => {
                number = process.as_raw().to_ne_bytes();
                (b'P', &number, None)
            }
            Message::Terminal(fd) => (b'T', &[], Some(fd.as_raw_fd())),
            Message::Failed(text) => (b'F', text.as_bytes(), None),
            Message::NotStarted(text) => (b'N', text.as_bytes(), None),
            Message::Warning(text) => (b'W', text.as_bytes(), None),
            Message::Exited(value) => {
                code = [*value];
                (b'E', &code, None)
            }
            Message::Signaled(value) => {
                code = [*value];
                (b'S', &code, None)
            }
        };
        let kind = [kind];
        let body = &body[..body.len().min(TEXT_LIMIT)];
        let fds: Vec<i32> = fd.into_iter().collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &control[..0] } else { &control[..] };
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&kind), IoSlice::new(body)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// Waits for the next message; `None` when the other end is gone.
    pub(super) fn receive(&self) -> io::Result<Option<Message>> {
        let mut buffer = [0; TEXT_LIMIT + 1];
        let mut space = nix::cmsg_space!(i32);
        let (length, fd) = {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let received = recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
            let mut fd = None;
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    fd = fds.into_iter().next();
                }
            }
            (received.bytes, fd)
        };
        if length == 0 {
            return Ok(None);
        }
        let body = &buffer[1..length];
        let text = || String::from_utf8_lossy(body).into_owned();
        let value = body.first().copied().unwrap_or(u8::MAX);
        let message = match (buffer[0], fd) {
            (b'T', Some(fd)) => Message::Terminal(own(fd)),
            (b'U', _) => Message::NeedsIds,
            (b'M', _) => Message::IdsAreMapped,
            (b'P', _) => {
                let number = body.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
                Message::Started(Pid::from_raw(i32::from_ne_bytes(number)))
            }
            (b'F', _) => Message::Failed(text()),
            (b'N', _) => Message::NotStarted(text()),
            (b'W', _) => Message::Warning(text()),
            (b'E', _) => Message::Exited(value),
            (b'S', _) => Message::Signaled(value),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "PID 1 of the image sent nonsense")),
        };
        Ok(Some(message))
    }
}

#[allow(unsafe_code)] // nix hands received descriptors over as plain integers
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_in_order_and_the_end_is_seen() {
        let (here, there) = Channel::pair().unwrap();
        there.send(&Message::Failed("a".repeat(2 * TEXT_LIMIT))).unwrap();
        there.send(&Message::Terminal(std::fs::File::open("/dev/null").unwrap().into())).unwrap();
        there.send(&Message::Started(Pid::from_raw(70_000))).unwrap();
        there.send(&Message::Exited(7)).unwrap();
        drop(there);
        assert!(matches!(here.receive().unwrap(), Some(Message::Failed(text)) if text.len() == TEXT_LIMIT));
        assert!(matches!(here.receive().unwrap(), Some(Message::Terminal(_))));
        assert!(matches!(here.receive().unwrap(), Some(Message::Started(process)) if process.as_raw() == 70_000));
        assert!(matches!(here.receive().unwrap(), Some(Message::Exited(7))));
        assert!(here.receive().unwrap().is_none());
    }
}
