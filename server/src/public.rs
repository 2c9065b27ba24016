//! `/public`: encrypted images by range, and boot files. Nobody is asked who they are: what is here protects itself (images are sealed)
//! or holds no secret (boot files).

use crate::content;
use crate::cpio::Archive;
use crate::http::{Connection, Failure};
use crate::shares::{BLOCK, Client, Turn};
use crate::state::Member;
use crate::store::records::ImageRecord;
use axum::Router;
use axum::body::Body;
use axum::extract::{self, Extension, State};
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt as _};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use moor_api::ids::Sha256Digest;
use moor_api::problem::{Code, Problem};
use moor_api::trust::SITE_FILE;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes per write: rustls is fastest at 64 KiB. Of what is read at once no more is in memory than this.
const PIECE: usize = 64 << 10;

/// Behind the name of a boot file there are other bytes with the profile's next generation: a proxy that kept them would let nodes boot the old kernel.
const OF_NOW: HeaderValue = HeaderValue::from_static("no-cache");

/// The routes.
pub fn router() -> Router<Arc<Member>> {
    Router::new().route("/public/images/{digest}", get(image)).route("/public/boot/{profile}/{file}", get(boot))
}

/// What it takes to send a file: a place among those of the connection, and the client's turn.
pub(crate) struct Leave {
    files: Arc<Semaphore>,
    turn: Turn,
}

impl Leave {
    /// Waits for the turn. Heads of answers wait for no place: what comes of one is the client's to take.
    pub(crate) async fn of(connection: &Connection, member: &Member, client: Client) -> Self {
        Self { files: connection.files(), turn: member.shares.turn(client).await }
    }
}

fn not_found(what: impl Into<String>) -> Failure {
    Failure(Problem::new(Code::NotFound, what))
}

async fn image(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    extract::Path(digest): extract::Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let digest: Sha256Digest = digest.parse().map_err(|_| not_found("an image is named by 64 hexadecimal digits"))?;
    let leave = Leave::of(&connection, &member, Client::of(&connection.peer)).await;
    let image = member.view()?.image(&digest.to_string())?.filter(|image| image.encrypted);
    let image = image.ok_or_else(|| not_found(format!("no public image {digest} here")))?;
    image_response(&member, &image, leave, &method, &headers)
}

/// Why content that a record names cannot be read. Nodes hear of all members, and content comes after the record: what is not here yet,
/// another member has.
pub(crate) fn unreadable(what: &str, path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::NotFound {
        let detail = format!("{what} has not come to this member yet: ask another");
        return Problem { status: 503, ..Problem::new(Code::Other, detail) }.into();
    }
    anyhow::anyhow!("reading '{}': {error}", path.display()).into()
}

/// An image's bytes, whole or by one range, to the client that has leave.
pub(crate) fn image_response(
    member: &Member,
    image: &ImageRecord,
    leave: Leave,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Failure> {
    let path = content::path_of(&member.config.blobs(), image.blob);
    let what = format!("image {}", image.digest);
    let file = File::open(&path).map_err(|error| unreadable(&what, &path, &error))?;
    Ok(ranges((file, image.size), &format!("\"{}\"", image.digest), leave, method, headers))
}

/// The range that a request asks for (RFC 9110 §14): `None` the whole, `Err` outside of the object. Several ranges are answered by
/// the whole, which every client has to take.
fn wanted(headers: &HeaderMap, size: u64, etag: &str) -> Result<Option<Range<u64>>, ()> {
    let Some(text) = headers.get(header::RANGE).and_then(|value| value.to_str().ok()) else { return Ok(None) };
    if headers.get(header::IF_RANGE).is_some_and(|value| value.as_bytes() != etag.as_bytes()) {
        return Ok(None);
    }
    let Some(spec) = text.strip_prefix("bytes=") else { return Ok(None) };
    let Some((first, last)) = spec.split_once('-') else { return Ok(None) };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(count)) if first.is_empty() => size.saturating_sub(count)..size,
        _ => return Ok(None),
    };
    if range.start >= range.end { Err(()) } else { Ok(Some(range)) }
}

/// An object of this size, or the range of it that is asked for, to the client that has leave.
pub(crate) fn ranges(
    (file, size): (File, u64),
    etag: &str,
    leave: Leave,
    method: &Method,
    headers: &HeaderMap,
) -> Response {
    let builder = Response::builder()
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, etag)
        .header(header::CACHE_CONTROL, "public, max-age=31536000, immutable")
        .header(header::CONTENT_TYPE, "application/octet-stream");
    let (builder, range) = match wanted(headers, size, etag) {
        Ok(None) => (builder.status(StatusCode::OK), 0..size),
        Ok(Some(range)) => {
            let shown = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            (builder.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, shown), range)
        }
        Err(()) => (
            builder.status(StatusCode::RANGE_NOT_SATISFIABLE).header(header::CONTENT_RANGE, format!("bytes */{size}")),
            0..0,
        ),
    };
    let builder = builder.header(header::CONTENT_LENGTH, range.end - range.start);
    let body = if *method == Method::HEAD || range.is_empty() { Body::empty() } else { stream(file, range, leave) };
    builder.body(body).unwrap_or_else(|_| Response::new(Body::empty()))
}

/// What is still to be sent of an answer.
struct Rest {
    file: Arc<File>,
    range: Range<u64>,
    turn: Arc<Turn>,
    /// Bytes that may be sent yet in this turn.
    room: usize,
    files: Arc<Semaphore>,
    /// From the first read on.
    place: Option<Arc<OwnedSemaphorePermit>>,
}

/// Bytes that keep a turn, and a place, until the connection has taken them.
struct Sending {
    bytes: Vec<u8>,
    _turn: Arc<Turn>,
    _place: Arc<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Sending {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Rest {
    /// The next bytes. What the kernel has in memory is read at once; the rest on blocking threads, a turn's bytes at a time: a slow peer holds
    /// a buffer, never a thread.
    async fn read(mut self) -> io::Result<Option<(Bytes, Self)>> {
        let start = self.range.start;
        let left = usize::try_from(self.range.end - start).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(None);
        }
        let place = match self.place.take() {
            Some(place) => place,
            None => Arc::new(self.files.clone().acquire_owned().await.map_err(io::Error::other)?),
        };
        self.place = Some(place.clone());
        if self.room == 0 {
            self.turn = Arc::new(self.turn.next().await);
            self.room = BLOCK;
        }
        let most = left.min(self.room);
        let bytes = if let Some(bytes) = read_now(&self.file, start, most.min(PIECE))? {
            bytes
        } else {
            let reader = self.file.clone();
            let read = move || {
                let mut bytes = vec![0; most];
                reader.read_exact_at(&mut bytes, start).map(|()| bytes)
            };
            tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??
        };
        self.range.start += bytes.len() as u64;
        self.room -= bytes.len();
        Ok(Some((Bytes::from_owner(Sending { bytes, _turn: self.turn.clone(), _place: place }), self)))
    }
}

fn stream(file: File, range: Range<u64>, Leave { turn, files }: Leave) -> Body {
    let rest = Rest { file: Arc::new(file), range, turn: Arc::new(turn), room: BLOCK, files, place: None };
    let reads = stream::try_unfold(rest, Rest::read);
    Body::from_stream(reads.map_ok(|bytes| stream::iter(pieces(bytes).map(Ok::<_, io::Error>))).try_flatten())
}

/// What can be read without waiting for a disk; `None` if nothing can, or where the file system does not tell.
fn read_now(file: &File, start: u64, length: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; length];
    match preadv2(file, &mut [IoSliceMut::new(&mut bytes)], start, ReadWriteFlags::NOWAIT) {
        Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Ok(length) => {
            bytes.truncate(length);
            Ok(Some(bytes))
        }
        Err(error) => Err(error.into()),
    }
}

fn pieces(mut bytes: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!bytes.is_empty()).then(|| bytes.split_to(PIECE.min(bytes.len()))))
}

async fn boot(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    extract::Path((profile, name)): extract::Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    if name == "site.cpio" {
        let bytes = site_archive(&member)?;
        let response = Response::builder().header(header::CACHE_CONTROL, OF_NOW).body(Body::from(bytes));
        return response.map_err(|error| anyhow::Error::from(error).into());
    }
    let leave = Leave::of(&connection, &member, Client::of(&connection.peer)).await;
    let view = member.view()?;
    let record = view.profile(&profile)?.ok_or_else(|| not_found(format!("no published profile '{profile}'")))?;
    let image = view
        .image(&record.manifest.image.to_string())?
        .ok_or_else(|| not_found(format!("the image of profile '{profile}' is gone")))?;
    let blob = match name.as_str() {
        "kernel" => image.kernel,
        "initramfs" => image.initramfs,
        other => *image.boot_loaders.get(other).ok_or_else(|| {
            let mut names = vec!["kernel", "initramfs", "site.cpio"];
            names.extend(image.boot_loaders.keys().map(String::as_str));
            not_found(format!("boot files of profile '{profile}' are {}", names.join(", ")))
        })?,
    };
    let path = content::path_of(&member.config.blobs(), blob);
    let file =
        File::open(&path).map_err(|error| unreadable(&format!("'{name}' of profile '{profile}'"), &path, &error))?;
    let size = file.metadata().map_err(|error| anyhow::anyhow!("reading '{}': {error}", path.display()))?.len();
    let mut response = ranges((file, size), &format!("\"{blob}\""), leave, &method, &headers);
    response.headers_mut().insert(header::CACHE_CONTROL, OF_NOW);
    Ok(response)
}

/// What stands behind the image's initramfs: the site bundle.
fn site_archive(member: &Member) -> Result<Vec<u8>, Failure> {
    let bundle = serde_json::to_vec_pretty(&member.bundle()?).map_err(anyhow::Error::from)?;
    let mut archive = Archive::default();
    let path = SITE_FILE.trim_start_matches('/');
    for (at, _) in path.match_indices('/') {
        archive.directory(&path[..at]);
    }
    archive.file(path, 0o644, &bundle);
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_rfc() {
        let etag = "\"x\"";
        for (text, expected) in [
            (None, Ok(None)),
            (Some("bytes=0-0"), Ok(Some(0..1))),
            (Some("bytes=5-"), Ok(Some(5..10))),
            (Some("bytes=-3"), Ok(Some(7..10))),
            (Some("bytes=-30"), Ok(Some(0..10))),
            (Some("bytes=0-99"), Ok(Some(0..10))),
            (Some("bytes=10-"), Err(())),
            (Some("bytes=-0"), Err(())),
            (Some("bytes=3-2"), Ok(None)),
            (Some("bytes=0-1,3-4"), Ok(None)),
            (Some("lines=0-1"), Ok(None)),
            (Some("bytes=x"), Ok(None)),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(text) = text {
                headers.insert(header::RANGE, text.parse().unwrap());
            }
            assert_eq!(wanted(&headers, 10, etag), expected, "{text:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, "bytes=0-1".parse().unwrap());
        headers.insert(header::IF_RANGE, "\"other\"".parse().unwrap());
        assert_eq!(wanted(&headers, 10, etag), Ok(None));
    }
}
