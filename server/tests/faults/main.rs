//! Three real members in network namespaces, with faults drawn from a seed, while clients read and write through all of them. What they
//! were told is then judged: no acknowledged change is lost, no read is stale, all members hold the same in the end.
//!
//! `MOOR_SEED=N` repeats the faults of a run (not their exact timing: the members are real), `MOOR_SECONDS=N` goes on for so long.
//! Otherwise the seed is taken from the commit.

mod cluster;
mod history;
mod net;

use anyhow::{Context as _, ensure};
use cluster::Cluster;
use history::{Act, Call};
use moor_api::admin::{DefineNodes, SetAttributes};
use moor_api::client::ClientError;
use moor_api::client::admin::AdminClient;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MEMBERS: usize = 3;
/// Registers: a node each.
const KEYS: usize = 4;
const CLIENTS: u64 = 6;
/// The value is in this attribute.
const ATTRIBUTE: &str = "info.note";
/// How long `make test` and `make test-full` go on, in seconds.
const SECONDS: u64 = 300;
const FULL_SECONDS: u64 = 7200;
/// A client gives a call up after this; whether it takes effect is then unknown.
const GIVE_UP: Duration = Duration::from_secs(3);
/// A member goes on for so long with a call that its client has given up.
const LINGER: Duration = Duration::from_secs(20);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

fn seed() -> anyhow::Result<u64> {
    if let Some(seed) = number("MOOR_SEED") {
        return Ok(seed);
    }
    let head = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output()?;
    Ok(head.stdout.iter().fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add((*byte).into())) % 1_000_000_000)
}

/// What clients share.
struct Shared {
    began: Instant,
    /// No value is written twice.
    values: AtomicU64,
    is_over: AtomicBool,
    /// When a write was acknowledged last, in microseconds.
    written: AtomicU64,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }
}

/// A connection to one member, and whether its last answer may be stale.
struct Line {
    admin: AdminClient,
    is_stale: Arc<AtomicBool>,
}

impl Line {
    async fn new(socket: &Path) -> Result<Self, ClientError> {
        let mut admin = AdminClient::unix(socket).await?;
        let is_stale = Arc::new(AtomicBool::new(false));
        let told = is_stale.clone();
        admin.when_stale(move |_| told.store(true, Ordering::Relaxed));
        Ok(Self { admin, is_stale })
    }

    async fn read(&mut self, key: usize) -> Result<(u64, bool), ClientError> {
        self.is_stale.store(false, Ordering::Relaxed);
        let nodes = self.admin.nodes(Some(&name(key))).await?;
        let value = nodes.first().and_then(|node| node.attributes.get(ATTRIBUTE)?.parse().ok()).unwrap_or(0);
        Ok((value, self.is_stale.load(Ordering::Relaxed)))
    }

    /// Whether it is known to be done.
    async fn write(&mut self, key: usize, value: u64) -> bool {
        let request = SetAttributes {
            range: name(key),
            set: [(ATTRIBUTE.to_owned(), value.to_string())].into(),
            clear: Vec::new(),
        };
        self.admin.set(&request).await.is_ok_and(|changed| changed.refused.is_empty())
    }
}

fn name(key: usize) -> String {
    format!("n{key}")
}

/// One client: reads and writes anywhere, one call after the other, until all is over.
async fn client(shared: Arc<Shared>, sockets: Vec<PathBuf>, mut random: fastrand::Rng) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut lines: Vec<Option<Line>> = sockets.iter().map(|_| None).collect();
    while !shared.is_over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(random.u64(0..60))).await;
        let (at, key) = (random.usize(0..sockets.len()), random.usize(0..KEYS));
        if lines[at].is_none() {
            lines[at] = Line::new(&sockets[at]).await.ok();
        }
        let Some(line) = &mut lines[at] else { continue };
        let sent = shared.now();
        if random.bool() {
            let value = shared.values.fetch_add(1, Ordering::Relaxed);
            let is_done = tokio::time::timeout(GIVE_UP, line.write(key, value)).await == Ok(true);
            let answered = if is_done { shared.now() } else { u64::MAX };
            if is_done {
                shared.written.fetch_max(answered, Ordering::Relaxed);
            } else {
                lines[at] = None;
            }
            calls.push(Call { key, act: Act::Write(value), sent, answered });
        } else {
            match tokio::time::timeout(GIVE_UP, line.read(key)).await {
                // What says itself that it may be old promises nothing.
                Ok(Ok((_, true))) => {}
                Ok(Ok((value, false))) => {
                    calls.push(Call { key, act: Act::Read(value), sent, answered: shared.now() });
                }
                _ => lines[at] = None,
            }
        }
    }
    calls
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(usize),
    Restart(usize),
    Pause(usize),
    /// Nothing reaches it, and nothing comes from it.
    Isolate(usize),
    /// It hears the others, and they do not hear it.
    Mute(usize),
    /// They hear it, and it does not hear them.
    Deafen(usize),
    /// These two do not reach each other; the third reaches both.
    Part(usize, usize),
    /// All that run are killed at once.
    KillAll,
}

impl Fault {
    /// The leader is hit as often as the two others together.
    fn draw(random: &mut fastrand::Rng, leader: Option<usize>) -> Self {
        let at = leader.filter(|_| random.bool()).unwrap_or_else(|| random.usize(0..MEMBERS));
        match random.u8(0..8) {
            0 => Self::Kill(at),
            1 => Self::Restart(at),
            2 => Self::Pause(at),
            3 => Self::Isolate(at),
            4 => Self::Mute(at),
            5 => Self::Deafen(at),
            6 => Self::Part(at, (at + random.usize(1..MEMBERS)) % MEMBERS),
            _ => Self::KillAll,
        }
    }

    fn begin(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let others = |at| (0..MEMBERS).filter(move |other| *other != at);
        match self {
            Self::Kill(at) => cluster.kill(at),
            Self::Restart(at) => {
                cluster.kill(at);
                cluster.start(at)?;
            }
            Self::Pause(at) => cluster.signal(at, Signal::SIGSTOP)?,
            Self::Isolate(at) => {
                for other in others(at) {
                    cluster.net.cut(at, other)?;
                    cluster.net.cut(other, at)?;
                }
            }
            Self::Mute(at) => others(at).try_for_each(|other| cluster.net.cut(at, other))?,
            Self::Deafen(at) => others(at).try_for_each(|other| cluster.net.cut(other, at))?,
            Self::Part(one, other) => {
                cluster.net.cut(one, other)?;
                cluster.net.cut(other, one)?;
            }
            Self::KillAll => (0..MEMBERS).for_each(|at| cluster.kill(at)),
        }
        Ok(())
    }

    fn end(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        match self {
            Self::Kill(at) => cluster.start(at),
            Self::Restart(_) => Ok(()),
            Self::Pause(at) => cluster.signal(at, Signal::SIGCONT),
            Self::KillAll => (0..MEMBERS).try_for_each(|at| cluster.start(at)),
            Self::Isolate(_) | Self::Mute(_) | Self::Deafen(_) | Self::Part(..) => cluster.net.heal(),
        }
    }
}

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
    let range = format!("n[0-{}]", KEYS - 1);
    cluster.admin(0).await?.define(&DefineNodes { range, attributes: BTreeMap::new() }).await?;
    let sockets: Vec<PathBuf> = (0..MEMBERS).map(|at| cluster.socket(at)).collect();
    let shared = Arc::new(Shared {
        began: Instant::now(),
        values: AtomicU64::new(1),
        is_over: AtomicBool::new(false),
        written: AtomicU64::new(0),
    });
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
        let sent = shared.now();
        let (value, is_stale) = Line::new(&sockets[0]).await?.read(key).await?;
        ensure!(!is_stale, "all are well again, and no majority answers");
        calls.push(Call { key, act: Act::Read(value), sent, answered: shared.now() });
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
    suffer(seed()?, number("MOOR_SECONDS").unwrap_or(SECONDS)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "two hours of faults: make test-full"]
async fn nothing_acknowledged_is_lost_and_no_read_is_stale_in_two_hours() -> anyhow::Result<()> {
    suffer(seed()?, number("MOOR_SECONDS").unwrap_or(FULL_SECONDS)).await
}

/// The judge is able to convict: what a member that is cut off says (and says itself that it may be old) is no linearizable read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_read_is_found_out() -> anyhow::Result<()> {
    let cluster = Cluster::new(MEMBERS).await?;
    let range = format!("n[0-{}]", KEYS - 1);
    cluster.admin(0).await?.define(&DefineNodes { range, attributes: BTreeMap::new() }).await?;
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
