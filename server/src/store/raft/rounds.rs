//! Reads that have to be up to date share the question who leads and how far: whoever comes while it is being asked waits for the next time, which is
//! for all that wait.

use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Mutex;

/// Times that it was asked.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    begun: AtomicU64,
    /// The last one that was answered.
    answered: Mutex<u64>,
}

impl Rounds {
    /// Returns once `ask` was answered for somebody who began to ask after this was called.
    pub(super) async fn share<E>(&self, ask: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        let before = self.begun.load(Ordering::SeqCst);
        let mut answered = self.answered.lock().await;
        if *answered > before {
            return Ok(());
        }
        let this = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        ask.await?;
        *answered = this;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;
    use tokio::sync::Semaphore;

    /// The first asks alone; all that came meanwhile share one more, and none of them is content with the first.
    #[tokio::test]
    async fn who_comes_while_it_is_asked_shares_the_next_time() {
        let (rounds, asked, gate) =
            (Arc::new(Rounds::default()), Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let share = || {
            let (rounds, asked, gate) = (rounds.clone(), asked.clone(), gate.clone());
            tokio::spawn(async move {
                let ask = async {
                    asked.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                    Ok::<(), ()>(())
                };
                rounds.share(ask).await
            })
        };
        let first = share();
        while asked.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let others: Vec<_> = (0..10).map(|_| share()).collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        gate.add_permits(1);
        assert_eq!(first.await.unwrap(), Ok(()));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(others.iter().all(|other| !other.is_finished()), "the first question was asked before they came");
        gate.add_permits(1);
        for other in others {
            assert_eq!(other.await.unwrap(), Ok(()));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn one_that_fails_or_is_dropped_answers_nobody() {
        let rounds = Rounds::default();
        assert_eq!(rounds.share(async { Err("no") }).await, Err("no"));
        let never =
            tokio::time::timeout(Duration::from_millis(10), rounds.share(std::future::pending::<Result<(), &str>>()));
        assert!(never.await.is_err());
        let asked = AtomicU32::new(0);
        let ask = async {
            asked.fetch_add(1, Ordering::SeqCst);
            Ok::<(), &str>(())
        };
        assert_eq!(rounds.share(ask).await, Ok(()));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }
}
