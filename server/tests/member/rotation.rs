//! The collective's keys are rotated: everybody who is a member reads all secrets, and who was one opens nothing that came after.

use crate::cli::{moor, shown};
use crate::collective::{PATIENCE, blobs, invite, joined, knows, text, until, view, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::{MemberRequest, SetAttributes};
use moor_api::ids::CollectiveId;
use moor_api::node::{KeyRequest, Stage};
use moor_api::problem::Code;
use moor_image::Dek;
use moord::node::token::mint;
use moord::secrets::{Place, Ring, SealedSecret};
use moord::store::records::ProfileRecord;
use moord::store::tables;
use moord::store::{Command, Outcome, Snapshot, Store as _};
use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, Instant};

const PRIVATE: &str = "a private file";
const HASH: &str = "crypted.rootpassword";

/// A member with a node that has an identity and two secrets: its own, and one of the profile; and the key of its image.
pub(crate) async fn planted() -> anyhow::Result<(Member, Machine, Dek)> {
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
    set_hash_of(member, "n1", hash).await
}

async fn set_hash_of(member: &Member, node: &str, hash: &str) -> anyhow::Result<()> {
    let set = [(HASH.to_owned(), hash.to_owned())].into();
    let changed = member.admin().await?.set(&SetAttributes { range: node.into(), set, clear: Vec::new() }).await?;
    ensure!(changed.refused.is_empty(), "{changed:?}");
    Ok(())
}

/// The node boots from this member, and gets its secrets.
pub(crate) async fn boots(member: &Member, machine: &mut Machine, dek: &Dek, hash: &str) -> anyhow::Result<()> {
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
    first.admin().await?.change_member("remove", &MemberRequest { member: "m2".into(), force: false }).await?;
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

/// Gives a node a secret that no key of the collective opens, as if it had been damaged. The member does not run.
async fn damage(member: &Member, node: &str) -> anyhow::Result<()> {
    let store = member.store().await?;
    let id = store.snapshot()?.node_named(node)?.context("no node")?.id;
    let place = Place { table: "nodes", id: &id.to_string(), field: HASH };
    let secret = Ring::first(CollectiveId::random())?.seal(place, b"$6$planted$qwertzuiop9")?;
    let secrets = [(HASH.to_owned(), secret)].into();
    let set = Command::SetAttributes { id, set: BTreeMap::new(), secrets, clear: Vec::new() };
    ensure!(store.propose(set).await? == Outcome::Done);
    store.close().await;
    drop(store);
    // The thread of a log ends a moment after its store was closed.
    for file in ["log.redb", "member.redb"] {
        let path = member.path("state/store").join(file);
        until(member, "this process keeps the store", async || Ok(File::open(&path)?.try_lock().is_ok())).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_does_not_open_holds_nothing_else_up_and_is_named() -> anyhow::Result<()> {
    let (mut first, mut machine, dek) = planted().await?;
    first.define("n2", uuid::Uuid::new_v4()).await?;
    ensure!(first.terminate()?, "it does not stop:\n{}", first.log());
    damage(&first, "n2").await?;
    first.run()?;
    // However often: only the version that it is under is kept.
    for version in [2, 3] {
        assert_eq!(first.admin().await?.rotate_key().await?.version, version);
        until(&first, "the others are not sealed anew", async || Ok(view(&first).await?.keys == [1, version])).await?;
        boots(&first, &mut machine, &dek, "$6$planted$qwertzuiop1").await?;
    }
    let named = "attribute 'crypted.rootpassword' of node n2";
    let told = format!(
        "{named} does not open, and version 1 of the keys is kept for it: set it anew (`moor node set n2 --file"
    );
    until(&first, "the log does not say so", async || Ok(first.log().contains(&told))).await?;
    assert_eq!(first.log().matches(&told).count(), 1, "it is said once:\n{}", first.log());
    let (status, out, err) = shown(&moor(&first, &["collective", "show"])?.output()?);
    ensure!(status == Some(0) && out.contains(&told), "{out}{err}");
    let (_, out, _) = shown(&moor(&first, &["--json", "collective", "show"])?.output()?);
    let json: serde_json::Value = serde_json::from_str(&out)?;
    ensure!(json["unreadable"][0]["of"] == named && json["unreadable"][0]["version"] == 1, "{out}");
    assert_eq!(json["unreadable"].as_array().map(Vec::len), Some(1));
    ensure!(first.terminate()?, "it does not stop:\n{}", first.log());
    {
        let (ring, store) = first.opened()?;
        let secrets = sealed(&store.view()?)?;
        for (table, id, field, secret) in &secrets {
            let opens = ring.open_secret(Place { table, id, field }, secret).is_ok();
            assert_eq!(secret.key_version(), if opens { 3 } else { 1 }, "{table} {id} {field}");
        }
        ensure!(secrets.iter().filter(|(.., secret)| secret.key_version() == 1).count() == 1 && secrets.len() >= 5);
    }
    first.run()?;
    // What is to be done about it helps.
    set_hash_of(&first, "n2", "$6$planted$qwertzuiop4").await?;
    all_under(&first, 3).await?;
    ensure!(view(&first).await?.unreadable.is_empty());
    Ok(())
}
