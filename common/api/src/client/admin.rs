//! An administrator's connection to a member and the calls of `/admin/v1` on it.

use super::tls::{handshake_failure, member_tls_config};
use super::{Body, ClientError, Http, chain, full};
use crate::admin::{
    ArmRequest, AuthorityCancelled, AuthorityKind, AuthorityRetired, AuthorityRotated, AuthorityView, BackupRequest,
    BlobAdded, BootFiles, Changed, CollectiveView, ContentView, CreateProfile, DefineNodes, DeployRequest, ImageView,
    ImportImage, InviteRequest, Invited, KeysRotated, LogEvent, MemberRequest, NodeView, ProfileView, RangeRequest,
    ReplaceRequest, RetireRequest, SetAttributes, SiteInfo, SshRole, StatusEvent, TokenCreated, TokenRequest, Why,
};
use crate::client::node::parse_https;
use crate::ids::{ImageDigest, ProfileName};
use crate::trust::SiteBundle;
use bytes::{Buf as _, Bytes, BytesMut};
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use serde::de::DeserializeOwned;
use std::io::Read;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

/// A change may wait for a disk, and an import for a verification.
const TIMEOUT: Duration = Duration::from_mins(2);

/// Longest line of a stream, in bytes.
const MAX_LINE: usize = 4 << 20;

/// A connection to one member, as an administrator.
pub struct AdminClient {
    http: Http,
}

/// Percent-encodes a query value or a path segment.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&hex::encode_upper([byte]));
        }
    }
    out
}

fn range_query(path: &str, range: Option<&str>) -> String {
    range.map_or_else(|| path.to_owned(), |range| format!("{path}?range={}", encode(range)))
}

impl AdminClient {
    /// Over the member's unix socket; the peer's credentials say who asks.
    ///
    /// # Errors
    /// No socket, no server behind it.
    pub async fn unix(socket: &Path) -> Result<Self, ClientError> {
        let to = socket.display().to_string();
        let stream = UnixStream::connect(socket).await.map_err(|error| ClientError::connect(&to, error.to_string()))?;
        Ok(Self { http: Http::start(stream, &to, "localhost", TIMEOUT).await? })
    }

    /// Over HTTPS with an administrator's token.
    ///
    /// # Errors
    /// No connection, or the other side is no member of the bundle's collective.
    pub async fn https(url: &str, bundle: &SiteBundle, token: &str) -> Result<Self, ClientError> {
        let (host, port) = parse_https(url)?;
        let failed = |cause: String| ClientError::connect(url, cause);
        let config = Arc::new(member_tls_config(bundle, None)?);
        let name = match host.parse::<IpAddr>() {
            Ok(address) => rustls_pki_types::ServerName::IpAddress(address.into()),
            Err(_) => rustls_pki_types::ServerName::try_from(host.clone())
                .map_err(|_| ClientError::Config(format!("'{host}' is not a host name")))?,
        };
        let connect = async {
            let tcp = TcpStream::connect((host.as_str(), port)).await.map_err(|error| failed(error.to_string()))?;
            let connected = TlsConnector::from(config).connect(name, tcp).await;
            // An administrator's clock is set by nobody, and so a member need not prove that its certificate has expired.
            connected.map_err(|error| handshake_failure(url, &error, false))
        };
        let tls = tokio::time::timeout(Duration::from_secs(10), connect)
            .await
            .map_err(|_| failed("no TLS connection within 10 s".into()))??;
        let mut http = Http::start(tls, url, &format!("{host}:{port}"), TIMEOUT).await?;
        http.set_token(token)?;
        Ok(Self { http })
    }

    /// Calls `tell` with the reason before an answer that may be out of date is given back: no majority of the members answers.
    pub fn when_stale(&mut self, tell: impl FnMut(&str) + Send + Sync + 'static) {
        self.http.stale = Some(Box::new(tell));
    }

    /// `GET /metrics`: the member's metrics as Prometheus reads them.
    pub async fn metrics(&mut self) -> Result<String, ClientError> {
        let bytes = self.http.bytes("/metrics", 1 << 20).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// `GET site`.
    pub async fn site(&mut self) -> Result<SiteInfo, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/site", None).await
    }

    /// `GET nodes`; no range: all.
    pub async fn nodes(&mut self, range: Option<&str>) -> Result<Vec<NodeView>, ClientError> {
        self.http.json::<(), _>(Method::GET, &range_query("/admin/v1/nodes", range), None).await
    }

    /// `POST nodes`.
    pub async fn define(&mut self, request: &DefineNodes) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes", Some(request)).await
    }

    /// `POST nodes/remove`.
    pub async fn remove(&mut self, request: &RangeRequest) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes/remove", Some(request)).await
    }

    /// `POST nodes/set`.
    pub async fn set(&mut self, request: &SetAttributes) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes/set", Some(request)).await
    }

    /// `POST nodes/arm`.
    pub async fn arm(&mut self, request: &ArmRequest) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes/arm", Some(request)).await
    }

    /// `POST nodes/rearm`.
    pub async fn rearm(&mut self, request: &RangeRequest) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes/rearm", Some(request)).await
    }

    /// `POST nodes/deploy`.
    pub async fn deploy(&mut self, request: &DeployRequest) -> Result<Changed, ClientError> {
        self.http.json(Method::POST, "/admin/v1/nodes/deploy", Some(request)).await
    }

    /// `GET status`: the last event of each node, with `history` all that are kept. With `watch` the stream goes on until it is
    /// dropped; the connection serves nothing else meanwhile.
    pub async fn status(
        &mut self,
        range: Option<&str>,
        history: bool,
        watch: bool,
    ) -> Result<Lines<StatusEvent>, ClientError> {
        let mut path = range_query("/admin/v1/status", range);
        for (name, wanted) in [("history", history), ("watch", watch)] {
            if wanted {
                path.push(if path.contains('?') { '&' } else { '?' });
                path.push_str(name);
                path.push_str("=true");
            }
        }
        self.lines(&path).await
    }

    /// `GET why/NODE`.
    pub async fn why(&mut self, subject: &str) -> Result<Why, ClientError> {
        self.http.json::<(), _>(Method::GET, &format!("/admin/v1/why/{}", encode(subject)), None).await
    }

    /// `GET log/NODE`.
    pub async fn log(&mut self, node: &str) -> Result<Lines<LogEvent>, ClientError> {
        self.lines(&format!("/admin/v1/log/{}", encode(node))).await
    }

    async fn lines<T>(&mut self, path: &str) -> Result<Lines<T>, ClientError> {
        let response = self.http.send(Method::GET, path, "", full(Bytes::new())).await?;
        Ok(Lines {
            call: format!("GET {path}"),
            body: response.into_body(),
            buffer: BytesMut::new(),
            kind: PhantomData,
        })
    }

    /// `PUT blobs`: sends all of `reader` (`length` bytes); `progress` is told the bytes sent so far.
    pub async fn add_blob<R>(
        &mut self,
        reader: R,
        mut progress: impl FnMut(u64) + Send + 'static,
    ) -> Result<BlobAdded, ClientError>
    where
        R: Read + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(4);
        tokio::task::spawn_blocking(move || {
            let mut reader = reader;
            let mut sent = 0;
            loop {
                let mut buffer = vec![0; 256 << 10];
                let piece = match reader.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => {
                        buffer.truncate(count);
                        sent += count as u64;
                        Ok(Bytes::from(buffer))
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = piece.is_err();
                if sender.blocking_send(piece).is_err() || failed {
                    return;
                }
                progress(sent);
            }
        });
        let body: Body = BodyExt::boxed(StreamBody::new(Pieces { receiver }));
        // The answer comes after the last byte: the pace of the upload decides, not the usual limit.
        let usual = std::mem::replace(&mut self.http.timeout, Duration::from_hours(4));
        let response = self.http.send(Method::PUT, "/admin/v1/blobs", "application/octet-stream", body).await;
        self.http.timeout = usual;
        let bytes = self.http.collect("PUT /admin/v1/blobs", response?, 1 << 16).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| ClientError::Answer { call: "PUT /admin/v1/blobs".into(), cause: error.to_string() })
    }

    /// `GET images`.
    pub async fn images(&mut self) -> Result<Vec<ImageView>, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/images", None).await
    }

    /// `POST images`.
    pub async fn import_image(&mut self, request: &ImportImage) -> Result<ImageView, ClientError> {
        self.http.json(Method::POST, "/admin/v1/images", Some(request)).await
    }

    /// `GET content`.
    pub async fn content(&mut self) -> Result<ContentView, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/content", None).await
    }

    /// `GET profiles`.
    pub async fn profiles(&mut self) -> Result<Vec<ProfileView>, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/profiles", None).await
    }

    /// `POST profiles`.
    pub async fn create_profile(&mut self, request: &CreateProfile) -> Result<ProfileView, ClientError> {
        self.http.json(Method::POST, "/admin/v1/profiles", Some(request)).await
    }

    /// `POST profiles/NAME/publish`.
    pub async fn publish(&mut self, profile: &ProfileName) -> Result<ProfileView, ClientError> {
        self.http.json::<(), _>(Method::POST, &format!("/admin/v1/profiles/{profile}/publish"), None).await
    }

    /// `GET profiles/NAME/boot`.
    pub async fn boot_files(&mut self, profile: &ProfileName) -> Result<BootFiles, ClientError> {
        self.http.json::<(), _>(Method::GET, &format!("/admin/v1/profiles/{profile}/boot"), None).await
    }

    /// `GET /public/boot/PROFILE/FILE` (`kernel`, `initramfs`, `site.cpio`), at most `limit` bytes.
    pub async fn boot_file(&mut self, profile: &ProfileName, file: &str, limit: usize) -> Result<Bytes, ClientError> {
        self.http.bytes(&format!("/public/boot/{profile}/{}", encode(file)), limit).await
    }

    /// `GET /public/images/DIGEST`, at most `limit` bytes.
    pub async fn image(&mut self, digest: ImageDigest, limit: usize) -> Result<Bytes, ClientError> {
        self.http.bytes(&format!("/public/images/{digest}"), limit).await
    }

    /// `POST tokens`.
    pub async fn create_token(&mut self, request: &TokenRequest) -> Result<TokenCreated, ClientError> {
        self.http.json(Method::POST, "/admin/v1/tokens", Some(request)).await
    }

    /// `GET collective`.
    pub async fn collective(&mut self) -> Result<CollectiveView, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/collective", None).await
    }

    /// `POST collective/invite`.
    pub async fn invite(&mut self, request: &InviteRequest) -> Result<Invited, ClientError> {
        self.http.json(Method::POST, "/admin/v1/collective/invite", Some(request)).await
    }

    /// `POST collective/replace`.
    pub async fn replace(&mut self, request: &ReplaceRequest) -> Result<Invited, ClientError> {
        self.http.json(Method::POST, "/admin/v1/collective/replace", Some(request)).await
    }

    /// `POST backup`: the backup, as it comes.
    pub async fn backup(&mut self, request: &BackupRequest) -> Result<Parts, ClientError> {
        let response = self.http.send_json(Method::POST, "/admin/v1/backup", Some(request)).await?;
        Ok(Parts { call: "POST /admin/v1/backup".into(), body: response.into_body() })
    }

    /// `POST collective/ACTION`: `promote`, `demote` or `remove`.
    pub async fn change_member(&mut self, action: &str, request: &MemberRequest) -> Result<(), ClientError> {
        self.http.post_only(&format!("/admin/v1/collective/{action}"), request).await
    }

    /// `POST collective/rotate-key`: new keys, and everything is sealed anew.
    pub async fn rotate_key(&mut self) -> Result<KeysRotated, ClientError> {
        self.http.json(Method::POST, "/admin/v1/collective/rotate-key", None::<&()>).await
    }

    /// `GET authority`.
    pub async fn authority(&mut self) -> Result<AuthorityView, ClientError> {
        self.http.json::<(), _>(Method::GET, "/admin/v1/authority", None).await
    }

    /// `POST authority/rotate`: a new one beside the one in use.
    pub async fn rotate_authority(&mut self) -> Result<AuthorityRotated, ClientError> {
        self.http.json(Method::POST, "/admin/v1/authority/rotate", None::<&()>).await
    }

    /// `POST authority/cancel`: the one that is beside it is not wanted any more.
    pub async fn cancel_authority(&mut self) -> Result<AuthorityCancelled, ClientError> {
        self.http.json(Method::POST, "/admin/v1/authority/cancel", None::<&()>).await
    }

    /// `POST authority/retire`: the new one takes the place of the old one.
    pub async fn retire_authority(&mut self, request: &RetireRequest) -> Result<AuthorityRetired, ClientError> {
        self.http.json(Method::POST, "/admin/v1/authority/retire", Some(request)).await
    }

    /// `POST authority/ssh-ROLE/rotate`: a new SSH authority beside the one in use.
    pub async fn rotate_ssh_authority(&mut self, role: SshRole) -> Result<AuthorityRotated, ClientError> {
        let path = format!("/admin/v1/authority/{}/rotate", AuthorityKind::Ssh(role));
        self.http.json(Method::POST, &path, None::<&()>).await
    }

    /// `POST authority/ssh-ROLE/retire`: the new one takes the place of the old one.
    pub async fn retire_ssh_authority(
        &mut self,
        role: SshRole,
        request: &RetireRequest,
    ) -> Result<AuthorityRetired, ClientError> {
        let path = format!("/admin/v1/authority/{}/retire", AuthorityKind::Ssh(role));
        self.http.json(Method::POST, &path, Some(request)).await
    }

    /// Any other call of the API, for additions that have no method here.
    pub async fn call<Q: serde::Serialize + ?Sized, A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<A, ClientError> {
        self.http.json(method, path, body).await
    }
}

/// Turns the channel of an upload into frames.
struct Pieces {
    receiver: mpsc::Receiver<Result<Bytes, std::io::Error>>,
}

impl futures_core::Stream for Pieces {
    type Item = Result<Frame<Bytes>, Box<dyn std::error::Error + Send + Sync>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|piece| piece.map(|piece| piece.map(Frame::data).map_err(Into::into)))
    }
}

/// An answer of any length as it arrives.
pub struct Parts {
    call: String,
    body: Incoming,
}

impl Parts {
    /// The next part; `None` once the whole came.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let broken = |cause: String| ClientError::Broken { call: self.call.clone(), cause };
        loop {
            let frame = tokio::time::timeout(TIMEOUT, self.body.frame()).await;
            match frame.map_err(|_| broken("the answer stalled".into()))? {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(chain(&error))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// Newline-delimited JSON as it arrives.
pub struct Lines<T> {
    call: String,
    body: Incoming,
    buffer: BytesMut,
    kind: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next line; `None` at the end of the stream. Empty lines (the server's sign of life) are passed over.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let value = serde_json::from_slice(&line);
                return value
                    .map(Some)
                    .map_err(|error| ClientError::Answer { call: self.call.clone(), cause: error.to_string() });
            }
            if self.buffer.len() > MAX_LINE {
                return Err(ClientError::Answer { call: self.call.clone(), cause: "a line is too long".into() });
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(ClientError::Broken { call: self.call.clone(), cause: chain(&error) }),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }
}
