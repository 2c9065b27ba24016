//! `files` and `scripts`: what the profile's generation holds for its nodes.

use super::Caller;
use crate::content;
use crate::http::Failure;
use crate::public::unreadable;
use crate::secrets::Place;
use crate::state::Member;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use http::header;
use moor_api::deploy::PhaseName;
use moor_api::ids::Sha256Digest;
use moor_api::problem::{Code, Problem};
use std::sync::Arc;

fn not_found(what: String) -> Failure {
    Failure(Problem::new(Code::NotFound, what))
}

fn bytes(content: impl Into<Body>) -> Result<Response, Failure> {
    let response = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CACHE_CONTROL, "no-store");
    response.body(content.into()).map_err(|error| anyhow::Error::from(error).into())
}

async fn blob(member: &Member, blob: Sha256Digest, what: &str) -> Result<Response, Failure> {
    let path = content::path_of(&member.config.blobs(), blob);
    bytes(tokio::fs::read(&path).await.map_err(|error| unreadable(what, &path, &error))?)
}

pub(super) async fn file(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    Path(path): Path<String>,
) -> Result<Response, Failure> {
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
        return bytes(content.to_vec());
    }
    let found = profile.manifest.files.get(&path).copied();
    let found = found.ok_or_else(|| not_found(format!("profile '{}' has no file '{path}'", profile.name)))?;
    blob(&member, found, &format!("'{path}' of profile '{}'", profile.name)).await
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
    Path((word, path)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let profile = caller.generation(&member.view()?)?;
    let phase =
        phase(&word).ok_or_else(|| not_found(format!("'{word}' is no phase: pre, post, firstboot or onboot")))?;
    let scripts = profile.manifest.scripts.get(&phase).map(Vec::as_slice).unwrap_or_default();
    let found = scripts.iter().find(|(name, _)| *name == path).map(|(_, blob)| *blob);
    let found = found.ok_or_else(|| not_found(format!("profile '{}' has no script '{word}/{path}'", profile.name)))?;
    blob(&member, found, &format!("'{word}/{path}' of profile '{}'", profile.name)).await
}
