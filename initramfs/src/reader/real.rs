//! The world there is: a tokio runtime, the machine's clock, and the kernel's randomness.

use super::world::{Boxed, World};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::coop::unconstrained;

/// Tasks run on one runtime.
pub struct Real {
    runtime: Handle,
    begun: Instant,
}

impl Real {
    /// Tasks run on `runtime`, which has to outlive every reader in this world.
    #[must_use]
    pub fn new(runtime: Handle) -> Self {
        Self { runtime, begun: Instant::now() }
    }
}

impl World for Real {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn sleep(&self, time: Duration) -> Boxed<'static, ()> {
        // Of what tokio gives a task at a time, what is polled before a time limit may take all, each time: a limit that has to have its share would
        // never end it.
        Box::pin(unconstrained(tokio::time::sleep(time)))
    }

    fn spawn(&self, task: Boxed<'static, ()>) {
        self.runtime.spawn(task);
    }

    fn random(&self) -> u64 {
        let mut bytes = [0; 8];
        // Without randomness nodes choose and rest alike: not even, but right.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
        u64::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::world::within;
    use super::*;
    use std::convert::Infallible;
    use tokio::task::coop::consume_budget;
    use tokio::time::timeout;

    /// Like a server that sends and sends, and nothing of what was asked for.
    async fn busy() -> Infallible {
        loop {
            consume_budget().await;
        }
    }

    #[tokio::test]
    async fn a_time_limit_also_ends_what_has_always_something_to_do() {
        let world = Real::new(Handle::current());
        let limited = within(&world, Duration::from_millis(50), busy());
        // tokio's own knows of it.
        let ended = timeout(Duration::from_secs(10), limited).await;
        assert!(matches!(ended, Ok(None)), "it has no end");
    }
}
