//! Threads of their own for what must not wait for the rest, or the rest for it.

use std::io;
use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime that may be dropped anywhere, also within another one: its tasks end then, and what is under way is not waited for.
pub(crate) struct Aside {
    /// Always there until it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Aside {
    /// Begins its threads.
    ///
    /// # Errors
    /// The system has no more threads or files.
    pub(crate) fn begin(builder: &mut Builder) -> io::Result<Self> {
        let runtime = builder.build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where its tasks are begun.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
