//! What administrators do is in the audit log before it is done. A change of one record takes its line along, in one entry of the log: both are made or
//! neither, and the disks are waited for once.

use crate::http::Failure;
use crate::state::{self, Member};
use crate::store::Command;
use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::Method;
use moor_api::problem::Problem;
use std::sync::{Arc, Mutex, PoisonError};

/// The name of the administrator who asks.
#[derive(Debug, Clone)]
pub(super) struct Who(pub(super) String);

/// The line of a call, as long as it is not written. Whoever makes the call's first change takes it.
#[derive(Clone)]
pub(super) struct Line(Arc<Mutex<Option<serde_json::Value>>>);

impl Line {
    fn take(&self) -> Option<serde_json::Value> {
        // Taking is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// These changes with the line in front of them: in the one, or written before several.
    pub(super) async fn before(&self, member: &Member, mut changes: Vec<Command>) -> Result<Vec<Command>, Problem> {
        let Some(entry) = self.take() else { return Ok(changes) };
        match changes.pop() {
            Some(change) if changes.is_empty() => changes.push(Command::Audited { entry, change: Box::new(change) }),
            last => {
                changes.extend(last);
                member.propose(Command::Audit { entry }).await?;
            }
        }
        Ok(changes)
    }
}

fn entry(Who(who): &Who, request: &Request) -> Option<serde_json::Value> {
    if request.method() == Method::GET {
        return None;
    }
    let call = format!("{} {}", request.method(), request.uri().path());
    tracing::info!("{call} by {who}");
    Some(state::audit_entry("admin", &serde_json::json!({ "by": who, "call": call })))
}

/// Around calls that do not know of their line: it is written before they begin.
pub(super) async fn first(
    State(member): State<Arc<Member>>,
    Extension(who): Extension<Who>,
    request: Request,
    next: Next,
) -> Response {
    if let Some(entry) = entry(&who, &request)
        && let Err(problem) = member.propose(Command::Audit { entry }).await
    {
        return Failure(problem).into_response();
    }
    next.run(request).await
}

/// Around calls whose first change takes the line along. One that was refused before it came to a change was asked for all the same.
pub(super) async fn along(
    State(member): State<Arc<Member>>,
    Extension(who): Extension<Who>,
    mut request: Request,
    next: Next,
) -> Response {
    let line = Line(Arc::new(Mutex::new(entry(&who, &request))));
    request.extensions_mut().insert(line.clone());
    let response = next.run(request).await;
    if let Some(entry) = line.take()
        && let Err(problem) = member.propose(Command::Audit { entry }).await
    {
        return Failure(problem).into_response();
    }
    response
}
