//! What others watch a member by: `/healthz` for load balancers, `/metrics` for Prometheus (text format, names by its conventions).

use crate::admin::nodes;
use crate::http::Failure;
use crate::state::Member;
use crate::store::Store as _;
use crate::store::syncs::Figures;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};
use moor_api::client::REQUEST_ID;
use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tracing::Instrument as _;

/// Who asks: by the beginning of the path.
const CALLERS: [(&str, &str); 4] = [("node", "/node/"), ("admin", "/admin/"), ("member", "/member/"), ("public", "/")];
/// Answers by the first digit of their status, from 2 on.
const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// Requests since the member was started.
#[derive(Debug, Default)]
pub struct Requests {
    answers: [[AtomicU64; CLASSES.len()]; CALLERS.len()],
    microseconds: [AtomicU64; CALLERS.len()],
    begun: AtomicU64,
}

impl Requests {
    /// Time that requests of nodes, and of machines that boot, took until their answers began.
    pub(crate) fn spent_on_nodes(&self) -> Duration {
        let of_nodes =
            CALLERS.iter().zip(&self.microseconds).filter(|((caller, _), _)| matches!(*caller, "node" | "public"));
        Duration::from_micros(of_nodes.map(|(_, time)| time.load(Ordering::Relaxed)).sum())
    }
}

tokio::task_local! {
    /// What the request that is being answered belongs to.
    static REQUEST: String;
}

/// What the request that is being answered belongs to, to tell it to other members.
pub(crate) fn request_id() -> Option<String> {
    REQUEST.try_with(Clone::clone).ok()
}

/// What the caller says that its request belongs to, as far as it may go to a log.
fn told(request: &Request) -> Option<&str> {
    let id = request.headers().get(REQUEST_ID)?.to_str().ok()?;
    let is_word = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    (is_word && (1..=64).contains(&id.len())).then_some(id)
}

/// Answers a request so that each line that is logged of it, here and on members that are asked for it, has its id: the caller's, or
/// one of this member's.
async fn followed(member: &Member, request: Request, next: Next) -> Response {
    let id = match told(&request) {
        Some(id) => id.to_owned(),
        // Members talk to each other all the time.
        None if request.uri().path().starts_with("/member/") => return next.run(request).await,
        None => format!("{}-{}", member.identity.name, member.requests.begun.fetch_add(1, Ordering::Relaxed)),
    };
    let span = tracing::info_span!("request", id = id.as_str());
    let answered = async {
        let call = format!("{} {}", request.method(), request.uri().path());
        let response = next.run(request).await;
        tracing::debug!("{call}: {}", response.status());
        response
    };
    REQUEST.scope(id, answered).instrument(span).await
}

/// Counts a request, and the time until its answer begins.
pub async fn count(State(member): State<Arc<Member>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let caller = CALLERS.iter().position(|(_, begin)| path.starts_with(begin)).unwrap_or(CALLERS.len() - 1);
    let began = Instant::now();
    let response = followed(&member, request, next).await;
    let class = usize::from(response.status().as_u16() / 100).saturating_sub(2).min(CLASSES.len() - 1);
    member.requests.answers[caller][class].fetch_add(1, Ordering::Relaxed);
    let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    member.requests.microseconds[caller].fetch_add(took, Ordering::Relaxed);
    response
}

/// `GET /healthz`: 200 as long as nodes are answered from here, with a word on changes; 503 once the store has failed.
pub(crate) async fn health(State(member): State<Arc<Member>>) -> Response {
    let looker = member.clone();
    let is_read = tokio::task::spawn_blocking(move || looker.view().is_ok_and(|view| view.site().is_ok()));
    if !is_read.await.unwrap_or(false) {
        return (StatusCode::SERVICE_UNAVAILABLE, "the store does not answer\n").into_response();
    }
    if let Some(why) = member.calls.removed() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response();
    }
    let standing = member.store.standing();
    let text = if standing.has_majority() {
        "ok\n"
    } else {
        "no majority: known nodes are served for a while, changes wait\n"
    };
    text.into_response()
}

/// `GET /metrics`, for administrators.
pub(crate) async fn metrics(State(member): State<Arc<Member>>) -> Result<Response, Failure> {
    let text = tokio::task::spawn_blocking(move || text(&member)).await.map_err(anyhow::Error::from)??;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

fn head(f: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(f, "# HELP moord_{name} {help}\n# TYPE moord_{name} {kind}")
}

/// How long files of the store took to become durable.
fn syncs(f: &mut String, files: &[Figures]) -> fmt::Result {
    head(f, "sync_seconds", "histogram", "Time that a file of the store took to become durable.")?;
    for Figures { file, within, count, sum, .. } in files {
        for (bound, count) in within {
            writeln!(f, "moord_sync_seconds_bucket{{file=\"{file}\",le=\"{bound}\"}} {count}")?;
        }
        writeln!(f, "moord_sync_seconds_bucket{{file=\"{file}\",le=\"+Inf\"}} {count}")?;
        writeln!(f, "moord_sync_seconds_sum{{file=\"{file}\"}} {sum}")?;
        writeln!(f, "moord_sync_seconds_count{{file=\"{file}\"}} {count}")?;
    }
    head(f, "sync_longest_seconds", "gauge", "The longest of those since the member was started.")?;
    for Figures { file, longest, .. } in files {
        writeln!(f, "moord_sync_longest_seconds{{file=\"{file}\"}} {longest}")?;
    }
    Ok(())
}

fn text(member: &Member) -> Result<String, Failure> {
    let (standing, view) = (member.store.standing(), member.store.snapshot()?);
    let nodes = nodes::select(&view, None)?;
    let enrolled = nodes.iter().filter(|node| node.identity.is_some()).count();
    let deploying = nodes.iter().filter(|node| node.deployment.is_some()).count();
    let voters = standing.members.values().filter(|(_, votes)| *votes).count();
    let disk = rustix::fs::statvfs(&member.config.state_dir).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
    let gauges = [
        ("leader", "Whether this member leads.", u64::from(standing.leader == Some(standing.number))),
        ("majority", "Whether a majority answers, as far as this member can tell.", u64::from(standing.has_majority())),
        ("term", "Term of the last vote.", standing.term),
        ("log_last_index", "Newest entry of this member's log.", standing.last),
        ("log_applied_index", "Newest entry that it has applied.", standing.applied),
        ("members", "Members of the collective.", standing.members.len() as u64),
        ("voters", "Of those, the ones that vote.", voters as u64),
        ("nodes", "Nodes that are defined.", nodes.len() as u64),
        ("nodes_enrolled", "Of those, the ones with an identity.", enrolled as u64),
        ("nodes_ordered", "Nodes with a deployment that is not over.", deploying as u64),
        ("state_free_bytes", "Free space where the member keeps its state.", disk),
    ];
    let (load, is_busy) = member.busy.own();
    let files: Vec<Figures> = member.store.syncs().collect();
    let mut out = String::new();
    let write = |f: &mut String| -> fmt::Result {
        head(f, "info", "gauge", "The member.")?;
        writeln!(f, "moord_info{{version=\"{}\",member=\"{}\"}} 1", env!("CARGO_PKG_VERSION"), member.identity.id)?;
        for (name, help, value) in gauges {
            head(f, name, "gauge", help)?;
            writeln!(f, "moord_{name} {value}")?;
        }
        head(f, "node_answers_at_once", "gauge", "Answers to nodes that are under way at once, on an average.")?;
        writeln!(f, "moord_node_answers_at_once {}.{:02}", load / 100, load % 100)?;
        head(f, "busy", "gauge", "Whether this member is busier than the others: nodes try them first.")?;
        writeln!(f, "moord_busy {}", u8::from(is_busy))?;
        syncs(f, &files)?;
        head(f, "requests_total", "counter", "Requests that were answered, by who asked and the status.")?;
        for ((caller, _), answers) in CALLERS.iter().zip(&member.requests.answers) {
            for (class, count) in CLASSES.iter().zip(answers) {
                let count = count.load(Ordering::Relaxed);
                writeln!(f, "moord_requests_total{{caller=\"{caller}\",status=\"{class}\"}} {count}")?;
            }
        }
        head(f, "request_seconds_total", "counter", "Time until those answers began.")?;
        for ((caller, _), time) in CALLERS.iter().zip(&member.requests.microseconds) {
            let time = Duration::from_micros(time.load(Ordering::Relaxed)).as_secs_f64();
            writeln!(f, "moord_request_seconds_total{{caller=\"{caller}\"}} {time}")?;
        }
        Ok(())
    };
    write(&mut out).map_err(anyhow::Error::from)?;
    Ok(out)
}
