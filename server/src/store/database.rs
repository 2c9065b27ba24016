//! A database in a file, with a bound of the memory that it takes for what it has read: redb would take a gigabyte for each.
//!
//! It is made once, with its member. From then on it is there and whole, or the member does not start: one that has forgotten what it voted
//! for could vote twice in a term, and one that has forgotten entries would be counted among those that have them.

use super::StoreError;
use redb::Database;
use std::fs::{File, TryLockError};
use std::path::Path;

/// For the log. Its newest entries are in memory anyway, and it is written in bulk.
pub(crate) const LOG: usize = 4 << 20;
/// For the tables: what ten thousand nodes take, with room. Beyond it the kernel keeps what was read.
pub(crate) const TABLES: usize = 32 << 20;
/// For what waits for a majority. All of it is in memory anyway.
pub(crate) const LATE: usize = 1 << 20;

/// Makes an empty one.
///
/// # Errors
/// The directory is not writable, or its disk is full.
pub(crate) fn make(path: &Path) -> Result<(), StoreError> {
    let made = Database::builder().set_cache_size(LATE).create(path).and_then(Database::close);
    made.map_err(|error| StoreError::from(error).within(path))
}

/// Opens it, and compares all that is in it with its checksums. redb believes a file that it closed itself, and ends the process when that
/// was altered since. After a crash it looks at everything anyway, so that this takes no longer than a start after a crash.
///
/// # Errors
/// It cannot be opened, is not there, or is damaged.
pub(crate) fn open(path: &Path, memory: usize) -> Result<Database, StoreError> {
    Ok(Database::builder().set_cache_size(memory).set_check_integrity_on_open(true).open(path)?)
}

/// Whether a process has it open: redb locks the whole file.
pub(crate) fn is_open(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Waits until no process has it open: the thread of a log ends a moment after its store was closed.
#[cfg(test)]
pub(crate) async fn released(path: &Path) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while is_open(path) {
        assert!(std::time::Instant::now() < end, "'{}' is still open", path.display());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
