//! The TPM structures as a member uses them. That a real TPM agrees is shown by `node-agent/tests/identity`, which has both sides.
#![allow(clippy::unwrap_used)] // tests and their helpers

mod forge;
mod keys;
mod parsers;
mod quotes;
mod vectors;
