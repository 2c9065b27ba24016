//! A simulated network: time, delays, bandwidth and faults are inputs, and a run is repeated from its seed.

pub(crate) mod network;
pub(crate) mod schedule;
pub(crate) mod world;
