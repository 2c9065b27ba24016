//! A member without a majority: known nodes go on, for a while, and what they report comes to all later.

use crate::cli::{moor, shown};
use crate::collective::{define, invite, joined, text, three, until, view, voters};
use crate::machine::Machine;
use crate::support::{Member, import, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CreateProfile, DeployRequest, MemberRequest, SetAttributes};
use moor_api::client::node::NodeConnection;
use moor_api::node::{HostCertificateRequest, ImageOffer, KeyRequest, Stage, StageClosed};
use moor_api::problem::Code;
use moor_image::Dek;
use moord::store::{Store as _, tables};
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, PrivateKey};
use std::time::Duration;

fn hash() -> String {
    format!("$6$salt${}", "a".repeat(86))
}

/// A published profile and a node that has booted it once; the node is done with that boot.
async fn known_node(member: &Member) -> anyhow::Result<Machine> {
    member.publish().await?;
    let machine = Machine::new(member).await?;
    member.define("n1", machine.uuid).await?;
    let set = [("crypted.rootpassword".to_owned(), hash())].into();
    member.admin().await?.set(&SetAttributes { range: "n1".into(), set, clear: Vec::new() }).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    spread_image(&mut connection).await?;
    connection.status(&machine.report(1, "first")).await?;
    connection.stage_closed(&StageClosed { boot: machine.boot }).await?;
    Ok(machine)
}

/// The image that the node is to boot, once enough members hold it.
async fn spread_image(connection: &mut NodeConnection) -> anyhow::Result<ImageOffer> {
    loop {
        match connection.image().await {
            Err(error) if error.is_transient() => {}
            answer => return Ok(answer?),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_node_boots_without_a_majority_and_its_reports_are_delivered_once() -> anyhow::Result<()> {
    let [mut first, mut second, mut third] = three().await?;
    let mut machine = known_node(&first).await?;
    second.kill();
    third.kill();
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    let config = boot.config().await?;
    assert_eq!(config.secrets.context("no secrets")?.root_password_hash, Some(hash()));
    let offer = boot.image().await?;
    boot.image_key(&KeyRequest { digest: offer.digest }).await?;
    boot.status(&machine.report(1, "image")).await?;
    // What is kept survives the member.
    first.kill();
    first.run()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    boot.status(&machine.report(2, "switch-root")).await?;
    boot.stage_closed(&StageClosed { boot: machine.boot }).await?;
    assert_eq!(refusal(boot.image().await).0, Code::StageClosed, "the stage is over here and now");
    let mut run = machine.connect().await?;
    machine.log_in(&mut run, Stage::Run).await?;
    let key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519)?;
    let keys = vec![key.public_key().to_openssh()?];
    let certificates = run.host_certificates(&HostCertificateRequest { public_keys: keys }).await?;
    assert_eq!(certificates.certificates.len(), 1);
    run.status(&machine.report(3, "booted")).await?;
    run.status(&machine.report(3, "booted")).await?;
    // What is new waits for the others: changes, and machines that nobody knows.
    assert_eq!(refusal(define(&first, "n2").await).0, Code::NoMajority);
    assert_eq!(first.states("n1").await?, ["pending", "first"]);
    second.run()?;
    let wanted = ["pending", "first", "image", "switch-root", "booted"];
    until(&first, "the reports are not delivered", async || Ok(first.states("n1").await? == wanted)).await?;
    // To all.
    until(&second, "they are not everywhere", async || Ok(second.states("n1").await? == wanted)).await?;
    run.status(&machine.report(4, "later")).await?;
    assert_eq!(first.states("n1").await?.last().map(String::as_str), Some("later"));
    let view = &first.admin().await?.nodes(Some("n1")).await?[0];
    assert_eq!((view.pin, view.attributes["deployment.profile"].as_str()), (Some(offer.digest), "p"));
    third.run()?;
    voters(&first, 3).await?;
    until(&third, "they are not everywhere", async || Ok(third.states("n1").await?.len() == 6)).await?;
    ensure!(first.terminate()?, "{}", first.log());
    let store = first.store().await?;
    let lines: Vec<serde_json::Value> = store.snapshot()?.all(tables::AUDIT)?;
    let count = |what: &str| {
        let of_this_boot = |line: &&serde_json::Value| line["entry"]["fields"]["boot"] == machine.boot.to_string();
        lines.iter().filter(|line| line["entry"]["what"] == what).filter(of_this_boot).count()
    };
    assert_eq!((count("image-key"), count("node-secrets"), count("host-certificates")), (1, 1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_a_node_boots_what_it_last_booted_and_with_one_what_is_ordered() -> anyhow::Result<()> {
    let [first, mut second, mut third] = three().await?;
    let mut machine = known_node(&first).await?;
    let mut run = machine.connect().await?;
    machine.log_in(&mut run, Stage::Run).await?;
    run.status(&machine.report(2, "booted")).await?;
    let mut admin = first.admin().await?;
    let booted = admin.images().await?.pop().context("no image")?.digest;
    // A newer generation of what it booted, and an order for something else.
    first.write_profile("p", "files/motd", "newer")?;
    admin.publish(&"p".parse()?).await?;
    let other = import(&mut admin, "other", [8; 16], 1, Some(&Dek::generate()?)).await?.digest;
    let template = "debian-diskless".to_owned();
    admin.create_profile(&CreateProfile { name: "q".parse()?, image: "other".parse()?, template }).await?;
    admin.publish(&"q".parse()?).await?;
    admin.deploy(&DeployRequest { range: "n1".into(), profile: "q".parse()? }).await?;
    second.kill();
    third.kill();
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    assert_eq!(boot.config().await?.profile.name.as_str(), "p");
    assert_eq!(boot.image().await?.digest, booted);
    assert_eq!(refusal(boot.file("motd", 100).await).0, Code::NotFound, "it boots what it has never booted");
    // What was kept is delivered before anything newer.
    second.run()?;
    until(&first, "nothing is delivered", async || Ok(first.log().contains("a majority is back"))).await?;
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    assert_eq!(boot.config().await?.profile.name.as_str(), "q");
    assert_eq!(spread_image(&mut boot).await?.digest, other);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nobody_enrols_and_what_is_shown_is_said_to_be_old() -> anyhow::Result<()> {
    let first = Member::start()?;
    let mut second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    first.publish().await?;
    let machine = Machine::new(&first).await?;
    first.define("n2", machine.uuid).await?;
    first.deploy("n2").await?;
    first.arm("n2", "once").await?;
    second.kill();
    until(&first, "it believes in a majority", async || Ok(!view(&first).await?.majority)).await?;
    // Armed before, and too late all the same.
    let mut connection = machine.connect().await?;
    let known = machine.known(&mut connection).await?;
    let request = machine.enroll_request(&connection, &known)?;
    let (code, detail) = refusal(connection.enroll(&request).await);
    assert_eq!(code, Code::NoMajority, "{detail}");
    for arguments in [&["node", "list"][..], &["status"]] {
        let (status, out, err) = shown(&moor(&first, arguments)?.output()?);
        ensure!(status == Some(0) && out.contains("n2"), "{arguments:?}: {status:?} {out}");
        let is_told = err.starts_with("moor: warning: no majority of the ") && err.contains("may be out of date");
        ensure!(is_told && err.lines().count() == 1, "{arguments:?}: {err}");
    }
    second.run()?;
    until(&first, "no majority comes back", async || Ok(view(&first).await?.majority)).await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    let (_, _, err) = shown(&moor(&first, &["node", "list"])?.output()?);
    ensure!(err.is_empty(), "{err}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_cut_off_stops_giving_secrets_and_then_answering() -> anyhow::Result<()> {
    let mut first = Member::init()?;
    first.configure("stale_seconds = 25\nstale_secrets_seconds = 12\n")?;
    first.run()?;
    let mut second = Member::prepare()?;
    let output = second.join(&invite(&first, "m2", true, 60).await?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    second.run()?;
    voters(&first, 2).await?;
    let mut machine = known_node(&first).await?;
    second.kill();
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    let token = machine.log_in(&mut boot, Stage::Boot).await?;
    ensure!(token.expires <= moord::state::now() + 25, "the token outlives what the member may do");
    let offer = boot.image().await?;
    until(&first, "it gives the key out for ever", async || {
        let mut again = machine.connect().await?;
        again.set_token(&token.token)?;
        match again.image_key(&KeyRequest { digest: offer.digest }).await {
            Ok(_) => Ok(false),
            error => {
                let (code, detail) = refusal(error);
                ensure!(code == Code::NoMajority && detail.contains("give out secrets for 12 s only"), "{detail}");
                Ok(true)
            }
        }
    })
    .await?;
    // It still answers.
    boot.status(&machine.report(1, "image")).await?;
    until(&first, "it answers for ever", async || boot_refused(&machine).await).await?;
    // Started anew it knows no better.
    first.kill();
    first.run()?;
    ensure!(boot_refused(&machine).await?, "a restart makes nothing newer");
    second.run()?;
    until(&first, "it does not answer again", async || Ok(!boot_refused(&machine).await?)).await?;
    Ok(())
}

/// The leader goes on saying that it is there, although nobody but a member that does not vote hears it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_a_leader_without_a_majority_knows_of_none_either() -> anyhow::Result<()> {
    let mut voting = three().await?;
    let fourth = joined(&voting[0], "m4", false).await?;
    let mut machine = known_node(&voting[0]).await?;
    until(&fourth, "it does not know the node", async || Ok(fourth.states("n1").await? == ["pending", "first"]))
        .await?;
    let leader = view(&voting[0]).await?.leader.context("nobody leads")?;
    let mut others = Vec::new();
    for member in &mut voting {
        if view(member).await?.number != leader {
            member.kill();
            others.push(member);
        }
    }
    machine.reboot()?;
    machine.asks(&fourth);
    until(&fourth, "it believes in a majority", async || Ok(!view(&fourth).await?.majority)).await?;
    // It still hears the leader, and asks it.
    assert_eq!(view(&fourth).await?.leader, Some(leader));
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    boot.status(&machine.report(1, "image")).await?;
    let metrics = fourth.admin().await?.metrics().await?;
    ensure!(metrics.contains("moord_majority 0"), "{metrics}");
    for other in others {
        other.run()?;
    }
    let wanted = ["pending", "first", "image"];
    until(&fourth, "the report is not delivered", async || {
        Ok(view(&fourth).await?.majority && fourth.states("n1").await? == wanted)
    })
    .await
}

/// It hears of it by the first who answers, whatever it reads in its own records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_removed_while_it_was_away_sends_nodes_to_others() -> anyhow::Result<()> {
    let [mut first, mut second, mut third] = three().await?;
    let mut machine = known_node(&first).await?;
    until(&third, "it does not know the node", async || Ok(third.states("n1").await? == ["pending", "first"])).await?;
    third.kill();
    first.admin().await?.change_member("remove", &MemberRequest { member: "m3".into(), force: false }).await?;
    voters(&first, 2).await?;
    third.run()?;
    let removed = async |machine: &Machine| -> anyhow::Result<bool> {
        // Hellos are rate-limited.
        tokio::time::sleep(Duration::from_millis(500)).await;
        match machine.connect().await?.hello(&machine.hello()).await {
            Ok(_) => Ok(false),
            Err(error) => {
                ensure!(error.is_transient(), "the node takes it for the end: {error}");
                let (code, detail) = refusal::<()>(Err(error));
                ensure!(code == Code::Removed && detail.contains("was removed from the collective"), "{detail}");
                Ok(true)
            }
        }
    };
    machine.asks(&third);
    until(&third, "it answers nodes", async || removed(&machine).await).await?;
    // Started anew, with nobody to ask, it knows it still.
    first.kill();
    second.kill();
    third.kill();
    third.run()?;
    ensure!(removed(&machine).await?, "{}", third.log());
    first.run()?;
    second.run()?;
    voters(&first, 2).await?;
    machine.asks(&first);
    machine.reboot()?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    Ok(())
}

/// Whether a session is refused because the member has been alone for too long.
async fn boot_refused(machine: &Machine) -> anyhow::Result<bool> {
    // Hellos are rate-limited.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut connection = machine.connect().await?;
    match machine.log_in(&mut connection, Stage::Boot).await {
        Ok(_) => Ok(false),
        Err(error) if error.to_string().contains("may answer nodes for 25 s only") => Ok(true),
        Err(error) => Err(error),
    }
}
