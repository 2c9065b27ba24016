//! The network root: a sealed image on HTTPS servers becomes one read-only file, and that file a node's root file system.
//!
//! * [`reader`]: chunk numbers in, verified plaintext out. Servers may fail, lie and come back; no unverified byte leaves it.
//! * [`mount`]: the reader as a file `image` in a FUSE mount. [`root`]: loop device, squashfs, zram and overlay on top.
//! * [`daemon`] and [`survive`]: how the process that serves the root outlives `switch_root`, memory pressure and shutdown.
//! * [`state`]: what it tells others. [`kmsg`]: where it logs when there is nobody to read its standard error.

pub mod daemon;
pub mod kmsg;
pub mod mount;
pub mod reader;
pub mod root;
pub mod state;
pub mod survive;
pub mod tls;
