//! Looking at nodes: status, log, and why a node does not boot.

use super::nodes::select;
use crate::http::Failure;
use crate::node::report::HEARTBEAT;
use crate::state::Member;
use crate::store::records::{Armed, NodeRecord};
use crate::store::{Event, Snapshot, Store as _};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use bytes::Bytes;
use http::header;
use moor_api::admin::{Refusal, Why};
use moor_api::problem::{Code, Problem};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;

/// Seconds without a heartbeat after which a node is told to be silent: three that did not come.
const SILENT: u64 = 3 * HEARTBEAT as u64;
/// Refusals that `moor why` shows.
const SHOWN: usize = 50;
/// A stream that has nothing to say sends an empty line this often, so that a dead peer is noticed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

#[derive(Debug, Deserialize)]
pub(super) struct StatusQuery {
    range: Option<String>,
    #[serde(default)]
    history: bool,
    #[serde(default)]
    watch: bool,
}

fn line<T: Serialize>(value: &T) -> Result<Bytes, std::io::Error> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes.into())
}

fn ndjson(body: Body) -> Result<Response, Failure> {
    let response = Response::builder().header(header::CONTENT_TYPE, "application/x-ndjson").body(body);
    response.map_err(|error| anyhow::Error::from(error).into())
}

pub(super) async fn status(
    State(member): State<Arc<Member>>,
    Query(query): Query<StatusQuery>,
) -> Result<Response, Failure> {
    // Watch first: nothing falls between the snapshot and the stream.
    let events = query.watch.then(|| member.store.watch());
    let view = member.view()?;
    let nodes = select(&view, query.range.as_deref())?;
    let mut first = Vec::new();
    for node in &nodes {
        let events = view.events(node.id)?;
        let skip = if query.history { 0 } else { events.len().saturating_sub(1) };
        first.extend(events.into_iter().skip(skip));
    }
    first.sort_by_key(|event| event.time_ms);
    let lines: Vec<_> = first.iter().map(line).collect();
    let Some(events) = events else {
        return ndjson(Body::from_stream(tokio_stream::iter(lines)));
    };
    let (sender, receiver) = mpsc::channel(64);
    let wanted: Option<BTreeSet<_>> = query.range.is_some().then(|| nodes.iter().map(|node| node.id).collect());
    tokio::spawn(async move {
        for line in lines {
            if sender.send(line).await.is_err() {
                return;
            }
        }
        follow(events, wanted, sender).await;
    });
    ndjson(Body::from_stream(ReceiverStream::new(receiver)))
}

async fn follow(
    mut events: broadcast::Receiver<Event>,
    wanted: Option<BTreeSet<moor_api::ids::NodeId>>,
    sender: mpsc::Sender<Result<Bytes, std::io::Error>>,
) {
    loop {
        let next = match tokio::time::timeout(SIGN_OF_LIFE, events.recv()).await {
            Err(_) => Ok(Bytes::from_static(b"\n")),
            Ok(Ok(Event::Status { node, status })) => {
                if wanted.as_ref().is_some_and(|wanted| !wanted.contains(&node)) {
                    continue;
                }
                line(&status)
            }
            // Too slow, or this member was: the watcher is cut off and begins anew, rather than being told less than happened.
            Ok(Ok(Event::Reset) | Err(_)) => return,
        };
        if sender.send(next).await.is_err() {
            return;
        }
    }
}

pub(super) async fn log(State(member): State<Arc<Member>>, Path(name): Path<String>) -> Result<Response, Failure> {
    let view = member.view()?;
    let node = view.node_named(&name)?.ok_or_else(|| Problem::new(Code::NotFound, format!("no node '{name}'")))?;
    let lines: Vec<_> = view.logs(node.id)?.iter().map(line).collect();
    ndjson(Body::from_stream(tokio_stream::iter(lines)))
}

pub(super) async fn why(State(member): State<Arc<Member>>, Path(subject): Path<String>) -> Result<Json<Why>, Failure> {
    let view = member.view()?;
    let node = view.node_named(&subject)?;
    let mut refusals = view.refusals(&canonical(&subject))?;
    let mut state = None;
    if let Some(node) = &node {
        refusals.extend(view.refusals(&node.id.to_string())?);
        state = view.events(node.id)?.pop();
    } else if refusals.is_empty() {
        return Err(Problem::new(
            Code::NotFound,
            format!(
                "'{subject}' is no node, and no machine with this UUID or MAC was refused: it has not been heard of"
            ),
        )
        .into());
    }
    refusals.sort_by_key(|refusal| std::cmp::Reverse(refusal.time_ms));
    refusals.truncate(SHOWN);
    let mut advice = advice(&view, node.as_ref(), &refusals, state.as_ref())?;
    let heard = node.as_ref().and_then(|node| member.heartbeats.age(node.id));
    if let Some(age) = heard.filter(|age| *age > SILENT) {
        advice.push(format!("it was last heard of {age} s ago: it is down, or cut off"));
    }
    Ok(Json(Why { subject, node: node.map(|node| node.name), state, heard, refusals, advice }))
}

fn canonical(subject: &str) -> String {
    if let Ok(uuid) = uuid::Uuid::parse_str(subject) {
        return uuid.to_string();
    }
    subject.parse::<moor_api::ids::HwAddr>().map_or_else(|_| subject.to_owned(), |address| address.to_string())
}

fn advice(
    view: &Snapshot,
    node: Option<&NodeRecord>,
    refusals: &[Refusal],
    state: Option<&moor_api::admin::StatusEvent>,
) -> Result<Vec<String>, Failure> {
    let mut out = Vec::new();
    let Some(node) = node else {
        out.push("no node has this machine's UUID or MAC: `moor node define NAME id.uuid=UUID`".into());
        return Ok(out);
    };
    let name = &node.name;
    match &node.deployment {
        None => out.push(format!("it has no profile: `moor deploy {name} -n PROFILE`")),
        Some(order) if view.profile(order.profile.as_str())?.is_none() => {
            out.push(format!("its profile '{0}' is not published: `moor profile publish {0}`", order.profile));
        }
        Some(_) => {}
    }
    if node.identity.is_none() && node.armed == Armed::No {
        out.push(format!("it has no identity and may not enrol: `moor arm {name}`"));
    }
    if !node.attributes.keys().any(|attribute| attribute == "id.uuid" || attribute.ends_with("hwaddr")) {
        out.push(format!(
            "no machine can be known as it: set id.uuid or net.hwaddr (`moor node set {name} id.uuid=UUID`)"
        ));
    }
    // Only what is newer than the last state says why it stands still now.
    let newest = refusals.first().filter(|refusal| state.is_none_or(|state| refusal.time_ms >= state.time_ms));
    if newest.is_some_and(|refusal| refusal.problem.code == Code::IdentityMismatch) {
        out.push(format!("a machine with another identity asks under its name: if it is the right one, `moor node trust rearm {name}`"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::event as status;
    use moor_api::ids::NodeId;

    #[tokio::test]
    async fn a_watch_ends_where_a_snapshot_took_the_place_of_what_happened() {
        let (told, events) = broadcast::channel(8);
        let event = |state| Event::Status { node: NodeId::from_bytes([1; 16]), status: status(state) };
        for event in [event("image"), Event::Reset, event("booted")] {
            told.send(event).unwrap();
        }
        let (sender, mut receiver) = mpsc::channel(8);
        follow(events, None, sender).await;
        let line = receiver.recv().await.unwrap().unwrap();
        assert!(std::str::from_utf8(&line).unwrap().contains("image"));
        assert!(receiver.recv().await.is_none(), "it goes on behind what it did not tell");
    }
}
