//! The collective's keys are rotated: everybody who is a member reads all secrets, and who was one opens nothing that came after.

use crate::cli::{moor, shown};
use crate::collective::{PATIENCE, blobs, invite, joined, knows, text, until, view, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::{MemberRequest, SetAttributes};
use moor_api::node::{KeyRequest, Stage};
use moor_api::problem::Code;
use moor_image::Dek;
use moord::node::token::mint;
use moord::secrets::{Place, SealedSecret};
use moord::store::Snapshot;
use moord::store::records::ProfileRecord;
use moord::store::tables;
use std::time::{Duration, Instant};

const PRIVATE: &str = "a private file";

/// A member with a node that has an identity and two secrets: its own, and one of the profile; and the key of its image.
async fn planted() -> anyhow::Result<(Member, Machine, Dek)> {
    let (member, machine) = prepared().await?;
    let mut admin = member.admin().await?;
    let dek = Dek::generate()?;
    crate::support::import(&mut admin, "root", [7; 16], 2, Some(&dek)).await?;
    member.write_profile("p", "private/munge.key", PRIVATE)?;
    admin.publish(&"p".parse()?).await?;
    set_hash(&member, "$6$planted$qwertzuiop1").await?;
    member.arm("n1", "once").await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    Ok((member, machine, dek))
}

async fn set_hash(member: &Member, hash: &str) -> anyhow::Result<()> {
    let set = [("crypted.rootpassword".to_owned(), hash.to_owned())].into();
    let changed = member.admin().await?.set(&SetAttributes { range: "n1".into(), set, clear: Vec::new() }).await?;
    ensure!(changed.refused.is_empty(), "{changed:?}");
    Ok(())
}

/// The node boots from this member, and gets its secrets.
async fn boots(member: &Member, machine: &mut Machine, dek: &Dek, hash: &str) -> anyhow::Result<()> {
    machine.asks(member);
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    let got = boot.config().await?.secrets.context("no secrets")?;
    ensure!(got.root_password_hash.as_deref() == Some(hash), "{:?}", got.root_password_hash);
    ensure!(boot.file("private/munge.key", 100).await?[..] == *PRIVATE.as_bytes(), "another private file");
    let offer = boot.image().await?;
    ensure!(boot.image_key(&KeyRequest { digest: offer.digest }).await?.wrapped.0 == dek.as_bytes(), "another key");
    Ok(())
}

/// Waits until everything is under this version of the keys alone.
async fn all_under(member: &Member, version: u32) -> anyhow::Result<()> {
    let otherwise = format!("not all is under version {version}");
    until(member, &otherwise, async || Ok(view(member).await?.keys == [version])).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_while_a_member_is_down_and_it_reads_all_when_it_is_back() -> anyhow::Result<()> {
    let (first, mut machine, dek) = planted().await?;
    let second = joined(&first, "m2", true).await?;
    let mut third = joined(&first, "m3", true).await?;
    voters(&first, 3).await?;
    until(&third, "the content did not come", async || Ok(blobs(&third)? == blobs(&first)?)).await?;
    for member in [&first, &second, &third] {
        boots(member, &mut machine, &dek, "$6$planted$qwertzuiop1").await?;
    }
    let waiting = invite(&first, "m4", false, 600).await?;
    third.kill();
    let (status, out, err) = shown(&moor(&second, &["collective", "rotate-key"])?.output()?);
    ensure!(status == Some(0) && out.starts_with("the keys have version 2;"), "{out}{err}");
    all_under(&first, 2).await?;
    // Once more, by the other: versions are counted on.
    let (status, out, err) = shown(&moor(&first, &["--json", "collective", "rotate-key"])?.output()?);
    ensure!(status == Some(0) && out.trim() == r#"{"version":3}"#, "{out}{err}");
    all_under(&second, 3).await?;
    set_hash(&second, "$6$planted$qwertzuiop2").await?;
    third.run()?;
    all_under(&third, 3).await?;
    // What is read there is as new as what was acknowledged.
    knows(&third, &["n1"]).await?;
    for member in [&first, &second, &third] {
        boots(member, &mut machine, &dek, "$6$planted$qwertzuiop2").await?;
    }
    let (_, out, _) = shown(&moor(&third, &["collective", "show"])?.output()?);
    ensure!(out.ends_with("keys: version 3\n"), "{out}");
    // An invitation of before is a secret as well, and good; who comes by it has all keys.
    let mut fourth = Member::prepare()?;
    let output = fourth.join(&waiting)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    fourth.run()?;
    all_under(&fourth, 3).await?;
    until(&fourth, "the content did not come", async || Ok(blobs(&fourth)? == blobs(&first)?)).await?;
    boots(&fourth, &mut machine, &dek, "$6$planted$qwertzuiop2").await?;
    // Also who starts anew, from its own disk.
    ensure!(third.terminate()?, "it does not stop:\n{}", third.log());
    third.run()?;
    until(&third, "it has no majority", async || Ok(view(&third).await?.majority)).await?;
    boots(&third, &mut machine, &dek, "$6$planted$qwertzuiop2").await?;
    Ok(())
}

/// All secrets of a store, and their places.
fn sealed(view: &Snapshot) -> anyhow::Result<Vec<(&'static str, String, String, SealedSecret)>> {
    let mut all = Vec::new();
    for node in view.nodes()? {
        all.extend(node.secrets.into_iter().map(|(name, secret)| ("nodes", node.id.to_string(), name, secret)));
    }
    for image in view.images()? {
        all.extend(image.key.map(|secret| ("images", image.digest.to_string(), "dek".to_owned(), secret)));
    }
    for table in [tables::PROFILES, tables::GENERATIONS] {
        for profile in view.all::<ProfileRecord>(table)? {
            let name = profile.name.to_string();
            let private = profile.manifest.private.into_iter();
            all.extend(private.map(|(path, secret)| ("profiles", name.clone(), path, secret)));
        }
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_removed_member_has_opens_nothing_of_after() -> anyhow::Result<()> {
    let (first, mut machine, dek) = planted().await?;
    let mut second = joined(&first, "m2", true).await?;
    let mut third = joined(&first, "m3", true).await?;
    voters(&first, 3).await?;
    machine.asks(&first);
    machine.reboot()?;
    let mut session = machine.connect().await?;
    machine.log_in(&mut session, Stage::Boot).await?;
    let node = session.config().await?.node.id;
    // All that it has, which nobody takes from it.
    ensure!(second.terminate()?, "it does not stop:\n{}", second.log());
    let (kept, _) = second.opened()?;
    second.run()?;
    voters(&second, 3).await?;
    first.admin().await?.change_member("remove", &MemberRequest { member: "m2".into() }).await?;
    all_under(&first, 2).await?;
    all_under(&third, 2).await?;
    // The session of before has ended, and a new one begins without an administrator.
    let end = Instant::now() + PATIENCE;
    while session.config().await.is_ok() {
        ensure!(Instant::now() < end, "a token of before is good:\n{}", first.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (code, detail) = refusal(session.config().await);
    ensure!(code == Code::TokenInvalid && detail.contains("its keys were rotated"), "{code:?}: {detail}");
    machine.log_in(&mut session, Stage::Boot).await?;
    session.config().await?;
    set_hash(&first, "$6$planted$qwertzuiop3").await?;
    let mut admin = first.admin().await?;
    crate::support::import(&mut admin, "root", [7; 16], 3, Some(&dek)).await?;
    until(&third, "the change did not come", async || {
        Ok(third.admin().await?.images().await?.iter().any(|image| image.serial == 3))
    })
    .await?;

    for member in [&mut second, &mut third] {
        ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    }
    let ((theirs, _), (ours, open)) = (second.opened()?, third.opened()?);
    let store = open.view()?;
    let secrets = sealed(&store)?;
    ensure!(secrets.len() >= 6, "{} secrets", secrets.len());
    for (table, id, field, secret) in &secrets {
        let place = Place { table, id, field };
        ours.open_secret(place, secret).with_context(|| format!("the control: {field} of {id}"))?;
        for ring in [&kept, &theirs] {
            ensure!(ring.open_secret(place, secret).is_err(), "'{field}' of {table} {id} opens");
        }
    }
    // Nor does a token that it signs.
    let epoch = store.node(node)?.context("no node")?.epoch;
    let claims = machine.claims(session.member(), node, epoch);
    session.set_token(&mint(ours.token()?, &claims)?)?;
    session.config().await.context("the control: a token by the keys of now")?;
    session.set_token(&mint(kept.token()?, &claims)?)?;
    assert_eq!(refusal(session.config().await).0, Code::TokenInvalid);
    Ok(())
}
