//! A member is killed with SIGKILL again and again while a client makes changes: everything that was acknowledged is there afterwards.

use crate::machine::Machine;
use crate::support::Member;
use anyhow::ensure;
use moor_api::admin::{ArmRequest, DefineNodes, SetAttributes};
use moor_api::client::node::NodeConnection;
use moor_api::node::{KeyRequest, Stage, StatusReport};
use moord::store::{Store as _, tables};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const KILLS: usize = 20;
const LIMIT: Duration = Duration::from_mins(1);

/// xorshift: enough for times, and the same again for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What a member said that it had done.
#[derive(Default)]
struct Acknowledged {
    /// Node to the value of its note.
    notes: BTreeMap<String, String>,
    /// Blobs.
    blobs: Vec<(String, usize)>,
    /// Sequence numbers of the node's reports, in order.
    reports: Vec<u64>,
}

type Shared = Arc<Mutex<Acknowledged>>;

/// Defines nodes, changes them and sends blobs until the member is gone.
async fn administrate(socket: std::path::PathBuf, round: usize, shared: Shared) {
    let Ok(mut admin) = moor_api::client::admin::AdminClient::unix(&socket).await else { return };
    for number in 0.. {
        let name = format!("r{round}n{number}");
        let define = DefineNodes { range: name.clone(), attributes: BTreeMap::new() };
        if !admin.define(&define).await.is_ok_and(|changed| changed.nodes.len() == 1) {
            return;
        }
        shared.lock().unwrap().notes.insert(name.clone(), String::new());
        let value = format!("note {number}");
        let set = [("info.note".to_owned(), value.clone())].into();
        if admin.set(&SetAttributes { range: name.clone(), set, clear: Vec::new() }).await.is_err() {
            return;
        }
        shared.lock().unwrap().notes.insert(name, value);
        let content = format!("{round} {number} ").repeat(1 + number * 997 % 5000);
        let Ok(added) = admin.add_blob(Cursor::new(content.clone().into_bytes()), |_| {}).await else { return };
        shared.lock().unwrap().blobs.push((added.blob.to_string(), content.len()));
    }
}

/// Reports states until the member is gone.
async fn report(machine: &Machine, mut connection: NodeConnection, next: &mut u64, shared: &Shared) {
    loop {
        *next += 1;
        let report = StatusReport {
            boot: machine.boot,
            sequence: *next,
            state: format!("s{next}"),
            detail: String::new(),
            uptime_ms: *next,
            figures: BTreeMap::new(),
        };
        if connection.status(&report).await.is_err() {
            return;
        }
        shared.lock().unwrap().reports.push(*next);
    }
}

async fn check(member: &Member, shared: &Shared, seed: u64) -> anyhow::Result<()> {
    let mut admin = member.admin().await?;
    let nodes: BTreeMap<String, String> = admin
        .nodes(None)
        .await?
        .into_iter()
        .map(|node| (node.name.to_string(), node.attributes.get("info.note").cloned().unwrap_or_default()))
        .collect();
    let said = shared.lock().unwrap();
    for (name, value) in &said.notes {
        // The value after the last one that was acknowledged may be there too.
        ensure!(nodes.contains_key(name), "seed {seed}: node {name} is gone");
        ensure!(value.is_empty() || nodes[name] == *value, "seed {seed}: {name} has '{}', not '{value}'", nodes[name]);
    }
    for (blob, length) in &said.blobs {
        let path = member.path("state/blobs").join(&blob[..2]).join(blob);
        ensure!(std::fs::metadata(&path)?.len() == *length as u64, "seed {seed}: blob {blob} is not whole");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_sigkill() -> anyhow::Result<()> {
    let seed = std::env::var("MOORD_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        u64::from(std::process::id()) << 20
            ^ std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |time| u64::from(time.subsec_nanos()))
    });
    println!("seed {seed} (MOORD_TEST_SEED={seed} repeats it)");
    let mut random = Random(seed | 1);
    let start = Instant::now();
    let mut member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.admin().await?.arm(&ArmRequest { range: "n1".into(), until: "once".into() }).await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    let shared = Shared::default();
    let mut sequence = 0;
    let mut kills = 0;
    while kills < KILLS && start.elapsed() < LIMIT {
        let mut connection = machine.connect().await?;
        machine.log_in(&mut connection, Stage::Boot).await?;
        let admin = tokio::spawn(administrate(member.path("api.sock"), kills, shared.clone()));
        let done = Arc::new(AtomicBool::new(false));
        let pid = nix::unistd::Pid::from_raw(i32::try_from(member.pid().unwrap())?);
        let (pause, ended) = (Duration::from_micros(20_000 + random.below(400_000)), done.clone());
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(pause);
            let killed = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            ended.store(true, Ordering::Relaxed);
            killed
        });
        report(&machine, connection, &mut sequence, &shared).await;
        killer.await??;
        admin.await?;
        ensure!(done.load(Ordering::Relaxed), "seed {seed}: the member ended before it was killed:\n{}", member.log());
        member.kill();
        member.run()?;
        kills += 1;
        check(&member, &shared, seed).await?;
    }
    ensure!(kills >= KILLS / 2, "only {kills} kills in {} s", LIMIT.as_secs());
    // Reports: each that was acknowledged is there once, in order; of the rest each at most once.
    let states = member.states("n1").await?;
    let kept: Vec<u64> = states.iter().filter_map(|state| state.strip_prefix('s')?.parse().ok()).collect();
    let said = shared.lock().unwrap();
    ensure!(kept.windows(2).all(|pair| pair[0] < pair[1]), "seed {seed}: reports out of order or twice: {kept:?}");
    let first = kept.first().copied().unwrap_or_default();
    for number in said.reports.iter().filter(|number| **number >= first) {
        ensure!(kept.contains(number), "seed {seed}: report {number} is gone");
    }
    println!(
        "{kills} kills, {} nodes, {} blobs, {} reports acknowledged, in {:.1} s",
        said.notes.len(),
        said.blobs.len(),
        said.reports.len(),
        start.elapsed().as_secs_f32()
    );
    ensure!(said.notes.len() > kills && said.reports.len() > kills, "the clients did next to nothing");
    Ok(())
}

#[tokio::test]
async fn a_key_leaves_after_its_audit_line_and_the_pin_are_on_disk() -> anyhow::Result<()> {
    let mut member = Member::start()?;
    let (image, _) = member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    connection.image_key(&KeyRequest { digest: image.digest }).await?;
    member.kill();
    let store = member.store().await?;
    let view = store.snapshot()?;
    assert_eq!(view.node_named("n1")?.expect("the node").pin, Some(image.digest));
    let lines: Vec<serde_json::Value> = view.all(tables::AUDIT)?;
    let line = lines.iter().find(|line| line["entry"]["what"] == "image-key").expect("an audit line");
    assert_eq!(line["entry"]["fields"]["image"], image.digest.to_string());
    assert_eq!(line["entry"]["fields"]["boot"], machine.boot.to_string());
    Ok(())
}
