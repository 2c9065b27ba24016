//! Throw-away machines: network namespaces, members, software TPMs and virtual machines, each gone when its value is dropped.
//!
//! The test lab and `imgutil test` are built of these. Each process is tied to the thread that started it by a parent-death signal, so
//! that nothing is left when that thread panics or is killed. Root is assumed.

mod error;
pub mod member;
mod namespace;
pub mod process;
mod swtpm;
pub mod vm;

pub use error::VmError;
pub use member::{Member, MemberOptions};
pub use namespace::Namespace;
pub use swtpm::Swtpm;
pub use vm::{Vm, VmOptions};
