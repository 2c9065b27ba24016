//! Threads for what can wait. A member that fills itself decrypts, hashes and writes gigabytes, and machines with few processors have nodes to
//! answer meanwhile: the scheduler gives these threads what the others leave, and a tenth beside one that is busy, so that they get on in any case.
//! Their requests to the disk are of a lower priority as well, which follows from that (`ioprio_set(2)`).

use crate::aside::Aside;
use rustix::process::{getpriority_process, setpriority_process};
use std::io;
use tokio::runtime::Builder;
use tokio::task::JoinSet;

/// How nice they are (setpriority(2)): a thread of another one that wakes up runs at once instead of them.
const NICE: i32 = 10;

/// One thread for connections, and up to two that read, hash and write files.
pub(super) struct Behind(Aside);

/// Makes the calling thread, and no other, as nice as these.
fn step_back() {
    let stepped = match getpriority_process(None) {
        Ok(nice) if nice >= NICE => Ok(()),
        Ok(_) => setpriority_process(None, NICE),
        Err(error) => Err(error),
    };
    if let Err(error) = stepped {
        tracing::debug!("a thread for content is as urgent as others: {error}");
    }
}

impl Behind {
    /// Begins them.
    ///
    /// # Errors
    /// The system has no more threads or files.
    pub(super) fn new() -> io::Result<Self> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).max_blocking_threads(2).thread_name("content").enable_all();
        Ok(Self(Aside::begin(builder.on_thread_start(step_back))?))
    }

    /// Does there what may wait for a disk.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.0.handle().spawn_blocking(work).await.map_err(io::Error::other)?
    }

    /// Does there what waits for the network.
    pub(super) async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
        self.0.handle().spawn(work).await.map_err(io::Error::other)
    }

    /// As [`Self::run`], as one of several.
    pub(super) fn run_among<T: Send + 'static>(
        &self,
        several: &mut JoinSet<T>,
        work: impl Future<Output = T> + Send + 'static,
    ) {
        several.spawn_on(work, self.0.handle());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_done_there_comes_after_the_rest_and_the_rest_stays_as_it_is() {
        let nice = || getpriority_process(None).unwrap();
        let before = nice();
        let behind = Behind::new().unwrap();
        let expected = before.max(NICE);
        assert_eq!(behind.run(async move { nice() }).await.unwrap(), expected);
        assert_eq!(behind.blocking(move || Ok(nice())).await.unwrap(), expected);
        // A thread that one of theirs has begun is not nicer still.
        let nested = async move { tokio::task::spawn_blocking(nice).await.unwrap() };
        assert_eq!(behind.run(nested).await.unwrap(), expected);
        assert_eq!(nice(), before);
    }
}
