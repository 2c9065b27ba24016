//! Clients: each reads and writes registers through any member, and writes down what it was told.

use crate::cluster::Cluster;
use crate::etcd::Gateway;
use crate::history::{Act, Call};
use moor_api::admin::{DefineNodes, SetAttributes};
use moor_api::client::admin::AdminClient;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Registers: a node each.
pub(crate) const KEYS: usize = 4;
/// The value is in this attribute.
const ATTRIBUTE: &str = "info.note";
/// A client gives a call up after this; whether it takes effect is then unknown.
const GIVE_UP: Duration = Duration::from_secs(3);

/// What clients share.
pub(crate) struct Shared {
    pub(crate) began: Instant,
    /// No value is written twice.
    values: AtomicU64,
    pub(crate) is_over: AtomicBool,
    /// When a write was acknowledged last, in microseconds.
    pub(crate) written: AtomicU64,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            values: AtomicU64::new(1),
            is_over: AtomicBool::new(false),
            written: AtomicU64::new(0),
        }
    }

    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }
}

/// A connection to one member.
pub(crate) enum Line {
    Moord {
        admin: AdminClient,
        /// Whether the last answer may be stale.
        is_stale: Arc<AtomicBool>,
    },
    Etcd(Gateway),
}

impl Line {
    pub(crate) async fn new(to: &Way) -> anyhow::Result<Self> {
        if to.is_etcd {
            return Ok(Self::Etcd(Gateway::new(&to.socket).await?));
        }
        let mut admin = AdminClient::unix(&to.socket).await?;
        let is_stale = Arc::new(AtomicBool::new(false));
        let told = is_stale.clone();
        admin.when_stale(move |_| told.store(true, Ordering::Relaxed));
        Ok(Self::Moord { admin, is_stale })
    }

    /// The value, and whether it was said that it may be old.
    pub(crate) async fn read(&mut self, key: usize) -> anyhow::Result<(u64, bool)> {
        match self {
            Self::Moord { admin, is_stale } => {
                is_stale.store(false, Ordering::Relaxed);
                let nodes = admin.nodes(Some(&name(key))).await?;
                let value = nodes.first().and_then(|node| node.attributes.get(ATTRIBUTE)?.parse().ok()).unwrap_or(0);
                Ok((value, is_stale.load(Ordering::Relaxed)))
            }
            Self::Etcd(gateway) => Ok((gateway.get(&name(key)).await?, false)),
        }
    }

    /// Whether it is known to be done.
    pub(crate) async fn write(&mut self, key: usize, value: u64) -> bool {
        match self {
            Self::Moord { admin, .. } => {
                admin.set(&change(key, value)).await.is_ok_and(|changed| changed.refused.is_empty())
            }
            Self::Etcd(gateway) => gateway.put(&name(key), value).await.is_ok(),
        }
    }
}

/// The call that sets a register.
pub(crate) fn change(key: usize, value: u64) -> SetAttributes {
    let set = [(ATTRIBUTE.to_owned(), value.to_string())].into();
    SetAttributes { range: name(key), set, clear: Vec::new() }
}

/// The way to one member.
#[derive(Clone)]
pub(crate) struct Way {
    socket: PathBuf,
    is_etcd: bool,
}

/// The way to member `at`.
pub(crate) fn way(cluster: &Cluster, at: usize) -> Way {
    Way { socket: cluster.socket(at), is_etcd: cluster.is_etcd() }
}

fn name(key: usize) -> String {
    format!("n{key}")
}

/// Makes the registers; etcd needs none.
pub(crate) async fn define(cluster: &Cluster) -> anyhow::Result<()> {
    if cluster.is_etcd() {
        return Ok(());
    }
    let range = format!("n[0-{}]", KEYS - 1);
    cluster.admin(0).await?.define(&DefineNodes { range, attributes: BTreeMap::new() }).await?;
    Ok(())
}

/// One client: reads and writes anywhere, one call after the other, until all is over.
pub(crate) async fn client(shared: Arc<Shared>, ways: Vec<Way>, mut random: fastrand::Rng) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut lines: Vec<Option<Line>> = ways.iter().map(|_| None).collect();
    while !shared.is_over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(random.u64(0..60))).await;
        let (at, key) = (random.usize(0..ways.len()), random.usize(0..KEYS));
        if lines[at].is_none() {
            lines[at] = Line::new(&ways[at]).await.ok();
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
