//! Three real members in network namespaces, with faults drawn from a seed, while clients read and write through all of them. What they
//! were told is then judged: no acknowledged change is lost, no read is stale, all members hold the same in the end.
//!
//! `MOOR_SEED=N` repeats the faults of a run (not their exact timing: the members are real), `MOOR_SECONDS=N` goes on for so long.
//! Otherwise the seed is taken from the commit.

mod clients;
mod cluster;
mod fault;
mod history;
mod net;
#[path = "../../../tests/seed.rs"]
mod seed;

use anyhow::{Context as _, ensure};
use clients::{KEYS, Line, Shared, client, define};
use cluster::Cluster;
use fault::Fault;
use history::{Act, Call};
use seed::{first_seed, number};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const MEMBERS: usize = 3;
const CLIENTS: u64 = 6;
/// How long `make test` and `make test-full` go on, in seconds.
const SECONDS: u64 = 300;
const FULL_SECONDS: u64 = 7200;
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

async fn suffer(seed: u64, seconds: u64) -> anyhow::Result<()> {
    println!("seed {seed}, {seconds} s; MOOR_SEED={seed} MOOR_SECONDS={seconds} repeats it");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new(MEMBERS).await?;
    define(&cluster).await?;
    let sockets: Vec<PathBuf> = (0..MEMBERS).map(|at| cluster.socket(at)).collect();
    let shared = Arc::new(Shared::new());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|index| {
            let random = fastrand::Rng::with_seed(seed.wrapping_mul(31).wrapping_add(index));
            tokio::spawn(client(shared.clone(), sockets.clone(), random))
        })
        .collect();

    let mut longest = Duration::ZERO;
    let mut faults = 0;
    while shared.began.elapsed() < Duration::from_secs(seconds) {
        writes_go_on(&shared).await?;
        tokio::time::sleep(Duration::from_millis(random.u64(0..1500))).await;
        let leader = cluster.leader().await;
        let fault = Fault::draw(&mut random, leader);
        fault.begin(&mut cluster).with_context(|| format!("{fault:?}"))?;
        faults += 1;
        let goes_on = match fault {
            Fault::KillAll => None,
            _ => Some(writes_go_on(&shared).await.with_context(|| format!("{fault:?}, led by {leader:?}"))?),
        };
        if let (Fault::Kill(at), Some(time)) = (fault, goes_on)
            && leader == Some(at)
        {
            longest = longest.max(time);
        }
        println!("{:6.1} s: {fault:?}, led by {leader:?}: {goes_on:.1?}", shared.began.elapsed().as_secs_f32());
        tokio::time::sleep(Duration::from_millis(random.u64(0..3000))).await;
        fault.end(&mut cluster).with_context(|| format!("the end of {fault:?}"))?;
    }
    writes_go_on(&shared).await?;
    shared.is_over.store(true, Ordering::Relaxed);
    let mut calls = Vec::new();
    for client in clients {
        calls.extend(client.await?);
    }
    // What is there in the end is judged as well: all could have lost the same.
    for key in 0..KEYS {
        let end = Instant::now() + Duration::from_mins(1);
        loop {
            let sent = shared.now();
            if let Ok((value, false)) = Line::new(&sockets[0]).await?.read(key).await {
                calls.push(Call { key, act: Act::Read(value), sent, answered: shared.now() });
                break;
            }
            ensure!(Instant::now() < end, "all are well again, and no majority answers:\n{}", cluster.log(0));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let reads = calls.iter().filter(|call| matches!(call.act, Act::Read(_))).count() as u64;
    ensure!(reads > 2 * seconds, "only {reads} reads were up to date: there is little to judge");
    let unknown = calls.iter().filter(|call| call.answered == u64::MAX).count();
    println!(
        "{} calls, {unknown} writes of unknown outcome, {faults} faults; changes go on {longest:.1?} after a leader's death at the latest",
        calls.len()
    );
    history::check(&calls).map_err(anyhow::Error::msg)?;
    tokio::time::sleep(LINGER).await;
    let digests = cluster.settle().await?;
    for (table, digest) in &digests[0] {
        let same = digests.iter().filter(|other| other.get(table) == Some(digest)).count();
        ensure!(same == MEMBERS, "only {same} members hold the same in '{table}'");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_no_read_is_stale() -> anyhow::Result<()> {
    suffer(first_seed(), number("MOOR_SECONDS").unwrap_or(SECONDS)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two hours of faults: make test-full"]
async fn nothing_acknowledged_is_lost_and_no_read_is_stale_in_two_hours() -> anyhow::Result<()> {
    suffer(first_seed(), number("MOOR_SECONDS").unwrap_or(FULL_SECONDS)).await
}

/// The judge is able to convict: what a member that is cut off says (and says itself that it may be old) is no linearizable read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_read_is_found_out() -> anyhow::Result<()> {
    let cluster = Cluster::new(MEMBERS).await?;
    define(&cluster).await?;
    let leader = cluster.leader().await.context("a leader")?;
    let (alone, other) = ((leader + 1) % MEMBERS, (leader + 2) % MEMBERS);
    let mut line = Line::new(&cluster.socket(alone)).await?;
    ensure!(line.read(0).await? == (0, false), "a read of a member that follows");
    for to in [leader, other] {
        cluster.net.cut(alone, to)?;
        cluster.net.cut(to, alone)?;
    }
    let mut calls = vec![Call { key: 0, act: Act::Write(1), sent: 1, answered: 2 }];
    ensure!(Line::new(&cluster.socket(other)).await?.write(0, 1).await, "two of three are a majority");
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
