//! The world there is: a tokio runtime, the machine's clock, and the kernel's randomness.

use super::world::{Boxed, World};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

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
        Box::pin(tokio::time::sleep(time))
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
