//! Invitations: for whom they are good, how often, and what comes of one that is another's, altered or overheard.

use crate::collective::{invite, joined, text, view, voters};
use crate::support::{Member, refusal};
use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use moor_api::admin::InviteRequest;
use moor_api::client::member::MemberConnection;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::MemberId;
use moor_api::node::Base64;
use moor_api::problem::Code;
use moord::collective::invite::{Invitation, Side, Subject};
use moord::store::Level;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// A point of X25519.
const UNWRAP: [u8; 32] = [9; 32];

/// What an invitation holds.
fn unpacked(invitation: &str) -> anyhow::Result<Value> {
    let encoded = invitation.strip_prefix("moori_").context("no invitation")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(encoded)?)?)
}

fn packed(invitation: &Value) -> anyhow::Result<String> {
    Ok(format!("moori_{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(invitation)?)))
}

/// The same invitation with one digit of its secret changed.
fn altered(invitation: &str) -> anyhow::Result<String> {
    let mut value = unpacked(invitation)?;
    let secret = value["secret"].as_str().context("no secret")?;
    let digit = if secret.starts_with('0') { '1' } else { '0' };
    value["secret"] = format!("{digit}{}", &secret[1..]).into();
    packed(&value)
}

/// `moord join` says no, with these words, and makes no member.
fn refused(member: &Member, invitation: &str, says: &str) -> anyhow::Result<()> {
    let output = member.join(invitation)?;
    let error = text(&output.stderr);
    ensure!(!output.status.success(), "it was let in");
    ensure!(error.contains(says), "{says:?} is not in {error}");
    ensure!(!member.path("state/store").exists(), "something of a member is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_is_good_once_and_in_its_time() -> anyhow::Result<()> {
    let first = Member::start()?;
    let good = invite(&first, "m2", true, 60).await?;
    let second = Member::prepare()?;
    refused(&second, "nonsense", "this is no invitation")?;
    refused(&second, &good[..good.len() - 8], "damaged")?;
    refused(&second, &altered(&good)?, "there is no such invitation, or it was used")?;
    let short = invite(&first, "m9", true, 1).await?;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    refused(&second, &short, "expired")?;
    let output = second.join(&good)?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let third = Member::prepare()?;
    refused(&third, &good, "no such invitation, or it was used")?;
    // The name is taken now.
    let again = first.admin().await?.invite(&InviteRequest { name: "m2".into(), voter: true, lifetime: 60 }).await;
    let (code, detail) = refusal(again.map(drop));
    assert_eq!(code, Code::Conflict, "{detail}");
    // Neither the invitation nor its secret is in a log.
    assert!(!first.log().contains(&good[..40]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_of_another_collective_opens_nothing_whatever_is_taken_from_it() -> anyhow::Result<()> {
    let (first, stranger) = (Member::start()?, Member::start()?);
    let (ours, theirs) = (invite(&first, "m2", true, 60).await?, invite(&stranger, "m2", true, 60).await?);
    let member = Member::prepare()?;
    // Ours, sent to where they are: they are not whom it names.
    let mut elsewhere = unpacked(&ours)?;
    elsewhere["bundle"]["members"] = json!([stranger.url()]);
    for says in
        ["no member of the invitation's collective is reached", "`moor collective invite`", "of another authority"]
    {
        refused(&member, &packed(&elsewhere)?, says)?;
    }
    // Theirs, with our certificates: nobody here has made it.
    let mut mixed = unpacked(&theirs)?;
    mixed["bundle"] = unpacked(&ours)?["bundle"].clone();
    refused(&member, &packed(&mixed)?, "there is no such invitation, or it was used")?;
    // Both are as good as before.
    for (host, invitation) in [(&first, &ours), (&stranger, &theirs)] {
        let new = Member::prepare()?;
        let output = new.join(invitation)?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(view(host).await?.members.len(), 2);
    }
    Ok(())
}

/// Who relays what a new member says, over a connection of his own, is not let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_that_was_made_for_another_connection_is_refused_and_uses_nothing_up() -> anyhow::Result<()> {
    let first = Member::start()?;
    let text = invite(&first, "m2", false, 60).await?;
    let invitation = Invitation::from_text(&text)?;
    let collective = invitation.bundle.collective;
    let tls = Arc::new(member_tls_config(&invitation.bundle, None)?);
    let url = first.url();
    let connect = || MemberConnection::connect(&url, collective, tls.clone(), Duration::from_secs(20));
    let (mut guest, mut thief) = (connect().await?, connect().await?);
    let member = MemberId::random();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.subject_public_key_info();
    let subject =
        Subject { collective, invite: invitation.id, member, key: &key, unwrap: &UNWRAP, exporter: guest.exporter() };
    let proof = Base64(subject.prove(&invitation.secret()?, Side::Guest));
    let request = json!({
        "invite": invitation.id, "member": member, "key": Base64(key), "unwrap": Base64(UNWRAP.to_vec()), "urls": ["https://127.0.0.1:1"],
        "proof": proof, "level": Level::NEWEST
    });
    let request = Bytes::from(serde_json::to_vec(&request)?);
    let stolen = thief.post("/member/v1/join", request.clone(), 1 << 20).await;
    let (code, detail) = refusal(stolen.map(drop));
    assert_eq!(code, Code::Forbidden, "{detail}");
    ensure!(detail.contains("there is no such invitation, or it was used"), "{detail}");
    assert_eq!(view(&first).await?.members.len(), 1);
    // On the connection that it was made for, it is good.
    guest.post("/member/v1/join", request, 1 << 20).await?;
    assert_eq!(view(&first).await?.members.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_joins_another_collective_only_when_told_so_and_what_it_was_lies_aside() -> anyhow::Result<()> {
    let (first, mut member) = (Member::start()?, Member::start()?);
    let _theirs = joined(&member, "m2", false).await?;
    let identity = |member: &Member| std::fs::read_to_string(member.path("state/store/member.json"));
    let before = identity(&member)?;
    let good = invite(&first, "m2", true, 60).await?;
    let says_no = |member: &Member, invitation: &str, more: &[&str], says: &str| {
        let output = member.join_by(invitation, more)?;
        let error = text(&output.stderr);
        ensure!(!output.status.success() && error.contains(says), "{says:?} is not in {error}");
        ensure!(identity(member)? == before && member.aside()?.is_empty(), "{says}: something was changed");
        anyhow::Ok(())
    };
    says_no(&member, &good, &["--set-aside"], "runs: nothing was changed; stop it first")?;
    member.kill();
    says_no(&member, &good, &[], "holds a member already: nothing was changed")?;
    says_no(&member, &altered(&good)?, &["--set-aside"], "there is no such invitation")?;
    let output = member.join_by(&good, &["--set-aside"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let aside = member.aside()?;
    ensure!(aside.len() == 1, "{aside:?}");
    assert_eq!(std::fs::read_to_string(aside[0].join("member.json"))?, before);
    for file in ["log.redb", "log.journal", "member.redb", "late.redb", "keys/root.key"] {
        ensure!(aside[0].join(file).metadata()?.len() > 0, "{file} is not there any more");
    }
    member.run()?;
    voters(&first, 2).await?;
    // The same for a collective that begins.
    member.kill();
    let joined = identity(&member)?;
    let output = member.moord("init", &["--address", "127.0.0.1", "--set-aside"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let aside = member.aside()?;
    ensure!(aside.len() == 2, "{aside:?}");
    let kept = aside.iter().map(|store| std::fs::read_to_string(store.join("member.json")));
    ensure!(kept.collect::<Result<Vec<_>, _>>()?.contains(&joined), "what it was is gone");
    member.run()?;
    voters(&member, 1).await?;
    Ok(())
}
