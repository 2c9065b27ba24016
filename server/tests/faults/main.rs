//! Real members in network namespaces, three that vote and one that does not, with faults drawn from a seed, while clients read and write through all of
//! them. Meanwhile they are upgraded, one after the other, from a release that knows less. What clients were told is then judged: no acknowledged
//! change is lost, no read is stale, all members hold the same in the end.
//!
//! The judge is shown to be right: it acquits etcd under the same faults, and convicts members whose disk says that it has synced and has not.
//!
//! `MOOR_SEED=N` repeats the faults of a run (not their exact timing: the members are real), `MOOR_SECONDS=N` goes on for so long.
//! Otherwise the seed is taken from the commit.

mod clients;
mod cluster;
mod etcd;
mod fault;
mod history;
mod net;
#[path = "../../../tests/seed.rs"]
mod seed;
mod shim;

use anyhow::{Context as _, ensure};
use clients::{KEYS, Line, Shared, Way, client, define, way};
use cluster::Cluster;
use etcd::Gateway;
use fault::{Fault, UPGRADE};
use history::{Act, Call};
use moor_api::client::ClientError;
use moor_api::problem::Code;
use seed::{first_seed, number};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Members that vote, and that do not.
const VOTERS: usize = 3;
const OTHERS: usize = 1;
const CLIENTS: u64 = 6;
/// How long `make test` and `make test-full` go on, in seconds.
const SECONDS: u64 = 300;
const FULL_SECONDS: u64 = 7200;
/// The same with etcd.
const ETCD_SECONDS: u64 = 240;
/// A member goes on for so long with a call that its client has given up.
const LINGER: Duration = Duration::from_secs(20);

/// Waits until a write that was asked for after now is acknowledged.
async fn writes_go_on(shared: &Shared) -> anyhow::Result<Duration> {
    let (from, began) = (shared.now(), Instant::now());
    while shared.written.load(Ordering::Relaxed) <= from {
        ensure!(began.elapsed() < Duration::from_mins(1), "no change was acknowledged for a minute");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(began.elapsed())
}

/// Clients that go on until they are told to end.
struct Clients {
    shared: Arc<Shared>,
    running: Vec<tokio::task::JoinHandle<Vec<Call>>>,
    ways: Vec<Way>,
}

impl Clients {
    fn start(cluster: &Cluster, seed: u64) -> Self {
        let ways: Vec<Way> = (0..cluster.count()).map(|at| way(cluster, at)).collect();
        let shared = Arc::new(Shared::new());
        let start = |index| {
            let random = fastrand::Rng::with_seed(seed.wrapping_mul(31).wrapping_add(index));
            tokio::spawn(client(shared.clone(), ways.clone(), random))
        };
        let running = (0..CLIENTS).map(start).collect();
        Self { shared, running, ways }
    }

    /// All that they did; and what is there in the end, which is judged as well: all could have lost the same.
    async fn end(self) -> anyhow::Result<Vec<Call>> {
        let Self { shared, running, ways } = self;
        shared.is_over.store(true, Ordering::Relaxed);
        let mut calls = Vec::new();
        for client in running {
            calls.extend(client.await?);
        }
        for key in 0..KEYS {
            let end = Instant::now() + Duration::from_mins(1);
            loop {
                let sent = shared.now();
                let read = async { Line::new(&ways[0]).await?.read(key).await };
                match tokio::time::timeout(Duration::from_secs(5), read).await {
                    Ok(Ok((value, false))) => {
                        calls.push(Call { key, act: Act::Read(value), sent, answered: shared.now() });
                        break;
                    }
                    other => ensure!(Instant::now() < end, "all are well again, and no majority answers: {other:?}"),
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        Ok(calls)
    }
}

async fn suffer(mut cluster: Cluster, seed: u64, seconds: u64) -> anyhow::Result<Cluster> {
    println!("seed {seed}, {seconds} s; MOOR_SEED={seed} MOOR_SECONDS={seconds} repeats it");
    let mut random = fastrand::Rng::with_seed(seed);
    define(&cluster).await?;
    let clients = Clients::start(&cluster, seed);
    let shared = clients.shared.clone();
    let mut longest = Duration::ZERO;
    let mut faults = 0;
    // Evenly over the whole time.
    let mut upgrade: VecDeque<(Duration, Fault)> = VecDeque::new();
    if cluster.is_old() {
        let part = Duration::from_secs(seconds) / (u32::try_from(UPGRADE.len())? + 1);
        upgrade.extend((1..).zip(UPGRADE).map(|(step, fault)| (part * step, fault)));
    }
    while shared.began.elapsed() < Duration::from_secs(seconds) || !upgrade.is_empty() {
        writes_go_on(&shared).await?;
        tokio::time::sleep(Duration::from_millis(random.u64(0..1500))).await;
        let leader = cluster.leader().await;
        if !upgrade.is_empty() {
            cluster.is_at_the_old_level().await?;
        }
        let due = upgrade.pop_front_if(|(due, _)| shared.began.elapsed() >= *due);
        let fault = due.map_or_else(|| Fault::draw(&mut random, &cluster, leader), |(_, fault)| fault);
        fault.begin(&mut cluster).await.with_context(|| format!("{fault:?}"))?;
        faults += 1;
        let goes_on = if fault.leaves_a_majority() {
            Some(writes_go_on(&shared).await.with_context(|| format!("{fault:?}, led by {leader:?}"))?)
        } else {
            None
        };
        if let (true, Some(time)) = (fault.kills().is_some() && fault.kills() == leader, goes_on) {
            longest = longest.max(time);
        }
        println!("{:6.1} s: {fault:?}, led by {leader:?}: {goes_on:.1?}", shared.began.elapsed().as_secs_f32());
        tokio::time::sleep(Duration::from_millis(random.u64(0..3000))).await;
        fault.end(&mut cluster).await.with_context(|| format!("the end of {fault:?}"))?;
    }
    writes_go_on(&shared).await?;
    if cluster.is_old() {
        cluster.comes_to_the_new_level().await?;
    }
    let calls = clients.end().await.with_context(|| cluster.log(0))?;
    let reads = calls.iter().filter(|call| matches!(call.act, Act::Read(_))).count() as u64;
    ensure!(reads > 2 * seconds, "only {reads} reads were up to date: there is little to judge");
    let unknown = calls.iter().filter(|call| call.answered == u64::MAX).count();
    println!(
        "{} calls, {unknown} writes of unknown outcome, {faults} faults; changes go on {longest:.1?} after a leader's death at the latest",
        calls.len()
    );
    history::check(&calls).map_err(anyhow::Error::msg)?;
    Ok(cluster)
}

async fn suffer_and_agree(seconds: u64) -> anyhow::Result<()> {
    let seconds = number("MOOR_SECONDS").unwrap_or(seconds);
    let mut cluster = suffer(Cluster::old(VOTERS, OTHERS).await?, first_seed(), seconds).await?;
    tokio::time::sleep(LINGER).await;
    let digests = cluster.settle().await?;
    for (table, digest) in &digests[0] {
        let same = digests.iter().filter(|other| other.get(table) == Some(digest)).count();
        ensure!(same == cluster.count(), "only {same} members hold the same in '{table}'");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_no_read_is_stale() -> anyhow::Result<()> {
    suffer_and_agree(SECONDS).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two hours of faults: make test-full"]
async fn nothing_acknowledged_is_lost_and_no_read_is_stale_in_two_hours() -> anyhow::Result<()> {
    suffer_and_agree(FULL_SECONDS).await
}

/// Were it convicted, clients or judge would be wrong: etcd has been through this for years.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "some minutes more: make test-full"]
async fn etcd_is_acquitted_under_the_same_faults() -> anyhow::Result<()> {
    suffer(Cluster::etcd(VOTERS).await?, first_seed(), number("MOOR_SECONDS").unwrap_or(ETCD_SECONDS)).await.map(drop)
}

/// Slow disks and wrong clocks reach etcd, which calls no C library for either: what is preloaded there does more than to be there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_feels_slow_disks_and_wrong_clocks() -> anyhow::Result<()> {
    const SLOW: Duration = Duration::from_millis(400);
    const WRONG: i64 = -700 * 86_400;
    let cluster = Cluster::etcd(VOTERS).await?;
    let mut line = Line::new(&way(&cluster, 0)).await?;
    ensure!(line.write(0, 1).await, "a write of three members that are well");
    (0..VOTERS).try_for_each(|at| cluster.orders(at).slow(SLOW))?;
    let began = Instant::now();
    ensure!(line.write(0, 2).await, "a write of three members with slow disks");
    let took = began.elapsed();
    ensure!(took >= SLOW, "acknowledged after {took:?}, and two have to sync first");
    (0..VOTERS).try_for_each(|at| cluster.orders(at).slow(Duration::ZERO))?;
    cluster.orders(0).clock(WRONG)?;
    let now = time::OffsetDateTime::now_utc();
    let wrong = (Gateway::new(&cluster.socket(0)).await?.time().await? - now).whole_seconds();
    ensure!((wrong - WRONG).abs() < 60, "it is {wrong} s wrong");
    let right = (Gateway::new(&cluster.socket(1)).await?.time().await? - now).whole_seconds();
    ensure!(right.abs() < 60, "its neighbour is {right} s wrong");
    Ok(())
}

/// All members are killed at once while clients write. What they had acknowledged is judged when they are back.
async fn all_die(lie: Duration) -> anyhow::Result<Result<(), String>> {
    let mut cluster = Cluster::new(VOTERS, 0).await?;
    define(&cluster).await?;
    for at in 0..VOTERS {
        cluster.kill(at);
        cluster.orders(at).lie(lie)?;
    }
    cluster.start_all(0..VOTERS)?;
    let clients = Clients::start(&cluster, 1);
    for _ in 0..20 {
        writes_go_on(&clients.shared).await?;
    }
    (0..VOTERS).for_each(|at| cluster.kill(at));
    cluster.start_all(0..VOTERS)?;
    writes_go_on(&clients.shared).await.with_context(|| cluster.log(0))?;
    Ok(history::check(&clients.end().await?))
}

/// The judge is able to convict: members whose disk says that all is synced, and keeps of it what it had some time ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_acknowledges_before_it_syncs_is_found_out() -> anyhow::Result<()> {
    // The same disk, when it tells the truth: it is not the disk itself that is convicted.
    let truth = all_die(shim::HONEST).await?;
    ensure!(truth.is_ok(), "an honest disk is convicted: {truth:?}");
    let lie = all_die(Duration::from_mins(10)).await?;
    ensure!(lie.is_err(), "acknowledged changes were lost, and nobody noticed");
    Ok(())
}

/// The only one left, and without a vote: it shows what it knows and says that it may be old, and changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_a_vote_that_is_alone_shows_what_it_knows_and_changes_nothing() -> anyhow::Result<()> {
    let mut cluster = Cluster::new(1, 1).await?;
    define(&cluster).await?;
    let mut line = Line::new(&way(&cluster, 1)).await?;
    let end = Instant::now() + Duration::from_mins(1);
    while !line.write(0, 1).await {
        ensure!(Instant::now() < end, "no change through a member without a vote:\n{}", cluster.log(1));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ensure!(line.read(0).await? == (1, false), "what it was told itself");
    cluster.kill(0);
    let began = Instant::now();
    ensure!(line.read(0).await? == (1, true), "it may be old, and that has to be said");
    let refused = cluster.admin(1).await?.set(&clients::change(0, 2)).await;
    let code = refused.as_ref().err().and_then(ClientError::problem).map(|problem| problem.code);
    ensure!(code == Some(Code::NoMajority), "after {:?}: {refused:?}", began.elapsed());
    cluster.start(0)?;
    let end = Instant::now() + Duration::from_mins(1);
    while !line.write(0, 3).await {
        ensure!(Instant::now() < end, "no changes, and all are there again:\n{}", cluster.log(1));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ensure!(line.read(0).await? == (3, false), "all is well again");
    Ok(())
}

/// As a machine whose clock has lost its battery: its certificate was made for a time that is over when the clock is set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_started_with_an_old_clock_is_back_when_the_clock_is_set() -> anyhow::Result<()> {
    let mut cluster = Cluster::new(VOTERS, 0).await?;
    define(&cluster).await?;
    cluster.kill(2);
    cluster.orders(2).clock(-700 * 86_400)?;
    cluster.start(2)?;
    ensure!(Line::new(&way(&cluster, 0)).await?.write(0, 1).await, "two of three are a majority");
    cluster.orders(2).clock(0)?;
    let end = Instant::now() + Duration::from_mins(1);
    // Until then it may not even know of the register.
    while !Line::new(&way(&cluster, 2)).await?.read(0).await.is_ok_and(|read| read == (1, false)) {
        ensure!(Instant::now() < end, "it does not come back:\n{}", cluster.log(2));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Who looks for the reason why changes take long finds it: in one line of the member whose disk is slow, and in its figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_is_said_once_and_counted() -> anyhow::Result<()> {
    let cluster = Cluster::new(1, 0).await?;
    define(&cluster).await?;
    let mut line = Line::new(&way(&cluster, 0)).await?;
    cluster.orders(0).slow(Duration::from_millis(1500))?;
    for value in 1..=2 {
        ensure!(line.write(0, value).await, "a change with a slow disk");
    }
    cluster.orders(0).slow(Duration::ZERO)?;
    let log = cluster.log(0);
    let said: Vec<_> = log.lines().filter(|line| line.contains("log.journal' t")).collect();
    ensure!(
        matches!(said[..], [line] if line.contains("WARN") && line.ends_with("changes and elections wait for it")),
        "{log}"
    );
    let metrics = cluster.admin(0).await?.metrics().await?;
    let figure = |name: &str| {
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)).context("no such figure")?;
        anyhow::Ok(value.trim().parse::<f64>()?)
    };
    let (all, quick) = (
        figure("moord_sync_seconds_count{file=\"log.journal\"}")?,
        figure("moord_sync_seconds_bucket{file=\"log.journal\",le=\"1\"}")?,
    );
    ensure!(all - quick >= 2.0, "{quick} of {all} took a second at most:\n{metrics}");
    ensure!(figure("moord_sync_longest_seconds{file=\"log.journal\"}")? >= 1.5, "{metrics}");
    Ok(())
}

/// The judge is able to convict: what a member that is cut off says (and says itself that it may be old) is no linearizable read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_read_is_found_out() -> anyhow::Result<()> {
    let cluster = Cluster::new(VOTERS, 0).await?;
    define(&cluster).await?;
    let leader = cluster.leader().await.context("a leader")?;
    let (alone, other) = ((leader + 1) % VOTERS, (leader + 2) % VOTERS);
    let mut line = Line::new(&way(&cluster, alone)).await?;
    ensure!(line.read(0).await? == (0, false), "a read of a member that follows");
    for to in [leader, other] {
        cluster.net.cut(alone, to)?;
        cluster.net.cut(to, alone)?;
    }
    let mut calls = vec![Call { key: 0, act: Act::Write(1), sent: 1, answered: 2 }];
    ensure!(Line::new(&way(&cluster, other)).await?.write(0, 1).await, "two of three are a majority");
    let (value, is_stale) = line.read(0).await?;
    ensure!(is_stale, "it was not said that the answer may be old");
    ensure!(history::check(&calls).is_ok(), "the write alone");
    calls.push(Call { key: 0, act: Act::Read(value), sent: 3, answered: 4 });
    ensure!(history::check(&calls).is_err(), "a read of {value} after a write of 1 was acknowledged");
    // And when it hears the others again, it is up to date.
    cluster.net.heal()?;
    let end = Instant::now() + Duration::from_mins(1);
    loop {
        match line.read(0).await {
            Ok((1, false)) => return Ok(()),
            Ok((value, false)) => anyhow::bail!("a stale read of {value}, and it was not said"),
            _ => ensure!(Instant::now() < end, "it does not come back:\n{}", cluster.log(alone)),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
