//! `image` and `image/key`: which root a node boots, and the key that opens it.

use super::Caller;
use crate::http::{Connection, Failure, parse};
use crate::public::{Leave, image_response};
use crate::secrets::Place;
use crate::shares::Client;
use crate::state::Member;
use crate::store::records::{ImageRecord, ProfileRecord};
use crate::store::{Command, Snapshot};
use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method};
use moor_api::ids::ImageDigest;
use moor_api::node::{Base64, EnvelopeKind, HexBytes, ImageOffer, KeyEnvelope, KeyRequest, image_url};
use moor_api::problem::{Code, Problem};
use moor_image::Dek;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A node that asks for an image that is on too few members is answered after this time at the latest.
const SPREADING: Duration = Duration::from_secs(5);

fn image_of(view: &Snapshot, profile: &ProfileRecord) -> Result<ImageRecord, Failure> {
    let digest = profile.manifest.image;
    let gone = || {
        Problem::new(
            Code::NoProfile,
            format!(
                "profile '{}' boots image {digest}, which is not in the catalogue any more: publish it anew",
                profile.name
            ),
        )
    };
    Ok(view.image(&digest.to_string())?.ok_or_else(gone)?)
}

/// An image that came a moment ago is spreading: nodes wait until a member's loss does not take it from them.
async fn when_offered(member: &Member, image: ImageRecord) -> Result<ImageRecord, Failure> {
    let until = Instant::now() + SPREADING;
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = member.view()?.image(&image.digest.to_string())?;
        if let Some(now) = now.filter(|now| now.offered) {
            return Ok(now);
        }
    }
    let detail = format!(
        "image '{}' @{} is on too few members so far (`moor content status`): the node waits and asks again",
        image.name, image.serial
    );
    Err(Problem { status: 503, ..Problem::new(Code::Other, detail) }.into())
}

/// What boots of the image read, in order.
async fn prefetch(member: &Arc<Member>, image: ImageDigest) -> Result<Vec<u64>, Failure> {
    if let Some(list) = member.traces.at_hand(image) {
        return Ok(list);
    }
    let member = member.clone();
    let list = tokio::task::spawn_blocking(move || member.traces.list(image)).await;
    list.map_err(|error| anyhow::Error::from(error).into())
}

pub(super) async fn offer(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<ImageOffer>, Failure> {
    caller.boot_stage("the image")?;
    let view = member.view()?;
    let profile = caller.generation(&view)?;
    let image = image_of(&view, &profile)?;
    drop(view);
    let image = if image.offered { image } else { when_offered(&member, image).await? };
    let url = |base: &String| {
        if image.encrypted {
            image_url(base, image.digest)
        } else {
            format!("{}/node/v1/images/{}", base.trim_end_matches('/'), image.digest)
        }
    };
    let prefetch = prefetch(&member, image.digest).await?;
    let urls = caller.endpoints(&member)?.iter().flat_map(|member| &member.urls).map(url).collect();
    Ok(Json(ImageOffer {
        name: image.name,
        digest: image.digest,
        size: image.size,
        lineage: image.lineage,
        minimum_serial: image.serial,
        signers: profile.manifest.signers.clone(),
        signatures: image.signatures,
        urls,
        token_required: !image.encrypted,
        root: profile.manifest.root,
        prefetch,
    }))
}

/// Nothing leaves before the audit line and the pin are on disk.
pub(super) async fn key(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<KeyEnvelope>, Failure> {
    caller.boot_stage("the image key")?;
    let request: KeyRequest = parse(&body)?;
    let (image, sealed) = {
        let view = member.view()?;
        let profile = caller.generation(&view)?;
        let image = image_of(&view, &profile)?;
        if image.digest != request.digest {
            let detail = format!(
                "this boot of {} is for image {}, not {}: ask for the image again",
                caller.node.name, image.digest, request.digest
            );
            return Err(Problem::new(Code::Conflict, detail).into());
        }
        caller.proven(&profile, "image key")?;
        let sealed = image.key.clone();
        (image, sealed.ok_or_else(|| Problem::new(Code::Conflict, "the image is plain: it has no key"))?)
    };
    let id = caller.node.id;
    let fields =
        serde_json::json!({ "node": id, "name": caller.node.name, "boot": caller.claims.boot, "image": image.digest });
    member.audit_for_node("image-key", fields).await?;
    member.propose_for_node(Command::Pin { id, digest: image.digest }).await?;
    let digest = image.digest.to_string();
    let opened = member.open_secret(Place { table: "images", id: &digest, field: "dek" }, &sealed)?;
    let bytes: &[u8; 32] =
        opened.as_slice().try_into().map_err(|_| anyhow::anyhow!("the key of image {digest} has not 32 bytes"))?;
    let dek = Dek::from_bytes(*bytes);
    Ok(Json(KeyEnvelope {
        kind: EnvelopeKind::Plain,
        recipient: id,
        key_id: HexBytes(dek.key_id().to_vec()),
        nonce: Base64::default(),
        wrapped: Base64(dek.as_bytes().to_vec()),
    }))
}

/// The bytes of a plain image: what is not sealed is not public.
pub(super) async fn plain(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    Extension(connection): Extension<Connection>,
    Path(digest): Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let leave = Leave::of(&connection, &member, Client::Node(caller.node.id)).await;
    let view = member.view()?;
    let profile = caller.generation(&view)?;
    let image = image_of(&view, &profile)?;
    if image.digest.to_string() != digest {
        return Err(Problem::new(Code::NotFound, format!("{} does not boot image {digest}", caller.node.name)).into());
    }
    image_response(&member, &image, leave, &method, &headers)
}
