//! The real `moord`, as nodes and administrators meet it.

mod admin_api;
mod durability;
mod node_api;
mod support;
mod tls;
