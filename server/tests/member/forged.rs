//! Who shows a certificate of the member authority and is no member. Whoever was one once has that authority's key, and issues itself what
//! it likes: another id, the id of a member, vouchers.

use crate::collective::{define, invite, joined, knows, names, text, three, until, view, voters};
use crate::support::{Member, TIMEOUT, refusal};
use crate::tls::{Identity, issue_for, issue_until};
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use moor_api::admin::MemberRequest;
use moor_api::client::member::{MemberConnection, Switched};
use moor_api::client::tls::peer_tls_config;
use moor_api::ids::{CollectiveId, MemberId, NodeId};
use moor_api::problem::Code;
use moor_api::trust::{SiteBundle, incarnation_uri, member_uri};
use moord::collective::identity::Identity as Own;
use moord::collective::voucher::{Acquaintance, Voucher, extend};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls::ServerConfig;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const LIMIT: usize = 1 << 20;
const REMOVED: &str = "was removed from";
const OF_BEFORE: &str =
    "this member is of incarnation 1 of the collective, which was recovered or restored since and is at 2";
const FOR_ANOTHER: &str = "nobody speaks for another member";

/// Whoever has the key directory of somebody who is or was a member.
pub(crate) struct Insider {
    keys: PathBuf,
    own: Own,
}

impl Insider {
    pub(crate) fn of(member: &Member) -> anyhow::Result<Self> {
        let store = member.path("state/store");
        Ok(Self { own: Own::read(&store.join("member.json"))?, keys: store.join("keys") })
    }

    fn collective(&self) -> CollectiveId {
        self.own.site.collective
    }

    fn key(&self) -> anyhow::Result<KeyPair> {
        Ok(KeyPair::from_pem(&std::fs::read_to_string(self.keys.join("member.key"))?)?)
    }

    /// A member's certificate of this id, for this key.
    fn issue(&self, id: MemberId, key: &KeyPair) -> anyhow::Result<Identity> {
        issue_for(key, &self.keys, "member", &[member_uri(self.collective(), id)], &["member-ca.pem"])
    }

    /// As it says of itself, by its own key.
    pub(crate) fn itself(&self) -> anyhow::Result<Identity> {
        self.issue(self.own.id, &self.key()?)
    }
}

pub(crate) async fn connect(
    to: &Member,
    bundle: &SiteBundle,
    (chain, key): Identity,
) -> anyhow::Result<MemberConnection> {
    let certified = CertifiedKey::from_der(chain, key, &rustls::crypto::aws_lc_rs::default_provider())?;
    let tls = Arc::new(peer_tls_config(bundle, Arc::new(SingleCertAndKey::from(certified)))?);
    Ok(MemberConnection::connect(&to.url(), bundle.collective, tls, TIMEOUT).await?)
}

/// What a member says to a call.
type Said = (&'static str, Code, String);

/// A call of each kind by which a leader leads, in the name of the member of this number: what the member says to each.
async fn calls_of_leaders(connection: &mut MemberConnection, candidate: u64) -> anyhow::Result<Vec<Said>> {
    let vote = json!({ "term": 1000, "candidate": candidate, "committed": true });
    let asked = json!({
        "vote": { "term": 1000, "candidate": candidate, "committed": false }, "last": { "term": 1000, "index": 1_000_000 },
    });
    let snapshot = format!("/member/v1/snapshot?vote={}", hex::encode(vote.to_string()));
    let append = json!({ "vote": vote, "previous": null, "commit": null, "entries": [] });
    let mut said = Vec::new();
    for (what, path, body) in [
        ("append", "/member/v1/append", append.to_string()),
        ("vote", "/member/v1/vote", asked.to_string()),
        ("pre-vote", "/member/v1/pre-vote", asked.to_string()),
        ("snapshot", snapshot.as_str(), "no snapshot".into()),
    ] {
        let (code, detail) = refusal(connection.post(path, Bytes::from(body), LIMIT).await);
        said.push((what, code, detail));
    }
    Ok(said)
}

/// A call of each kind that members make, which would do harm.
async fn calls(connection: &mut MemberConnection) -> anyhow::Result<Vec<Said>> {
    let define = json!({ "command": "define-node", "id": NodeId::random(), "name": "evil", "attributes": {} });
    let mut said = calls_of_leaders(connection, 2).await?;
    for (what, path, body) in [
        ("propose", "/member/v1/propose", define.to_string()),
        ("read-index", "/member/v1/read-index", String::new()),
        ("lacking", "/member/v1/lacking", "[]".into()),
    ] {
        let (code, detail) = refusal(connection.post(path, Bytes::from(body), LIMIT).await);
        said.push((what, code, detail));
    }
    let blob = format!("/member/v1/blobs/{}", "0".repeat(64));
    let (code, detail) = refusal(connection.get_range(&blob, &(0..1)).await.map(drop));
    said.push(("blobs", code, detail));
    Ok(said)
}

/// Every call of this connection is refused, with these words.
async fn all_refused(what: &str, connection: &mut MemberConnection, says: &str) -> anyhow::Result<()> {
    for (call, code, detail) in calls(connection).await? {
        let is_none = [REMOVED, OF_BEFORE].iter().any(|none| says.starts_with(none));
        let refuses = if is_none { Code::Removed } else { Code::Forbidden };
        ensure!(code == refuses && detail.contains(says), "{what}: {call}: {code:?}: {detail}");
    }
    Ok(())
}

/// What does no harm is answered: who asks is the member of this number.
pub(crate) async fn is_member(number: u64, connection: &mut MemberConnection) -> anyhow::Result<()> {
    connection.post("/member/v1/lacking", Bytes::from_static(b"[]"), LIMIT).await?;
    may_vote(number, connection).await
}

async fn may_vote(number: u64, connection: &mut MemberConnection) -> anyhow::Result<()> {
    let old = json!({ "vote": { "term": 0, "candidate": number, "committed": false }, "last": null });
    connection.post("/member/v1/pre-vote", Bytes::from(old.to_string()), LIMIT).await?;
    Ok(())
}

async fn show(connection: &mut MemberConnection, vouchers: &[Voucher]) -> anyhow::Result<()> {
    connection.post("/member/v1/introduce", Bytes::from(serde_json::to_vec(vouchers)?), LIMIT).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_comes_back_under_no_id_key_or_voucher() -> anyhow::Result<()> {
    let [first, mut second, third] = three().await?;
    let bundle = first.site().await?.bundle;
    let (gone, stays) = (Insider::of(&second)?, Insider::of(&third)?);
    // The control: as long as it is a member, its certificate is good.
    is_member(2, &mut connect(&first, &bundle, gone.itself()?).await?).await?;
    // Whose secret it could read.
    let waiting = invite(&first, "m9", true, 600).await?;
    first.admin().await?.change_member("remove", &MemberRequest { member: "m2".into(), force: false }).await?;
    second.kill();
    // It has a vote until that is through, on each of the others.
    for host in [&first, &third] {
        let is_out = async || {
            let mut connection = connect(host, &bundle, gone.itself()?).await?;
            anyhow::Ok(is_member(2, &mut connection).await.is_err() && may_vote(2, &mut connection).await.is_err())
        };
        until(host, "it is not removed", is_out).await?;
    }
    // It may have led.
    until(&first, "nobody leads", async || Ok(view(&first).await?.leader.is_some_and(|leader| leader != 2))).await?;
    let term = view(&first).await?.term;
    let (removed, unknown, another) = (REMOVED, "has not heard of", "is another key than");
    for host in [&first, &third] {
        is_member(3, &mut connect(host, &bundle, stays.itself()?).await?).await?;
        let stranger = MemberId::random();
        let cases = [
            ("the removed member", gone.own.id, gone.key()?, removed),
            ("its id with another key", gone.own.id, KeyPair::generate()?, another),
            ("an id that nobody has", stranger, KeyPair::generate()?, unknown),
            ("its key under an id that nobody has", stranger, gone.key()?, unknown),
            ("a member's id with another key", stays.own.id, KeyPair::generate()?, another),
            ("a member's id with the removed one's key", stays.own.id, gone.key()?, another),
        ];
        for (what, id, key, says) in cases {
            let mut connection = connect(host, &bundle, gone.issue(id, &key)?).await?;
            all_refused(what, &mut connection, says).await?;
            // It may show by which chain it came itself.
            show(&mut connection, &gone.own.introduction).await?;
            all_refused(&format!("{what}, with its vouchers"), &mut connection, says).await?;
        }
        // It vouches for itself under another id, in its own name and in that of a member.
        for by in [gone.own.id, stays.own.id] {
            let key = KeyPair::generate()?;
            let guest = Acquaintance { id: stranger, key: key.subject_public_key_info().into() };
            let vouchers = extend(&gone.own.introduction, by, &gone.keys, gone.collective(), guest)?;
            let mut connection = connect(host, &bundle, gone.issue(stranger, &key)?).await?;
            show(&mut connection, &vouchers).await?;
            all_refused("a forged voucher", &mut connection, unknown).await?;
        }
    }
    let output = Member::prepare()?.join(&waiting)?;
    let error = text(&output.stderr);
    ensure!(!output.status.success() && error.contains("there is no such invitation"), "{error}");
    // All of that has done nothing.
    define(&first, "good").await?;
    knows(&third, &["good"]).await?;
    assert_eq!(view(&third).await?.term, term);
    Ok(())
}

/// A member calls itself by the number of another one, of the one that it calls, and by one that nobody has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_speaks_in_nobody_else_s_name() -> anyhow::Result<()> {
    let [first, second, mut third] = three().await?;
    let (bundle, own) = (first.site().await?.bundle, Insider::of(&third)?);
    assert_eq!(own.own.number, 3);
    // It has heard of all there is, so that its own calls are good; and none of them comes from elsewhere.
    define(&first, "a").await?;
    knows(&third, &["a"]).await?;
    third.kill();
    until(&first, "nobody leads", async || Ok(view(&first).await?.leader.is_some_and(|leader| leader != 3))).await?;
    define(&first, "b").await?;
    knows(&second, &["a", "b"]).await?;
    let before = view(&first).await?;
    for host in [&first, &second] {
        let mut connection = connect(host, &bundle, own.itself()?).await?;
        is_member(3, &mut connection).await?;
        for number in [1, 2, 9] {
            for (call, code, detail) in calls_of_leaders(&mut connection, number).await? {
                ensure!(
                    code == Code::Forbidden && detail.contains(FOR_ANOTHER),
                    "{call} as {number}: {code:?}: {detail}"
                );
            }
        }
    }
    // All of that has done nothing.
    define(&first, "c").await?;
    knows(&second, &["a", "b", "c"]).await?;
    let after = view(&first).await?;
    assert_eq!((after.term, after.leader), (before.term, before.leader));
    third.run()?;
    knows(&third, &["a", "b", "c"]).await?;
    Ok(())
}

/// A member that has just joined, and has no record of anybody, believes those of which it was told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_without_records_takes_nothing_from_who_is_no_member() -> anyhow::Result<()> {
    let mut first = Member::start()?;
    let (left, mut second) = (Member::prepare()?, Member::prepare()?);
    for (member, name) in [(&left, "m2"), (&second, "m3")] {
        let output = member.join(&invite(&first, name, false, 60).await?)?;
        ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
        if name == "m2" {
            first.admin().await?.change_member("remove", &MemberRequest { member: name.into(), force: false }).await?;
        }
    }
    let bundle = first.site().await?.bundle;
    first.kill();
    second.run()?;
    let founder = Insider::of(&first)?;
    let cases = [
        ("an id that nobody has", MemberId::random(), "has not heard of"),
        ("the founder's id with another key", founder.own.id, "is another key than"),
    ];
    for (what, id, says) in cases {
        let mut connection = connect(&second, &bundle, founder.issue(id, &KeyPair::generate()?)?).await?;
        all_refused(what, &mut connection, says).await?;
    }
    // Who was removed before it came has a voucher of the founder's all the same.
    let left = Insider::of(&left)?;
    let mut connection = connect(&second, &bundle, left.itself()?).await?;
    all_refused("a removed member", &mut connection, REMOVED).await?;
    show(&mut connection, &left.own.introduction).await?;
    all_refused("a removed member with its voucher", &mut connection, REMOVED).await?;
    let mut connection = connect(&second, &bundle, founder.itself()?).await?;
    is_member(1, &mut connection).await?;
    // It knows nobody by number yet, but itself.
    for (call, code, detail) in calls_of_leaders(&mut connection, Insider::of(&second)?.own.number).await? {
        ensure!(code == Code::Forbidden && detail.contains(FOR_ANOTHER), "{call}: {code:?}: {detail}");
    }
    // A member too: terms do not end.
    let vote = json!({ "term": u64::MAX, "candidate": 1, "committed": true });
    let append = json!({ "vote": vote, "previous": null, "commit": null, "entries": [] }).to_string();
    let (code, detail) = refusal(connection.post("/member/v1/append", append.into(), LIMIT).await);
    ensure!(code == Code::BadRequest && detail.contains("is impossible"), "{code:?}: {detail}");
    ensure!(names(&second).await?.is_empty(), "it has heard of something");
    first.run()?;
    define(&first, "a").await?;
    knows(&second, &["a"]).await?;
    Ok(())
}

/// It has the same authorities, and can issue itself a certificate of the new incarnation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_before_a_recovery_is_none_whatever_it_shows() -> anyhow::Result<()> {
    let mut first = Member::start()?;
    let mut second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    let before = first.site().await?.bundle;
    first.kill();
    second.kill();
    let output = second.moord("recover", &["--force"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    second.run()?;
    let (now, gone) = (second.site().await?.bundle, Insider::of(&first)?);
    let mut connection = connect(&second, &now, gone.itself()?).await?;
    all_refused("as it is", &mut connection, OF_BEFORE).await?;
    let names = [member_uri(gone.collective(), gone.own.id), incarnation_uri(gone.collective(), now.incarnation)];
    let disguised = issue_for(&gone.key()?, &gone.keys, "member", &names, &["member-ca.pem"])?;
    let mut connection = connect(&second, &now, disguised).await?;
    all_refused("as one of now", &mut connection, REMOVED).await?;
    // Nor does it ask one of now for anything.
    let error = connect(&second, &before, gone.itself()?).await.err().context("it connects")?.to_string();
    ensure!(error.contains("of incarnation 2 of the collective, and this member is of 1"), "{error}");
    Ok(())
}

/// It was started with a clock that is years behind, and issued itself a certificate for that time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_certificate_is_of_another_time_is_told_that() -> anyhow::Result<()> {
    let first = Member::start()?;
    let (second, bundle) = (joined(&first, "m2", false).await?, first.site().await?.bundle);
    let own = Insider::of(&second)?;
    let names = [member_uri(own.collective(), own.own.id)];
    let old = issue_until(2020, &own.key()?, &own.keys, "member", &names, &["member-ca.pem"])?;
    let mut connection = connect(&first, &bundle, old).await?;
    let says = "the certificate that was shown is not believed: its certificate expired ";
    all_refused("an old one", &mut connection, says).await?;
    is_member(2, &mut connect(&first, &bundle, own.itself()?).await?).await
}

/// A member's streams count among the connections of its address as long as they are open, and keep nobody from stopping.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_take_the_places_of_connections() -> anyhow::Result<()> {
    let most = 40;
    let mut first = Member::init()?;
    first.configure(&format!("connections_per_address = {most}\n"))?;
    first.run()?;
    let second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    let (bundle, insider) = (first.site().await?.bundle, Insider::of(&second)?);
    let begin = async || -> anyhow::Result<Switched> {
        let connection = connect(&first, &bundle, insider.itself()?).await?;
        Ok(connection.switch("/member/v1/stream", "moor-append/1").await?)
    };
    let mut held = Vec::new();
    while let Ok(stream) = begin().await {
        held.push(stream);
        ensure!(held.len() <= most, "one more than there are places");
    }
    ensure!(held.len() > most / 2, "{} streams alone were taken:\n{}", held.len(), first.log());
    let few = held.split_off(most / 2);
    drop(held);
    until(&first, "the places stay taken", async || Ok(begin().await.is_ok())).await?;
    let begun = Instant::now();
    ensure!(first.terminate()?, "{}", first.log());
    ensure!(begun.elapsed() < Duration::from_secs(3), "it waited for streams to end: {:?}", begun.elapsed());
    drop(few);
    Ok(())
}

/// Who stands at a member's address with its id and another key is asked nothing, and told nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_says_nothing_to_one_with_another_key_at_a_member_s_address() -> anyhow::Result<()> {
    let [first, second, mut third] = three().await?;
    let (insider, id) = (Insider::of(&second)?, Insider::of(&third)?.own.id);
    third.kill();
    let (chain, key) = insider.issue(id, &KeyPair::generate()?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let listener = TcpListener::bind(("127.0.0.1", third.port)).await?;
    let (came, heard) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counts, hears) = (came.clone(), heard.clone());
    let pretender = tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(Arc::new(config));
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(mut tls) = acceptor.accept(tcp).await else { continue };
            counts.fetch_add(1, Ordering::Relaxed);
            let mut bytes = [0; 64];
            let read = tokio::time::timeout(Duration::from_secs(1), tls.read(&mut bytes)).await;
            hears.fetch_add(read.ok().and_then(Result::ok).unwrap_or(0), Ordering::Relaxed);
        }
    });
    define(&first, "a").await?;
    until(&first, "nobody calls", async || Ok(came.load(Ordering::Relaxed) >= 3)).await?;
    pretender.abort();
    // Its end closes the socket.
    ensure!(pretender.await.is_err_and(|error| error.is_cancelled()), "the pretender ended by itself");
    assert_eq!(heard.load(Ordering::Relaxed), 0, "bytes of calls");
    third.run().context("the member itself")?;
    knows(&third, &["a"]).await?;
    Ok(())
}
