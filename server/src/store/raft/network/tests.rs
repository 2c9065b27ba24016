//! Raft's calls, while what other calls are made by is busy.

use super::*;
use crate::authority::{self, Addresses, MemberIssuer, create_member_key};
use crate::certificate::Certificate;
use crate::state::now;
use crate::store::Level;
use crate::store::raft::follow::without_holes;
use crate::store::raft::{Entry, LogId, own, stream, wire};
use crate::store::records::SiteRecord;
use crate::trust::{Trust, peer_calls};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use moor_api::trust::Incarnation;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// Long enough for a handshake on a machine that has much else to do.
const LIMIT: Duration = Duration::from_secs(10);

/// A member that somebody else plays, where he takes connections, and how he is called by one who shows the same certificate.
async fn played(keys: &std::path::Path) -> (Peer, Arc<Calls>, TcpListener, TlsAcceptor) {
    let (collective, incarnation, id) = (CollectiveId::random(), Incarnation::FIRST, MemberId::random());
    let site = SiteRecord { collective, name: "x".into(), bundle_version: 1, created: now(), incarnation };
    authority::create(keys, collective, "x", site.created).unwrap();
    let key = create_member_key(keys).unwrap().into();
    let addresses = Addresses { ips: vec!["127.0.0.1".parse().unwrap()], names: Vec::new() };
    let issuer =
        MemberIssuer { keys: keys.to_owned(), collective, incarnation, member: id, addresses, created: site.created };
    let certificate = Arc::new(Certificate::new(&issuer).unwrap());
    let tls = peer_calls(&site, &Trust::open(keys, &site).unwrap().taken(), certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let urls = vec![format!("https://{}", listener.local_addr().unwrap())];
    let peer = Peer { id, key, name: "m2".into(), urls };
    (peer, Arc::new(Calls::new(collective, tls, None)), listener, acceptor)
}

/// One who answers all calls by granting a vote.
async fn voter(keys: &std::path::Path) -> (Peer, Arc<Calls>) {
    let (peer, calls, listener, acceptor) = played(keys).await;
    tokio::spawn(async move {
        let granted = VoteResponse::<Raft>::new(Vote::new(3, 1), None, true);
        let answer = serde_json::to_value(WireVoted::from(granted)).unwrap();
        let app: Router = Router::new().fallback(move || std::future::ready(Json(answer.clone())));
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let tls = acceptor.accept(tcp).await.unwrap();
            let service = TowerToHyperService::new(app.clone());
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(tls), service));
        }
    });
    (peer, calls)
}

pub(in crate::store::raft) fn id(index: u64) -> LogId {
    LogId::new(1.into(), index)
}

/// Of each call the last entry that it ends with, and what it told of commits.
type Seen = Vec<(u64, Option<u64>)>;

/// A follower that takes all that is streamed.
#[derive(Clone)]
pub(in crate::store::raft) struct Follower {
    pub(in crate::store::raft) peer: Peer,
    seen: Arc<Mutex<Seen>>,
}

impl Follower {
    /// What was sent to him.
    pub(in crate::store::raft) fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }
}

impl Network {
    pub(in crate::store::raft) fn calls(&self) -> &Calls {
        &self.calls
    }
}

/// One whose answer to the first call takes as long as the first of `delays`, and so on; to those after them none.
pub(in crate::store::raft) async fn scripted(keys: &std::path::Path, delays: Vec<Duration>) -> (Follower, Network) {
    use futures_util::SinkExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (peer, calls, listener, acceptor) = played(keys).await;
    let seen = Arc::<Mutex<Seen>>::default();
    let follower = Follower { peer, seen: seen.clone() };
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(tcp).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tls.read_u8().await.unwrap());
        }
        let switched =
            format!("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: {}\r\n\r\n", stream::PROTOCOL);
        tls.write_all(switched.as_bytes()).await.unwrap();
        let frames = stream::framed(tls);
        let mut delays = delays.into_iter();
        let (mut answers, mut frames) = futures_util::StreamExt::split(frames);
        let (note, mut noted) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some((last, delay)) = noted.recv().await {
                tokio::time::sleep(delay).await;
                let answer: StreamAppendResult<Raft> = Ok(last);
                let answer = serde_json::to_vec(&wire::Streamed::from(&answer)).unwrap();
                answers.send(Bytes::from(answer)).await.unwrap();
            }
        });
        while let Some(Ok(frame)) = futures_util::StreamExt::next(&mut frames).await {
            if frame.is_empty() {
                continue;
            }
            let (call, _) = wire::append_from(&frame, Level::NEWEST).unwrap();
            let last = call.entries.last().map(|entry| entry.log_id).or(call.prev_log_id);
            seen.lock().unwrap().push((last.map_or(0, |last| last.index()), call.leader_commit.map(|id| id.index())));
            note.send((last, delays.next().unwrap_or_default())).unwrap();
        }
    });
    (follower, Network::new(calls))
}

#[test]
fn entries_follow_each_other_and_what_is_before_them() {
    use openraft::EntryPayload;
    let id = |(term, index): (u64, u64)| LogId::new(term.into(), index);
    for (before, entries, says) in [
        (None, &[][..], ""),
        (Some((3, 4)), &[], ""),
        (None, &[(1, 0), (1, 1), (2, 2)], ""),
        (Some((3, 4)), &[(3, 5), (7, 6)], ""),
        (None, &[(1, 1)], "does not follow nothing"),
        (Some((3, 4)), &[(3, 6)], "does not follow entry"),
        (Some((3, 4)), &[(3, 4)], "does not follow entry"),
        (Some((3, 4)), &[(3, 5), (3, 7)], "does not follow entry"),
        (Some((3, 4)), &[(2, 5)], "does not follow entry"),
        (Some((3, 4)), &[(4, 5), (3, 6)], "does not follow entry"),
        (Some((3, u64::MAX)), &[(3, 0)], "does not follow entry"),
    ] {
        let entry = |at: &(u64, u64)| Entry { log_id: id(*at), payload: EntryPayload::Blank };
        let request = AppendEntriesRequest::<Raft> {
            vote: Vote::new_committed(7, 2),
            prev_log_id: before.map(id),
            leader_commit: None,
            entries: entries.iter().map(entry).collect(),
        };
        let said = without_holes(&request).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.is_empty() == says.is_empty() && said.contains(says), "{before:?} {entries:?}: {said}");
    }
}

#[test]
fn a_vote_does_not_wait_for_what_other_calls_are_made_by() {
    let keys = tempfile::tempdir().unwrap();
    let far = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (peer, calls) = far.block_on(voter(keys.path()));
    // A member's other threads. The connection that is kept from this call is driven by them, and nothing goes on there any more.
    let busy = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let alive = calls.post::<serde_json::Value>(&peer, "/member/v1/alive", Vec::new(), LIMIT);
    busy.block_on(alive).unwrap();
    let raft = own::thread().unwrap();
    let asked = raft.handle().spawn(async move {
        let mut network = Network::new(calls);
        network.ready(1, peer.clone()).await;
        let kept = network.pool.take(peer.id).ok_or("no connection waits for a vote")?;
        network.pool.put_back(kept);
        // The second goes over the connection of the first.
        for _ in 0..2 {
            let mut link = network.new_client(2, &peer).await;
            let request = VoteRequest::new(Vote::new(3, 1), None);
            let voted = link.pre_vote(request, RPCOption::new(LIMIT)).await.map_err(|error| error.to_string())?;
            assert!(voted.vote_granted);
        }
        Ok::<(), String>(())
    });
    assert_eq!(far.block_on(asked).unwrap(), Ok(()));
}
