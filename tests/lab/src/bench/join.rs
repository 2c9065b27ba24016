//! Table *join*: what nodes notice while a new member fills itself with the collective's content.

use super::load::{Answers, Client, Running, request};
use super::store::boot_stage;
use super::{Bar, Lab, Row, Table};
use crate::Collective;
use crate::crowd::{Machine, boot_all, image, machines};
use anyhow::{Context as _, ensure};
use moor_api::trust::SiteBundle;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Images, and bytes of each: five gigabytes together.
const IMAGES: u64 = 20;
const SIZE: usize = 256_000_000;
/// Nodes that call, and the pause of each between two calls for its settings, and between two reports.
const CALLERS: usize = 32;
const PAUSE: Duration = Duration::from_millis(50);
const REPORT: Duration = Duration::from_secs(1);
/// Machines that boot meanwhile, over and over, and what each reads of its image.
const BOOTING: usize = 20;
const READS: u64 = 40;
/// So long calls are looked at before the new member comes, after their connections have been in use for a while.
const BEFORE: Duration = Duration::from_mins(1);
const WARM: Duration = Duration::from_secs(2);
/// The new member has everything within this time, and is looked at this often.
const LIMIT: Duration = Duration::from_mins(5);
const LOOK: Duration = Duration::from_millis(200);

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("join");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    lab.say("join: a member with five gigabytes");
    let mut collective = runtime.block_on(Collective::new(&lab.bins, lab.dir, 1))?;
    let keys = [lab.dir.join("callers"), lab.dir.join("booting")];
    keys.iter().try_for_each(std::fs::create_dir)?;
    let (site, callers) = runtime.block_on(boot_stage(&collective, &keys[0], CALLERS))?;
    let mut booting = runtime.block_on(async {
        let mut admin = collective.admin(0).await?;
        for number in 0..IMAGES {
            image(&mut admin, &format!("content{number}"), SIZE).await?;
        }
        machines(&mut admin, &keys[1], "b", BOOTING, &BTreeMap::new()).await
    })?;
    table.facts.push(format!(
        "one member with {IMAGES} images of {} MB; a second one joins; {CALLERS} nodes ask for their settings every {} ms and report their state every {} ms, \
         and {BOOTING} boot over and over; everything on two cores and one disk",
        SIZE / 1_000_000,
        PAUSE.as_millis(),
        REPORT.as_millis()
    ));
    let is_over = AtomicBool::new(false);
    let urls = collective.urls();
    let figures = std::thread::scope(|scope| {
        let boots = scope.spawn(|| keep_booting(&mut booting, &site, &urls, &is_over));
        let figures = join(lab, &runtime, &mut collective, (&site, &callers));
        is_over.store(true, Ordering::Relaxed);
        let boots = boots.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the machines panicked")))?;
        figures.map(|figures| (figures, boots))
    });
    let ((before, during, filled), boots) = figures?;
    for (call, before, during) in [
        ("settings of a node", before.settings, during.settings),
        ("reports of a node", before.reports, during.reports),
    ] {
        let row = |what: &str, answers: &Answers| {
            let row = format!("{call}, 99th percentile: {what}");
            anyhow::Ok(with_failures(Row::alone(&row, "ms", answers.p99()?, Bar::None), answers))
        };
        table.rows.push(row("before", &before)?);
        table.rows.push(row("while a member joins", &during)?);
        let ratio = during.p99()? / before.p99()?;
        table.rows.push(Row::alone(&format!("{call}, that over before"), "", ratio, Bar::AtMost(2.0)));
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let megabytes = (IMAGES * SIZE as u64) as f64 / 1e6;
    table.rows.push(Row::alone("the new member takes in", "MB/s", megabytes / filled.as_secs_f64(), Bar::None));
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    table.rows.push(Row::alone("boots meanwhile", "", boots as f64, Bar::None));
    Ok(table)
}

fn with_failures(row: Row, answers: &Answers) -> Row {
    match answers.failures() {
        Some(failures) => row.noted(&failures),
        None => row,
    }
}

/// What the nodes that call were answered.
struct Answered {
    settings: Answers,
    reports: Answers,
}

/// The nodes that call, each by two connections.
struct Calls {
    settings: Running,
    reports: Running,
}

impl Calls {
    /// Their reports are numbered from `first` on.
    async fn start(port: u16, site: &SiteBundle, callers: &[(Machine, String)], first: u64) -> anyhow::Result<Self> {
        let (mut settings, mut reports) = (Vec::new(), Vec::new());
        for (machine, token) in callers {
            let tls = Arc::new(machine.tls(site)?);
            let requests = vec![request("GET", "/node/v1/config", Some(token), "")];
            settings.push(Client { tls: tls.clone(), port, requests, expected: "interfaces", pause: PAUSE });
            // A report that comes a second time is taken for done, which costs less: there are enough of them.
            let count = (BEFORE + LIMIT).as_secs() / REPORT.as_secs();
            let report = |sequence: u64| {
                let body =
                    json!({ "boot": machine.boot_id(), "sequence": sequence, "state": "image", "uptime_ms": 1000 });
                request("POST", "/node/v1/status", Some(token), &body.to_string())
            };
            let requests = (first..first + count).map(report).collect();
            reports.push(Client { tls, port, requests, expected: "", pause: REPORT });
        }
        Ok(Self { settings: Running::start(settings, WARM).await?, reports: Running::start(reports, WARM).await? })
    }

    async fn stop(self) -> anyhow::Result<Answered> {
        Ok(Answered { settings: self.settings.stop().await?, reports: self.reports.stop().await? })
    }
}

/// What nodes are answered before a member joins and while it does, and how long it takes until it has everything.
fn join(
    lab: &Lab<'_>,
    runtime: &Runtime,
    collective: &mut Collective,
    (site, callers): (&SiteBundle, &[(Machine, String)]),
) -> anyhow::Result<(Answered, Answered, Duration)> {
    let port = collective.port(0);
    let before = runtime.block_on(async {
        let calls = Calls::start(port, site, callers, 1).await?;
        tokio::time::sleep(WARM + BEFORE).await;
        calls.stop().await
    })?;
    lab.say("join: a second member comes");
    let wanted = blobs(&collective.dir(0).join("state/blobs"))?;
    // The connections are in use for as long before anything is counted as they were before.
    let calls = runtime.block_on(async {
        let calls = Calls::start(port, site, callers, 1_000_000).await?;
        tokio::time::sleep(WARM).await;
        anyhow::Ok(calls)
    })?;
    let at = runtime.block_on(collective.add(true))?;
    let began = Instant::now();
    while blobs(&collective.dir(at).join("state/blobs"))? < wanted {
        ensure!(began.elapsed() < LIMIT, "the new member does not fill itself: {}", collective.log_tail(at));
        std::thread::sleep(LOOK);
    }
    let filled = began.elapsed();
    Ok((before, runtime.block_on(calls.stop())?, filled))
}

/// Boots all machines over and over until it is over; how many boots that were.
fn keep_booting(
    machines: &mut [Machine],
    site: &SiteBundle,
    urls: &[String],
    is_over: &AtomicBool,
) -> anyhow::Result<usize> {
    let mut boots = 0;
    while !is_over.load(Ordering::Relaxed) {
        boots += boot_all(machines, site, urls, READS, (Duration::from_secs(2), LIMIT))?.len();
        machines.iter_mut().try_for_each(Machine::power_cycle)?;
    }
    Ok(boots)
}

/// Blobs that are whole: a part has another name.
fn blobs(dir: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in dir.read_dir().with_context(|| format!("reading '{}'", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count += blobs(&entry.path())?;
        } else {
            let name = entry.file_name();
            let is_digest = |text: &str| text.len() >= 60 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            count += usize::from(name.to_str().is_some_and(is_digest));
        }
    }
    Ok(count)
}
