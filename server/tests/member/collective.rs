//! Several real members on loopback: joining, replication, the leader's death, no majority, removal.

use crate::cli::moor;
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CollectiveView, DefineNodes, InviteRequest, MemberRequest, SetAttributes};
use moor_api::client::ClientError;
use moor_api::node::{Heartbeat, Stage};
use moor_api::problem::Code;
use nix::sys::signal::Signal;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// For what a quiet machine does in a second or two.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) async fn invite(member: &Member, name: &str, voter: bool, lifetime: u64) -> anyhow::Result<String> {
    let request = InviteRequest { name: name.into(), voter, lifetime };
    Ok(member.admin().await?.invite(&request).await?.invitation)
}

/// A further member, which runs.
pub(crate) async fn joined(host: &Member, name: &str, voter: bool) -> anyhow::Result<Member> {
    let mut member = Member::prepare()?;
    let output = member.join(&invite(host, name, voter, 60).await?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    member.run()?;
    Ok(member)
}

pub(crate) async fn view(member: &Member) -> anyhow::Result<CollectiveView> {
    Ok(member.admin().await?.collective().await?)
}

/// Waits until `member` sees this many members that vote, and a leader.
pub(crate) async fn voters(member: &Member, count: usize) -> anyhow::Result<CollectiveView> {
    let end = Instant::now() + PATIENCE;
    loop {
        let seen = view(member).await?;
        if seen.leader.is_some() && seen.members.iter().filter(|member| member.votes).count() == count {
            return Ok(seen);
        }
        ensure!(Instant::now() < end, "{count} voters do not come: {seen:?}\n{}", member.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until something is so; its log says why `member` does not come to it.
pub(crate) async fn until(
    member: &Member,
    otherwise: &str,
    is_so: impl AsyncFn() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !is_so().await? {
        ensure!(Instant::now() < end, "{otherwise}:\n{}", member.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

pub(crate) async fn names(member: &Member) -> anyhow::Result<Vec<String>> {
    Ok(member.admin().await?.nodes(None).await?.into_iter().map(|node| node.name.to_string()).collect())
}

/// Waits until `member` knows these nodes and no others.
pub(crate) async fn knows(member: &Member, wanted: &[&str]) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let seen = names(member).await?;
        if seen == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{seen:?}, not {wanted:?}\n{}", member.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) async fn define(member: &Member, name: &str) -> Result<(), ClientError> {
    let request = DefineNodes { range: name.into(), attributes: BTreeMap::new() };
    let mut admin = member.admin().await.map_err(|error| ClientError::Config(error.to_string()))?;
    let changed = admin.define(&request).await?;
    match changed.refused.into_iter().next() {
        None => Ok(()),
        Some((_, problem)) => Err(ClientError::Problem(problem)),
    }
}

/// Names of the blobs that a member has, with their lengths.
pub(crate) fn blobs(member: &Member) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for folder in std::fs::read_dir(member.path("state/blobs"))?.filter_map(Result::ok) {
        for blob in std::fs::read_dir(folder.path()).into_iter().flatten() {
            let blob = blob?;
            found.insert(blob.file_name().to_string_lossy().into_owned(), blob.metadata()?.len());
        }
    }
    Ok(found)
}

fn member_request(name: &str) -> MemberRequest {
    MemberRequest { member: name.into(), force: false }
}

pub(crate) async fn three() -> anyhow::Result<[Member; 3]> {
    let first = Member::start()?;
    let second = joined(&first, "m2", true).await?;
    let third = joined(&first, "m3", true).await?;
    voters(&first, 3).await?;
    Ok([first, second, third])
}

/// A root that one member serves dies with it: the node hears of the others before it has mounted anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_told_where_every_member_has_its_image() -> anyhow::Result<()> {
    let first = Member::start()?;
    let second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    first.publish().await?;
    until(&second, "the image did not come", async || Ok(blobs(&second)? == blobs(&first)?)).await?;
    for (member, other, name) in [(&first, &second, "n1"), (&second, &first, "n2")] {
        let machine = Machine::new(member).await?;
        member.define(name, machine.uuid).await?;
        member.deploy(name).await?;
        member.arm(name, "once").await?;
        let mut connection = machine.connect().await?;
        machine.log_in(&mut connection, Stage::Boot).await?;
        let offer = connection.image().await?;
        let of = |member: &Member| format!("https://127.0.0.1:{}/public/images/{}", member.port, offer.digest);
        // Whomever it asks, a node is sent to the same member first.
        let here = connection.hello(&machine.hello()).await?.members;
        let mut elsewhere = machine;
        elsewhere.asks(other);
        assert_eq!(elsewhere.connect().await?.hello(&elsewhere.hello()).await?.members, here);
        let first = if here[0].urls == [member.url()] { [of(member), of(other)] } else { [of(other), of(member)] };
        assert_eq!(offer.urls, first);
        // Both have it indeed.
        for at in [member, other] {
            ensure!(at.admin().await?.image(offer.digest, 1 << 20).await?.len() as u64 == offer.size);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_agree_also_when_the_leader_dies() -> anyhow::Result<()> {
    let mut members = three().await?;
    members[0].publish().await?;
    // A change goes in anywhere, and is everywhere.
    define(&members[1], "a").await?;
    define(&members[2], "b").await?;
    for member in &members {
        knows(member, &["a", "b"]).await?;
    }
    // So is content.
    let end = Instant::now() + PATIENCE;
    let content = blobs(&members[0])?;
    assert!(content.len() >= 3, "image, kernel, initramfs: {content:?}");
    while blobs(&members[1])? != content || blobs(&members[2])? != content {
        ensure!(Instant::now() < end, "the image did not come:\n{}", members[1].log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The one who reads after a change that somebody else made and acknowledged, sees it.
    let leader = view(&members[0]).await?.leader.context("a leader")?;
    let at = usize::try_from(leader - 1)?;
    members[at].kill();
    let other = (at + 1) % 3;
    let died = Instant::now();
    define(&members[other], "c").await?;
    println!("a change went in {:.1} s after the leader's death", died.elapsed().as_secs_f32());
    knows(&members[(at + 2) % 3], &["a", "b", "c"]).await?;
    // Who was dead comes back, and has it too.
    members[at].run()?;
    knows(&members[at], &["a", "b", "c"]).await?;
    let listed = view(&members[at]).await?;
    assert_eq!(listed.members.iter().map(|member| member.votes).collect::<Vec<_>>(), [true, true, true]);
    Ok(())
}

/// A node speaks to one member, and `moor why` may be asked of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_hears_which_nodes_are_alive() -> anyhow::Result<()> {
    let (first, machine) = prepared().await?;
    let second = joined(&first, "m2", false).await?;
    knows(&second, &["n1"]).await?;
    let heard = async |member: &Member| anyhow::Ok(member.admin().await?.why("n1").await?.heard);
    first.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Run).await?;
    ensure!(heard(&first).await?.is_none() && heard(&second).await?.is_none(), "it had no heartbeat");
    connection.heartbeat(&Heartbeat { boot: machine.boot, trust_version: 1, ssh_version: 1 }).await?;
    ensure!(heard(&first).await?.is_some(), "the member that it speaks to");
    until(&second, "the other one does not hear of it", async || Ok(heard(&second).await?.is_some())).await?;
    let shown = moor(&second, &["why", "n1"])?.output()?;
    ensure!(text(&shown.stdout).contains("n1: last heartbeat "), "{}", text(&shown.stdout));
    Ok(())
}

/// Which nodes a change is of is read as late as what is shown: a member that lags behind does not say of a node that another member has just
/// acknowledged that there is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_knows_what_was_acknowledged_anywhere_before() -> anyhow::Result<()> {
    let members = three().await?;
    let leader = usize::try_from(view(&members[0]).await?.leader.context("a leader")? - 1)?;
    let lagging = &members[(leader + 1) % 3];
    for name in ["a", "b", "c", "d", "e"] {
        // It wakes up with the question before it, and the change that it has missed still on its way.
        lagging.signal(Signal::SIGSTOP)?;
        define(&members[leader], name).await?;
        let wake = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            lagging.signal(Signal::SIGCONT)
        };
        tokio::try_join!(lagging.arm(name, "once"), wake)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_changes_are_refused_with_the_reason_and_go_on_when_one_is_back() -> anyhow::Result<()> {
    let mut members = three().await?;
    define(&members[0], "a").await?;
    knows(&members[0], &["a"]).await?;
    members[1].kill();
    members[2].kill();
    // The first finds out, and waits for it; later ones are refused at once.
    for name in ["b", "c"] {
        let (code, detail) = refusal(define(&members[0], name).await);
        assert_eq!(code, Code::NoMajority, "{detail}");
        assert!(detail.contains("no majority of the 3 voting members answers"), "{detail}");
    }
    // What was known is still read, and it is said that it may be old.
    let told = Arc::new(Mutex::new(String::new()));
    let (mut admin, hears) = (members[0].admin().await?, told.clone());
    admin.when_stale(move |why| hears.lock().unwrap().push_str(why));
    assert_eq!(admin.nodes(None).await?.len(), 1);
    assert!(told.lock().unwrap().starts_with("no majority of the "), "{told:?}");
    assert_eq!(names(&members[0]).await?, ["a"]);
    assert!(!view(&members[0]).await?.majority);
    members[1].run()?;
    let end = Instant::now() + PATIENCE;
    while let Err(error) = define(&members[0], "d").await {
        ensure!(Instant::now() < end, "{error}\n{}", members[0].log());
    }
    members[2].run()?;
    let known = names(&members[0]).await?;
    // The refused change was not made behind the administrator's back, or it was and everybody has it: the same everywhere.
    for member in &members[1..] {
        knows(member, &known.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    }
    Ok(())
}

/// Two of three are there, and without the second one no two of those that vote would be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_vote_is_taken_where_those_that_are_left_have_no_majority() -> anyhow::Result<()> {
    let [first, mut second, mut third] = three().await?;
    third.kill();
    for action in ["demote", "remove"] {
        let (code, detail) = refusal(first.admin().await?.change_member(action, &member_request("m2")).await);
        assert_eq!(code, Code::Conflict);
        assert!(detail.starts_with("of the 2 members that would vote then, 1 do not answer (m3)"), "{detail}");
    }
    define(&first, "a").await?;
    // Who does not answer goes first.
    first.admin().await?.change_member("remove", &member_request("m3")).await?;
    voters(&first, 2).await?;
    first.admin().await?.change_member("demote", &member_request("m2")).await?;
    voters(&first, 1).await?;
    second.kill();
    define(&first, "b").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_promoted_demoted_and_removed_for_good() -> anyhow::Result<()> {
    let first = Member::start()?;
    let mut second = joined(&first, "m2", false).await?;
    define(&first, "a").await?;
    // A non-voting member has everything, and takes changes.
    knows(&second, &["a"]).await?;
    define(&second, "b").await?;
    knows(&first, &["a", "b"]).await?;
    assert_eq!(voters(&first, 1).await?.members.len(), 2);
    let mut admin = first.admin().await?;
    // Somebody has to vote.
    let (code, _) = refusal(admin.change_member("demote", &member_request("1")).await);
    assert_eq!(code, Code::Conflict);
    admin.change_member("promote", &member_request("m2")).await?;
    voters(&first, 2).await?;
    admin.change_member("demote", &member_request("m2")).await?;
    voters(&first, 1).await?;
    admin.change_member("remove", &member_request("m2")).await?;
    until(&first, "it is not removed", async || Ok(view(&first).await?.members.len() <= 1)).await?;
    // It comes back, and nobody listens.
    second.kill();
    second.run()?;
    define(&first, "c").await?;
    // As long as it has heard of no leader it can ask nobody.
    until(&second, "it is not told", async || {
        let (code, detail) = refusal(define(&second, "d").await);
        let is_told = code == Code::Removed && detail.contains("was removed from the collective");
        ensure!(is_told || code == Code::NoMajority, "{code:?}: {detail}");
        Ok(is_told)
    })
    .await?;
    assert_eq!(names(&first).await?, ["a", "b", "c"]);
    // Its name is free again.
    let _third = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_survives_the_leader_alone_knows_that_there_is_no_majority() -> anyhow::Result<()> {
    let mut members = three().await?;
    let leader = usize::try_from(view(&members[0]).await?.leader.context("a leader")? - 1)?;
    let survivor = (leader + 1) % 3;
    until(&members[survivor], "it knows of no majority", async || Ok(view(&members[survivor]).await?.majority)).await?;
    members[leader].kill();
    members[(leader + 2) % 3].kill();
    until(&members[survivor], "it believes in a dead leader", async || Ok(!view(&members[survivor]).await?.majority))
        .await?;
    let (code, detail) = refusal(define(&members[survivor], "a").await);
    assert_eq!(code, Code::NoMajority, "{detail}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_can_be_removed_also_while_its_vote_is_needed() -> anyhow::Result<()> {
    let first = Member::start()?;
    let second = joined(&first, "m2", true).await?;
    let leader = voters(&first, 2).await?.leader.context("a leader")?;
    let (mut gone, stays) = if leader == 1 { (first, second) } else { (second, first) };
    gone.admin().await?.change_member("remove", &member_request(&leader.to_string())).await?;
    until(&stays, "it does not lead", async || Ok(view(&stays).await?.leader == Some(3 - leader))).await?;
    // It is its own majority now, also when the other has gone.
    gone.kill();
    define(&stays, "a").await?;
    assert_eq!(voters(&stays, 1).await?.members.len(), 1);
    Ok(())
}

/// Who was away while members came and went votes for one that it does not know, and follows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_votes_for_a_member_that_came_meanwhile() -> anyhow::Result<()> {
    let mut members = Vec::from(three().await?);
    let leader = view(&members[0]).await?.leader.context("a leader")?;
    let mut leads = members.remove(usize::try_from(leader - 1)?);
    let [mut away, mut goes]: [Member; 2] = members.try_into().map_err(|_| anyhow::anyhow!("two are left"))?;
    away.kill();
    let new = joined(&leads, "m4", true).await?;
    voters(&leads, 4).await?;
    let number = view(&goes).await?.number.to_string();
    leads.admin().await?.change_member("remove", &member_request(&number)).await?;
    // In the log, not only in the records.
    let removed = format!("membership: member {number} is removed");
    until(&leads, "it is not removed", async || Ok(leads.log().contains(&removed))).await?;
    // With the old leader and who was removed gone, the two have to make a majority.
    leads.kill();
    goes.kill();
    away.run()?;
    let end = Instant::now() + PATIENCE;
    while let Err(error) = define(&new, "a").await {
        // A try of which nothing was heard may have been made.
        if matches!(&error, ClientError::Problem(problem) if problem.code == Code::Conflict) {
            break;
        }
        ensure!(Instant::now() < end, "{error}\n{}", away.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    knows(&away, &["a"]).await?;
    Ok(())
}

/// One entry of the log may be larger than all that members say to each other otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_more_than_a_megabyte_reaches_every_member() -> anyhow::Result<()> {
    let [first, second, mut third] = three().await?;
    define(&first, "a").await?;
    let change = async |letter: &str| {
        let set = (0..110).map(|number| (format!("custom.{letter}{number}"), letter.repeat(16_000))).collect();
        let request = SetAttributes { range: "a".into(), set, clear: Vec::new() };
        let changed = first.admin().await?.set(&request).await?;
        ensure!(changed.refused.is_empty(), "{:?}", changed.refused);
        anyhow::Ok(())
    };
    let has = async |member: &Member, count: usize| {
        until(member, "it has not all values", async || {
            let nodes = member.admin().await?.nodes(Some("a")).await?;
            Ok(nodes[0].attributes.keys().filter(|name| name.starts_with("custom.")).count() == count)
        })
        .await
    };
    change("x").await?;
    has(&second, 110).await?;
    has(&third, 110).await?;
    // And several of them one who was away.
    third.kill();
    for letter in ["y", "z", "w"] {
        change(letter).await?;
    }
    third.run()?;
    has(&third, 440).await
}

/// The first entry that is in the log of a member that was stopped.
fn log_begins(member: &Member) -> anyhow::Result<u64> {
    let entries = TableDefinition::<u64, &[u8]>::new("entries");
    let log = Database::open(member.path("state/store/log.redb"))?;
    let entries = log.begin_read()?.open_table(entries)?;
    let first = entries.first()?.context("the log is empty")?;
    Ok(first.0.value())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_comes_late_gets_a_snapshot() -> anyhow::Result<()> {
    let mut first = Member::start()?;
    let mut admin = first.admin().await?;
    // More than the log keeps.
    for batch in 0..30 {
        let range = format!("n[{}-{}]", batch * 1000, batch * 1000 + 999);
        let changed = admin.define(&DefineNodes { range, attributes: BTreeMap::new() }).await?;
        ensure!(changed.refused.is_empty(), "{:?}", changed.refused);
    }
    // Its log does not reach back to the beginning.
    let end = Instant::now() + PATIENCE;
    loop {
        ensure!(first.terminate()?, "it does not stop:\n{}", first.log());
        let begins = log_begins(&first)?;
        first.run()?;
        if begins > 1 {
            break;
        }
        ensure!(Instant::now() < end, "the log is not cut");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    until(&second, "it has not all nodes", async || Ok(names(&second).await?.len() >= 30_000)).await?;
    assert_eq!(names(&first).await?, names(&second).await?);
    let snapshots = std::fs::read_dir(second.path("state/store/snapshots"))?.count();
    ensure!(snapshots > 0, "it got no snapshot");
    Ok(())
}
