//! Members are lost for ever: one is replaced, or the one that survives goes on alone.

use crate::cli::{moor, shown};
use crate::collective::{PATIENCE, blobs, define, joined, knows, names, text, three, until, view, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::rotation::{boots, planted};
use crate::support::{Member, as_user, refusal};
use anyhow::{Context as _, ensure};
use moor_api::ids::MemberId;
use moor_api::node::{Heartbeat, Stage};
use moor_api::problem::Code;
use moor_api::trust::Incarnation;
use moord::collective::identity::Identity;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The members by number, and whether each votes.
async fn votes(member: &Member) -> anyhow::Result<Vec<(u64, bool)>> {
    Ok(view(member).await?.members.iter().map(|member| (member.number, member.votes)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_member_is_replaced_by_one_command_also_under_its_own_name() -> anyhow::Result<()> {
    let mut members = three().await?;
    define(&members[0], "a").await?;
    // Any but the one that is asked below; the leader among them is the harder case.
    let leader = view(&members[0]).await?.leader.context("a leader")?;
    let dead = usize::try_from(leader.max(2) - 1)?;
    let name = format!("m{}", dead + 1);
    members[dead].kill();
    let file = members[0].path("invitation");
    let out = file.to_str().context("a path")?;
    let (status, said, err) =
        shown(&moor(&members[0], &["collective", "replace", &name, &name, "--expires", "5m", "--out", out])?.output()?);
    ensure!(status == Some(0), "{said}{err}");
    // As long as nobody came, nobody goes.
    assert_eq!(votes(&members[0]).await?.len(), 3);
    let mut new = Member::prepare()?;
    let output = new.join(&std::fs::read_to_string(&file)?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    new.run()?;
    let kept: Vec<u64> = [1, 2, 3].into_iter().filter(|number| *number != dead as u64 + 1).collect();
    let wanted = vec![(kept[0], true), (kept[1], true), (4, true)];
    until(&members[0], "it does not take the place", async || Ok(votes(&members[0]).await? == wanted)).await?;
    knows(&new, &["a"]).await?;
    assert_eq!(view(&new).await?.members.iter().filter(|member| member.name == name).count(), 1);
    // The three go on without any one of them, once that is through: in the log, not only in the records.
    let other = if dead == 1 { 2 } else { 1 };
    let removed = format!("membership: member {} is removed", dead + 1);
    let is_through =
        async || Ok([&members[0], &members[other], &new].iter().any(|member| member.log().contains(&removed)));
    until(&members[0], "it is not removed", is_through).await?;
    members[other].kill();
    define(&new, "b").await?;
    knows(&members[0], &["a", "b"]).await?;
    let (status, _, err) = shown(&moor(&members[0], &["collective", "replace", "m9", "m9"])?.output()?);
    ensure!(status == Some(1) && err.contains("no member 'm9'"), "{err}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_survivor_of_three_goes_on_alone_and_the_others_are_none_any_more() -> anyhow::Result<()> {
    let (mut first, mut machine) = prepared().await?;
    let mut second = joined(&first, "m2", true).await?;
    let mut third = joined(&first, "m3", true).await?;
    voters(&first, 3).await?;
    first.arm("n1", "once").await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    knows(&third, &["n1"]).await?;
    until(&third, "the content did not come", async || Ok(blobs(&third)? == blobs(&first)?)).await?;
    let recover = |member: &Member, more: &[&str]| {
        let output = member.moord("recover", more)?;
        anyhow::Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
    };
    // It runs.
    let (done, _, err) = recover(&third, &["--force"])?;
    ensure!(!done && err.contains("has to be stopped first"), "{err}");
    third.kill();
    first.kill();
    // Another one answers.
    let (done, _, err) = recover(&third, &["--force"])?;
    ensure!(!done && err.contains("member m2 answers") && err.contains("nothing was changed"), "{err}");
    second.kill();
    // Something that may be a member, and does not speak.
    let silent = TcpListener::bind(("127.0.0.1", second.port))?;
    let (done, out, err) = recover(&third, &[])?;
    ensure!(!done && err.contains("nothing was changed: `--force`"), "{err}");
    ensure!(out.contains("this member's log ends with entry") && out.contains("is lost"), "{out}");
    let stranger =
        format!("something answers at {}, where member m2 was, and is no member of this collective", second.url());
    ensure!(out.contains(&stranger), "{out}");
    drop(silent);
    third.run()?;
    ensure!(!view(&third).await?.majority, "it went on alone without being told to");
    third.kill();
    let (done, out, err) = recover(&third, &["--force"])?;
    ensure!(done && out.contains("the only one of collective test"), "{out}{err}");
    third.run()?;
    assert_eq!(votes(&third).await?, [(4, true)]);
    define(&third, "n2").await?;
    let now = third.site().await?.bundle;
    ensure!(now.incarnation == Incarnation::FIRST.next() && now.version > machine.bundle.version, "{now:?}");
    // The node boots from it as before: nobody armed it.
    machine.asks(&third);
    machine.reboot()?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(connection.config().await?.node.name.as_str(), "n1");
    let beat = Heartbeat { boot: machine.boot, trust_version: machine.bundle.version, ssh_version: 1 };
    ensure!(connection.heartbeat(&beat).await?.bundle.as_ref() == Some(&now), "the node does not hear of it");
    // Two of the old ones are a majority of the old collective. They go on in that, and reach the new one no more.
    first.run()?;
    second.run()?;
    let end = Instant::now() + PATIENCE;
    while let Err(error) = define(&first, "old").await {
        ensure!(Instant::now() < end, "{error}\n{}", first.log());
    }
    define(&third, "n3").await?;
    assert_eq!(names(&third).await?, ["n1", "n2", "n3"]);
    assert_eq!(names(&second).await?, ["n1", "old"]);
    assert_eq!(votes(&third).await?, [(4, true)]);
    let says = "its certificate is of incarnation 2 of the collective, and this member is of 1";
    until(&first, "it does not say why m3 is not reached", async || Ok(first.log().contains(says))).await?;
    // A node that has heard of the new one does not believe them. Who has not may, and what it gets there is of no use in the new one.
    machine.asks(&first);
    let mut connection = machine.connect().await?;
    let token = machine.log_in(&mut connection, Stage::Run).await?.token;
    machine.bundle = now.clone();
    let error = machine.connect().await.err().context("it is believed")?.to_string();
    ensure!(error.contains("its certificate is of incarnation 1 of the collective"), "{error}");
    machine.asks(&third);
    let mut connection = machine.connect().await?;
    connection.set_token(&token)?;
    assert_eq!(refusal(connection.config().await).0, Code::TokenInvalid);
    machine.log_in(&mut connection, Stage::Run).await?;
    connection.config().await?;
    // Others join, and get all of it.
    let fourth = joined(&third, "m2", true).await?;
    voters(&third, 2).await?;
    knows(&fourth, &["n1", "n2", "n3"]).await?;
    let new = Machine::new(&fourth).await?;
    assert_eq!(new.bundle.collective, machine.bundle.collective);
    ensure!(new.bundle.incarnation == now.incarnation, "{:?}", new.bundle);
    // Nor does one of before become another one while this one is there.
    first.kill();
    second.kill();
    let (done, _, err) = recover(&first, &["--force"])?;
    ensure!(!done && err.contains("answers for incarnation 2 of the collective, and this member is of 1"), "{err}");
    ensure!(err.contains("nothing was changed") && err.contains("`moor collective join --set-aside`"), "{err}");
    // Who is alone needs no recovery.
    let alone = Member::init()?;
    let (done, _, err) = recover(&alone, &["--force"])?;
    ensure!(!done && err.contains("it is its own majority"), "{err}");
    Ok(())
}

/// Puts a copy of a member's store in its place.
fn put(member: &Member, copy: &Path) -> anyhow::Result<()> {
    let store = member.path("state/store");
    std::fs::remove_dir_all(&store)?;
    copied(copy, &store)
}

pub(crate) fn copied(from: &Path, to: &Path) -> anyhow::Result<()> {
    ensure!(Command::new("cp").arg("-a").args([from, to]).status()?.success(), "copying '{}'", from.display());
    Ok(())
}

/// `moord recover`: whether it succeeds, and all that it says.
fn recovers(member: &Member, more: &[&str]) -> anyhow::Result<(bool, String)> {
    let output = member.moord("recover", more)?;
    Ok((output.status.success(), text(&output.stdout) + &text(&output.stderr)))
}

const HASH: &str = "$6$planted$qwertzuiop1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_that_is_interrupted_anywhere_goes_on_and_loses_no_key() -> anyhow::Result<()> {
    let (mut first, mut machine, dek) = planted().await?;
    let mut second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    first.kill();
    second.kill();
    let (store, copy) = (first.path("state/store"), first.path("copy"));
    copied(&store, &copy)?;
    let (member, intention) = (store.join("member.json"), store.join("recovering.json"));
    let intend = |id: MemberId| std::fs::write(&intention, serde_json::json!({ "id": id }).to_string());

    // It was written down what is to come, and nothing has come of it: the member is as it was.
    intend(MemberId::random())?;
    first.run()?;
    ensure!(!view(&first).await?.majority && !intention.exists());
    first.kill();
    put(&first, &copy)?;
    intend(MemberId::random())?;
    let (done, said) = recovers(&first, &[])?;
    ensure!(!done && said.contains("nothing was changed: `--force`"), "{said}");

    // To its end, and how long that takes.
    let begun = Instant::now();
    let (done, said) = recovers(&first, &["--force"])?;
    ensure!(done && said.contains("the only one of collective test") && !said.contains("does not open"), "{said}");
    let whole = begun.elapsed();
    ensure!(!intention.exists());
    let (after, id) = (first.path("after"), Identity::read(&member)?.id);
    copied(&store, &after)?;

    // The tables have changed, and nothing says so yet. Whatever comes next finishes it.
    for by_recover in [true, false] {
        put(&first, &after)?;
        std::fs::copy(copy.join("member.json"), &member)?;
        intend(id)?;
        if by_recover {
            let (done, said) = recovers(&first, &[])?;
            ensure!(done && said.contains("that was interrupted is finished"), "{said}");
        }
        first.run()?;
        ensure!(!intention.exists() && Identity::read(&member)?.id == id);
        assert_eq!(votes(&first).await?, [(3, true)]);
        boots(&first, &mut machine, &dek, HASH).await?;
        first.kill();
    }

    // Killed at any moment.
    for moment in 0..10 {
        put(&first, &copy)?;
        let config = first.config();
        let mut command = as_user(&["recover", "--config", &config, "--force"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(whole * moment / 9 + Duration::from_millis(1));
        child.kill()?;
        child.wait()?;
        let (done, said) = recovers(&first, &["--force"])?;
        // It may have been through.
        ensure!(done || said.contains("it is its own majority"), "after {moment}/9: {said}");
        first.run()?;
        assert_eq!(votes(&first).await?, [(3, true)], "after {moment}/9");
        boots(&first, &mut machine, &dek, HASH).await.with_context(|| format!("after {moment}/9"))?;
        first.kill();
    }
    Ok(())
}
