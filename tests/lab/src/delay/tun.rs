//! Making a TUN device in another network namespace. The one module of this crate with `unsafe`: the kernel's interface is two ioctls.
#![expect(unsafe_code, reason = "ioctl(2) takes pointers and numbers that the compiler cannot check")]

use anyhow::Context as _;
use nix::libc;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54D0;
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// Checksums and segmentation of TCP over IPv4 are left to whoever gets the packet.
const OFFLOAD: libc::c_ulong = 0x01 | 0x02;

/// `struct ifreq` of `linux/if.h`, of which name and flags are used.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(set_interface, TUNSETIFF, Request);
nix::ioctl_write_int_bad!(set_offload, TUNSETOFFLOAD);

/// Makes the device `name` in the network namespace at `namespace`. It is gone when the file is closed, which does not wait for packets.
pub(super) fn open(namespace: &Path, name: &str) -> anyhow::Result<File> {
    // A thread of its own: the namespace is the thread's, and the device that of whoever opens it.
    std::thread::scope(|scope| {
        scope.spawn(|| make(namespace, name)).join().unwrap_or_else(|_| anyhow::bail!("making a TUN device panicked"))
    })
}

fn make(namespace: &Path, name: &str) -> anyhow::Result<File> {
    let place = File::open(namespace).with_context(|| format!("opening '{}'", namespace.display()))?;
    nix::sched::setns(place, nix::sched::CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun").context("opening /dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open, and `request` is a whole `struct ifreq` that outlives the call.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }.context("making a TUN device")?;
    let offload = libc::c_int::try_from(OFFLOAD).context("the offload flags")?;
    // SAFETY: the descriptor is open, and the argument is a number.
    unsafe { set_offload(file.as_raw_fd(), offload) }.context("leaving segmentation to the receiver")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_request_has_the_kernel_s_size() {
        assert_eq!(size_of::<super::Request>(), 40);
    }
}
