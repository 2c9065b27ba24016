//! What a node may ask, in which order, and what it is refused.

use crate::machine::{Machine, soft_key};
use crate::support::{Member, import, refusal};
use moor_api::admin::{RangeRequest, SetAttributes, TrustState};
use moor_api::client::session::SessionKey;
use moor_api::deploy::PhaseName;
use moor_api::ids::{BootId, HwAddr, Sha256Digest};
use moor_api::node::{
    EnrollReply, EnvelopeKind, Heartbeat, HostCertificateRequest, KeyRequest, LogReport, NextStep, Stage, StageClosed,
    StatusReport, TraceReport,
};
use moor_api::problem::Code;
use moord::store::{Store as _, tables};
use std::process::Command;
use uuid::Uuid;

/// A member with a published profile and a node that is to boot it.
pub(crate) async fn prepared() -> anyhow::Result<(Member, Machine)> {
    let member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    Ok((member, machine))
}

/// The same, armed once.
async fn armed() -> anyhow::Result<(Member, Machine)> {
    let (member, machine) = prepared().await?;
    member.arm("n1", "once").await?;
    Ok((member, machine))
}

fn status(machine: &Machine, sequence: u64, state: &str) -> StatusReport {
    StatusReport { figures: [("image.bytes_fetched".to_owned(), 5)].into(), ..machine.report(sequence, state) }
}

#[tokio::test]
async fn a_node_with_a_soft_key_boots() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, dek) = member.publish().await?;
    let mut machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;

    let mut connection = machine.connect().await?;
    let token = machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(token.stage, Stage::Boot);
    let config = connection.config().await?;
    assert_eq!(config.node.name.as_str(), "n1");
    assert_eq!(config.profile.name.as_str(), "p");
    let offer = connection.image().await?;
    assert_eq!((offer.digest, offer.size, offer.token_required), (image.digest, image.size, false));
    let envelope = connection.image_key(&KeyRequest { digest: offer.digest }).await?;
    assert_eq!((envelope.kind, envelope.recipient), (EnvelopeKind::Plain, config.node.id));
    assert_eq!(envelope.wrapped.0, dek.as_bytes());
    assert_eq!(envelope.key_id.0, dek.key_id());
    connection.status(&status(&machine, 1, "image")).await?;
    connection.stage_closed(&StageClosed { boot: machine.boot }).await?;
    // The answer may be lost: the same once more is good.
    connection.stage_closed(&StageClosed { boot: machine.boot }).await?;

    // The run stage, as the agent in the running system.
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Run).await?;
    connection.status(&status(&machine, 2, "booted")).await?;
    connection.status(&status(&machine, 2, "booted")).await?;
    let heartbeat = connection.heartbeat(&Heartbeat { boot: machine.boot, trust_version: 1, ssh_version: 0 }).await?;
    assert_eq!(heartbeat.generation, Some(config.profile.generation));
    assert_eq!((heartbeat.members, heartbeat.bundle), (config.members.clone(), None));
    // A node with an older trust bundle gets the new one.
    let heartbeat = connection.heartbeat(&Heartbeat { boot: machine.boot, trust_version: 0, ssh_version: 0 }).await?;
    assert_eq!(heartbeat.bundle.as_ref(), Some(&machine.bundle));
    assert!(offer.prefetch.is_empty(), "nobody has told yet what it reads");
    let trace = TraceReport { boot: machine.boot, digest: offer.digest, chunks: vec![0] };
    connection.trace(&trace).await?;
    // The answer may be lost; but no boot makes the list alone.
    connection.trace(&TraceReport { chunks: vec![1], ..trace.clone() }).await?;
    let bad = TraceReport { chunks: vec![0, 1 << 40], ..trace.clone() };
    assert!(refusal(connection.trace(&bad).await).1.contains("chunks that the image has not"));
    let bad = TraceReport { digest: Sha256Digest([1; 32]), ..trace };
    assert!(refusal(connection.trace(&bad).await).1.contains("another image"));
    connection
        .log(&LogReport { boot: machine.boot, phase: Some(PhaseName::Onboot), text: "one\n\u{1b}[2Jtwo".into() })
        .await?;
    assert_eq!(member.states("n1").await?, ["pending", "image", "booted"], "a report that is sent twice is taken once");
    let mut admin = member.admin().await?;
    let logged = admin.log("n1").await?.next().await?.expect("a log event");
    assert_eq!((logged.phase.as_str(), logged.text.as_str()), ("onboot", "one\n [2Jtwo"));

    // The next boot needs no arming, and knows what this one read.
    machine.reboot()?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(connection.image().await?.prefetch, [0]);
    assert_eq!(connection.config().await?.node.machine_id, config.node.machine_id);
    let view = &member.admin().await?.nodes(Some("n1")).await?[0];
    assert_eq!((view.pin, view.trust), (Some(image.digest), TrustState::Soft));
    assert_eq!(view.attributes["deployment.profile"], "p");
    Ok(())
}

#[tokio::test]
async fn a_machine_is_found_by_uuid_or_mac_and_refused_when_it_may_be_two() -> anyhow::Result<()> {
    let (member, machine) = armed().await?;
    let mut admin = member.admin().await?;
    let mut connection = machine.connect().await?;
    let mac: HwAddr = "52:54:00:00:00:02".parse()?;
    let set = [("net.hwaddr".to_owned(), "52-54-00-00-00-02".to_owned())].into();
    member.define("n2", Uuid::new_v4()).await?;
    admin.set(&SetAttributes { range: "n2".into(), set, clear: vec!["id.uuid".into()] }).await?;
    member.arm("n2", "once").await?;

    let mut hello = machine.hello();
    hello.uuid = None;
    hello.macs = vec!["52:54:00:00:00:09".parse()?, mac.clone()];
    assert_eq!(connection.hello(&hello).await?.node.expect("known").name.as_str(), "n2");
    // The UUID of many boards says nothing; the MAC still does.
    hello.uuid = Some(Uuid::parse_str("03000200-0400-0500-0006-000700080009")?);
    assert_eq!(connection.hello(&hello).await?.node.expect("known").name.as_str(), "n2");
    // The UUID of one and the MAC of the other.
    hello.uuid = Some(machine.uuid);
    let problem = connection.hello(&hello).await?.refusal.expect("refused");
    assert_eq!(problem.code, Code::Ambiguous);
    for name in ["n1", "n2"] {
        assert!(member.why(name).await?.contains("more than one node"), "{name}");
    }
    // A board that is not the node's.
    let other = Uuid::new_v4();
    let set = [("id.uuid".to_owned(), Uuid::new_v4().to_string())].into();
    admin.set(&SetAttributes { range: "n2".into(), set, clear: Vec::new() }).await?;
    hello.uuid = Some(other);
    let problem = connection.hello(&hello).await?.refusal.expect("refused");
    assert_eq!(problem.code, Code::IdentityMismatch);
    assert!(problem.detail.contains(&other.to_string()), "{problem}");
    // By serial number where there is nothing else.
    let set = [("id.serial".to_owned(), "SN-77".to_owned())].into();
    admin.set(&SetAttributes { range: "n2".into(), set, clear: vec!["id.uuid".into(), "net.hwaddr".into()] }).await?;
    hello.macs.clear();
    hello.serial = Some("SN-77".into());
    assert_eq!(connection.hello(&hello).await?.node.expect("known").name.as_str(), "n2");
    admin.remove(&RangeRequest { range: "n2".into() }).await?;
    assert_eq!(connection.hello(&hello).await?.refusal.expect("refused").code, Code::UnknownNode);
    Ok(())
}

#[tokio::test]
async fn another_key_is_another_machine() -> anyhow::Result<()> {
    let (member, mut machine) = armed().await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    machine.key = soft_key()?;
    let mut connection = machine.connect().await?;
    let known = machine.known(&mut connection).await?;
    assert_eq!(known.next, NextStep::SessionSoft);
    let request = machine.session_request(&connection, known.id, &known.nonce.0, Stage::Boot)?;
    let (code, detail) = refusal(connection.session(&request).await);
    assert_eq!(code, Code::IdentityMismatch);
    assert!(detail.contains("another key"), "{detail}");
    // Not even while the node is armed by mistake, in whatever way.
    for armed in ["once", "continuous"] {
        member.arm("n1", armed).await?;
        let known = machine.known(&mut connection).await?;
        assert_eq!(known.next, NextStep::SessionSoft, "{armed}");
        let (code, _) = refusal(connection.enroll(&machine.enroll_request(&connection, &known)?).await);
        assert_eq!(code, Code::IdentityMismatch, "{armed}");
    }
    assert!(member.why("n1").await?.contains("another key"));
    // The administrator may say that it is the right one.
    member.admin().await?.rearm(&RangeRequest { range: "n1".into() }).await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    Ok(())
}

#[tokio::test]
async fn a_proof_is_good_once_for_its_connection() -> anyhow::Result<()> {
    let (_member, machine) = armed().await?;
    let mut connection = machine.connect().await?;
    let known = machine.known(&mut connection).await?;
    let request = machine.enroll_request(&connection, &known)?;
    // Over another connection: another exporter.
    let mut other = machine.connect().await?;
    assert_eq!(refusal(other.enroll(&request).await).0, Code::ProofInvalid);
    // And now its nonce is used up.
    let (code, detail) = refusal(connection.enroll(&request).await);
    assert_eq!(code, Code::ProofInvalid);
    assert!(detail.contains("used before"), "{detail}");
    // An answer that was lost: the same key once more is no second enrolment.
    let known = machine.known(&mut connection).await?;
    let EnrollReply::Enrolled(first) = connection.enroll(&machine.enroll_request(&connection, &known)?).await? else {
        anyhow::bail!("a challenge");
    };
    let known = machine.known(&mut connection).await?;
    let EnrollReply::Enrolled(second) = connection.enroll(&machine.enroll_request(&connection, &known)?).await? else {
        anyhow::bail!("a challenge");
    };
    assert_eq!(first.epoch, second.epoch);
    // A session proof of another boot, and one signed as an enrolment.
    let mut request = machine.session_request(&connection, known.id, &second.nonce.0, Stage::Boot)?;
    request.boot = BootId::random();
    assert_eq!(refusal(connection.session(&request).await).0, Code::IdentityMismatch);
    // Without a client certificate nothing is proven.
    Ok(())
}

#[tokio::test]
async fn a_token_is_bound_to_key_boot_stage_and_epoch() -> anyhow::Result<()> {
    let (member, machine) = armed().await?;
    let mut connection = machine.connect().await?;
    let boot_token = machine.log_in(&mut connection, Stage::Boot).await?;
    connection.config().await?;

    // Copied to a connection with another session key.
    let thief = SessionKey::generate()?;
    let mut stolen = machine.connect_with(&thief).await?;
    stolen.set_token(&boot_token.token)?;
    let (code, detail) = refusal(stolen.config().await);
    assert_eq!(code, Code::TokenInvalid);
    assert!(detail.contains("another session key"), "{detail}");
    assert!(member.why("n1").await?.contains("another session key"));

    // No token, and one that is none.
    let mut bare = machine.connect().await?;
    assert_eq!(refusal(bare.config().await).0, Code::TokenInvalid);
    bare.set_token("moorn1.e30.AAAA")?;
    assert_eq!(refusal(bare.config().await).0, Code::TokenInvalid);

    // A report of another boot.
    let mut report = status(&machine, 1, "image");
    report.boot = BootId::random();
    assert_eq!(refusal(connection.status(&report).await).0, Code::BadRequest);

    // After stage-closed the boot token opens nothing, and there is no new one for this boot.
    connection.stage_closed(&StageClosed { boot: machine.boot }).await?;
    let digest = connection.image().await;
    assert_eq!(refusal(digest).0, Code::StageClosed);
    assert_eq!(refusal(connection.config().await).0, Code::StageClosed);
    let known = machine.known(&mut connection).await?;
    let request = machine.session_request(&connection, known.id, &known.nonce.0, Stage::Boot)?;
    assert_eq!(refusal(connection.session(&request).await).0, Code::StageClosed);
    assert!(member.why("n1").await?.contains("boot stage of this boot of n1 is over"));

    // A run token opens no secrets.
    machine.log_in(&mut connection, Stage::Run).await?;
    assert_eq!(refusal(connection.image().await).0, Code::StageForbidden);
    let key = KeyRequest { digest: moor_api::ids::Sha256Digest([0; 32]) };
    assert_eq!(refusal(connection.image_key(&key).await).0, Code::StageForbidden);
    assert_eq!(refusal(connection.file("private/x", 100).await).0, Code::StageForbidden);
    connection.config().await?;

    // Another epoch.
    member.admin().await?.rearm(&RangeRequest { range: "n1".into() }).await?;
    let (code, detail) = refusal(connection.config().await);
    assert_eq!(code, Code::TokenInvalid);
    assert!(detail.contains("identity of n1 changed"), "{detail}");
    Ok(())
}

#[tokio::test]
async fn a_new_boot_ends_the_boot_stages_before_it() -> anyhow::Result<()> {
    let (_member, mut machine) = armed().await?;
    let mut first = machine.connect().await?;
    machine.log_in(&mut first, Stage::Boot).await?;
    first.config().await?;
    machine.reboot()?;
    let mut second = machine.connect().await?;
    machine.log_in(&mut second, Stage::Boot).await?;
    assert_eq!(refusal(first.image().await).0, Code::StageClosed);
    second.image().await?;
    Ok(())
}

#[tokio::test]
async fn secrets_are_for_the_boot_stage() -> anyhow::Result<()> {
    let (mut member, machine) = armed().await?;
    let hash = format!("$6$salt${}", "a".repeat(86));
    let set = [("crypted.rootpassword", hash.as_str()), ("custom.nodesecret.key", "hush"), ("info.note", "seen")];
    let set = set.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    member.admin().await?.set(&SetAttributes { range: "n1".into(), set, clear: Vec::new() }).await?;
    member.write_profile("p", "private/munge.key", "munge")?;
    member.write_profile("p", "files/motd", "welcome")?;
    member.write_profile("p", "scripts/onboot/10-a", "#!/bin/sh\n")?;
    member.write_profile("p", "scripts/onboot/05 b", "#!/bin/sh\n")?;
    member.admin().await?.publish(&"p".parse()?).await?;

    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    let config = boot.config().await?;
    let secrets = config.secrets.expect("secrets in the boot stage");
    assert_eq!(secrets.root_password_hash.as_deref(), Some(hash.as_str()));
    assert_eq!(&boot.file("private/munge.key", 100).await?[..], b"munge");
    assert_eq!(&boot.file("motd", 100).await?[..], b"welcome");
    assert_eq!(config.phases[0].scripts, ["05 b", "10-a"]);
    assert_eq!(&boot.script(PhaseName::Onboot, "05 b", 100).await?[..], b"#!/bin/sh\n");
    for missing in ["nothing", "../profile.yaml", "private/../motd", "private/nothing"] {
        assert_eq!(refusal(boot.file(missing, 100).await).0, Code::NotFound, "{missing}");
    }
    boot.stage_closed(&StageClosed { boot: machine.boot }).await?;

    let mut run = machine.connect().await?;
    machine.log_in(&mut run, Stage::Run).await?;
    assert!(run.config().await?.secrets.is_none());
    assert_eq!(&run.file("motd", 100).await?[..], b"welcome");
    assert_eq!(refusal(run.file("private/munge.key", 100).await).0, Code::StageForbidden);

    // Nothing of it is in the clear on the member's disk or in its log.
    for secret in ["munge\"", "hush", &hash] {
        let found =
            Command::new("grep").args(["-rlF", secret]).arg(member.path("state")).arg(member.path("log")).output()?;
        assert!(found.stdout.is_empty(), "'{secret}' is in {}", String::from_utf8_lossy(&found.stdout));
    }
    // Each that left was written down before.
    assert!(member.terminate()?);
    let store = member.store().await?;
    let lines: Vec<serde_json::Value> = store.snapshot()?.all(tables::AUDIT)?;
    let released: Vec<&str> = lines.iter().filter_map(|line| line["entry"]["fields"]["secret"].as_str()).collect();
    assert_eq!(released, ["crypted.rootpassword", "p/munge.key"]);
    Ok(())
}

#[tokio::test]
async fn a_boot_keeps_its_generation_while_a_newer_one_is_published() -> anyhow::Result<()> {
    let (member, mut machine) = armed().await?;
    member.write_profile("p", "files/motd", "old")?;
    let mut admin = member.admin().await?;
    let old = admin.publish(&"p".parse()?).await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let first = connection.image().await?;

    let dek = moor_image::Dek::generate()?;
    let second = import(&mut admin, "root", [7; 16], 2, Some(&dek)).await?;
    member.write_profile("p", "files/motd", "new")?;
    let new = admin.publish(&"p".parse()?).await?;
    assert_ne!(old.generation, new.generation);
    assert_eq!(Some(connection.config().await?.profile.generation), old.generation);
    assert_eq!(connection.image().await?.digest, first.digest);
    assert_eq!(&connection.file("motd", 100).await?[..], b"old");
    let (code, _) = refusal(connection.image_key(&KeyRequest { digest: second.digest }).await);
    assert_eq!(code, Code::Conflict, "a key is for the image of this boot");
    connection.image_key(&KeyRequest { digest: first.digest }).await?;
    let heartbeat = connection.heartbeat(&Heartbeat { boot: machine.boot, trust_version: 1, ssh_version: 0 }).await?;
    assert_eq!(heartbeat.generation, new.generation, "a new boot is due");

    machine.reboot()?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(connection.image().await?.digest, second.digest);
    assert_eq!(&connection.file("motd", 100).await?[..], b"new");
    Ok(())
}

#[tokio::test]
async fn a_node_without_a_profile_is_told_so_until_it_has_one() -> anyhow::Result<()> {
    let member = Member::start()?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let (code, detail) = refusal(connection.config().await);
    assert_eq!(code, Code::NoProfile);
    assert!(detail.contains("moor deploy n1"), "{detail}");
    assert!(member.why("n1").await?.contains("has no profile"));
    // The same session goes on when the administrator has said what to boot.
    member.publish().await?;
    member.deploy("n1").await?;
    connection.config().await?;
    connection.image().await?;
    Ok(())
}

#[tokio::test]
async fn continuous_arming_proves_nothing() -> anyhow::Result<()> {
    let (member, mut machine) = prepared().await?;
    member.arm("n1", "continuous").await?;
    for round in 0..2 {
        let mut connection = machine.connect().await?;
        machine.log_in(&mut connection, Stage::Boot).await?;
        assert!(connection.config().await?.secrets.is_none(), "round {round}");
        let digest = connection.image().await?.digest;
        let (code, detail) = refusal(connection.image_key(&KeyRequest { digest }).await);
        assert_eq!(code, Code::Forbidden);
        assert!(detail.contains("allow_unproven") && detail.contains("moor node trust rearm n1"), "{detail}");
        assert_eq!(refusal(connection.file("private/x", 10).await).0, Code::Forbidden);
        // A diskless machine that keeps nothing.
        machine.key = soft_key()?;
        machine.reboot()?;
    }
    assert_eq!(member.admin().await?.nodes(Some("n1")).await?[0].trust, TrustState::Unproven);
    assert!(member.why("n1").await?.contains("proves nothing"));

    let settings = std::fs::read_to_string(member.profile_dir("p").join("profile.yaml"))?;
    member.write_profile("p", "profile.yaml", &settings.replace("allow_unproven: false", "allow_unproven: true"))?;
    member.admin().await?.publish(&"p".parse()?).await?;
    machine.reboot()?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let digest = connection.image().await?.digest;
    connection.image_key(&KeyRequest { digest }).await?;
    Ok(())
}

#[tokio::test]
async fn one_machine_is_one_node() -> anyhow::Result<()> {
    let (member, mut machine) = armed().await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    machine.uuid = Uuid::new_v4();
    member.define("n2", machine.uuid).await?;
    member.arm("n2", "once").await?;
    let mut connection = machine.connect().await?;
    let known = machine.known(&mut connection).await?;
    let (code, detail) = refusal(connection.enroll(&machine.enroll_request(&connection, &known)?).await);
    assert_eq!(code, Code::IdentityMismatch);
    assert!(detail.contains("that of node n1"), "{detail}");
    Ok(())
}

#[tokio::test]
async fn host_certificates_are_good_for_ssh() -> anyhow::Result<()> {
    let (member, machine) = armed().await?;
    let set = [("dns.domain", "hpc.example"), ("net.ipv4_address", "10.9.8.7/24"), ("net.ipv4_method", "static")];
    let set = set.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    member.admin().await?.set(&SetAttributes { range: "n1".into(), set, clear: Vec::new() }).await?;
    member.define("n2", Uuid::new_v4()).await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let dir = tempfile::tempdir()?;
    let key = dir.path().join("key");
    assert!(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status()?.success());
    let public = std::fs::read_to_string(key.with_extension("pub"))?;
    let issued = connection.host_certificates(&HostCertificateRequest { public_keys: vec![public] }).await?;
    let certificate = dir.path().join("key-cert.pub");
    std::fs::write(&certificate, &issued.certificates[0])?;
    let shown = Command::new("ssh-keygen").arg("-L").arg("-f").arg(&certificate).output()?;
    let text = String::from_utf8_lossy(&shown.stdout);
    for part in ["host certificate", "n1.hpc.example", "10.9.8.7", "Serial: 1"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let trust = connection.ssh_trust().await?;
    assert_eq!(trust.shosts, ["n1.hpc.example", "n1", "n2.hpc.example", "n2"]);
    assert_eq!(trust.known_hosts, member.site().await?.known_hosts);
    assert_eq!(trust.user_authorities.len(), 1);
    let bad = HostCertificateRequest { public_keys: vec!["ssh-rsa nonsense".into()] };
    assert_eq!(refusal(connection.host_certificates(&bad).await).0, Code::BadRequest);
    let many = HostCertificateRequest { public_keys: vec![String::new(); 9] };
    assert_eq!(refusal(connection.host_certificates(&many).await).0, Code::BadRequest);
    Ok(())
}

#[tokio::test]
async fn what_is_too_much_or_malformed_is_refused_in_one_line() -> anyhow::Result<()> {
    let (_member, machine) = armed().await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let log = |length: usize| LogReport { boot: machine.boot, phase: None, text: "x".repeat(length) };
    connection.log(&log(64 << 10)).await?;
    assert_eq!(refusal(connection.log(&log((64 << 10) + 1)).await).0, Code::BadRequest);
    for state in ["", "two words", "\u{1b}[2J"] {
        assert_eq!(refusal(connection.status(&status(&machine, 9, state)).await).0, Code::BadRequest, "{state:?}");
    }
    let mut many = machine.connect().await?;
    let mut hello = machine.hello();
    hello.macs = vec!["52:54:00:00:00:01".parse()?; 65];
    assert_eq!(refusal(many.hello(&hello).await).0, Code::BadRequest);
    // More than any call takes: the connection is of no use afterwards, and the member goes on.
    let huge = log(2 << 20);
    assert!(many.log(&huge).await.is_err());
    connection.config().await?;
    // The rate of hellos is limited, per address.
    let mut refused = false;
    for _ in 0..100 {
        if let Err(error) = connection.hello(&machine.hello()).await {
            assert_eq!(error.problem().map(|problem| problem.code), Some(Code::RateLimited));
            refused = true;
            break;
        }
    }
    assert!(refused);
    Ok(())
}
