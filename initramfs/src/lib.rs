//! The network root: a sealed image on HTTPS servers becomes one read-only file, and that file a node's root file system.
//!
//! * [`reader`]: chunk numbers in, verified plaintext out. Servers may fail, lie and come back; no unverified byte leaves it.
//! * [`mount`]: the reader as a file `image` in a FUSE mount. [`root`]: loop device, squashfs, zram and overlay on top.
//! * [`ram`]: the whole image in memory instead, [`progress`] how far that is. [`disk`]: sealed chunks that stay over restarts.
//! * [`daemon`] and [`survive`]: how the process that serves the root outlives `switch_root`, memory pressure and shutdown. [`apart`] and
//!   [`seccomp`]: what it can see and do meanwhile.
//! * [`pressure`]: memory that is given back while the machine is short of it, as [`meminfo`] tells.
//! * [`control`]: the socket by which other members and other trust are taken up while it serves; [`tls`] is that trust, [`clock`] the time
//!   by which it is judged.
//! * [`state`]: what it tells others, and [`prometheus`] in another form. [`kmsg`]: where it logs when there is nobody to read its standard error.

pub mod apart;
pub mod clock;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod kmsg;
mod meminfo;
pub mod mount;
pub mod pressure;
pub mod progress;
pub mod prometheus;
pub mod ram;
pub mod reader;
pub mod root;
pub mod seccomp;
pub mod state;
pub mod survive;
pub mod tls;
