//! The library behind `moord`, a member of a collective: the store, the authorities, content, and the two APIs over them.
//!
//! Requests come in by [`listener`], pass [`http`] and end in [`node`] (nodes), [`admin`] (administrators) [`collective`] (members) or [`public`] (anybody).
//! Each handler reads a snapshot of the [`store`] and proposes commands to it; nothing else changes state.

mod addresses;
pub mod admin;
pub mod args;
mod aside;
pub mod authority;
pub mod backup;
pub mod certificate;
pub mod collective;
pub mod config;
pub mod content;
pub mod cpio;
pub mod files;
mod heap;
mod house;
pub mod http;
mod idle;
pub mod late;
pub mod listener;
pub mod model;
pub mod node;
pub mod observe;
pub mod profile;
pub mod public;
pub mod run;
pub mod secrets;
pub mod shares;
pub mod state;
pub mod store;
pub mod traces;
pub mod trust;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use state::Member;
use std::sync::Arc;

/// All that a member answers.
pub fn router(member: &Arc<Member>) -> Router {
    Router::new()
        .merge(
            public::router()
                .merge(node::router(member))
                .route_layer(from_fn_with_state(member.clone(), collective::refuse_removed)),
        )
        .merge(admin::router(member))
        .merge(collective::router(member))
        .route("/healthz", get(observe::health))
        .layer(from_fn(http::problems))
        .layer(from_fn_with_state(member.clone(), observe::count))
        .layer(from_fn(http::noted))
        .with_state(member.clone())
}
