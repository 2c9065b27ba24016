//! The node's agent: the same program in the initramfs (`boot`) and in the running system (`onboot`).
//!
//! * [`boot`]: the state machine from the kernel's start to `switch_root`. [`onboot`]: the run stage, for as long as the node is up.
//! * [`network`]: links, addresses and routes before the system's own network service runs. [`members`]: a connection that fails over.
//! * [`render`]: the deploy document as the files of an operating system. [`tree`]: how they get into a root nobody vouches for.
//! * [`ssh`]: host keys made here and never sent. [`scripts`]: the admin's phases. [`child`]: other programs.
//! * [`handover`]: what the boot stage leaves to the run stage in `/run/mooring`.
//! * `identity` and `machine`: who the node is and how it proves it.

pub mod boot;
pub mod child;
pub mod clock;
pub mod console;
pub mod handover;
pub mod identity;
pub mod machine;
pub mod members;
pub mod network;
pub mod onboot;
pub mod process;
pub mod render;
pub mod scripts;
pub mod ssh;
pub mod tree;
