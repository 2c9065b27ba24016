//! The SSH authorities are rotated: who has to know of it is waited for, and nothing of it is lost with a member. That OpenSSH sees it so is
//! tested where the node's agent is (`node-agent/tests/identity/ssh_rotation.rs`).

use crate::authority::{JUMP, authorities, booted, good, knows_of_it, names, refused};
use crate::backup::{PASSPHRASE, backup, restore};
use crate::collective::{joined, text, three, until, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::Member;
use anyhow::{Context as _, ensure};
use moor_api::admin::{AuthorityState, SshRole};
use moor_api::node::{Heartbeat, HostCertificateRequest, Stage};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

/// What a node is told.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    /// By a heartbeat.
    version: u64,
    hosts: usize,
    users: usize,
    /// The authority that its certificate is from: `SHA256:…`.
    signer: String,
}

/// A heartbeat of a node that has taken up `version`, and what it fetches then.
async fn beats(machine: &Machine, version: u64) -> anyhow::Result<Told> {
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Run).await?;
    let (boot, trust_version) = (machine.boot, machine.bundle.version);
    let reply = connection.heartbeat(&Heartbeat { boot, trust_version, ssh_version: version }).await?;
    let trust = connection.ssh_trust().await?;
    let dir = tempfile::tempdir()?;
    let key = dir.path().join("key");
    ensure!(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status()?.success());
    let public_keys = vec![std::fs::read_to_string(key.with_extension("pub"))?];
    let issued = connection.host_certificates(&HostCertificateRequest { public_keys }).await?;
    ensure!((trust.version, issued.version) == (reply.ssh_version, reply.ssh_version), "{trust:?} {issued:?}");
    let certificate = dir.path().join("key-cert.pub");
    std::fs::write(&certificate, &issued.certificates[0])?;
    let shown = Command::new("ssh-keygen").arg("-L").arg("-f").arg(&certificate).output()?;
    let shown = text(&shown.stdout);
    let signer =
        shown.lines().find_map(|line| line.trim().strip_prefix("Signing CA: ED25519 ")).context("no signer")?;
    let signer = signer.split(' ').next().unwrap_or_default().to_owned();
    let (hosts, users) = (trust.known_hosts.len(), trust.user_authorities.len());
    Ok(Told { version: reply.ssh_version, hosts, users, signer })
}

/// Number, state and fingerprint of those of a role.
async fn shown(member: &Member, role: SshRole) -> anyhow::Result<Vec<(u32, AuthorityState, String)>> {
    let of = authorities(member).await?.ssh.into_iter().filter(|one| one.role == role);
    Ok(of.map(|one| (one.number, one.state, one.fingerprint)).collect())
}

async fn acknowledged(member: &Member) -> anyhow::Result<()> {
    let otherwise = "what the node said is not in the records";
    until(member, otherwise, async || Ok(authorities(member).await?.ssh_behind.is_empty())).await
}

/// Waits until the member itself has taken up this version.
async fn has(member: &Member, version: u64, known_hosts: usize) -> anyhow::Result<()> {
    until(member, "the SSH authorities are not taken up", async || {
        let held = std::fs::read_to_string(member.path("state/store/keys/ssh-authorities.json")).unwrap_or_default();
        let is_held = serde_json::from_str::<serde_json::Value>(&held).is_ok_and(|held| held["version"] == version);
        Ok(is_held && member.site().await?.known_hosts.len() == known_hosts)
    })
    .await
}

/// Private keys of SSH authorities that a member has, and that they are its own alone.
fn private_keys(member: &Member) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(member.path("state/store/keys"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("ssh-") && entry.path().extension().is_none() {
            ensure!(entry.metadata()?.permissions().mode() & 0o777 == 0o600, "'{name}' is for others");
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

async fn keeps(member: &Member, wanted: &[&str]) -> anyhow::Result<()> {
    until(member, "other keys are there", async || Ok(private_keys(member)? == wanted)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_ones_go_once_all_nodes_have_taken_up_the_new_ones() -> anyhow::Result<()> {
    let (mut member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    for (arguments, says) in [
        (["authority", "retire", "ssh-host"], "there is one SSH host authority, and nothing to retire"),
        (["authority", "retire", "ssh-user"], "`moor authority rotate ssh-user` makes another first"),
    ] {
        refused(&member, &arguments, &[says])?;
    }
    let first = shown(&member, SshRole::Host).await?[0].2.clone();
    let told = |version, hosts, users, signer: &str| Told { version, hosts, users, signer: signer.to_owned() };
    assert_eq!(beats(&machine, 1).await?, told(1, 1, 1, &first), "before");

    // Of users.
    let (out, err) = good(&member, &["authority", "rotate", "ssh-user"])?;
    ensure!(out.starts_with("SSH user authority 2 is there, and SSH version 2 has it"), "{out}");
    ensure!(err.contains("certify users by the new authority; then `moor authority retire ssh-user`"), "{err}");
    let beside = "SSH user authority 2 is beside SSH user authority 1 already: `moor authority retire ssh-user`";
    refused(&member, &["authority", "rotate", "ssh-user"], &[beside])?;
    has(&member, 2, 1).await?;
    assert_eq!(beats(&machine, 1).await?, told(2, 1, 2, &first), "while there are two");
    refused(
        &member,
        &["authority", "retire", "ssh-user"],
        &["these nodes have not acknowledged version 2 of the SSH authorities", ": n1: "],
    )?;
    let (out, _) = good(&member, &["authority", "show"])?;
    ensure!(out.contains("SSH version 2: acknowledged by 0 of 1 nodes"), "{out}");
    ensure!(out.contains("SSH user authority 2: trusted, takes over with `moor authority retire ssh-user`"), "{out}");
    // It dies in between, and is what it was.
    member.kill();
    member.run()?;
    keeps(&member, &["ssh-host-ca", "ssh-user-ca", "ssh-user-ca-2"]).await?;
    beats(&machine, 2).await?;
    acknowledged(&member).await?;
    let (out, _) = good(&member, &["authority", "retire", "ssh-user"])?;
    ensure!(out == "SSH user authority 1 is retired, and trusted no more\n", "{out}");
    has(&member, 3, 1).await?;
    assert_eq!(beats(&machine, 2).await?, told(3, 1, 1, &first), "afterwards");
    keeps(&member, &["ssh-host-ca", "ssh-user-ca-2"]).await?;

    // Of hosts, which is the other step more.
    let (out, err) = good(&member, &["authority", "rotate", "ssh-host"])?;
    ensure!(out.starts_with("SSH host authority 2 is there, and SSH version 4 has it"), "{out}");
    ensure!(err.contains("`moor site --known-hosts`"), "{err}");
    has(&member, 4, 2).await?;
    let second = shown(&member, SshRole::Host).await?[1].2.clone();
    let (out, _) = good(&member, &["site", "--known-hosts"])?;
    ensure!(out.lines().filter(|line| line.starts_with("@cert-authority * ssh-ed25519 ")).count() == 2, "{out}");
    assert_eq!(beats(&machine, 4).await?, told(4, 2, 1, &first), "certificates are from the old one");
    acknowledged(&member).await?;
    let (out, _) = good(&member, &["authority", "retire", "ssh-host"])?;
    ensure!(
        out.starts_with("SSH host authority 1 is retired; it is trusted until these nodes show the new one: n1"),
        "{out}"
    );
    refused(&member, &["authority", "retire", "ssh-host"], &["is retired already, and goes once", ": n1; `--force`"])?;
    assert_eq!(beats(&machine, 4).await?, told(5, 2, 1, &second), "certificates are from the new one");
    ensure!(shown(&member, SshRole::Host).await?[0].1 == AuthorityState::Retiring, "no state");
    member.kill();
    member.run()?;
    beats(&machine, 5).await?;
    has(&member, 6, 1).await?;
    assert_eq!(beats(&machine, 6).await?, told(6, 1, 1, &second), "afterwards");
    acknowledged(&member).await?;
    keeps(&member, &["ssh-host-ca-2", "ssh-user-ca-2"]).await?;

    // What is no secret says what was done, and nothing else.
    let redacted = member.path("redacted");
    good(&member, &["backup", "--redact", redacted.to_str().context("a path")?])?;
    let lines = std::fs::read_to_string(&redacted)?;
    for part in [r#""kind":"ssh-user""#, r#""kind":"ssh-host""#, "authority-rotated", "authority-retired"] {
        ensure!(lines.contains(part), "no {part} in {lines}");
    }
    ensure!(!lines.contains("ciphertext") && !lines.contains("PRIVATE"), "{lines}");
    // A member that comes now has the new ones, and a backup brings them back.
    let third = joined(&member, "m2", false).await?;
    ensure!(private_keys(&third)? == ["ssh-host-ca-2", "ssh-user-ca-2"], "{:?}", private_keys(&third)?);
    let file = backup(&member, "after.backup")?;
    let mut restored = Member::prepare()?;
    let output = restore(&restored, &file, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    restored.run()?;
    machine.asks(&restored);
    has(&restored, JUMP + 6, 1).await?;
    // The node is told of it: there may have been others that nothing is known of here.
    assert_eq!(beats(&machine, 6).await?, told(JUMP + 6, 1, 1, &second), "another authority");
    ensure!(names(&authorities(&restored).await?.ssh_behind) == ["n1"], "it has acknowledged nothing of this");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_of_before_a_rotation_is_taken_up_by_nodes_that_went_on() -> anyhow::Result<()> {
    let (mut member, mut machine) = prepared().await?;
    knows_of_it(&member).await?;
    booted(&member, &machine).await?;
    let first = shown(&member, SshRole::Host).await?;
    let file = backup(&member, "before.backup")?;
    good(&member, &["authority", "rotate", "ssh-host"])?;
    has(&member, 2, 2).await?;
    beats(&machine, 2).await?;
    acknowledged(&member).await?;
    member.kill();

    let mut restored = Member::prepare()?;
    let output = restore(&restored, &file, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    restored.run()?;
    machine.asks(&restored);
    // It trusts one that is lost: the version says that there is something to be fetched.
    let told = beats(&machine, 2).await?;
    ensure!((told.version, told.hosts, &told.signer) == (JUMP + 1, 1, &first[0].2), "{told:?}");
    let (out, _) = good(&restored, &["authority", "rotate", "ssh-host"])?;
    ensure!(out.starts_with(&format!("SSH host authority {} is there", JUMP + 2)), "{out}");
    has(&restored, JUMP + 2, 2).await?;
    beats(&machine, JUMP + 1).await?;
    refused(&restored, &["authority", "retire", "ssh-host"], &["have not acknowledged version", ": n1: "])?;
    let (out, err) = good(&restored, &["authority", "retire", "ssh-host", "--force"])?;
    ensure!(out == "SSH host authority 1 is retired, and trusted no more\n", "{out}");
    ensure!(err.contains("warning: left behind, until they run and have heard of it: n1"), "{err}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_takes_them_up_and_goes_on_with_them_alone() -> anyhow::Result<()> {
    let [mut first, mut second, mut third] = three().await?;
    knows_of_it(&second).await?;
    third.kill();
    until(&first, "no change is taken", async || {
        Ok(first.admin().await?.rotate_ssh_authority(SshRole::User).await.is_ok())
    })
    .await?;
    has(&first, 2, 1).await?;
    has(&second, 2, 1).await?;
    third.run()?;
    has(&third, 2, 1).await?;
    let both = ["ssh-host-ca", "ssh-user-ca", "ssh-user-ca-2"];
    for member in [&first, &second, &third] {
        keeps(member, &both).await?;
    }
    let before = shown(&third, SshRole::User).await?;
    voters(&third, 3).await?;
    for member in [&mut first, &mut second, &mut third] {
        member.kill();
    }
    let output = third.moord("recover", &["--force"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    third.run()?;
    has(&third, JUMP + 2, 1).await?;
    ensure!(shown(&third, SshRole::User).await? == before, "others");
    keeps(&third, &both).await?;
    // There is no node to wait for.
    let (out, _) = good(&third, &["authority", "retire", "ssh-user"])?;
    ensure!(out == "SSH user authority 1 is retired, and trusted no more\n", "{out}");
    keeps(&third, &["ssh-host-ca", "ssh-user-ca-2"]).await?;
    let (out, _) = good(&third, &["authority", "rotate", "ssh-user"])?;
    ensure!(out.starts_with(&format!("SSH user authority {} is there", JUMP + 3)), "{out}");
    Ok(())
}
