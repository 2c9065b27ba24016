//! Backups, as they are sent to the administrator.

use super::audit::Who;
use super::stale;
use crate::backup::{self, lock::Lock};
use crate::http::{Connection, Failure, Peer, parse};
use crate::state::Member;
use crate::store::StoreError;
use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use http::header;
use moor_api::admin::{BackupRequest, MIN_PASSPHRASE, STALE};
use moor_api::problem::{Code, Problem};
use std::io::{self, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use zeroize::Zeroizing;

/// Bytes that are sent at a time.
const PIECE: usize = 64 << 10;

/// What is written becomes an answer's body. The reader's pace is the writer's: a few pieces wait, and no more.
struct Pipe {
    piece: Vec<u8>,
    sender: mpsc::Sender<io::Result<Bytes>>,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.sender.blocking_send(Ok(piece.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Refuses what could not be restored.
async fn check(member: &Arc<Member>) -> Result<(), Failure> {
    let member = member.clone();
    let checked = tokio::task::spawn_blocking(move || backup::check(&member)).await.map_err(anyhow::Error::from)?;
    checked.map_err(|error| match error.downcast_ref::<StoreError>() {
        Some(StoreError::NoAuthority) => {
            let detail = "this member was killed in the middle of a rotation of the authorities: its tables are of before that, and the keys of \
                          then are removed; bring a majority back, or let this member go on alone (`moor collective recover`), and make the \
                          backup then";
            Problem::new(Code::Conflict, detail).into()
        }
        _ => error.into(),
    })
}

/// A lock, made aside: that takes a while.
async fn locked(make: impl FnOnce() -> io::Result<Lock> + Send + 'static) -> Result<Lock, Failure> {
    let made = tokio::task::spawn_blocking(make).await.map_err(anyhow::Error::from)?;
    made.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => Problem::new(Code::BadRequest, error.to_string()).into(),
        _ => anyhow::Error::from(error).into(),
    })
}

pub(super) async fn backup(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    Extension(Who(who)): Extension<Who>,
    body: Bytes,
) -> Result<Response, Failure> {
    let body = Zeroizing::new(body.to_vec());
    let mut request: BackupRequest = parse(&body)?;
    let passphrase = request.passphrase.take().map(Zeroizing::new);
    let recipients = std::mem::take(&mut request.recipients);
    let is_redacted = passphrase.is_none() && recipients.is_empty();
    // Also an encrypted one: who asks for it says who opens it.
    if !is_redacted && !matches!(connection.peer, Peer::Socket { .. }) {
        let detail = "a backup holds all keys of the collective: it is made on a member, over its socket";
        return Err(Problem::new(Code::Forbidden, detail).into());
    }
    let fields = |majority: bool| serde_json::json!({ "by": who, "redacted": is_redacted, "recipients": recipients, "majority": majority });
    // What cannot be locked shows before anything is sent.
    let lock = match (passphrase, recipients.clone()) {
        (Some(_), recipients) if !recipients.is_empty() => {
            let detail = "a backup is under a passphrase or encrypted to keys, not both";
            return Err(Problem::new(Code::BadRequest, detail).into());
        }
        (Some(passphrase), _) if passphrase.chars().count() < MIN_PASSPHRASE => {
            let detail = format!("the passphrase has less than {MIN_PASSPHRASE} characters");
            return Err(Problem::new(Code::BadRequest, detail).into());
        }
        (Some(passphrase), _) => Some(locked(move || Lock::by_passphrase(passphrase.as_bytes())).await?),
        (None, recipients) if !recipients.is_empty() => Some(locked(move || Lock::to_recipients(&recipients)).await?),
        (None, _) => None,
    };
    tracing::info!("a backup for {who}");
    // Before anything leaves: what is in it is then at least as new as the line.
    let why = match member.store.linearize().await {
        Ok(()) => {
            member.audit("backup", fields(true)).await?;
            None
        }
        Err(StoreError::NoLeader(why)) if request.without_majority => {
            if lock.is_some() {
                check(&member).await?;
            }
            member.audit_alone("backup", &fields(false)).await?;
            Some(why)
        }
        Err(StoreError::NoLeader(why)) => {
            let detail = format!(
                "{why}: a backup could only be of what this member holds, which may not be the newest; `--without-majority` makes such a one"
            );
            return Err(Problem::new(Code::NoMajority, detail).into());
        }
        Err(error) => return Err(error.into()),
    };
    let is_stale = why.is_some();
    let (sender, receiver) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        let pipe = Pipe { piece: Vec::with_capacity(PIECE), sender: sender.clone() };
        let written = match lock {
            Some(lock) => backup::write(&member, lock, is_stale, pipe),
            None => backup::plain::write(&member, is_stale, pipe),
        };
        let ended = written.and_then(|mut pipe| Ok(pipe.flush()?));
        if let Err(error) = ended {
            tracing::error!("a backup: {error:#}");
            // The answer breaks off: nobody takes what came for a whole one. The reader may be who went away.
            let _ = sender.blocking_send(Err(io::Error::other("the backup failed")));
        }
    });
    let mut response = Response::builder().header(header::CONTENT_TYPE, "application/octet-stream");
    if let Some(why) = why {
        response = response.header(STALE, stale(&why));
    }
    let response = response.body(Body::from_stream(ReceiverStream::new(receiver)));
    response.map_err(|error| anyhow::Error::from(error).into())
}
