//! One server of the image: how to reach it, how it has behaved, and what it has served.

use super::fault::Fault;
use super::link::{Answer, Link, Slowness};
use super::pace::Pace;
use super::slots::{Counted, Slot};
use super::world::{Path, World};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Shortest rest after a fault.
const REST_MIN: Duration = Duration::from_millis(500);
/// Longest rest.
const REST_MAX: Duration = Duration::from_secs(30);
/// Longest rest while no member answers: a root that stands still must not wait half a minute after the servers are back.
const REST_MAX_ALONE: Duration = Duration::from_secs(5);
/// Wrong bytes that exclude a member.
const WRONG_LIMIT: u32 = 2;
/// Requests in a row that others answered first, after which it counts as slow.
const OVERTAKEN_LIMIT: u32 = 3;
/// Time limits grow at most this much for a member that runs into them again and again.
const PATIENCE_MAX: u32 = 16;

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is asked.
    Good,
    /// It was much slower than another. It is asked while no other answers, and comes back by a read that is not.
    Slow,
    /// It rests after a fault, and comes back by a verified read.
    BackingOff,
    /// It served wrong bytes twice. It is asked again only when no other member answers.
    Excluded,
}

/// What a member has done so far, as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its URL.
    pub url: String,
    /// Bytes of answers received from it.
    pub bytes: u64,
    /// Requests sent to it.
    pub requests: u64,
    /// How often it failed.
    pub faults: u64,
    /// How it stands.
    pub state: Standing,
    /// The smoothed time to the first chunk of an answer, in microseconds.
    #[serde(default)]
    pub latency_us: u64,
    /// Its last fault, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_fault: Option<String>,
}

struct Health {
    standing: Standing,
    /// Faults in a row.
    row: u32,
    wrong: u32,
    last: Option<String>,
    etag: Option<Bytes>,
}

pub(super) struct Member {
    link: Link,
    world: Arc<dyn World>,
    health: Mutex<Health>,
    pace: Mutex<Pace>,
    patience: AtomicU32,
    in_flight: Arc<AtomicU32>,
    overdue: Arc<AtomicU32>,
    /// Requests in a row that another member answered first.
    lost: AtomicU32,
    bytes: AtomicU64,
    requests: AtomicU64,
    faults: AtomicU64,
    /// Whether it is no member any more.
    is_retired: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Member {
    pub(super) fn new(path: Box<dyn Path>, world: Arc<dyn World>) -> Self {
        Self {
            link: Link::new(path, world.clone()),
            world,
            health: Mutex::new(Health { standing: Standing::Good, row: 0, wrong: 0, last: None, etag: None }),
            pace: Mutex::default(),
            patience: AtomicU32::new(1),
            in_flight: Arc::default(),
            overdue: Arc::default(),
            lost: AtomicU32::new(0),
            bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            is_retired: AtomicBool::new(false),
        }
    }

    /// It is no member any more: what runs moves away from it, and nobody brings it back. Returns how many bytes it has sent.
    pub(super) fn retire(&self) -> u64 {
        self.is_retired.store(true, Ordering::Relaxed);
        lock(&self.health).standing = Standing::BackingOff;
        self.link.forget_connections();
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::Relaxed)
    }

    pub(super) fn url(&self) -> &str {
        self.link.url()
    }

    pub(super) fn standing(&self) -> Standing {
        lock(&self.health).standing
    }

    pub(super) fn last_fault(&self) -> Option<String> {
        lock(&self.health).last.clone()
    }

    pub(super) fn pace(&self) -> MutexGuard<'_, Pace> {
        lock(&self.pace)
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request as running, for the choice between members.
    pub(super) fn running(&self) -> Counted {
        Counted::new(&self.in_flight)
    }

    /// Counts a request as overdue.
    pub(super) fn late(&self) -> Counted {
        Counted::new(&self.overdue)
    }

    /// Whether it has kept somebody waiting longer than usual, right now.
    pub(super) fn is_late(&self) -> bool {
        self.overdue.load(Ordering::Relaxed) > 0
    }

    /// It answered.
    pub(super) fn answered(&self) {
        self.lost.store(0, Ordering::Relaxed);
    }

    /// Another member was asked later and answered first. Returns whether that is its habit.
    pub(super) fn was_overtaken(&self) -> bool {
        self.lost.fetch_add(1, Ordering::Relaxed) + 1 >= OVERTAKEN_LIMIT
    }

    /// How many requests it is asked side by side just now.
    pub(super) fn side_by_side(&self) -> u32 {
        self.link.side_by_side()
    }

    /// Waits until it may be asked one thing more.
    pub(super) async fn turn(&self) -> Result<Slot, Fault> {
        self.link.turn().await
    }

    /// Asks for a range of the file, as soon as there is a connection for it. `total`: the length that the file must have, once it is known.
    pub(super) async fn get(&self, start: u64, length: u64, total: Option<u64>) -> Result<Answer, Fault> {
        loop {
            match self.ask(self.turn().await?, start, length, total).await {
                // Each time there is a turn less to wait for, and one is always left.
                Err(Fault::Crowded(_)) => {}
                answer => return answer,
            }
        }
    }

    /// Asks for a range of the file.
    pub(super) async fn ask(&self, slot: Slot, start: u64, length: u64, total: Option<u64>) -> Result<Answer, Fault> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let answer = self.link.get(slot, start, length, self.patience.load(Ordering::Relaxed)).await?;
        self.check(&answer, total)?;
        Ok(answer)
    }

    fn check(&self, answer: &Answer, total: Option<u64>) -> Result<(), Fault> {
        if let Some(expected) = total
            && answer.total != expected
        {
            return Err(Fault::Length { expected, actual: answer.total });
        }
        let mut health = lock(&self.health);
        match &health.etag {
            Some(known) if Some(known) != answer.etag.as_ref() => {
                // What comes next is judged by its bytes; the new tag counts from its first verified read on.
                health.etag = None;
                Err(Fault::Replaced)
            }
            _ => Ok(()),
        }
    }

    /// The next bytes of an answer, counted.
    pub(super) async fn take(&self, answer: &mut Answer, length: usize) -> Result<Vec<u8>, Fault> {
        self.take_into(answer, vec![0; length]).await
    }

    /// As many as fill this buffer.
    pub(super) async fn take_into(&self, answer: &mut Answer, buffer: Vec<u8>) -> Result<Vec<u8>, Fault> {
        answer.take(buffer, |count| _ = self.bytes.fetch_add(count, Ordering::Relaxed)).await
    }

    /// Takes a finished answer back. Everything in it was verified.
    pub(super) fn keep(&self, answer: Answer) {
        self.adapt(answer.slowness());
        if let Some(etag) = &answer.etag {
            let mut health = lock(&self.health);
            // One that was asked before the fault may be of the file of before.
            if matches!(health.standing, Standing::Good | Standing::Slow) {
                health.etag = Some(etag.clone());
            }
        }
        self.link.keep(answer);
    }

    /// Slow is not dead: the time limits follow what this member takes when it does answer. They grow at once, and shrink step by step.
    fn adapt(&self, slowness: Slowness) {
        let now = self.patience.load(Ordering::Relaxed);
        let next = slowness.patience().max(now.saturating_sub(1)).clamp(1, PATIENCE_MAX);
        self.patience.store(next, Ordering::Relaxed);
    }

    /// Gives up connections that were kept for a rush which is over.
    pub(super) fn trim(&self) {
        self.link.trim();
    }

    /// A read whose purpose it was has shown that the member is good. Returns whether it was not before.
    pub(super) fn passed(&self) -> bool {
        let mut health = lock(&self.health);
        health.row = 0;
        let was = std::mem::replace(&mut health.standing, Standing::Good);
        if was == Standing::Excluded {
            // Somebody has mended it. The next wrong bytes count at once, and no other fault does.
            health.wrong = WRONG_LIMIT - 1;
        }
        was != Standing::Good
    }

    /// Something failed. Returns how the member stood until now, and how it stands. Requests that were running when the member was found out
    /// (`is_trial` false, and it rests already) count as faults, but say nothing new about it.
    pub(super) fn failed(&self, fault: &Fault, is_trial: bool) -> (Standing, Standing) {
        self.link.forget_connections();
        self.faults.fetch_add(1, Ordering::Relaxed);
        let mut health = lock(&self.health);
        let before = health.standing;
        let is_known = match before {
            Standing::Good => false,
            // That it is slow is known; anything else is news.
            Standing::Slow => matches!(fault, Fault::Slow(_)),
            Standing::BackingOff | Standing::Excluded => true,
        };
        if is_known && !is_trial {
            return (before, before);
        }
        if fault.is_timeout() {
            // It may be slow for a reason (a storm, an emulated machine): more time at each try.
            let patience = self.patience.load(Ordering::Relaxed);
            self.patience.store((patience * 2).min(PATIENCE_MAX), Ordering::Relaxed);
        }
        health.last = Some(fault.to_string());
        health.row += 1;
        // What it serves after its rest is judged by its bytes: a file that was laid anew meanwhile is no reason to rest again.
        health.etag = None;
        if fault.is_of_another_image() {
            health.wrong += 1;
        }
        health.standing = match fault {
            _ if health.wrong >= WRONG_LIMIT => Standing::Excluded,
            Fault::Slow(_) => Standing::Slow,
            _ => Standing::BackingOff,
        };
        (before, health.standing)
    }

    /// How long to rest before the next try. Where no member answers, the time that the last try waited in vain is a part of it.
    pub(super) fn rest(&self, alone: bool, tried: Duration) -> Duration {
        let row = lock(&self.health).row;
        let (longest, over) = if alone { (REST_MAX_ALONE, tried) } else { (REST_MAX, Duration::ZERO) };
        let rest = REST_MIN.saturating_mul(1 << row.saturating_sub(1).min(10)).min(longest).saturating_sub(over);
        jitter(rest, self.world.random())
    }

    pub(super) fn status(&self) -> MemberStatus {
        let latency = self.pace().expected().unwrap_or_default();
        let health = lock(&self.health);
        MemberStatus {
            url: self.url().to_owned(),
            bytes: self.bytes.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            state: health.standing,
            latency_us: u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
            last_fault: health.last.clone(),
        }
    }
}

/// Between 75 % and 125 % of `duration`, never under the shortest rest, so that a thousand nodes do not come back at one instant.
fn jitter(duration: Duration, random: u64) -> Duration {
    let [low, high, ..] = random.to_le_bytes();
    let share = 0.75 + f64::from(u16::from_le_bytes([low, high])) / f64::from(u16::MAX) / 2.0;
    duration.mul_f64(share).max(REST_MIN)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::reader::world::{Boxed, Wire};

    /// Chance as it is, and nothing else.
    pub(in crate::reader) struct Chance;

    impl World for Chance {
        fn now(&self) -> Duration {
            Duration::ZERO
        }
        fn sleep(&self, _: Duration) -> Boxed<'static, ()> {
            Box::pin(std::future::pending())
        }
        fn spawn(&self, _: Boxed<'static, ()>) {}
        fn random(&self) -> u64 {
            let mut bytes = [0; 8];
            rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
            u64::from_le_bytes(bytes)
        }
    }

    struct Nowhere;

    impl Path for Nowhere {
        fn url(&self) -> &'static str {
            "https://nowhere/x"
        }
        fn connect(&self) -> Boxed<'_, Result<Box<dyn Wire>, Fault>> {
            Box::pin(std::future::pending())
        }
    }

    pub(in crate::reader) fn member() -> Member {
        Member::new(Box::new(Nowhere), Arc::new(Chance))
    }

    #[test]
    fn rests_grow_from_half_a_second_to_half_a_minute() {
        let member = member();
        let mut longest = Duration::ZERO;
        for row in 0..12 {
            assert_eq!(member.failed(&Fault::Connect("refused".into()), true).1, Standing::BackingOff);
            let rest = member.rest(false, Duration::from_mins(1));
            assert!(rest >= REST_MIN && rest <= REST_MAX.mul_f64(1.26), "{row}: {rest:?}");
            assert!(member.rest(true, Duration::ZERO) <= REST_MAX_ALONE.mul_f64(1.26));
            assert!(member.rest(true, Duration::from_secs(4)) <= Duration::from_secs(1).mul_f64(1.26));
            longest = longest.max(rest);
        }
        assert!(longest > Duration::from_secs(20));
        assert!(member.passed());
        member.failed(&Fault::Connect("refused".into()), false);
        assert!(member.rest(false, Duration::ZERO) < Duration::from_secs(1));
    }

    #[test]
    fn wrong_bytes_twice_exclude_and_other_faults_never_do() {
        let member = member();
        let wrong = || Fault::Wrong(moor_image::ImageError::Argument("x"));
        assert_eq!(member.failed(&wrong(), false).1, Standing::BackingOff);
        assert_eq!(member.failed(&wrong(), false).1, Standing::BackingOff, "it ran before the member was found out");
        member.passed();
        assert_eq!(member.failed(&Fault::NoRanges, false).1, Standing::BackingOff);
        assert_eq!(member.failed(&wrong(), true).1, Standing::Excluded);
        assert_eq!(member.failed(&Fault::NoRanges, true).1, Standing::Excluded);
        assert!(member.passed());
        assert_eq!(member.standing(), Standing::Good);
        // It was mended. That it is started again is not its old fault, and one more of those is enough.
        assert_eq!(member.failed(&Fault::Connect("refused".into()), false).1, Standing::BackingOff);
        assert!(member.passed());
        assert_eq!(member.failed(&wrong(), false).1, Standing::Excluded);
    }

    #[test]
    fn what_is_longer_than_the_image_is_another_file_and_what_is_shorter_may_be_on_its_way() {
        let of = |actual| Fault::Length { expected: 10, actual };
        let member = member();
        for _ in 0..4 {
            assert_eq!(member.failed(&of(9), true).1, Standing::BackingOff);
        }
        member.failed(&of(11), true);
        assert_eq!(member.failed(&of(11), true).1, Standing::Excluded);
    }

    #[test]
    fn slow_is_not_dead_but_what_a_slow_member_does_wrong_counts() {
        let member = member();
        let slow = || Fault::Slow(Duration::from_millis(400));
        assert_eq!(member.failed(&slow(), false), (Standing::Good, Standing::Slow));
        assert_eq!(member.failed(&slow(), false), (Standing::Slow, Standing::Slow));
        assert_eq!(member.failed(&Fault::Broken("x".into()), false), (Standing::Slow, Standing::BackingOff));
        assert_eq!(member.failed(&slow(), true), (Standing::BackingOff, Standing::Slow));
        assert!(member.passed());
    }

    #[test]
    fn time_outs_make_patient_and_quick_answers_strict_again() {
        let member = member();
        for _ in 0..10 {
            member.failed(&Fault::Silent(Duration::from_secs(2)), true);
        }
        assert_eq!(member.patience.load(Ordering::Relaxed), PATIENCE_MAX);
        for _ in 0..PATIENCE_MAX {
            member.adapt(Slowness::default());
        }
        assert_eq!(member.patience.load(Ordering::Relaxed), 1);
        // An answer just within the limit: the next one may take four times as long.
        member.adapt(Slowness::of(0.9));
        assert_eq!(member.patience.load(Ordering::Relaxed), 4);
    }
}
