//! Table *store*: changes and reads on three members, beside etcd with the same clients; how soon changes go on when the leader dies; what ten
//! thousand nodes take; how often nodes get their settings.
//!
//! A change of ours is what an administrator's call makes: an attribute set over HTTPS, with the token checked and the call in the audit log. etcd's
//! is a key set through its JSON gateway, over HTTPS as well. Clients of both talk to the leader, which is the quickest way for both.
//!
//! `MOOR_PARTS=changes,reads,deaths,nodes` makes some of it, `MOOR_WRITERS=1,16,128` changes by so many clients.

use super::etcd::{self, Etcd};
use super::load::{Client, Rate, drive, failures, request};
use super::web::Authority;
use super::{Bar, Lab, PAIRS, Paired, Row, Table, pairs};
use crate::Collective;
use crate::crowd::{Machine, machines, publish};
use crate::process::resident;
use anyhow::{Context as _, ensure};
use axum::body::Body;
use http::Request;
use http_body_util::BodyExt as _;
use moor_agent::members::Members;
use moor_api::admin::{DefineNodes, SetAttributes, TokenRequest};
use moor_api::client::tls::member_tls_config;
use moor_api::node::Stage;
use moor_api::trust::SiteBundle;
use moord::http::{Connection, Peer};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tower::ServiceExt as _;

/// Members of a collective.
const MEMBERS: usize = 3;
/// Leaders that are killed.
const DEATHS: usize = 10;
/// Clients that change something at a time.
const WRITERS: [usize; 3] = [1, 16, 128];
/// Clients that read at a time.
const READERS: usize = 64;
/// Keys, or nodes.
const KEYS: usize = 1000;
/// Requests that a client goes through before it begins anew.
const ROUND: usize = 64;
/// Bytes of a value.
const VALUE: usize = 256;
/// What is measured, and what goes before it.
const TIME: Duration = Duration::from_secs(3);
const WARM: Duration = Duration::from_millis(500);
/// Nodes, and values of each.
const NODES: usize = 10_000;
const VALUES: usize = 40;

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("store");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if is_wanted("changes") || is_wanted("reads") {
        beside_etcd(lab, &runtime, &mut table)?;
    }
    if is_wanted("deaths") {
        leaders_die(lab, &runtime, &mut table)?;
    }
    if is_wanted("nodes") {
        many_nodes(lab, &runtime, &mut table)?;
    }
    Ok(table)
}

/// Whether a part of the table is to be made.
fn is_wanted(part: &str) -> bool {
    is_in("MOOR_PARTS", part)
}

/// Whether a variable lists it, or is not set.
fn is_in(variable: &str, what: &str) -> bool {
    std::env::var(variable).map_or(true, |list| list.split(',').any(|wanted| wanted.trim() == what))
}

fn beside_etcd(lab: &Lab<'_>, runtime: &Runtime, table: &mut Table) -> anyhow::Result<()> {
    table.facts.push(format!(
        "{}, three members, TLS, everything else as it comes; values of {VALUE} bytes, {KEYS} keys; members, clients and generator share two cores and \
         one file system; all clients talk to the leader over HTTPS, etcd's to its JSON gateway",
        etcd::version()?
    ));
    table.facts.push(
        "a change of ours: an attribute of a node set by an administrator's call, token checked, audited, applied by the member that answers; a read of ours, \
         as of etcd: linearizable"
            .into(),
    );
    let authority = Authority::new(lab.dir)?;
    lab.say("store: three members of etcd, three of ours");
    let etcd = Etcd::start(lab.dir, &authority, lab.dir)?;
    let (_collective, site, token, port) = runtime.block_on(three(lab))?;
    let tls = Arc::new(member_tls_config(&site, None)?);
    let ours = |requests, expected| Client { tls: tls.clone(), port, requests, expected, pause: Duration::ZERO };
    for writers in
        WRITERS.into_iter().filter(|writers| is_wanted("changes") && is_in("MOOR_WRITERS", &writers.to_string()))
    {
        lab.say(&format!("store: {writers} clients write"));
        let both = pairs(
            PAIRS,
            || {
                let clients = (0..writers).map(|client| ours(keys(client, |at| set(at, &token)), r#""refused":{}"#));
                runtime.block_on(drive(clients.collect(), WARM, TIME))
            },
            || {
                let put = |at| etcd::put(&node(at), &value());
                let clients = (0..writers).map(|client| etcd.client(keys(client, put), "revision"));
                runtime.block_on(drive(clients.collect(), WARM, TIME))
            },
        )?;
        let what = if writers == 1 { "1 client".to_owned() } else { format!("{writers} clients") };
        rows(table, &format!("changes, {what}"), &both, Bar::AtLeast(1.0));
    }
    if !is_wanted("reads") {
        return Ok(());
    }
    lab.say("store: reads");
    let read = |at: usize| request("GET", &format!("/admin/v1/nodes?range={}", node(at)), Some(&token), "");
    let both = pairs(
        PAIRS,
        || {
            let clients = (0..READERS).map(|client| ours(keys(client, read), "info.note"));
            runtime.block_on(drive(clients.collect(), WARM, TIME))
        },
        || {
            let clients = (0..READERS).map(|client| etcd.client(keys(client, |at| etcd::range(&node(at))), "kvs"));
            runtime.block_on(drive(clients.collect(), WARM, TIME))
        },
    )?;
    rows(table, &format!("reads of a node's attributes, {READERS} clients"), &both, Bar::None);
    lab.say("store: etcd by its own generator");
    table.facts.push(format!("etcd by its own generator over gRPC, one run: {}", etcd.check_perf()?));
    Ok(())
}

fn rows(table: &mut Table, what: &str, both: &(Vec<Rate>, Vec<Rate>), bar: Bar) {
    let rate = Paired::of(both, |rate| rate.per_second);
    let mut row = Row::paired(&format!("{what}: in a second"), "1/s", "etcd", &rate, bar);
    for (who, rates) in [("ours", &both.0), ("etcd", &both.1)] {
        if let Some(failures) = failures(rates) {
            row = row.noted(&format!("{who}: {failures}"));
        }
    }
    table.rows.push(row);
    let slowest = Paired::of(both, |rate| rate.p99);
    table.rows.push(Row::paired(&format!("{what}: 99th percentile"), "ms", "etcd", &slowest, Bar::None));
}

/// Kills the leader over and over; how long the next change took that another member was asked for, at worst.
fn leaders_die(lab: &Lab<'_>, runtime: &Runtime, table: &mut Table) -> anyhow::Result<()> {
    lab.say(&format!("store: {DEATHS} leaders die"));
    let dir = lab.dir.join("deaths");
    std::fs::create_dir(&dir)?;
    let seconds = runtime.block_on(async {
        let mut collective = Collective::new(&lab.bins, &dir, MEMBERS).await?;
        let define = DefineNodes { range: node(0), attributes: BTreeMap::new() };
        collective.admin(0).await?.define(&define).await?;
        let mut seconds = Vec::with_capacity(DEATHS);
        for death in 0..DEATHS {
            let leader = collective.leader().await?;
            let mut admin = collective.admin((leader + 1) % MEMBERS).await?;
            let set = [("info.note".to_owned(), format!("death {death}"))].into();
            let change = SetAttributes { range: node(0), set, clear: Vec::new() };
            collective.kill(leader);
            let began = Instant::now();
            // A refusal is one that an administrator would see: it is tried again, as he would.
            while let Err(error) = admin.set(&change).await {
                ensure!(error.is_transient(), "{error}");
                ensure!(began.elapsed() < Duration::from_mins(1), "changes do not go on: {error}");
            }
            seconds.push(began.elapsed().as_secs_f64());
            collective.start(leader)?;
            caught_up(&collective, leader).await?;
        }
        anyhow::Ok(seconds)
    })?;
    let worst = seconds.iter().copied().fold(0.0, f64::max);
    table.facts.push(format!(
        "deaths of leaders: {DEATHS} times SIGKILL to the one of {MEMBERS} members that leads, and a change through another one at once, tried again until it is \
         acknowledged; middle {:.2} s",
        super::pairs::median(&seconds)
    ));
    table.rows.push(Row::alone("changes go on after a leader's death, at worst", "s", worst, Bar::AtMost(3.0)));
    Ok(())
}

/// Waits until a member that was started has what the leader has: the next death would find no majority before.
async fn caught_up(collective: &Collective, at: usize) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_mins(1);
    loop {
        let (own, leads) = (collective.view(at).await?, collective.view(collective.leader().await?).await?);
        if own.majority && own.applied >= leads.applied {
            return Ok(());
        }
        ensure!(Instant::now() < end, "it does not catch up: {}", collective.log_tail(at));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Three members with nodes; what is known of them, an administrator's token, and the leader's port.
async fn three(lab: &Lab<'_>) -> anyhow::Result<(Collective, SiteBundle, String, u16)> {
    let collective = Collective::new(&lab.bins, lab.dir, MEMBERS).await?;
    let leader = collective.leader().await?;
    let mut admin = collective.admin(leader).await?;
    let range = format!("n[0000-{:04}]", KEYS - 1);
    let attributes = [("info.note".to_owned(), value())].into();
    admin.define(&DefineNodes { range, attributes }).await?;
    let token = admin.create_token(&TokenRequest { name: "bench".into(), lifetime: 86_400 }).await?.token;
    let site = admin.site().await?.bundle;
    let port = collective.port(leader);
    Ok((collective, site, token, port))
}

fn node(at: usize) -> String {
    format!("n{at:04}")
}

fn value() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(VALUE).collect()
}

fn set(at: usize, token: &str) -> Vec<u8> {
    let body = format!(r#"{{"range":"{}","set":{{"info.note":"{}"}}}}"#, node(at), value());
    request("POST", "/admin/v1/nodes/set", Some(token), &body)
}

/// The requests of a client, each for another key.
fn keys(client: usize, request: impl Fn(usize) -> Vec<u8>) -> Vec<Vec<u8>> {
    (0..ROUND).map(|at| request((client * ROUND + at * 7) % KEYS)).collect()
}

fn many_nodes(lab: &Lab<'_>, runtime: &Runtime, table: &mut Table) -> anyhow::Result<()> {
    lab.say(&format!("store: {NODES} nodes"));
    let dir = lab.dir.join("many");
    std::fs::create_dir(&dir)?;
    let mut collective = runtime.block_on(async {
        let collective = Collective::new(&lab.bins, &dir, 1).await?;
        fill(&collective).await?;
        anyhow::Ok(collective)
    })?;
    table.facts.push(format!("one member with {NODES} nodes of {VALUES} values for memory, start and settings"));
    let megabytes = |bytes: u64| {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
        let megabytes = bytes as f64 / 1e6;
        megabytes
    };
    let memory = |collective: &Collective| resident(collective.id(0).context("the member is gone")?).map(megabytes);
    let what = format!("{NODES} nodes of {VALUES} values");
    let row = format!("{what}: resident memory after they were made and a snapshot");
    table.rows.push(Row::alone(&row, "MB", memory(&collective)?, Bar::AtMost(200.0)));

    lab.say("store: settings of nodes");
    let (site, booting) = runtime.block_on(boot_stage(&collective, &dir, READERS))?;
    let client = |(machine, token): &(Machine, String)| {
        let tls = Arc::new(machine.tls(&site)?);
        let requests = vec![request("GET", "/node/v1/config", Some(token), "")];
        anyhow::Ok(Client {
            tls,
            port: collective.port(0),
            requests,
            expected: r#""interfaces""#,
            pause: Duration::ZERO,
        })
    };
    let mut rates = Vec::new();
    for _ in 0..PAIRS {
        let clients = booting.iter().map(client).collect::<Result<Vec<_>, _>>()?;
        rates.push(runtime.block_on(drive(clients, WARM, TIME))?);
    }
    let middle = |figure: fn(&Rate) -> f64| super::pairs::median(&rates.iter().map(figure).collect::<Vec<_>>());
    let row = format!("settings of a node, {READERS} connections: in a second");
    let mut row = Row::alone(&row, "1/s", middle(|rate| rate.per_second), Bar::AtLeast(20_000.0));
    if let Some(failures) = failures(&rates) {
        row = row.noted(&failures);
    }
    table.rows.push(row);
    let row = format!("settings of a node, {READERS} connections: 99th percentile");
    table.rows.push(Row::alone(&row, "ms", middle(|rate| rate.p99), Bar::None));
    let row = format!("{what}: resident memory after that");
    table.rows.push(Row::alone(&row, "MB", memory(&collective)?, Bar::None));

    lab.say("store: start");
    for (how, is_killed) in [("in good order", false), ("by SIGKILL", true)] {
        let mut seconds = Vec::new();
        for _ in 0..PAIRS {
            if is_killed {
                collective.kill(0);
            } else {
                collective.stop(0);
            }
            let began = Instant::now();
            collective.start(0)?;
            runtime.block_on(async {
                collective.admin(0).await?.nodes(Some("n0000")).await.map_err(anyhow::Error::from)
            })?;
            seconds.push(began.elapsed().as_secs_f64());
        }
        let row = format!("{what}: from the start to the first answer, after an end {how}");
        table.rows.push(Row::alone(&row, "s", super::pairs::median(&seconds), Bar::AtMost(2.0)));
    }
    let row = format!("{what}: resident memory after a start");
    table.rows.push(Row::alone(&row, "MB", memory(&collective)?, Bar::None));

    lab.say("store: settings of nodes, without a network");
    collective.stop(0);
    let rate = runtime.block_on(in_process(&collective, &booting))?;
    table.rows.push(Row::alone(
        "settings of a node, in process, without TLS and sockets: in a second",
        "1/s",
        rate,
        Bar::None,
    ));
    Ok(())
}

/// So many values, as a site has them.
fn values() -> BTreeMap<String, String> {
    let mut values: BTreeMap<String, String> = [
        ("groups", "compute,rack12"),
        ("type", "compute"),
        ("id.model", "PowerEdge R6625"),
        ("info.note", "delivered in March, memory replaced in May"),
        ("location.room", "machine room 2"),
        ("location.row", "C"),
        ("location.rack", "C12"),
        ("location.u", "17"),
        ("location.height", "1"),
        ("net.ipv4_method", "static"),
        ("net.ipv4_address", "10.12.3.4/16"),
        ("net.ipv4_gateway", "10.12.0.1"),
        ("net.mtu", "9000"),
        ("net.ib0.ipv4_method", "static"),
        ("net.ib0.ipv4_address", "10.13.3.4/16"),
        ("net.ib0.mtu", "4092"),
        ("ntp.servers", "10.12.0.1,10.12.0.2"),
        ("dns.servers", "10.12.0.1,10.12.0.2"),
        ("dns.domain", "cluster.example"),
        ("time.zone", "Europe/Berlin"),
        ("locale.lang", "C.UTF-8"),
        ("locale.keymap", "us"),
        ("hardwaremanagement.manager", "10.14.3.4"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    for number in values.len()..VALUES {
        values.insert(format!("custom.setting{number}"), format!("value {number} of this site"));
    }
    values
}

/// Makes the nodes, and as many changes as a snapshot comes after.
async fn fill(collective: &Collective) -> anyhow::Result<()> {
    let mut admin = collective.admin(0).await?;
    let range = format!("n[0000-{:04}]", NODES - 1);
    let changed = admin.define(&DefineNodes { range: range.clone(), attributes: values() }).await?;
    ensure!(changed.nodes.len() == NODES, "{} nodes of {NODES}", changed.nodes.len());
    for room in ["1", "2"] {
        let set = [("location.room".to_owned(), room.to_owned())].into();
        admin.set(&SetAttributes { range: range.clone(), set, clear: Vec::new() }).await?;
    }
    let end = Instant::now() + Duration::from_mins(1);
    while std::fs::read_dir(collective.dir(0).join("state/store/snapshots"))?.next().is_none() {
        ensure!(Instant::now() < end, "no snapshot is made");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Until it is whole.
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(())
}

/// So many machines in their boot stage, each with its token.
pub(super) async fn boot_stage(
    collective: &Collective,
    dir: &Path,
    count: usize,
) -> anyhow::Result<(SiteBundle, Vec<(Machine, String)>)> {
    let mut admin = collective.admin(0).await?;
    publish(&mut admin, 1 << 20).await?;
    let site = admin.site().await?.bundle;
    let mut booting = Vec::new();
    for mut machine in machines(&mut admin, dir, "c", count, &values()).await? {
        let end = Instant::now() + Duration::from_mins(1);
        let token = loop {
            let mut members = Members::new(&site, machine.session(), collective.urls())?;
            match machine.log_in(&site, &mut members, Stage::Boot).await {
                Ok((_, reply)) => break reply.token,
                // All hellos are from one address, which the member lets in slowly.
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        };
        booting.push((machine, token));
    }
    Ok((site, booting))
}

/// Answers in a second by the same member in this process: its routes are called as functions.
async fn in_process(collective: &Collective, booting: &[(Machine, String)]) -> anyhow::Result<f64> {
    let config = moord::config::Config::read(&collective.dir(0).join("moord.toml"))?;
    let member = moord::state::Member::open(config).await?;
    let router = moord::router(&member);
    let answered = Arc::new(AtomicU64::new(0));
    let (began, until) = (Instant::now(), Instant::now() + TIME);
    let mut running = Vec::new();
    for (machine, token) in booting {
        let connection = Connection::new(Peer::Tls {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
            client_key: Some(machine.session_key()),
            exporter: Some([0; 32]),
            member: None,
        });
        let router = router.clone().layer(axum::Extension(connection));
        let (answered, bearer) = (answered.clone(), format!("Bearer {token}"));
        running.push(tokio::spawn(async move {
            while Instant::now() < until {
                let request = Request::get("/node/v1/config").header("authorization", &bearer).body(Body::empty())?;
                let response = router.clone().oneshot(request).await?;
                ensure!(response.status().is_success(), "{}", response.status());
                response.into_body().collect().await?;
                answered.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
            anyhow::Ok(())
        }));
    }
    for task in running {
        task.await.context("a reader panicked")??;
    }
    let seconds = began.elapsed().as_secs_f64();
    drop(router);
    member.store.close().await;
    #[expect(clippy::cast_precision_loss, reason = "some millions")]
    let rate = answered.load(Ordering::Relaxed) as f64 / seconds;
    Ok(rate)
}
