//! The test lab: real members, real TPMs (swtpm), real VMs (QEMU), in a network namespace of their own.
//!
//! Everything a lab starts dies with it: each process is tied to the thread that started it by a parent-death signal, so that
//! nothing is left when a test panics or is killed. Root is assumed; a missing tool is an error, never a skip.

pub mod bench;
pub mod bins;
pub mod collective;
pub mod container;
pub mod crowd;
pub mod delay;
pub mod figures;
pub mod member;
pub mod process;
pub mod scenario;
pub mod tree;

pub use bins::Bins;
pub use collective::Collective;
pub use member::Member;
pub use moor_vm::{Namespace, Swtpm, Vm, VmOptions, vm};
pub use scenario::Scenario;
