//! A database in a file, with a bound of the memory that it takes for what it has read: redb would take a gigabyte for each.

use crate::store::StoreError;
use redb::Database;
use std::path::Path;

/// For the log. Its newest entries are in memory anyway.
pub(super) const LOG: usize = 8 << 20;
/// For the tables.
pub(super) const TABLES: usize = 96 << 20;

/// Opens or makes it.
///
/// # Errors
/// It cannot be opened, or is damaged.
pub(super) fn open(path: &Path, memory: usize) -> Result<Database, StoreError> {
    Ok(Database::builder().set_cache_size(memory).create(path)?)
}
