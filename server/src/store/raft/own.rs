//! Raft has a thread of its own: its tasks wait for each other many times in each change, which costs nothing on one thread and a system call or two
//! between two. A storm of nodes, which the other threads answer, does not hold up what is agreed.

use super::StoreError;
use crate::aside::Aside;
use tokio::runtime::Builder;

/// Begins the thread.
///
/// # Errors
/// The system has no more threads or files.
pub(super) fn thread() -> Result<Aside, StoreError> {
    let mut builder = Builder::new_multi_thread();
    // What waits for the disk has others, as many as it takes: names of members that nobody resolves must not be in its way.
    builder.worker_threads(1).thread_name("raft").enable_all();
    Aside::begin(&mut builder).map_err(|error| StoreError::Thread(error.to_string()))
}
