//! The user model (REFERENCE.md): attributes and noderange.

pub mod attributes;
pub mod noderange;
