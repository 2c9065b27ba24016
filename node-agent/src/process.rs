//! What the agent asks of the kernel for its own process.

use nix::sys::resource::{Resource, setrlimit};

/// No core dumps, no attaching debugger: keys and tokens are in this process's memory. A kernel that refuses costs a protection, not
/// the boot. The umask stays as it is: children make directories of the new root.
pub fn protect() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Milliseconds since the kernel started, suspended time included.
#[must_use]
pub fn uptime_ms() -> u64 {
    let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else { return 0 };
    let milliseconds = std::time::Duration::from(now).as_millis();
    u64::try_from(milliseconds).unwrap_or(u64::MAX)
}

/// Magic numbers of `statfs`(2) for the file systems that an initramfs lives in: ramfs and tmpfs.
const INITRAMFS_MAGIC: [i64; 2] = [0x8584_58f6, 0x0102_1994];

/// Refuses to go on outside of an initramfs: a boot takes over the network and writes into `/`.
///
/// # Errors
/// `/` is no ramfs or tmpfs.
pub fn check_initramfs() -> anyhow::Result<()> {
    let stat = nix::sys::statfs::statfs("/")?;
    anyhow::ensure!(
        INITRAMFS_MAGIC.contains(&stat.filesystem_type().0),
        "'moor-agent boot' runs in an initramfs only; this is a running system, where 'moor-agent onboot' does its work"
    );
    Ok(())
}

/// Reboots at once. Returns only if the kernel refuses.
pub fn reboot() {
    nix::unistd::sync();
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
}
