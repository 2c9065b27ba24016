//! A rolling upgrade: members of two releases together, and a member that is too old. There is no earlier release: `max_feature_level` makes a member
//! do as one.

use crate::cli::moor;
use crate::collective::{define, invite, knows, text, until, view, voters};
use crate::content::invited;
use crate::support::Member;
use anyhow::ensure;
use moor_api::admin::CollectiveView;

const OLD: &str = "max_feature_level = 1\n";
/// What is of level 2.
const NEAR: &str = "near = [\"127.0.0.0/8\"]\n";
/// What is met first of what is newer says its own level.
const TOO_OLD: &str = "and this release of moord knows 1 at most: install the release";

/// From the next start on a member is of this release, or of the earlier one.
fn release(member: &Member, more: &str) -> anyhow::Result<()> {
    let path = member.path("moord.toml");
    let kept = std::fs::read_to_string(&path)?.replace(OLD, "");
    Ok(std::fs::write(path, kept + more)?)
}

fn restart(member: &mut Member) -> anyhow::Result<()> {
    ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    member.run()
}

/// The levels that members say they know, by number.
fn known(view: &CollectiveView) -> Vec<u32> {
    view.members.iter().map(|member| member.level).collect()
}

fn is_near_used(view: &CollectiveView) -> bool {
    view.members.iter().any(|member| !member.near.is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_level_rises_with_the_last_upgrade_and_older_releases_are_refused_from_then_on() -> anyhow::Result<()> {
    let mut first = Member::init()?;
    first.configure(&format!("{NEAR}{OLD}"))?;
    first.run()?;
    let mut second = invited(&first, "m2", &format!("{NEAR}{OLD}")).await?;
    second.run()?;
    voters(&first, 2).await?;
    release(&first, "")?;
    restart(&mut first)?;
    until(&second, "it does not say that it was upgraded", async || Ok(known(&view(&second).await?) == [5, 1])).await?;
    // It has told what it is, and looks every 2 s whether there is more to say: there is, and it may not.
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    for (member, node) in [(&first, "a"), (&second, "b")] {
        define(member, node).await?;
        let seen = view(member).await?;
        ensure!(seen.level == 1 && !is_near_used(&seen), "{seen:?}");
    }
    let output = moor(&first, &["collective", "show"])?.output()?;
    let shown = text(&output.stdout);
    ensure!(
        shown.contains("feature level 1: 5 is used once all members run a release that knows it; upgrade m2 (1)"),
        "{shown}"
    );

    release(&second, "")?;
    restart(&mut second)?;
    for member in [&first, &second] {
        until(member, "the level does not rise", async || {
            let seen = view(member).await?;
            Ok(seen.level == 5 && known(&seen) == [5, 5] && seen.members.iter().all(|member| member.near.len() == 1))
        })
        .await?;
    }
    let output = moor(&first, &["--json", "collective", "show"])?.output()?;
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(shown["level"] == 5 && shown["members"][1]["level"] == 5, "{shown}");

    // There is no way back.
    ensure!(second.terminate()?, "it does not stop:\n{}", second.log());
    release(&second, OLD)?;
    let output = second.run_to_its_end()?;
    ensure!(!output.status.success() && text(&output.stderr).contains(TOO_OLD), "{}", text(&output.stderr));
    release(&second, "")?;
    second.run()?;
    knows(&second, &["a", "b"]).await?;

    // And none in; the invitation is not used up by trying.
    let third = Member::prepare()?;
    third.configure(OLD)?;
    let invitation = invite(&first, "m3", false, 60).await?;
    let output = third.join(&invitation)?;
    ensure!(!output.status.success() && text(&output.stderr).contains(TOO_OLD), "{}", text(&output.stderr));
    release(&third, "")?;
    let output = third.join(&invitation)?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_went_back_and_is_outgrown_meanwhile_takes_nothing_and_ends() -> anyhow::Result<()> {
    let mut first = Member::init()?;
    first.configure(OLD)?;
    first.run()?;
    let (mut second, mut third) = (invited(&first, "m2", OLD).await?, invited(&first, "m3", OLD).await?);
    second.run()?;
    third.run()?;
    voters(&first, 3).await?;
    for member in [&mut first, &mut second] {
        release(member, "")?;
        restart(member)?;
    }
    until(&first, "they do not say what they know", async || Ok(known(&view(&first).await?) == [5, 5, 1])).await?;
    second.kill();
    release(&second, OLD)?;
    release(&third, NEAR)?;
    restart(&mut third)?;
    until(&first, "the level does not rise", async || Ok(is_near_used(&view(&first).await?))).await?;
    // The level rose after this one was gone: it is told by the leader.
    second.run()?;
    let status = second.wait()?;
    ensure!(status.code() == Some(1) && second.log().contains(TOO_OLD), "{status}:\n{}", second.log());
    release(&second, "")?;
    second.run()?;
    until(&second, "it does not come back", async || Ok(is_near_used(&view(&second).await?))).await
}
