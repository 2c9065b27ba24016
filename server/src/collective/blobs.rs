//! Content of the collective: each member fetches what the records name and it does not have from the others, several of them at once, checks
//! the SHA-256 of the whole, and has it. Nothing is believed: what others send is the blob, or it is thrown away, and who sent it is found.

use super::behind::Behind;
use super::pace::Pace;
use super::pieces::{PIECE, Pieces};
use crate::content::{self, Incoming};
use crate::http::{Connection, Failure};
use crate::public::{self, Leave};
use crate::shares::Client;
use crate::state::{self, Member};
use crate::store::raft::{Calls, Peer};
use aws_lc_rs::digest::{SHA256, digest};
use axum::response::Response;
use http::{HeaderMap, Method};
use http_body_util::BodyExt as _;
use moor_api::client::ClientError;
use moor_api::client::member::{MemberConnection, Part};
use moor_api::ids::{MemberId, Sha256Digest};
use moor_api::problem::{Code, Problem};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A member from which nothing more comes for so long does not send the rest of a piece either.
const STALL: Duration = Duration::from_secs(20);
/// A member that was not reached is not asked for content for so long: each blob would wait for it.
const SILENT: Duration = Duration::from_secs(15);
/// And one that sent other bytes than it should: its disk is going, or worse.
const UNTRUSTED: Duration = Duration::from_hours(1);
/// Members that one blob is fetched from at a time.
const SOURCES: usize = 4;
/// While content is fetched, what is missing is looked at anew this often, between two blobs: what was published since may be wanted before the rest.
const LIST_AGAIN: Duration = Duration::from_secs(2);
/// What nobody could send is asked for again after this time, while there is something else to fetch.
const TRY_AGAIN: Duration = Duration::from_mins(1);
/// Whether a piece is late is looked at this often, when none comes.
const LOOK: Duration = Duration::from_secs(1);

/// A blob, or the rest of one, for another member, which comes after the nodes.
pub(super) async fn send(
    member: &Arc<Member>,
    connection: &Connection,
    digest: &str,
    headers: &HeaderMap,
) -> Result<Response, Failure> {
    let blob: Sha256Digest =
        digest.parse().map_err(|error: moor_api::ids::InvalidId| Problem::new(Code::BadRequest, error.to_string()))?;
    let leave = Leave::of(connection, member, Client::of(&connection.peer)).await;
    let path = content::path_of(&member.config.blobs(), blob);
    let opened = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        Ok::<_, std::io::Error>((file, size))
    });
    match opened.await.map_err(anyhow::Error::from)? {
        Ok(opened) => Ok(public::ranges(opened, &format!("\"{blob}\""), leave, &Method::GET, headers)),
        Err(_) => Err(Problem::new(Code::NotFound, format!("this member does not have the blob {blob} either")).into()),
    }
}

/// What comes cannot be kept here, whoever sends it.
#[derive(Debug, thiserror::Error)]
#[error("content that comes from other members cannot be kept in '{}': {cause}", dir.display())]
struct CannotKeep {
    dir: PathBuf,
    cause: io::Error,
}

/// A member that a blob is fetched from; its connection is made when it is needed.
struct Source {
    peer: Peer,
    connection: Option<MemberConnection>,
}

/// What all sources of a blob share.
struct Wanted {
    calls: Arc<Calls>,
    path: String,
    pace: Arc<Pace>,
}

/// Why a piece did not come.
#[derive(Debug, thiserror::Error)]
enum NoPiece {
    #[error("{0}")]
    NotReached(ClientError),
    #[error("{0}")]
    NotSent(#[from] ClientError),
    #[error("{0}")]
    Broken(String),
}

/// Bytes of a blob that were written, who sent them, and their SHA-256.
struct Sent {
    range: Range<u64>,
    from: MemberId,
    digest: [u8; 32],
}

/// What a transfer came to.
enum Fetched {
    /// The blob is here.
    Whole,
    /// Not all of it came.
    Part,
    /// All of it came, and it is something else.
    Other(Vec<Sent>),
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

impl Source {
    fn new(peer: &Peer) -> Self {
        Self { peer: peer.clone(), connection: None }
    }

    /// These bytes of the blob, or as many of them as there are.
    async fn get(&mut self, wanted: &Wanted, range: &Range<u64>) -> Result<(Part, Vec<u8>), NoPiece> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => wanted.calls.connect(&self.peer).await.map_err(NoPiece::NotReached)?,
        };
        let (part, mut body) = connection.get_range(&wanted.path, range).await?;
        let length = usize::try_from(part.range.end - part.range.start).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        loop {
            let frame = tokio::time::timeout(STALL, body.frame()).await;
            let Some(frame) = frame.map_err(|_| NoPiece::Broken("nothing more comes".into()))? else { break };
            let frame = frame.map_err(|error| NoPiece::Broken(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > length {
                return Err(NoPiece::Broken("more came than was asked for".into()));
            }
            wanted.pace.take(data.len()).await;
            bytes.extend_from_slice(&data);
        }
        if bytes.len() != length {
            return Err(NoPiece::Broken(format!("{} of {length} bytes came", bytes.len())));
        }
        self.connection = Some(connection);
        Ok((part, bytes))
    }

    /// As [`Self::get`]; the source is given back with the answer.
    async fn begin(mut self, wanted: Arc<Wanted>, range: Range<u64>) -> (Self, Result<(Part, Vec<u8>), NoPiece>) {
        let got = self.get(&wanted, &range).await;
        (self, got)
    }

    /// A piece of a blob of `size` bytes. The source is given back with it.
    async fn piece(
        mut self,
        wanted: Arc<Wanted>,
        range: Range<u64>,
        size: u64,
    ) -> (Self, Range<u64>, Result<Vec<u8>, NoPiece>) {
        let got = self.get(&wanted, &range).await.and_then(|(part, bytes)| {
            let other = || NoPiece::Broken(format!("it has {} bytes here, and {size} elsewhere", part.size));
            if part.size == size { Ok(bytes) } else { Err(other()) }
        });
        (self, range, got)
    }
}

/// A blob that is being put together.
struct Assembly {
    behind: Arc<Behind>,
    /// Always there but while something is being written.
    file: Option<Incoming>,
    sent: Vec<Sent>,
    dir: PathBuf,
}

impl Assembly {
    fn cannot_keep(&self, cause: io::Error) -> CannotKeep {
        CannotKeep { dir: self.dir.clone(), cause }
    }

    async fn write(&mut self, range: Range<u64>, from: MemberId, bytes: Vec<u8>) -> Result<(), CannotKeep> {
        let Some(mut file) = self.file.take() else {
            return Err(self.cannot_keep(io::Error::other("it was given up")));
        };
        let written = self.behind.blocking(move || file.write(&bytes).map(|()| (file, sha256(&bytes)))).await;
        let (file, digest) = written.map_err(|error| self.cannot_keep(error))?;
        self.file = Some(file);
        self.sent.push(Sent { range, from, digest });
        Ok(())
    }

    /// Makes it durable, if it is `blob`.
    async fn finish(mut self, blob: Sha256Digest) -> Result<Fetched, CannotKeep> {
        let Some(file) = self.file.take() else {
            return Err(self.cannot_keep(io::Error::other("it was given up")));
        };
        match self.behind.blocking(move || file.finish_as(blob)).await {
            Ok(()) => Ok(Fetched::Whole),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Fetched::Other(self.sent)),
            Err(error) => Err(self.cannot_keep(error)),
        }
    }
}

/// Who sent other bytes than the blob in `path` has, which is the right one.
fn wrong_senders(path: &Path, sent: &[Sent]) -> io::Result<BTreeSet<MemberId>> {
    let file = File::open(path)?;
    let mut wrong = BTreeSet::new();
    for Sent { range, from, digest } in sent {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
        let is_right = match file.read_exact_at(&mut bytes, range.start) {
            Ok(()) => sha256(&bytes) == *digest,
            // It has not even so many.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(error),
        };
        if !is_right {
            wrong.insert(*from);
        }
    }
    Ok(wrong)
}

/// What a member lacks, in the order in which it is fetched.
async fn missing(member: &Arc<Member>) -> anyhow::Result<VecDeque<Sha256Digest>> {
    let looker = member.clone();
    let missing = tokio::task::spawn_blocking(move || state::missing(&looker.view()?, &looker.config.blobs()));
    Ok(missing.await??.into())
}

/// Fetches what a member lacks.
pub(super) struct Fetcher {
    /// Members that are not asked, and until when.
    left_out: BTreeMap<MemberId, Instant>,
    pace: Arc<Pace>,
    /// Where connections are, and files are written.
    behind: Arc<Behind>,
    /// It was said that this member cannot keep what comes.
    is_stuck: bool,
}

impl Fetcher {
    /// One that has fetched nothing yet.
    ///
    /// # Errors
    /// There are no threads to be had for it.
    pub(super) fn new(member: &Member) -> io::Result<Self> {
        let pace = Arc::new(Pace::new(member.config.content_mib_per_second));
        Ok(Self { left_out: BTreeMap::new(), pace, behind: Arc::new(Behind::new()?), is_stuck: false })
    }

    /// Fetches what is missing; returns how many blobs came, and how many are still missing.
    ///
    /// # Errors
    /// The store or the disk failed.
    pub(super) async fn fill(&mut self, member: &Arc<Member>) -> anyhow::Result<(usize, usize)> {
        let mut missing = missing(member).await?;
        let mut listed = Instant::now();
        let (mut came, mut left, mut failed) = (0, BTreeMap::new(), None);
        while let Some(blob) = missing.pop_front() {
            if left.get(&blob).is_some_and(|tried: &Instant| tried.elapsed() < TRY_AGAIN) {
                continue;
            }
            let here = self.fetch_from_any(member, blob).await;
            if matches!(here, Ok(true)) {
                came += 1;
                left.remove(&blob);
                if listed.elapsed() >= LIST_AGAIN {
                    missing = self::missing(member).await?;
                    listed = Instant::now();
                }
                continue;
            }
            left.insert(blob, Instant::now());
            if let Err(error) = here {
                failed.get_or_insert(error);
            }
        }
        let left = left.len();
        match failed {
            // It is tried again every few seconds, and said once.
            Some(error) if !self.is_stuck => {
                tracing::warn!("{error}: it is tried again until that is mended");
                self.is_stuck = true;
            }
            None if self.is_stuck && left == 0 => {
                tracing::info!("content is kept again: all of it is here");
                self.is_stuck = false;
            }
            _ => {}
        }
        Ok((came, left))
    }

    /// Members that may be asked for this blob; another one first for each blob.
    fn sources(&self, member: &Member, blob: Sha256Digest) -> Vec<Peer> {
        let now = Instant::now();
        let mut peers = member.others();
        peers.retain(|peer| self.left_out.get(&peer.id).is_none_or(|until| *until <= now));
        if !peers.is_empty() {
            let first = usize::from(blob.0[0]) % peers.len();
            peers.rotate_left(first);
        }
        peers
    }

    /// Whether it came. What several sent and is not the blob is fetched from one at a time: so it comes as long as one member has it.
    async fn fetch_from_any(&mut self, member: &Arc<Member>, blob: Sha256Digest) -> Result<bool, CannotKeep> {
        let peers = self.sources(member, blob);
        let sent = match self.fetch(member, &peers, blob).await? {
            Fetched::Whole => return Ok(true),
            Fetched::Part => return Ok(false),
            Fetched::Other(sent) => sent,
        };
        tracing::warn!("blob {blob} came, and its SHA-256 is another: it is fetched anew, from one member at a time");
        for peer in &peers {
            match self.fetch(member, std::slice::from_ref(peer), blob).await? {
                Fetched::Whole => {
                    let path = content::path_of(&member.config.blobs(), blob);
                    match self.behind.blocking(move || wrong_senders(&path, &sent)).await {
                        Ok(wrong) => {
                            peers
                                .iter()
                                .filter(|peer| wrong.contains(&peer.id))
                                .for_each(|peer| self.distrust(peer, blob));
                        }
                        Err(error) => tracing::warn!("who sent wrong bytes of blob {blob} is not known: {error}"),
                    }
                    return Ok(true);
                }
                Fetched::Part => {
                    // What the next one sends is to be its own from the beginning, or it would be blamed for what this one sent.
                    let dir = member.config.blobs();
                    if let Err(error) = self.behind.blocking(move || Incoming::resume(&dir, blob)?.restart()).await {
                        tracing::warn!("what came of blob {blob} cannot be dropped: {error}");
                        return Ok(false);
                    }
                }
                Fetched::Other(_) => self.distrust(peer, blob),
            }
        }
        Ok(false)
    }

    fn distrust(&mut self, peer: &Peer, blob: Sha256Digest) {
        tracing::warn!(
            "member {} sent wrong bytes of blob {blob}: it is asked for no content for {} minutes (is its disk well?)",
            peer.name,
            UNTRUSTED.as_secs() / 60
        );
        self.left_out.insert(peer.id, Instant::now() + UNTRUSTED);
    }

    fn went(&mut self, peer: &Peer, blob: Sha256Digest, error: &NoPiece) {
        tracing::debug!("blob {blob} from {}: {error}", peer.name);
        if matches!(error, NoPiece::NotReached(_)) {
            self.left_out.insert(peer.id, Instant::now() + SILENT);
        }
    }

    /// The first piece that is missing, from the first member that has it: it says how long the blob is.
    async fn begin(
        &mut self,
        wanted: &Arc<Wanted>,
        peers: &mut std::slice::Iter<'_, Peer>,
        blob: Sha256Digest,
        file: &mut Incoming,
    ) -> io::Result<Option<(Source, Part, Vec<u8>)>> {
        let behind = self.behind.clone();
        for peer in peers {
            let ask = async |source: Source, from: u64| {
                let range = from..from.saturating_add(PIECE);
                behind.run(source.begin(wanted.clone(), range)).await
            };
            let (mut source, mut got) = ask(Source::new(peer), file.size()).await?;
            // There is nothing from there on: what is here is no part of it.
            if matches!(got, Err(NoPiece::NotSent(ClientError::Answer { .. }))) && file.size() > 0 {
                file.restart()?;
                (source, got) = ask(source, 0).await?;
            }
            match got {
                Ok((part, bytes)) => return Ok(Some((source, part, bytes))),
                Err(error) => self.went(peer, blob, &error),
            }
        }
        Ok(None)
    }

    /// What is missing of the blob, from these members at once.
    async fn fetch(&mut self, member: &Member, peers: &[Peer], blob: Sha256Digest) -> Result<Fetched, CannotKeep> {
        let dir = member.config.blobs();
        let behind = self.behind.clone();
        let mut whole = Assembly { behind: behind.clone(), file: None, sent: Vec::new(), dir: dir.clone() };
        if blob.0 == sha256(b"") {
            // There is no byte of it to ask for.
            let made = behind.blocking(move || content::add(&dir, b"")).await;
            return made.map(|_| Fetched::Whole).map_err(|error| whole.cannot_keep(error));
        }
        let begun = behind.blocking(move || Incoming::resume(&dir, blob)).await;
        let mut file = begun.map_err(|error| whole.cannot_keep(error))?;
        let path = format!("/member/v1/blobs/{blob}");
        let wanted = Arc::new(Wanted { calls: member.calls.clone(), path, pace: self.pace.clone() });
        let mut others = peers.iter();
        let first = self.begin(&wanted, &mut others, blob, &mut file).await;
        let Some((source, part, bytes)) = first.map_err(|error| whole.cannot_keep(error))? else {
            return Ok(Fetched::Part);
        };
        whole.file = Some(file);
        let (from, size) = (part.range.start, part.size);
        let mut pieces = Pieces::new(from, size);
        // It is the one that came.
        let now = Instant::now();
        pieces.next(now);
        pieces.came(from, (source.peer.id, bytes), now);
        let mut idle = vec![source];
        idle.extend(others.by_ref().take(SOURCES - 1).map(Source::new));
        let mut asked = JoinSet::new();
        loop {
            while let Some((range, (from, bytes))) = pieces.take() {
                whole.write(range, from, bytes).await?;
            }
            if pieces.is_whole() {
                break;
            }
            while let Some(source) = idle.pop() {
                let Some(range) = pieces.next(Instant::now()) else {
                    idle.push(source);
                    break;
                };
                behind.run_among(&mut asked, source.piece(wanted.clone(), range, size));
            }
            match tokio::time::timeout(LOOK, asked.join_next()).await {
                // Whether one is late is looked at.
                Err(_) => {}
                Ok(Some(Ok((source, range, Ok(bytes))))) => {
                    pieces.came(range.start, (source.peer.id, bytes), Instant::now());
                    idle.push(source);
                }
                Ok(Some(Ok((source, range, Err(error))))) => {
                    pieces.failed(range.start);
                    self.went(&source.peer, blob, &error);
                    idle.extend(others.next().map(Source::new));
                }
                // Nobody is left who could send it.
                Ok(None | Some(Err(_))) => return Ok(Fetched::Part),
            }
        }
        let senders: BTreeSet<MemberId> = whole.sent.iter().map(|sent| sent.from).collect();
        let done = whole.finish(blob).await?;
        if matches!(done, Fetched::Whole) {
            let names = peers.iter().filter(|peer| senders.contains(&peer.id)).map(|peer| peer.name.as_str());
            tracing::debug!("blob {blob} came from {}, from byte {from} on", names.collect::<Vec<_>>().join(" and "));
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sent_what_is_not_the_blob_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, b"what is right").unwrap();
        let sent = |range: Range<u64>, from, bytes: &[u8]| Sent {
            range,
            from: MemberId::from_bytes([from; 16]),
            digest: sha256(bytes),
        };
        let wrong = |sent: &[Sent]| {
            wrong_senders(&path, sent).unwrap().into_iter().map(|id| id.as_bytes()[0]).collect::<Vec<u8>>()
        };
        let (first, second) = (sent(0..5, 1, b"what "), sent(5..13, 2, b"is right"));
        assert_eq!(wrong(&[first, second]), [0; 0]);
        // One of two; one that sent both right and wrong; one that had more of it than there is.
        let pieces = [
            sent(0..5, 1, b"what "),
            sent(5..8, 2, b"is!"),
            sent(8..10, 3, b"ri"),
            sent(10..13, 3, b"GHT"),
            sent(13..15, 4, b"??"),
        ];
        assert_eq!(wrong(&pieces), [2, 3, 4]);
    }
}
