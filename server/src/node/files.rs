//! `files` and `scripts`: what the profile's generation holds for its nodes.

use super::Caller;
use crate::content;
use crate::http::{Connection, Failure};
use crate::public::{self, Leave, unreadable};
use crate::secrets::Place;
use crate::shares::Client;
use crate::state::Member;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Method, header};
use moor_api::deploy::PhaseName;
use moor_api::ids::Sha256Digest;
use moor_api::problem::{Code, Problem};
use std::fs::File;
use std::sync::Arc;

fn not_found(what: String) -> Failure {
    Failure(Problem::new(Code::NotFound, what))
}

/// Nobody keeps the answer: it is for this node, and the path may mean something else in the next generation.
const NOT_KEPT: HeaderValue = HeaderValue::from_static("no-store");

/// The content of a private file.
fn secret(content: &[u8]) -> Result<Response, Failure> {
    let response = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CACHE_CONTROL, NOT_KEPT);
    response.body(Body::from(content.to_vec())).map_err(|error| anyhow::Error::from(error).into())
}

/// A file may be large: it goes out as images do, by what the client takes.
async fn blob(
    member: &Member,
    leave: Leave,
    (blob, what): (Sha256Digest, String),
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Failure> {
    let path = content::path_of(&member.config.blobs(), blob);
    let opened = tokio::task::spawn_blocking(move || {
        let read = File::open(&path).and_then(|file| file.metadata().map(|meta| (file, meta.len())));
        read.map_err(|error| unreadable(&what, &path, &error))
    });
    let opened = opened.await.map_err(anyhow::Error::from)??;
    let mut response = public::ranges(opened, &format!("\"{blob}\""), leave, method, headers);
    response.headers_mut().insert(header::CACHE_CONTROL, NOT_KEPT);
    Ok(response)
}

pub(super) async fn file(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    Extension(connection): Extension<Connection>,
    Path(path): Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let leave = Leave::of(&connection, &member, Client::Node(caller.node.id)).await;
    let profile = caller.generation(&member.view()?)?;
    if let Some(private) = path.strip_prefix("private/") {
        caller.boot_stage("a private file")?;
        caller.proven(&profile, "private files")?;
        let sealed = profile
            .manifest
            .private
            .get(private)
            .ok_or_else(|| not_found(format!("profile '{}' has no private file '{private}'", profile.name)))?;
        let place = Place { table: "profiles", id: profile.name.as_str(), field: private };
        let content = member.open_secret(place, sealed)?;
        caller.released(&member, "private-file", &format!("{}/{private}", profile.name)).await?;
        return secret(&content);
    }
    let found = profile.manifest.files.get(&path).copied();
    let found = found.ok_or_else(|| not_found(format!("profile '{}' has no file '{path}'", profile.name)))?;
    blob(&member, leave, (found, format!("'{path}' of profile '{}'", profile.name)), &method, &headers).await
}

/// The phase that a word names.
pub(crate) fn phase(word: &str) -> Option<PhaseName> {
    [PhaseName::Pre, PhaseName::Post, PhaseName::Firstboot, PhaseName::Onboot]
        .into_iter()
        .find(|phase| phase.as_str() == word)
}

pub(super) async fn script(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    Extension(connection): Extension<Connection>,
    Path((word, path)): Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let leave = Leave::of(&connection, &member, Client::Node(caller.node.id)).await;
    let profile = caller.generation(&member.view()?)?;
    let phase =
        phase(&word).ok_or_else(|| not_found(format!("'{word}' is no phase: pre, post, firstboot or onboot")))?;
    let scripts = profile.manifest.scripts.get(&phase).map(Vec::as_slice).unwrap_or_default();
    let found = scripts.iter().find(|(name, _)| *name == path).map(|(_, blob)| *blob);
    let found = found.ok_or_else(|| not_found(format!("profile '{}' has no script '{word}/{path}'", profile.name)))?;
    blob(&member, leave, (found, format!("'{word}/{path}' of profile '{}'", profile.name)), &method, &headers).await
}
