//! `make bench`: the tables of docs/benchmarks.md. Every figure that is compared comes from one run, ours and the peer's one
//! after the other in turn, so that what else the machine does reaches both; a ratio is the median over such pairs.
//!
//! A table is a function from [`Lab`] to [`Table`]. A row whose peer could not run says so and is not ok; only a table that
//! cannot be set up at all is an error.

mod boots;
mod build;
mod etcd;
mod faults;
mod join;
mod load;
mod measure;
mod mounts;
mod pack;
mod pairs;
mod reads;
mod root;
mod store;
mod storm;
mod sweep;
mod table;
mod web;

pub use boots::{RECORD, REPLAY, record, replay};
pub use measure::{Usage, WRAPPER, measure, run_wrapped};
pub use pairs::{PAIRS, Paired, pairs};
pub use reads::{ALL, READS, read, read_all};
pub use storm::{NODES, nodes};
pub use sweep::Place;
pub use table::{Bar, Row, Table};

use crate::Bins;
use std::path::{Path, PathBuf};

/// What a table may use.
pub struct Lab<'a> {
    /// The programs, built with the release profile.
    pub bins: Bins,
    /// A folder for this run; removed when the table is done.
    pub dir: &'a Path,
    /// A folder that is kept between runs, for inputs that take long to make.
    pub cache: PathBuf,
}

impl Lab<'_> {
    /// Tells the user what is being done; to the standard error, so that the table stays clean.
    pub fn say(&self, what: &str) {
        eprintln!("bench: {what}");
    }
}

/// Makes a table.
pub type Maker = fn(&Lab<'_>) -> anyhow::Result<Table>;

/// All tables by name, in the order in which they run.
pub const TABLES: [(&str, Maker); 10] = [
    ("pack", pack::table),
    ("pack-15", pack::releases),
    ("memory", pack::memory),
    ("build", build::table),
    ("root", root::table),
    ("faults", faults::table),
    ("prefetch", boots::table),
    ("storm", storm::table),
    ("store", store::table),
    ("join", join::table),
];
