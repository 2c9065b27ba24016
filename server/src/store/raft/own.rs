//! Raft has a thread of its own: its tasks wait for each other many times in each change, which costs nothing on one thread and a system call or two
//! between two. A storm of nodes, which the other threads answer, does not hold up what is agreed.

use super::StoreError;
use tokio::runtime::{Builder, Handle, Runtime};

/// The thread. Its tasks end when it is dropped.
pub(super) struct OwnThread {
    /// Always there until it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
}

impl OwnThread {
    /// Begins it.
    ///
    /// # Errors
    /// The system has no more threads or files.
    pub(super) fn new() -> Result<Self, StoreError> {
        let mut builder = Builder::new_multi_thread();
        // What waits for the disk has others, as many as it takes: names of members that nobody resolves must not be in its way.
        builder.worker_threads(1).thread_name("raft").enable_all();
        let runtime = builder.build().map_err(|error| StoreError::Thread(error.to_string()))?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where its tasks are begun.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        // What is under way is not waited for: who closes the store has done that.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
