//! What nodes report: states, output, the end of the boot stage, signs of life.

use super::Caller;
use crate::http::{Failure, clean, parse};
use crate::state::{Member, now_ms};
use crate::store::Command;
use axum::Json;
use axum::extract::{Extension, State};
use bytes::Bytes;
use http::StatusCode;
use moor_api::admin::{LogEvent, StatusEvent};
use moor_api::ids::BootId;
use moor_api::node::{Heartbeat, HeartbeatReply, LogReport, MAX_TRACE, StageClosed, StatusReport, TraceReport};
use moor_api::problem::{Code, Problem};
use std::sync::Arc;

/// Longest text of a log report, in bytes.
const MAX_LOG: usize = 64 << 10;
/// Longest sentence of a status report, in characters.
const MAX_DETAIL: usize = 1000;
/// Most figures of a status report.
const MAX_FIGURES: usize = 64;
/// Seconds between two heartbeats.
pub const HEARTBEAT: u32 = 60;

fn bad(detail: impl Into<String>) -> Failure {
    Failure(Problem::new(Code::BadRequest, detail))
}

fn own_boot(caller: &Caller, boot: BootId) -> Result<(), Failure> {
    if caller.claims.boot == boot { Ok(()) } else { Err(bad("the report is of another boot than the token")) }
}

/// A word: `booted`, `switch-root`.
fn is_word(text: &str, maximum: usize) -> bool {
    (1..=maximum).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

pub(super) async fn status(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    let report: StatusReport = parse(&body)?;
    own_boot(&caller, report.boot)?;
    if !is_word(&report.state, 32) {
        return Err(bad("a state is a word of at most 32 letters, digits, '-', '_' and '.'"));
    }
    if report.figures.len() > MAX_FIGURES || report.figures.keys().any(|name| !is_word(name, 64)) {
        return Err(bad(format!(
            "a report has at most {MAX_FIGURES} figures, whose names are words of at most 64 characters"
        )));
    }
    let event = StatusEvent {
        node: caller.node.name.clone(),
        boot: Some(report.boot),
        state: report.state,
        detail: clean(&report.detail, MAX_DETAIL),
        time_ms: now_ms(),
        uptime_ms: report.uptime_ms,
        figures: report.figures,
    };
    member.propose_for_node(Command::Status { id: caller.node.id, sequence: Some(report.sequence), event }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn log(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    let report: LogReport = parse(&body)?;
    own_boot(&caller, report.boot)?;
    if report.text.len() > MAX_LOG {
        return Err(bad(format!("a log report has at most {} KiB of text", MAX_LOG >> 10)));
    }
    let lines: Vec<String> = report.text.lines().map(|line| clean(line, MAX_LOG)).collect();
    let phase = report.phase.map_or("agent", moor_api::deploy::PhaseName::as_str).to_owned();
    let event = LogEvent { time_ms: now_ms(), phase, text: lines.join("\n") };
    member.propose_for_node(Command::Log { id: caller.node.id, event }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn stage_closed(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    let report: StageClosed = parse(&body)?;
    own_boot(&caller, report.boot)?;
    if caller.boot().is_none_or(|boot| !boot.closed) {
        member.propose_for_node(Command::CloseStage { id: caller.node.id, boot: report.boot }).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn heartbeat(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<HeartbeatReply>, Failure> {
    let report: Heartbeat = parse(&body)?;
    own_boot(&caller, report.boot)?;
    member.heartbeats.note(caller.node.id);
    member.note_trust(&caller.node, report.boot, report.trust_version, report.ssh_version);
    let view = member.view()?;
    let generation = match &caller.node.deployment {
        Some(order) => view.profile(order.profile.as_str())?.map(|profile| profile.generation),
        None => None,
    };
    let trust_version = member.trust.version();
    let bundle = if report.trust_version < trust_version { Some(member.bundle()?) } else { None };
    let members = caller.endpoints(&member)?;
    let ssh_version = member.trust.ssh().held.version;
    Ok(Json(HeartbeatReply { interval: HEARTBEAT, trust_version, ssh_version, generation, members, bundle }))
}

/// Only of the image that this boot boots, and once: the list is advice to later boots of it, and no node makes it alone. A second report is
/// answered as the first was, whose answer may have been lost.
pub(super) async fn trace(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    let report: TraceReport = parse(&body)?;
    own_boot(&caller, report.boot)?;
    let image = {
        let view = member.view()?;
        let profile = caller.generation(&view)?;
        view.image(&profile.manifest.image.to_string())?
    };
    let image = image.filter(|image| image.digest == report.digest);
    let image = image.ok_or_else(|| bad("the trace is of another image than this boot boots"))?;
    // A chunk is never smaller than 16 KiB.
    if report.chunks.len() > MAX_TRACE || report.chunks.iter().any(|chunk| *chunk > image.size >> 14) {
        return Err(bad("the trace has more chunks than there may be, or chunks that the image has not"));
    }
    let is_known = |boot| caller.node.boots.iter().any(|record| record.boot == boot);
    if !member.traces.begins(caller.node.id, report.boot, is_known) {
        return Ok(StatusCode::NO_CONTENT);
    }
    let merge = tokio::task::spawn_blocking(move || member.traces.merge(report.digest, &report.chunks));
    merge.await.map_err(anyhow::Error::from)?.map_err(anyhow::Error::from)?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_says_does_not_reach_a_terminal_raw() {
        assert_eq!(clean("a\u{1b}[2Jb\nc", 100), "a [2Jb c");
        assert_eq!(clean("äöü", 2), "äö");
        for (word, good) in [
            ("booted", true),
            ("switch-root", true),
            ("image.bytes_fetched", true),
            ("", false),
            ("a b", false),
            ("a\u{1b}", false),
        ] {
            assert_eq!(is_word(word, 32), good, "{word:?}");
        }
        assert!(!is_word(&"x".repeat(33), 32));
    }
}
