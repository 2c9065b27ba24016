//! Blobs, images and profiles.

use crate::collective::holders;
use crate::content::{Incoming, path_of, touch};
use crate::http::{Failure, parse};
use crate::profile;
use crate::secrets::Place;
use crate::state::Member;
use crate::store::Command;
use crate::store::records::ImageRecord;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use moor_api::admin::{
    BOOT_LOADERS, BlobAdded, BootFiles, ContentView, CreateProfile, ImageView, ImportImage, ProfileView,
};
use moor_api::ids::{ProfileName, Sha256Digest};
use moor_api::problem::{Code, Problem};
use moor_image::{Dek, Image, OpenOptions};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Largest blob: the largest image and what stands around it.
const MAX_BLOB: u64 = (1 << 40) + (1 << 34);

/// So long a refused upload is read on.
const LINGER: Duration = Duration::from_secs(5);

pub(super) async fn add_blob(State(member): State<Arc<Member>>, body: Body) -> Result<Json<BlobAdded>, Failure> {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(8);
    let (blobs, place) = (member.config.blobs(), member.config.blobs());
    let writer = tokio::task::spawn_blocking(move || -> io::Result<(Sha256Digest, u64)> {
        let mut incoming = Incoming::new(&blobs)?;
        let mut size = 0_u64;
        while let Some(piece) = receiver.blocking_recv() {
            // An empty piece says that all came; without it the sender broke off.
            if piece.is_empty() {
                return incoming.finish();
            }
            size += piece.len() as u64;
            if size > MAX_BLOB {
                return Err(io::Error::other("it is larger than any image may be"));
            }
            incoming.write(&piece)?;
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the upload broke off"))
    });
    let mut body = body;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Problem::new(Code::BadRequest, format!("the upload broke off: {error}")))?;
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
            && sender.send(data).await.is_err()
        {
            break;
        }
    }
    // When the writer failed, its own error is what counts.
    let _ = sender.send(Bytes::new()).await;
    drop(sender);
    let kept = writer.await.map_err(|error| anyhow::anyhow!("keeping a blob: {error}"))?;
    let (blob, size) = kept.map_err(|error| {
        tokio::spawn(discard(body));
        cannot_keep(&place, &error)
    })?;
    Ok(Json(BlobAdded { blob, size }))
}

/// Who is refused in the middle of an upload still sends, and hears the reason only as long as somebody reads on.
async fn discard(mut body: Body) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// What becomes of an upload that the member's disk does not take.
fn cannot_keep(blobs: &std::path::Path, error: &io::Error) -> Problem {
    let advice = if error.kind() == io::ErrorKind::StorageFull { ": make room there, and send it again" } else { "" };
    let detail = format!("the member cannot keep the upload in '{}': {error}{advice}", blobs.display());
    Problem::new(Code::Internal, detail)
}

/// Which member has what, as the members say now.
pub(super) async fn status(State(member): State<Arc<Member>>) -> Result<Json<ContentView>, Failure> {
    Ok(Json(holders::view(&member).await?))
}

pub(super) async fn images(State(member): State<Arc<Member>>) -> Result<Json<Vec<ImageView>>, Failure> {
    let view = member.view()?;
    let nodes = view.nodes()?;
    let mut out: Vec<ImageView> = view
        .images()?
        .into_iter()
        .map(|image| {
            let pins = nodes.iter().filter(|node| node.pin == Some(image.digest)).count() as u64;
            view_of(&image, pins)
        })
        .collect();
    out.sort_by(|a, b| (&a.name, a.serial).cmp(&(&b.name, b.serial)));
    Ok(Json(out))
}

fn view_of(image: &ImageRecord, pins: u64) -> ImageView {
    ImageView {
        name: image.name.clone(),
        digest: image.digest,
        lineage: image.lineage,
        serial: image.serial,
        created: image.created,
        size: image.size,
        encrypted: image.encrypted,
        kernel_version: image.kernel_version.clone(),
        os: image.os.clone(),
        pins,
    }
}

pub(super) async fn import(State(member): State<Arc<Member>>, body: Bytes) -> Result<Json<ImageView>, Failure> {
    let body = Zeroizing::new(body.to_vec());
    let request: ImportImage = parse(&body)?;
    let opener = member.clone();
    let record = tokio::task::spawn_blocking(move || inspect(&opener, request))
        .await
        .map_err(|error| anyhow::anyhow!("importing: {error}"))??;
    let view = view_of(&record, 0);
    member.propose(Command::PutImage { image: record }).await?;
    Ok(Json(view))
}

fn sorted(mut names: [&str; 2]) -> [&str; 2] {
    names.sort_unstable();
    names
}

/// Opens the image with its key, so that nothing gets into the catalogue that no node could boot.
fn inspect(member: &Member, request: ImportImage) -> Result<ImageRecord, Failure> {
    let bad = |detail: String| Failure(Problem::new(Code::BadRequest, detail));
    let blobs = member.config.blobs();
    let pair = |names: &[&str; 2]| request.boot_loaders.keys().eq(sorted(*names));
    if !request.boot_loaders.is_empty() && !BOOT_LOADERS.iter().any(pair) {
        let known = BOOT_LOADERS.map(|names| names.join(" and ")).join(", or ");
        return Err(bad(format!("boot loaders are {known}")));
    }
    let files = [("image", request.image), ("kernel", request.kernel), ("initramfs", request.initramfs)];
    let loaders = request.boot_loaders.iter().map(|(name, blob)| (name.as_str(), *blob));
    for (what, blob) in files.into_iter().chain(loaders) {
        if touch(&blobs, blob).is_err() {
            return Err(Failure(Problem::new(
                Code::NotFound,
                format!("the {what} (blob {blob}) is not on this member: send it first"),
            )));
        }
    }
    let key = request.key.map(Zeroizing::new);
    let dek = key
        .as_ref()
        .map(|key| Dek::from_hex(key.as_bytes()))
        .transpose()
        .map_err(|error| bad(format!("the image's key: {error}")))?;
    let path = path_of(&blobs, request.image);
    let file = File::open(&path).map_err(|error| anyhow::anyhow!("opening '{}': {error}", path.display()))?;
    let size = file.metadata().map_err(|error| anyhow::anyhow!("reading '{}': {error}", path.display()))?.len();
    let image = Image::open(file, &OpenOptions { key: dek.clone(), ..OpenOptions::default() })
        .map_err(|error| bad(format!("the image: {error}")))?;
    let header = image.header().clone();
    if header.encrypted && dek.is_none() {
        return Err(bad("the image is encrypted: its key belongs into the catalogue (`--key-file`)".into()));
    }
    let metadata = image.metadata().map_err(|error| bad(format!("the image: {error}")))?;
    let digest = Sha256Digest(header.digest);
    let name = digest.to_string();
    let sealed =
        dek.map(|dek| member.seal(Place { table: "images", id: &name, field: "dek" }, dek.as_bytes())).transpose()?;
    Ok(ImageRecord {
        name: request.name,
        digest,
        blob: request.image,
        size,
        lineage: Uuid::from_bytes(header.lineage),
        serial: header.serial,
        created: header.created,
        encrypted: header.encrypted,
        key: sealed,
        signatures: request.signatures,
        kernel: request.kernel,
        initramfs: request.initramfs,
        boot_loaders: request.boot_loaders,
        kernel_version: metadata.kernel,
        os: Some(metadata.os).filter(|os| !os.is_empty()),
        // This member holds it.
        offered: holders::wanted(member) <= 1,
    })
}

pub(super) async fn profiles(State(member): State<Arc<Member>>) -> Result<Json<Vec<ProfileView>>, Failure> {
    let list = tokio::task::spawn_blocking(move || profile::list(&member)).await;
    Ok(Json(list.map_err(|error| anyhow::anyhow!("listing profiles: {error}"))??))
}

pub(super) async fn create_profile(
    State(member): State<Arc<Member>>,
    body: Bytes,
) -> Result<Json<ProfileView>, Failure> {
    let request: CreateProfile = parse(&body)?;
    let made = tokio::task::spawn_blocking(move || profile::create(&member, &request)).await;
    Ok(Json(made.map_err(|error| anyhow::anyhow!("making a profile: {error}"))??))
}

fn profile_name(text: &str) -> Result<ProfileName, Failure> {
    text.parse().map_err(|error: moor_api::ids::InvalidId| Failure(Problem::new(Code::BadRequest, error.to_string())))
}

pub(super) async fn publish(
    State(member): State<Arc<Member>>,
    Path(name): Path<String>,
) -> Result<Json<ProfileView>, Failure> {
    Ok(Json(profile::publish(&member, profile_name(&name)?).await?))
}

pub(super) async fn boot_files(
    State(member): State<Arc<Member>>,
    Path(name): Path<String>,
) -> Result<Json<BootFiles>, Failure> {
    let name = profile_name(&name)?;
    let view = member.view()?;
    let record = view.profile(name.as_str())?.ok_or_else(|| {
        Problem::new(Code::NotFound, format!("profile '{name}' was never published: `moor profile publish {name}`"))
    })?;
    let image = view
        .image(&record.manifest.image.to_string())?
        .ok_or_else(|| Problem::new(Code::NotFound, format!("the image of profile '{name}' is gone")))?;
    let servers = member.config.urls.join(",");
    let command_line = format!("boot=moor root=moor moor.server={servers} {}", record.manifest.kernel_arguments);
    Ok(Json(BootFiles {
        kernel: image.kernel,
        initramfs: image.initramfs,
        command_line: command_line.trim().to_owned(),
        boot_loaders: image.boot_loaders,
    }))
}
