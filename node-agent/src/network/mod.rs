//! The network of the boot stage: every physical link up, an address for each, and the link that reaches a member kept.
//!
//! [`links`] reads what the kernel knows, [`configure`] changes it by netlink, [`addresses`] finds addresses (DHCP, router
//! advertisement, kernel argument), one task per link, because links differ: training and spanning tree take half a minute
//! and more, a second port may have no cable at all (../../shared/TRAPS.md, "Node bootstrap").

pub mod addresses;
pub mod configure;
pub mod links;

pub use addresses::{Candidate, Origin, Search, StaticAddress};
pub use configure::{Netlink, NetworkError};
pub use links::Link;
