//! Calls on nodes: each evaluates a range, then proposes one command per node.

use super::audit::Line;
use crate::http::{Failure, parse};
use crate::model::{attributes, noderange};
use crate::secrets::Place;
use crate::state::{Member, now_ms};
use crate::store::records::{Armed, Identity, NodeRecord};
use crate::store::{Command, Outcome, Snapshot, Store as _, StoreError, tables};
use axum::extract::{Query, State};
use axum::{Extension, Json};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use moor_api::admin::{
    ArmRequest, Changed, DefineNodes, DeployRequest, NodeView, RangeRequest, SetAttributes, TrustState,
};
use moor_api::ids::{DeploymentId, NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use serde::Deserialize;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Commands of one request that wait at a time.
const AT_A_TIME: usize = 512;

/// A snapshot as ranges ask it. Names are looked up one by one: a range of one node costs the same however many there are.
struct Nodes<'a> {
    view: &'a Snapshot,
    /// The first failure of the database: what was found after it counts for nothing.
    failed: RefCell<Option<StoreError>>,
}

impl Nodes<'_> {
    fn found<T: Default>(&self, found: Result<T, StoreError>) -> T {
        found.unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            T::default()
        })
    }
}

/// By name, as they are shown.
fn in_order(mut nodes: Vec<NodeRecord>) -> Vec<NodeRecord> {
    nodes.sort_by(|one, other| one.name.cmp(&other.name));
    nodes
}

impl noderange::Lookup for Nodes<'_> {
    fn all(&self) -> Vec<NodeName> {
        in_order(self.found(self.view.nodes())).into_iter().map(|node| node.name).collect()
    }

    fn exists(&self, name: &str) -> bool {
        self.found(self.view.get::<NodeId>(tables::NAMES, name)).is_some()
    }

    fn group(&self, name: &str) -> Option<Vec<NodeName>> {
        if name == "everything" {
            return Some(self.all());
        }
        let has = |node: &NodeRecord| {
            node.attributes.get("groups").is_some_and(|groups| groups.split(',').any(|group| group.trim() == name))
        };
        let nodes = in_order(self.found(self.view.nodes()));
        let members: Vec<NodeName> = nodes.into_iter().filter(has).map(|node| node.name).collect();
        (!members.is_empty()).then_some(members)
    }
}

/// The nodes of a range, each once, in its order; none: all.
pub(crate) fn select(view: &Snapshot, range: Option<&str>) -> Result<Vec<NodeRecord>, Failure> {
    let Some(range) = range else { return Ok(in_order(view.nodes()?)) };
    let nodes = Nodes { view, failed: RefCell::default() };
    let names = noderange::evaluate(range, &nodes);
    if let Some(error) = nodes.failed.into_inner() {
        return Err(error.into());
    }
    let (mut seen, mut out) = (BTreeSet::new(), Vec::new());
    for name in names? {
        if let Some(node) = view.node_named(name.as_str())?
            && seen.insert(name)
        {
            out.push(node);
        }
    }
    Ok(out)
}

/// A range in the query.
#[derive(Debug, Deserialize)]
pub(super) struct RangeQuery {
    range: Option<String>,
}

pub(super) async fn list(
    State(member): State<Arc<Member>>,
    Query(query): Query<RangeQuery>,
) -> Result<Json<Vec<NodeView>>, Failure> {
    let nodes = select(&member.view()?, query.range.as_deref())?;
    Ok(Json(nodes.into_iter().map(view_of).collect()))
}

fn view_of(node: NodeRecord) -> NodeView {
    let mut attributes = node.attributes;
    for name in node.secrets.keys() {
        attributes.insert(name.clone(), "********".into());
    }
    let armed = match node.armed {
        Armed::No => None,
        Armed::Once => Some("once".into()),
        Armed::Continuous => Some("continuous".into()),
        Armed::Until(end) => i64::try_from(end)
            .ok()
            .and_then(|end| OffsetDateTime::from_unix_timestamp(end).ok())
            .and_then(|end| end.format(&Rfc3339).ok()),
    };
    if let Some(armed) = armed {
        attributes.insert("deployment.apiarmed".into(), armed);
    }
    // What it booted last is an attribute; what it is to boot is shown as long as that is something else.
    if let Some(order) = node
        .deployment
        .as_ref()
        .filter(|order| attributes.get("deployment.profile").is_none_or(|booted| *booted != order.profile.as_str()))
    {
        attributes.insert("deployment.pendingprofile".into(), order.profile.to_string());
    }
    let trust = match node.identity {
        None => TrustState::Unenrolled,
        Some(Identity::Tpm { .. }) => TrustState::Tpm,
        Some(Identity::Soft { unproven: true, .. }) => TrustState::Unproven,
        Some(Identity::Soft { .. }) => TrustState::Soft,
    };
    NodeView { id: node.id, name: node.name, attributes, trust, pin: node.pin }
}

fn check(set: &BTreeMap<String, String>) -> Result<(), Problem> {
    set.iter().try_for_each(|(name, value)| attributes::validate(name, value))
}

/// What a machine is known by belongs to one node.
fn check_single<'a>(count: usize, mut names: impl Iterator<Item = &'a String>) -> Result<(), Problem> {
    match names.find(|name| *name == "id.uuid" || *name == "id.serial" || name.ends_with(".hwaddr")) {
        Some(name) if count > 1 => {
            let detail = format!(
                "'{name}' says which machine a node is, and the range is {count} nodes: set it for each by itself"
            );
            Err(Problem::new(Code::BadRequest, detail))
        }
        _ => Ok(()),
    }
}

/// The command that sets values: secret ones sealed, for this node alone.
fn set_command(member: &Member, id: NodeId, request: &SetAttributes) -> Result<Command, Failure> {
    let (mut set, mut secrets) = (BTreeMap::new(), BTreeMap::new());
    for (name, value) in &request.set {
        if attributes::is_secret(name) {
            let node = id.to_string();
            let place = Place { table: "nodes", id: &node, field: name };
            secrets.insert(name.clone(), member.seal(place, value.as_bytes())?);
        } else {
            set.insert(name.clone(), canonical(name, value));
        }
    }
    Ok(Command::SetAttributes { id, set, secrets, clear: request.clear.clone() })
}

/// Hardware addresses and UUIDs have many spellings and are compared in one.
fn canonical(name: &str, value: &str) -> String {
    match attributes::find(name).map(|attribute| attribute.kind) {
        Some(attributes::Kind::HwAddr) => {
            value.parse().map_or_else(|_| value.to_owned(), |address: moor_api::ids::HwAddr| address.to_string())
        }
        Some(attributes::Kind::Uuid) => {
            uuid::Uuid::parse_str(value).map_or_else(|_| value.to_owned(), |uuid| uuid.to_string())
        }
        _ => value.to_owned(),
    }
}

/// Proposes one command for each node and gathers what was refused. Many at a time, so that the store commits them together.
async fn each(
    member: &Member,
    line: &Line,
    nodes: Vec<NodeRecord>,
    command: impl Fn(&NodeRecord) -> Result<Command, Failure>,
) -> Result<Json<Changed>, Failure> {
    let mut commands = Vec::with_capacity(nodes.len());
    for node in nodes {
        let command = command(&node)?;
        commands.push((node.name, command));
    }
    propose_all(member, line, commands).await
}

async fn propose_all(
    member: &Member,
    line: &Line,
    changes: Vec<(NodeName, Command)>,
) -> Result<Json<Changed>, Failure> {
    let mut changed = Changed { nodes: Vec::new(), refused: BTreeMap::new() };
    let (names, commands): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
    let commands = line.before(member, commands).await?;
    let mut outcomes = stream::iter(names.into_iter().zip(commands))
        .map(|(name, command)| async move { (name, member.store.propose(command).await) })
        .buffered(AT_A_TIME);
    while let Some((name, outcome)) = outcomes.next().await {
        match outcome? {
            Outcome::Refused(problem) => {
                changed.refused.insert(name, problem);
            }
            _ => changed.nodes.push(name),
        }
    }
    Ok(Json(changed))
}

pub(super) async fn define(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: DefineNodes = parse(&body)?;
    check(&request.attributes)?;
    if let Some(name) = request.attributes.keys().find(|name| attributes::is_secret(name)) {
        return Err(
            Problem::new(Code::BadRequest, format!("'{name}' is a secret: define the node, then set it")).into()
        );
    }
    let names = noderange::evaluate_pure(&request.range)?;
    check_single(names.len(), request.attributes.keys())?;
    let attributes: BTreeMap<String, String> =
        request.attributes.iter().map(|(name, value)| (name.clone(), canonical(name, value))).collect();
    let define = |name: NodeName| {
        let command = Command::DefineNode { id: NodeId::random(), name: name.clone(), attributes: attributes.clone() };
        (name, command)
    };
    propose_all(&member, &line, names.into_iter().map(define).collect()).await
}

pub(super) async fn remove(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: RangeRequest = parse(&body)?;
    let nodes = select(&member.view()?, Some(&request.range))?;
    each(&member, &line, nodes, |node| Ok(Command::RemoveNode { id: node.id })).await
}

pub(super) async fn set(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: SetAttributes = parse(&body)?;
    check(&request.set)?;
    for name in &request.clear {
        if attributes::find(name).is_none() {
            return Err(Problem::new(Code::BadRequest, format!("no attribute '{name}' to clear")).into());
        }
    }
    let nodes = select(&member.view()?, Some(&request.range))?;
    check_single(nodes.len(), request.set.keys().filter(|name| !request.set[*name].is_empty()))?;
    each(&member, &line, nodes, |node| set_command(&member, node.id, &request)).await
}

pub(super) async fn arm(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: ArmRequest = parse(&body)?;
    let armed = match request.until.as_str() {
        "" => Armed::No,
        "once" => Armed::Once,
        "continuous" => Armed::Continuous,
        text => {
            let time = OffsetDateTime::parse(text, &Rfc3339)
                .ok()
                .and_then(|time| u64::try_from(time.unix_timestamp()).ok())
                .ok_or_else(|| {
                    Problem::new(
                        Code::BadRequest,
                        format!("'{text}' is not once, continuous or a time such as 2026-11-23T18:00:00Z"),
                    )
                })?;
            Armed::Until(time)
        }
    };
    let nodes = select(&member.view()?, Some(&request.range))?;
    member.audit("arm", serde_json::json!({ "range": request.range, "until": request.until })).await?;
    each(&member, &line, nodes, |node| Ok(Command::Arm { id: node.id, armed })).await
}

pub(super) async fn rearm(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: RangeRequest = parse(&body)?;
    let nodes = select(&member.view()?, Some(&request.range))?;
    if nodes.len() != 1 {
        return Err(Problem::new(
            Code::BadRequest,
            format!(
                "'{}' is {} nodes: an identity is dropped for one named node at a time",
                request.range,
                nodes.len()
            ),
        )
        .into());
    }
    member.audit("rearm", serde_json::json!({ "node": nodes[0].id, "name": nodes[0].name })).await?;
    each(&member, &line, nodes, |node| Ok(Command::Rearm { id: node.id })).await
}

pub(super) async fn deploy(
    State(member): State<Arc<Member>>,
    Extension(line): Extension<Line>,
    body: Bytes,
) -> Result<Json<Changed>, Failure> {
    let request: DeployRequest = parse(&body)?;
    let view = member.view()?;
    if view.profile(request.profile.as_str())?.is_none() {
        return Err(Problem::new(
            Code::NoProfile,
            format!("profile '{0}' was never published: `moor profile publish {0}`", request.profile),
        )
        .into());
    }
    let nodes = select(&view, Some(&request.range))?;
    each(&member, &line, nodes, |node| {
        Ok(Command::Deploy {
            id: node.id,
            deployment: DeploymentId::random(),
            profile: request.profile.clone(),
            time_ms: now_ms(),
        })
    })
    .await
}
