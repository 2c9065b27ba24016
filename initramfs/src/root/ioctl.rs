//! The two ioctls of loop devices that no crate wraps. This is the only module of the crate with `unsafe`.
#![expect(unsafe_code, reason = "ioctl(2) takes pointers and numbers that the compiler cannot check")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};

const LOOP_CTL_GET_FREE: nix::libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: nix::libc::c_ulong = 0x4C0A;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(loop_ctl_get_free, LOOP_CTL_GET_FREE);
nix::ioctl_write_ptr_bad!(loop_configure, LOOP_CONFIGURE, LoopConfig);

/// The number of a loop device that is free now; somebody else may take it first.
pub(super) fn free_loop_device(control: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open, and the call takes no argument.
    unsafe { loop_ctl_get_free(control.as_raw_fd()) }.map_err(io::Error::from)
}

/// Ties `device` to `image`: read-only, with direct I/O, freed with its last user. It is read by blocks of `block_size`; 0: of the kernel's choice.
pub(super) fn configure(device: &File, image: &File, block_size: u32) -> io::Result<()> {
    let config = LoopConfig {
        fd: descriptor(image.as_raw_fd())?,
        block_size,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: READ_ONLY | AUTOCLEAR | DIRECT_IO,
            file_name: name(),
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: both descriptors are open, and `config` is a whole `struct loop_config` that the kernel only reads.
    unsafe { loop_configure(device.as_raw_fd(), &raw const config) }.map(drop).map_err(io::Error::from)
}

fn descriptor(fd: RawFd) -> io::Result<u32> {
    u32::try_from(fd).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What `losetup` shows.
fn name() -> [u8; 64] {
    let mut name = [0; 64];
    let text = b"moor-tether";
    name[..text.len()].copy_from_slice(text);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernel_s_sizes() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
