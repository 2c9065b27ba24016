//! Placeholder: `agent` owns the final one.

pub mod identity;
pub mod machine;
