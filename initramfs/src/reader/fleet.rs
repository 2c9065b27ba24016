//! All members together: which one is asked next, who rests, and what is said when none answers.

use super::fault::Fault;
use super::member::{Member, Standing};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How often an outage is named on the console.
const SAY_EVERY: Duration = Duration::from_mins(1);

pub(super) struct Fleet {
    members: Vec<Arc<Member>>,
    /// Where ties between members are broken: each node has its own, so that nodes spread over members.
    first: usize,
    good: watch::Sender<usize>,
}

impl Fleet {
    pub(super) fn new(members: Vec<Arc<Member>>) -> Self {
        let mut bytes = [0; 1];
        // Without randomness every node begins with the first member: not even, but right.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
        let first = usize::from(bytes[0]) % members.len().max(1);
        let good = watch::Sender::new(members.len());
        Self { members, first, good }
    }

    pub(super) fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// Whether no member is good.
    pub(super) fn is_down(&self) -> bool {
        *self.good.borrow() == 0
    }

    /// Whether every member is excluded: then they are asked all the same, because each byte is verified anyway and the alternative
    /// is a root that stands still for ever.
    pub(super) fn all_excluded(&self) -> bool {
        self.members.iter().all(|member| member.standing() == Standing::Excluded)
    }

    /// Counts the good members again, after one of them changed.
    pub(super) fn recount(&self) {
        let good = self.members.iter().filter(|member| member.standing() == Standing::Good).count();
        self.good.send_if_modified(|count| std::mem::replace(count, good) != good);
    }

    /// The good member with the fewest requests running. Waits for one as long as it takes.
    pub(super) async fn pick(&self) -> Arc<Member> {
        let mut good = self.good.subscribe();
        loop {
            good.borrow_and_update();
            let rotated = self.members.iter().cycle().skip(self.first).take(self.members.len());
            let best =
                rotated.filter(|member| member.standing() == Standing::Good).min_by_key(|member| member.in_flight());
            if let Some(best) = best {
                return best.clone();
            }
            if good.changed().await.is_err() {
                // The sender lives in `self`: cannot be. Waiting is what a reader without members does.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Says on the log that no member answers, once a minute, and when one does again. Runs as long as the reader.
    pub(super) async fn watch_outages(self: Arc<Self>) {
        let mut good = self.good.subscribe();
        loop {
            if good.wait_for(|count| *count == 0).await.is_err() {
                return;
            }
            let since = Instant::now();
            while self.is_down() {
                tracing::error!(
                    "no server of the image answers since {} s; programs wait until one does: {}",
                    since.elapsed().as_secs(),
                    self.reasons()
                );
                let back = tokio::time::timeout(SAY_EVERY, good.wait_for(|count| *count > 0)).await;
                if matches!(back, Ok(Err(_))) {
                    return;
                }
            }
            tracing::warn!("a server of the image answers again after {} s", since.elapsed().as_secs());
        }
    }

    fn reasons(&self) -> String {
        let reasons: Vec<_> = self
            .members
            .iter()
            .map(|member| format!("{}: {}", member.url(), member.last_fault().unwrap_or_else(|| "resting".into())))
            .collect();
        reasons.join("; ")
    }

    /// Notes a fault; returns whether the member was good until now, and somebody has to bring it back.
    pub(super) fn failed(&self, member: &Member, fault: &Fault, is_trial: bool) -> bool {
        let before = member.standing();
        let now = member.failed(fault, is_trial);
        self.recount();
        match now {
            Standing::Excluded if before != Standing::Excluded => {
                tracing::error!("{} is excluded, it served wrong bytes twice: {fault}", member.url());
            }
            _ if before == Standing::Good => tracing::warn!("{} fails and rests: {fault}", member.url()),
            _ => tracing::debug!("{} still fails: {fault}", member.url()),
        }
        before == Standing::Good
    }

    /// Notes a verified read; a trial is one whose purpose it was.
    pub(super) fn succeeded(&self, member: &Member, is_trial: bool) {
        if member.succeeded(is_trial) {
            tracing::info!("{} is back, a verified read succeeded", member.url());
            self.recount();
        }
    }
}
