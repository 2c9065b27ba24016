//! What the tests of `imgutil pack`, `unpack`, `inspect` and `verify` share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)] // each test binary uses a part; a test may panic

pub mod cli;
pub mod mount;
pub mod node;
pub mod odd_tree;
pub mod snapshot;
pub mod tied;
