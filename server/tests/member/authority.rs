//! One authority takes the place of another, and nothing that worked before stops working: nodes, members, and who was away meanwhile.

use crate::backup::{PASSPHRASE, backup, restore};
use crate::cli::{moor, said_no, shown};
use crate::collective::{define, joined, text, three, until, view, voters};
use crate::loss::copied;
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, TIMEOUT};
use anyhow::{Context as _, ensure};
use moor_api::admin::{AuthorityState, AuthorityView};
use moor_api::client::ClientError;
use moor_api::client::node::NodeConnection;
use moor_api::client::tls::member_tls_config;
use moor_api::node::{Heartbeat, HeartbeatReply, Stage, StageClosed};
use moor_api::trust::SiteBundle;
use moord::store::Level;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

/// What a collective that begins anew adds to the version of its trust bundle, so that none is given twice.
pub(crate) const JUMP: u64 = 1 << 20;

/// A command of `moor` that works: its answer, and what it warns of.
pub(crate) fn good(member: &Member, arguments: &[&str]) -> anyhow::Result<(String, String)> {
    let (status, out, err) = shown(&moor(member, arguments)?.output()?);
    ensure!(status == Some(0), "{arguments:?}: {status:?} {out}{err}\n{}", member.log());
    Ok((out, err))
}

pub(crate) fn refused(member: &Member, arguments: &[&str], says: &[&str]) -> anyhow::Result<()> {
    said_no(&arguments.join(" "), &moor(member, arguments)?.output()?, says);
    Ok(())
}

pub(crate) async fn authorities(member: &Member) -> anyhow::Result<AuthorityView> {
    Ok(member.admin().await?.authority().await?)
}

pub(crate) fn names<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

async fn bundle(member: &Member) -> anyhow::Result<SiteBundle> {
    Ok(member.site().await?.bundle)
}

/// Waits until the member itself trusts this many authorities, and no other.
async fn trusts(member: &Member, version: u64, roots: usize) -> anyhow::Result<SiteBundle> {
    let otherwise = format!("trust bundle {version} with {roots} roots is not taken up");
    until(member, &otherwise, async || {
        let bundle = bundle(member).await?;
        Ok((bundle.version, bundle.roots.len()) == (version, roots))
    })
    .await?;
    bundle(member).await
}

/// Whoever trusts nothing but this reaches the member.
async fn connects(member: &Member, bundle: &SiteBundle) -> Result<(), ClientError> {
    let config = Arc::new(member_tls_config(bundle, None)?);
    NodeConnection::connect(&member.url(), bundle.collective, config, TIMEOUT).await.map(drop)
}

async fn does_not_connect(member: &Member, bundle: &SiteBundle) -> anyhow::Result<()> {
    let error = connects(member, bundle).await.err().context("it connects")?.to_string();
    ensure!(error.contains("of another authority than the site bundle's"), "{error}");
    Ok(())
}

/// A heartbeat of the node in its running system.
async fn beats(machine: &Machine, trust_version: u64) -> anyhow::Result<HeartbeatReply> {
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Run).await?;
    Ok(connection.heartbeat(&Heartbeat { boot: machine.boot, trust_version, ssh_version: 0 }).await?)
}

/// A member that has just begun says what its release knows, and then the level rises.
pub(crate) async fn knows_of_it(member: &Member) -> anyhow::Result<()> {
    let newest = Level::NEWEST.0;
    until(member, "the level does not rise", async || Ok(view(member).await?.level == newest)).await
}

/// The node runs: its boot stage is over.
pub(crate) async fn booted(member: &Member, machine: &Machine) -> anyhow::Result<()> {
    member.arm("n1", "once").await?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    Ok(boot.stage_closed(&StageClosed { boot: machine.boot }).await?)
}

async fn acknowledged(member: &Member) -> anyhow::Result<()> {
    let otherwise = "what the node said is not in the records";
    until(member, otherwise, async || Ok(authorities(member).await?.nodes_behind.is_empty())).await
}

/// Waits until a change that is asked for here is made: who led may be gone.
async fn takes_changes(member: &Member) -> anyhow::Result<()> {
    let name = || format!("n{}", fastrand::u32(1000..));
    until(member, "no change is taken", async || Ok(define(member, &name()).await.is_ok())).await
}

/// Private keys of X.509 authorities that a member has, and that they are its own alone.
fn private_keys(member: &Member) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(member.path("state/store/keys"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("root") && entry.path().extension().is_some_and(|extension| extension == "key") {
            ensure!(entry.metadata()?.permissions().mode() & 0o777 == 0o600, "'{name}' is for others");
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_authority_goes_once_all_have_acknowledged_the_new_one() -> anyhow::Result<()> {
    let (mut member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    let old = bundle(&member).await?;
    refused(&member, &["authority", "retire"], &["there is one authority, and nothing to retire"])?;
    let (out, _) = good(&member, &["authority", "show"])?;
    ensure!(out.starts_with("authority 1: in use, made ") && out.contains("acknowledged by 1 of 1 nodes"), "{out}");

    let (out, err) = good(&member, &["authority", "rotate"])?;
    ensure!(out.starts_with("authority 2 is there, and trust bundle 2 has it"), "{out}");
    ensure!(err.contains("`moor profile boot-files`"), "{err}");
    refused(
        &member,
        &["authority", "rotate"],
        &["authority 2 is beside authority 1 already", "`moor authority retire`"],
    )?;
    let both = trusts(&member, 2, 2).await?;
    ensure!(both.roots[0] == old.roots[0], "the old one is trusted first");
    let new = SiteBundle { version: 3, roots: vec![both.roots[1].clone()], ..both.clone() };
    // Who trusts the old one alone is not cut off; nothing is from the new one yet.
    connects(&member, &old).await?;
    does_not_connect(&member, &new).await?;
    let reply = beats(&machine, 1).await?;
    ensure!((reply.trust_version, reply.bundle.as_ref()) == (2, Some(&both)), "{reply:?}");
    refused(&member, &["authority", "retire"], &["these nodes have not acknowledged trust bundle 2", ": n1: "])?;
    let seen = authorities(&member).await?;
    ensure!(names(&seen.nodes_behind) == ["n1"] && seen.old_boot_files.is_empty(), "{seen:?}");
    let states: Vec<_> = seen.authorities.iter().map(|one| (one.number, one.state)).collect();
    ensure!(states == [(1, AuthorityState::InUse), (2, AuthorityState::Next)], "{seen:?}");
    ensure!(seen.authorities[0].fingerprint != seen.authorities[1].fingerprint, "{seen:?}");

    // It dies in between, and is what it was.
    member.kill();
    member.run()?;
    ensure!(trusts(&member, 2, 2).await? == both, "another bundle");
    ensure!(private_keys(&member)? == ["root-2.key", "root.key"], "{:?}", private_keys(&member)?);
    connects(&member, &old).await?;
    // What it said before may have died with the member.
    beats(&machine, 1).await?;
    machine.bundle = both.clone();
    ensure!(beats(&machine, 2).await?.bundle.is_none(), "a bundle for a node that has it");
    acknowledged(&member).await?;
    let seen = authorities(&member).await?;
    ensure!(names(&seen.old_boot_files) == ["n1"], "it booted with the old one alone: {seen:?}");

    let (out, err) = good(&member, &["authority", "retire"])?;
    ensure!(out == "authority 1 is retired, and trusted no more\n", "{out}");
    ensure!(
        err.contains("warning: booted with a bundle that has the old authority alone") && err.contains("n1"),
        "{err}"
    );
    ensure!(trusts(&member, 3, 1).await? == new, "another bundle");
    does_not_connect(&member, &old).await?;
    ensure!(beats(&machine, 2).await?.bundle.as_ref() == Some(&new), "no bundle for a node that is behind");
    until(&member, "the old keys are there", async || Ok(private_keys(&member)? == ["root-2.key"])).await?;
    member.kill();
    member.run()?;
    machine.bundle = new.clone();
    ensure!(beats(&machine, 3).await?.bundle.is_none(), "a bundle for a node that has it");
    acknowledged(&member).await?;
    refused(&member, &["authority", "retire"], &["there is one authority, and nothing to retire"])?;

    // A member that comes now knows the new one alone, and a backup brings it back.
    let second = joined(&member, "m2", false).await?;
    ensure!(private_keys(&second)? == ["root-2.key"], "{:?}", private_keys(&second)?);
    connects(&second, &new).await?;
    let file = backup(&member, "after.backup")?;
    let mut restored = Member::prepare()?;
    let output = restore(&restored, &file, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    restored.run()?;
    connects(&restored, &new).await?;
    ensure!(trusts(&restored, JUMP + 3, 1).await?.roots == new.roots, "another authority");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_took_up_what_a_restored_backup_does_not_know_is_waited_for() -> anyhow::Result<()> {
    let (mut member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    let file = backup(&member, "before.backup")?;
    good(&member, &["authority", "rotate"])?;
    let lost = trusts(&member, 2, 2).await?;
    machine.bundle = lost.clone();
    beats(&machine, 2).await?;
    acknowledged(&member).await?;
    member.kill();

    let mut restored = Member::prepare()?;
    let output = restore(&restored, &file, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    restored.run()?;
    machine.asks(&restored);
    good(&restored, &["authority", "rotate"])?;
    let version = JUMP + 2;
    let both = trusts(&restored, version, 2).await?;
    ensure!(both.roots[0] == lost.roots[0] && both.roots[1] != lost.roots[1], "{both:?}");
    let otherwise = "the member does not say what it trusts";
    until(&restored, otherwise, async || {
        Ok(authorities(&restored).await?.members.iter().all(|member| member.version == version))
    })
    .await?;
    let reply = beats(&machine, 2).await?;
    ensure!(reply.bundle.as_ref() == Some(&both), "{reply:?}");
    let says = format!("these nodes have not acknowledged trust bundle {version}");
    refused(&restored, &["authority", "retire"], &[&*says, ": n1: "])?;
    machine.bundle = both;
    beats(&machine, version).await?;
    acknowledged(&restored).await?;
    let (out, _) = good(&restored, &["authority", "retire"])?;
    ensure!(out == "authority 1 is retired, and trusted no more\n", "{out}");
    machine.bundle = trusts(&restored, version + 1, 1).await?;
    beats(&machine, version + 1).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_is_cancelled_leaves_nothing_of_the_new_authority() -> anyhow::Result<()> {
    let (mut member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    let old = bundle(&member).await?;
    refused(&member, &["authority", "cancel"], &["there is one authority, and nothing to cancel"])?;
    good(&member, &["authority", "rotate"])?;
    let both = trusts(&member, 2, 2).await?;
    machine.bundle = both.clone();
    beats(&machine, 2).await?;
    acknowledged(&member).await?;

    let (out, err) = good(&member, &["authority", "cancel"])?;
    ensure!(out == "authority 2 is trusted no more: trust bundle 3 is without it\n", "{out}");
    ensure!(err.contains("boot files"), "{err}");
    let one = trusts(&member, 3, 1).await?;
    ensure!(one.roots == old.roots, "another authority");
    for bundle in [&old, &both, &one] {
        connects(&member, bundle).await?;
    }
    ensure!(beats(&machine, 2).await?.bundle.as_ref() == Some(&one), "a node that has it does not hear of it");
    until(&member, "its keys are there", async || Ok(private_keys(&member)? == ["root.key"])).await?;
    refused(&member, &["authority", "retire"], &["there is one authority, and nothing to retire"])?;
    member.kill();
    member.run()?;
    ensure!(trusts(&member, 3, 1).await? == one && private_keys(&member)? == ["root.key"], "it is back");

    // The next one is another, by number and by key; once it has taken over there is no way back.
    machine.bundle = one;
    until(&member, "no change is taken", async || {
        Ok(moor(&member, &["authority", "rotate"])?.output()?.status.success())
    })
    .await?;
    let next = trusts(&member, 4, 2).await?;
    ensure!(next.roots[0] == old.roots[0] && next.roots[1] != both.roots[1], "{next:?}");
    ensure!(private_keys(&member)? == ["root-3.key", "root.key"], "{:?}", private_keys(&member)?);
    machine.bundle = next;
    beats(&machine, 4).await?;
    acknowledged(&member).await?;
    until(&member, "it does not say what it trusts", async || {
        Ok(authorities(&member).await?.members.iter().all(|member| member.version == 4))
    })
    .await?;
    good(&member, &["authority", "retire"])?;
    refused(&member, &["authority", "cancel"], &["nothing to cancel"])?;
    Ok(())
}

/// It was removed while it was away, and knows neither that nor the authority that the others have since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_whose_authority_is_not_known_are_not_taken_for_lost() -> anyhow::Result<()> {
    let [first, second, mut third] = three().await?;
    knows_of_it(&first).await?;
    third.kill();
    takes_changes(&first).await?;
    let (_, err) = good(&first, &["collective", "remove", "m3", "--compromised", "-y"])?;
    ensure!(err.contains("authority 2 is there beside the one that m3 has"), "{err}");
    let otherwise = "a member does not say what it trusts";
    until(&first, otherwise, async || Ok(authorities(&first).await?.members.iter().all(|member| member.version == 2)))
        .await?;
    good(&first, &["authority", "retire"])?;
    for member in [&first, &second] {
        trusts(member, 3, 1).await?;
    }
    let output = third.moord("recover", &["--force"])?;
    let err = text(&output.stderr);
    ensure!(!output.status.success(), "{}{err}", text(&output.stdout));
    for says in [" was, answers as member ", "is not believed here", "authority was rotated", "nothing was changed"] {
        ensure!(err.contains(says), "{says}: {err}");
    }
    third.run()?;
    ensure!(!view(&third).await?.majority, "it went on alone");
    Ok(())
}

/// A power cut takes back what was not synced yet, of the log and of the tables; what was taken up of it is in the key directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_tables_are_of_before_does_not_go_back_to_an_authority_that_was_dropped() -> anyhow::Result<()> {
    let mut member = Member::start()?;
    knows_of_it(&member).await?;
    good(&member, &["authority", "rotate"])?;
    trusts(&member, 2, 2).await?;
    until(&member, "it does not say what it trusts", async || {
        Ok(authorities(&member).await?.members.iter().all(|member| member.version == 2))
    })
    .await?;
    member.kill();
    let (store, before) = (member.path("state/store"), member.path("before"));
    copied(&store, &before)?;
    member.run()?;
    let retired = "authority 1 is retired, and trusted no more\n";
    let (out, _) = good(&member, &["authority", "retire"])?;
    ensure!(out == retired, "{out}");
    let new = trusts(&member, 3, 1).await?;
    until(&member, "the old keys are there", async || Ok(private_keys(&member)? == ["root-2.key"])).await?;
    member.kill();
    std::fs::remove_dir_all(before.join("keys"))?;
    copied(&store.join("keys"), &before.join("keys"))?;
    std::fs::remove_dir_all(&store)?;
    std::fs::rename(&before, &store)?;

    member.run()?;
    connects(&member, &new).await?;
    ensure!(bundle(&member).await? == new, "it went back");
    // What is missing happens once more.
    let (out, _) = good(&member, &["authority", "retire"])?;
    ensure!(out == retired, "{out}");
    ensure!(trusts(&member, 3, 1).await? == new, "another bundle");
    ensure!(private_keys(&member)? == ["root-2.key"], "{:?}", private_keys(&member)?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_left_behind_are_named_and_get_back_by_new_boot_files() -> anyhow::Result<()> {
    let (member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    let old = bundle(&member).await?;
    good(&member, &["authority", "rotate"])?;
    trusts(&member, 2, 2).await?;
    refused(&member, &["authority", "retire"], &["would trust no member any more: n1: ", "`--force`"])?;
    let (out, err) = good(&member, &["--json", "authority", "retire", "--force"])?;
    let retired: serde_json::Value = serde_json::from_str(&out)?;
    ensure!(retired["left_behind"] == serde_json::json!(["n1"]) && retired["number"] == 1, "{retired}");
    ensure!(err.contains("warning: left behind") && err.contains("n1"), "{err}");
    let new = trusts(&member, 3, 1).await?;
    does_not_connect(&member, &old).await?;
    // Its next boot begins with the bundle of then.
    machine.bundle = new;
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    boot.stage_closed(&StageClosed { boot: machine.boot }).await?;
    beats(&machine, 3).await?;
    acknowledged(&member).await?;
    ensure!(authorities(&member).await?.old_boot_files.is_empty(), "its boot files are new");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_are_away_are_waited_for_and_take_everything_up_when_they_are_back() -> anyhow::Result<()> {
    let [mut first, mut second, mut third] = three().await?;
    knows_of_it(&second).await?;
    let old = bundle(&first).await?;
    // Away while the authority is made: it knows nothing of it, and could not talk to anybody any more.
    third.kill();
    takes_changes(&second).await?;
    let (out, _) = good(&second, &["--json", "authority", "rotate"])?;
    ensure!(out.trim() == r#"{"number":2,"version":2}"#, "{out}");
    for member in [&first, &second] {
        trusts(member, 2, 2).await?;
    }
    until(&first, "a member does not say what it trusts", async || {
        Ok(authorities(&first).await?.members.iter().filter(|member| member.version == 2).count() == 2)
    })
    .await?;
    for force in [&[][..], &["--force"]] {
        let arguments = [&["authority", "retire"], force].concat();
        refused(&first, &arguments, &["these members have not taken up trust bundle 2", "cut off: m3: "])?;
    }
    third.run()?;
    let both = trusts(&third, 2, 2).await?;
    let new = SiteBundle { version: 3, roots: vec![both.roots[1].clone()], ..both.clone() };
    until(&first, "the third does not say what it trusts", async || {
        Ok(authorities(&first).await?.members.iter().all(|member| member.version == 2))
    })
    .await?;
    for member in [&first, &second, &third] {
        connects(member, &old).await?;
        ensure!(private_keys(member)? == ["root-2.key", "root.key"], "{:?}", private_keys(member)?);
    }

    // Away while the new one takes over: the old one is trusted until it is back.
    second.kill();
    takes_changes(&first).await?;
    let (out, _) = good(&first, &["authority", "retire"])?;
    ensure!(out.starts_with("authority 1 is retired; it is trusted until these members show the new one: m2"), "{out}");
    for member in [&first, &third] {
        connects(member, &new).await?;
        trusts(member, 2, 2).await?;
    }
    refused(&first, &["authority", "retire"], &["authority 1 is retired already, and goes once m2 shows the new one"])?;
    second.run()?;
    for member in [&first, &second, &third] {
        trusts(member, 3, 1).await?;
        connects(member, &new).await?;
        does_not_connect(member, &old).await?;
        until(member, "the old keys are there", async || Ok(private_keys(member)? == ["root-2.key"])).await?;
    }

    // They know each other by the new one, also all anew.
    takes_changes(&second).await?;
    for member in [&mut first, &mut second, &mut third] {
        ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    }
    for member in [&mut first, &mut second, &mut third] {
        member.run()?;
    }
    voters(&third, 3).await?;
    takes_changes(&third).await
}
