//! The real `moord`, as nodes and administrators meet it.
#![allow(clippy::unwrap_used)] // tests and their helpers

mod admin_api;
mod alone;
mod authority;
mod backup;
mod backup_keys;
mod bad_input;
mod busy;
mod cli;
mod collective;
mod content;
mod crowd;
mod damage;
mod disk;
mod durability;
mod forged;
mod invitations;
mod loss;
mod machine;
mod node_api;
mod observe;
mod rotation;
mod shares;
mod ssh_authority;
mod strangers;
mod support;
mod tls;
mod tokens;
mod upgrade;
mod user;
