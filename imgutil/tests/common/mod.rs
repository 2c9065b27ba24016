//! What the tests of imgutil share.
#![allow(dead_code, missing_docs, clippy::unwrap_used)] // each test binary uses a part; a test may panic

pub mod mount;
pub mod odd_tree;
pub mod snapshot;
