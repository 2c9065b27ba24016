//! The collective: who is a member, how one joins, what members ask each other, and what each does to keep up.

pub mod blobs;
pub(crate) mod holders;
pub mod identity;
pub mod invite;
pub mod join;
mod pace;
mod pieces;
pub mod recover;
mod routes;
pub mod upkeep;

pub(crate) use routes::{invite_place, router};
