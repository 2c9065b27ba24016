//! The collective: who is a member, how one joins, what members ask each other, and what each does to keep up.

pub mod alive;
mod answer;
pub(crate) mod authorities;
mod behind;
pub mod blobs;
pub mod busy;
mod gate;
pub(crate) mod holders;
pub mod identity;
pub mod invite;
pub mod join;
mod pace;
mod pieces;
pub mod recover;
pub(crate) mod rotation;
mod routes;
pub(crate) mod ssh_authorities;
pub mod upkeep;
pub mod voucher;

pub(crate) use gate::{REMOVED, refuse_removed};
pub(crate) use routes::{invite_place, router};
