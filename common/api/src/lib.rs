//! The wire types of Mooring's two HTTP APIs, the trust rules that both sides share, and the client.
//!
//! * [`node`]: `/node/v1`, what a node and its members say to each other; [`deploy`] is the document a node is made from.
//! * [`admin`]: `/admin/v1`, what `moor` and other programs say to a member.
//! * [`proof`]: what a node signs to prove itself; computed on both sides, so it lives here.
//! * [`tether`]: what a node's agent says to the process that serves its root.
//! * [`trust`]: the site bundle and who may act as a member. [`client`]: HTTP over TLS or a unix socket.
//! * [`fail_stop`]: what the programs of both sides do when they panic.
//! * [`passphrase`]: how the programs of both sides are told one. [`backup_key`]: the other way to lock a backup.
//!
//! No server code lives here, and nothing that knows more of an operating system than a terminal and a socket.

pub mod admin;
pub mod backup_key;
mod bytes;
pub mod client;
pub mod deploy;
pub mod fail_stop;
pub mod ids;
pub mod node;
pub mod passphrase;
pub mod problem;
pub mod proof;
pub mod tether;
pub mod trust;
