//! The real `moord`, as nodes and administrators meet it.

mod node_api;
mod support;
