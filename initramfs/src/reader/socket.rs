//! The one option of a socket that no crate wraps.
#![expect(unsafe_code, reason = "setsockopt(2) takes a pointer and a length that the compiler cannot check")]

use nix::libc;
use std::io;
use std::os::fd::AsRawFd;

/// Has the kernel wake who waits for `socket` only with so many bytes in it, or with its end.
pub(super) fn wake_at(socket: &impl AsRawFd, bytes: usize) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel only reads the integer, whose length it is told.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const value).cast(), length)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    /// Whether something can be read within a moment.
    fn is_woken(socket: &TcpStream) -> bool {
        let mut wanted = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(socket), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut wanted, 200_u16).unwrap() == 1
    }

    #[test]
    fn less_than_that_does_not_wake_and_the_end_does() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        wake_at(&near, 1000).unwrap();
        far.write_all(&[1; 999]).unwrap();
        assert!(!is_woken(&near));
        far.write_all(&[1]).unwrap();
        assert!(is_woken(&near));
        near.read_exact(&mut [0; 1000]).unwrap();
        far.write_all(&[1]).unwrap();
        assert!(!is_woken(&near));
        drop(far);
        assert!(is_woken(&near));
    }
}
