//! Backups: what is in one, what is not, and what comes of it.

use crate::authority::knows_of_it;
use crate::cli::{moor, said_no, shown};
use crate::collective::{define, joined, knows, text, until, view, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, UID, refusal};
use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use moor_api::admin::{BackupRequest, InviteRequest, NodeView, SetAttributes, SshRole, TokenRequest};
use moor_api::client::admin::AdminClient;
use moor_api::node::{KeyRequest, Stage};
use moor_api::problem::Code;
use moor_image::Dek;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(crate) const PASSPHRASE: &str = "a passphrase of the test";
const HASH: &str = "$6$planted$qwertzuiop";
const PRIVATE: &str = "planted-private-file";

/// Writes a file that only the member's user (and root) reads.
pub(crate) fn secret_file(member: &Member, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = member.path(name);
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(text.as_bytes())?;
    chown(&path, Some(UID), Some(UID))?;
    Ok(path)
}

pub(crate) fn shown_path(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// A member whose node has an identity and has booted, with secrets of each kind in its store.
async fn planted() -> anyhow::Result<(Member, Machine, Dek, Vec<Secret>)> {
    let (member, machine) = prepared().await?;
    let mut admin = member.admin().await?;
    // Of these the private halves are in the store as well.
    knows_of_it(&member).await?;
    for role in SshRole::ALL {
        let number = admin.rotate_ssh_authority(role).await?.number;
        let file = member.path(&format!("state/store/keys/ssh-{role}-ca-{number}"));
        until(&member, "it is not taken up", async || Ok(file.exists())).await?;
    }
    let dek = Dek::generate()?;
    crate::support::import(&mut admin, "root", [7; 16], 2, Some(&dek)).await?;
    member.write_profile("p", "private/munge.key", PRIVATE)?;
    member.write_profile("p", "files/motd", "welcome")?;
    admin.publish(&"p".parse()?).await?;
    let set = [("crypted.rootpassword", HASH), ("custom.nodesecret.key", "planted-node-secret"), ("info.note", "seen")];
    let set = set.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    admin.set(&SetAttributes { range: "n1".into(), set, clear: Vec::new() }).await?;
    member.arm("n1", "once").await?;
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    let token = admin.create_token(&TokenRequest { name: "me".into(), lifetime: 600 }).await?.token;
    let invited = admin.invite(&InviteRequest { name: "m9".into(), voter: true, lifetime: 600 }).await?;
    let mut secrets = Vec::new();
    for text in [HASH, "planted-node-secret", PRIVATE, PASSPHRASE] {
        secrets.extend(forms(text, text.as_bytes()));
    }
    let text = invited.invitation.strip_prefix("moori_").context("no invitation")?;
    let invitation: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text)?)?;
    secrets.push(("the end of an invitation".into(), text.as_bytes()[text.len() - 40..].to_vec()));
    secrets.extend(forms("the secret of an invitation", &hex::decode(invitation["secret"].as_str().context("none")?)?));
    secrets.extend(forms("the key of an image", dek.as_bytes()));
    secrets.extend(forms("a token", &hex::decode(token.strip_prefix("moora_").context("no token")?)?));
    for key in std::fs::read_dir(member.path("state/store/keys"))? {
        let key = key?.path();
        if key.extension().is_none_or(|extension| extension != "pem" && extension != "json") {
            secrets.extend(key_forms(&key)?);
        }
    }
    ensure!(secrets.len() >= 36 + 10 * 6, "{} secrets", secrets.len());
    Ok((member, machine, dek, secrets))
}

/// What must not be found: what it is, and how it may lie somewhere.
type Secret = (String, Vec<u8>);

/// As it is, hexadecimal, and as base64, as far as that does not depend on what follows.
fn forms(what: &str, secret: &[u8]) -> Vec<Secret> {
    let whole = &secret[..secret.len() / 3 * 3];
    let forms = [
        secret.to_vec(),
        hex::encode(secret).into_bytes(),
        hex::encode_upper(secret).into_bytes(),
        STANDARD_NO_PAD.encode(whole).into_bytes(),
        URL_SAFE_NO_PAD.encode(whole).into_bytes(),
    ];
    forms.into_iter().map(|form| (what.to_owned(), form)).collect()
}

/// A key file: each of its lines, and what they stand for.
fn key_forms(path: &Path) -> anyhow::Result<Vec<Secret>> {
    let (what, text) = (path.display().to_string(), std::fs::read_to_string(path)?);
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("---")).collect();
    let body = lines.concat();
    let bytes = hex::decode(&body).or_else(|_| STANDARD.decode(&body))?;
    let mut secrets = forms(&what, &bytes);
    let long = lines.into_iter().filter(|line| line.len() >= 16);
    secrets.extend(long.map(|line| (what.clone(), line.as_bytes().to_vec())));
    Ok(secrets)
}

/// Looks for all of them in one go; what one is that is there.
fn found<'a>(bytes: &[u8], secrets: &'a [Secret]) -> Option<&'a str> {
    let start = |bytes: &[u8]| usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    let mut beginning = vec![Vec::new(); 1 << 16];
    for secret in secrets {
        beginning[start(&secret.1)].push(secret);
    }
    bytes.windows(2).enumerate().find_map(|(at, pair)| {
        let here = beginning[start(pair)].iter().find(|(_, form)| bytes[at..].starts_with(form));
        here.map(|(what, _)| what.as_str())
    })
}

fn none_of(what: &str, bytes: &[u8], secrets: &[Secret]) -> anyhow::Result<()> {
    ensure!(!bytes.is_empty(), "{what} is empty");
    match found(bytes, secrets) {
        Some(secret) => anyhow::bail!("{secret} is in {what}"),
        None => Ok(()),
    }
}

/// `moor backup`, with the passphrase in a file; the backup belongs to the user that will restore it.
pub(crate) fn backup(member: &Member, name: &str) -> anyhow::Result<PathBuf> {
    let (file, passphrase) = (member.path(name), secret_file(member, &format!("{name}.pass"), PASSPHRASE)?);
    let arguments = ["--json", "backup", shown_path(&file), "--passphrase-file", shown_path(&passphrase)];
    let (status, out, err) = shown(&moor(member, &arguments)?.output()?);
    ensure!(status == Some(0) && err.is_empty(), "{out}{err}");
    let told: serde_json::Value = serde_json::from_str(&out)?;
    let meta = std::fs::metadata(&file)?;
    ensure!(meta.mode() & 0o777 == 0o600, "{:o}", meta.mode());
    ensure!(told["bytes"] == meta.len() && told["redacted"] == false, "{told}");
    chown(&file, Some(UID), Some(UID))?;
    Ok(file)
}

/// `moord restore` into `member`, by this passphrase.
pub(crate) fn restore(member: &Member, file: &Path, passphrase: &str, more: &[&str]) -> anyhow::Result<Output> {
    let name = format!("restore.pass-{}", std::fs::read_dir(member.dir.path())?.count());
    let pass = secret_file(member, &name, passphrase)?;
    let arguments = [shown_path(file), "--address", "127.0.0.1", "--passphrase-file", shown_path(&pass)];
    member.moord("restore", &[&arguments[..], more].concat())
}

/// A client counts in two nodes, one step after the other in each: what is restored is of one moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_made_while_changes_go_on_is_of_one_moment() -> anyhow::Result<()> {
    let member = Member::start()?;
    for name in ["n1", "n2"] {
        define(&member, name).await?;
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let (mut admin, over) = (member.admin().await?, is_over.clone());
    let counting = tokio::spawn(async move {
        let mut count = 0_u64;
        while !over.load(Ordering::Relaxed) {
            count += 1;
            for name in ["n1", "n2"] {
                let set = [("info.note".to_owned(), count.to_string())].into();
                admin.set(&SetAttributes { range: name.into(), set, clear: Vec::new() }).await?;
            }
        }
        anyhow::Ok(count)
    });
    let mut files = Vec::new();
    for name in ["one", "two", "three"] {
        tokio::time::sleep(Duration::from_millis(100)).await;
        files.push(tokio::task::block_in_place(|| backup(&member, name))?);
    }
    is_over.store(true, Ordering::Relaxed);
    let end = counting.await??;
    let mut last = 0;
    for file in files {
        let mut restored = Member::prepare()?;
        let output = restore(&restored, &file, PASSPHRASE, &[])?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        restored.run()?;
        let counted = async |name| anyhow::Ok(node(&restored, name).await?.attributes["info.note"].parse::<u64>()?);
        let (one, other) = (counted("n1").await?, counted("n2").await?);
        ensure!(one == other || one == other + 1, "n1 is at {one} and n2 at {other}");
        ensure!(last < one && one <= end, "{last}, {one}, {end}: nothing was counted meanwhile");
        last = one;
    }
    Ok(())
}

/// A node as an administrator sees it.
async fn node(member: &Member, name: &str) -> anyhow::Result<NodeView> {
    member.admin().await?.nodes(Some(name)).await?.pop().context("no node")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_becomes_a_new_collective_that_its_nodes_know() -> anyhow::Result<()> {
    let (mut member, mut machine, dek, secrets) = planted().await?;
    let file = backup(&member, "site.backup")?;
    none_of("the backup", &std::fs::read(&file)?, &secrets)?;
    let before = node(&member, "n1").await?;
    define(&member, "later").await?;
    member.kill();

    // Without the content, it is said what is missing.
    let bare = Member::prepare()?;
    let output = restore(&bare, &file, PASSPHRASE, &["--json"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let missing: Vec<&str> =
        told["missing"].as_array().context("no list")?.iter().filter_map(|missing| missing["of"].as_str()).collect();
    for what in ["image 'root' @1", "image 'root' @2", "kernel of image 'root' @", "'motd' of profile 'p' @2"] {
        ensure!(missing.iter().any(|missing| missing.starts_with(what)), "{what} is not in {missing:?}");
    }
    let output = restore(&bare, &file, PASSPHRASE, &[])?;
    ensure!(text(&output.stderr).contains("holds a member already"), "{}", text(&output.stderr));
    // Told so, it is set aside; not by a try that comes to nothing.
    let stands = || std::fs::read_to_string(bare.path("state/store/member.json"));
    let before_it = stands()?;
    let output = restore(&bare, &file, "another passphrase", &["--set-aside"])?;
    ensure!(!output.status.success() && stands()? == before_it, "{}", text(&output.stderr));
    let output = restore(&bare, &file, PASSPHRASE, &["--set-aside"])?;
    ensure!(output.status.success() && stands()? != before_it, "{}", text(&output.stderr));
    let aside = bare.aside()?;
    ensure!(aside.len() == 1, "{aside:?}");
    assert_eq!(std::fs::read_to_string(aside[0].join("member.json"))?, before_it);

    let mut restored = Member::prepare()?;
    let blobs = member.path("state/blobs");
    let output = restore(&restored, &file, PASSPHRASE, &["--blobs", shown_path(&blobs)])?;
    let said = text(&output.stdout);
    ensure!(output.status.success() && !said.contains("missing"), "{said}{}", text(&output.stderr));
    ensure!(said.contains("collective test as it was at 20") && said.contains("1 nodes"), "{said}");
    restored.run()?;
    knows(&restored, &["n1"]).await?;
    assert_eq!(node(&restored, "n1").await?, before);
    // Nobody arms it: it is the machine that it was, and gets what it got.
    machine.asks(&restored);
    machine.reboot()?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    let got = boot.config().await?.secrets.context("no secrets")?;
    assert_eq!(got.root_password_hash.as_deref(), Some(HASH));
    assert_eq!(&boot.file("private/munge.key", 100).await?[..], PRIVATE.as_bytes());
    assert_eq!(&boot.file("motd", 100).await?[..], b"welcome");
    let offer = boot.image().await?;
    assert_eq!(boot.image_key(&KeyRequest { digest: offer.digest }).await?.wrapped.0, dek.as_bytes());
    assert_eq!(restored.admin().await?.image(offer.digest, 1 << 20).await?.len() as u64, offer.size);
    // The members and invitations of before are gone; new ones come.
    let seen = view(&restored).await?;
    assert_eq!((seen.members.len(), seen.members[0].number, seen.invitations.len()), (1, 2, 0));
    // Nor does what they have open what comes from now on.
    until(&restored, "it is not sealed anew", async || Ok(view(&restored).await?.keys == [2])).await?;
    let second = joined(&restored, "m2", true).await?;
    voters(&restored, 2).await?;
    knows(&second, &["n1"]).await?;
    // A backup of a restored collective is restored again.
    let again = backup(&restored, "again.backup")?;
    let third = Member::prepare()?;
    let output = restore(&third, &again, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_planted_secret_lies_on_a_disk_in_the_clear() -> anyhow::Result<()> {
    let (mut member, _, _, mut secrets) = planted().await?;
    // All of it is sealed a second time.
    assert_eq!(member.admin().await?.rotate_key().await?.version, 2);
    until(&member, "it is not sealed anew", async || Ok(view(&member).await?.keys == [2])).await?;
    let file = backup(&member, "site.backup")?;
    let redacted = member.path("redacted");
    let (status, _, err) = shown(&moor(&member, &["backup", "--redact", shown_path(&redacted)])?.output()?);
    ensure!(status == Some(0), "{err}");
    let lines = std::fs::read_to_string(&redacted)?;
    none_of("the redacted backup", lines.as_bytes(), &secrets)?;
    ensure!(!lines.contains("ciphertext"), "it holds secrets, although sealed");
    let parsed: Vec<serde_json::Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let of = |table: &str| parsed.iter().filter(|line| line["table"] == table).count() as u64;
    assert_eq!((of("nodes"), of("images"), of("tokens"), of("logs")), (1, 2, 0, 0));
    assert_eq!(parsed.last().context("empty")?["records"], parsed.len() as u64 - 2);
    let note = |line: &serde_json::Value| line["value"]["attributes"]["info.note"] == "seen";
    ensure!(parsed.iter().any(note), "what is no secret is to be read");
    chown(&redacted, Some(UID), Some(UID))?;
    let elsewhere = Member::prepare()?;
    let output = restore(&elsewhere, &redacted, PASSPHRASE, &[])?;
    ensure!(text(&output.stderr).contains("no encrypted backup"), "{}", text(&output.stderr));

    // Of a member that got all by its log, and of one whose log begins with a snapshot.
    let mut second = joined(&member, "m2", true).await?;
    voters(&member, 2).await?;
    knows(&second, &["n1"]).await?;
    // What is in the tables is in their file once they are closed.
    for member in [&mut second, &mut member] {
        ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    }
    // What everything is under.
    let carried = serde_json::to_value(member.opened()?.0.carry())?;
    let keys = hex::decode(carried["2"].as_str().context("no version 2")?)?;
    ensure!(keys.len() == 64 && carried.as_object().is_some_and(|all| all.len() == 1), "other versions");
    for key in keys.chunks(32) {
        secrets.extend(forms("a key of the collective", key));
    }
    let mut restored = Member::prepare()?;
    let output = restore(&restored, &file, PASSPHRASE, &[])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    restored.run()?;
    knows(&restored, &["n1"]).await?;
    let mut snapshots = 0;
    for (member, name) in [(&member, "the first"), (&second, "the second"), (&restored, "the restored one")] {
        for place in ["state/store", "state/store/snapshots"] {
            for entry in std::fs::read_dir(member.path(place))? {
                let path = entry?.path();
                if !path.is_file() {
                    continue;
                }
                let mut bytes = std::fs::read(&path)?;
                if path.extension().is_some_and(|extension| extension == "snapshot") {
                    snapshots += 1;
                    let mut plain = Vec::new();
                    zstd::Decoder::new(&*bytes)?.read_to_end(&mut plain)?;
                    bytes = plain;
                }
                none_of(&format!("'{}' of {name}", path.display()), &bytes, &secrets)?;
            }
        }
        none_of(&format!("the log of {name}"), member.log().as_bytes(), &secrets)?;
    }
    ensure!(snapshots > 0, "there was no snapshot to look into");
    // The search finds what is there.
    let note = [("a note".to_owned(), b"info.note".to_vec())];
    ensure!(found(&std::fs::read(second.path("state/store/member.redb"))?, &note).is_some(), "nothing was searched");
    let key = std::fs::read(member.path("state/store/keys/unwrap.key"))?;
    for form in [key.trim_ascii().to_vec(), hex::decode(key.trim_ascii())?] {
        ensure!(found(&[b"before ", &form[..], b" behind"].concat(), &secrets).is_some(), "no key would be found");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_backup_or_no_place_for_one_is_refused_and_leaves_nothing() -> anyhow::Result<()> {
    let member = Member::start()?;
    define(&member, "n1").await?;
    let file = backup(&member, "site.backup")?;
    let whole = std::fs::read(&file)?;
    let target = Member::prepare()?;
    let refused = |what: &str, bytes: &[u8], passphrase: &str, says: &str| {
        let path = target.path("bad.backup");
        std::fs::write(&path, bytes)?;
        chown(&path, Some(UID), Some(UID))?;
        let output = restore(&target, &path, passphrase, &[])?;
        let (status, out, err) = shown(&output);
        ensure!(status == Some(1) && out.is_empty() && err.lines().count() == 1, "{what}: {status:?} {out}{err}");
        ensure!(err.contains(says), "{what}: {says:?} is not in {err}");
        ensure!(!target.path("state/store").exists(), "{what}: a store is left");
        anyhow::Ok(())
    };
    let altered = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        bytes
    };
    refused("another passphrase", &whole, "another passphrase", "the passphrase is another one")?;
    refused("nothing", b"", PASSPHRASE, "no encrypted backup")?;
    refused("something else", b"{\"backup\":\"x\"}\n", PASSPHRASE, "no encrypted backup")?;
    refused("a newer format", &altered(9), PASSPHRASE, "a newer release wrote it")?;
    refused("altered salt", &altered(40), PASSPHRASE, "the passphrase is another one")?;
    refused("altered content", &altered(whole.len() / 2), PASSPHRASE, "damaged at byte")?;
    refused("altered end", &altered(whole.len() - 1), PASSPHRASE, "damaged at byte")?;
    refused("cut", &whole[..whole.len() - 1], PASSPHRASE, "damaged at byte")?;
    refused("cut to its header", &whole[..96], PASSPHRASE, "damaged at byte")?;
    refused("goes on", &[&whole[..], b"x"].concat(), PASSPHRASE, "damaged at byte")?;
    let output = restore(&member, &file, PASSPHRASE, &[])?;
    ensure!(text(&output.stderr).contains("holds a member already"), "{}", text(&output.stderr));

    // On the side that makes one.
    let short = secret_file(&member, "short", "elevenchars\n")?;
    let open = secret_file(&member, "open", PASSPHRASE)?;
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    let new = member.path("new.backup");
    for (what, passphrase, to, says) in [
        ("a short passphrase", &short, &new, "12 or more"),
        ("a passphrase that others read", &open, &new, "can be read by others"),
        ("a file that is there", &short, &file, "exists already"),
    ] {
        let arguments = ["backup", shown_path(to), "--passphrase-file", shown_path(passphrase)];
        said_no(what, &moor(&member, &arguments)?.output()?, &[says]);
    }
    said_no("no terminal", &moor(&member, &["backup", shown_path(&new)])?.output()?, &["--passphrase-file"]);
    ensure!(!new.exists() && std::fs::read(&file)? == whole, "a refused backup left something");
    // All keys do not go over the network, whoever asks.
    let bundle = member.site().await?.bundle;
    let token = member.admin().await?.create_token(&TokenRequest { name: "me".into(), lifetime: 600 }).await?.token;
    let mut remote = AdminClient::https(&member.url(), &bundle, &token).await?;
    let request =
        BackupRequest { passphrase: Some(PASSPHRASE.into()), recipients: Vec::new(), without_majority: false };
    assert_eq!(refusal(remote.backup(&request).await.map(drop)).0, Code::Forbidden);
    let mut parts = remote.backup(&BackupRequest::default()).await?;
    ensure!(parts.next().await?.is_some(), "a redacted one may be made from afar");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_a_backup_is_made_only_when_asked_for_and_says_so() -> anyhow::Result<()> {
    let mut first = Member::start()?;
    define(&first, "n1").await?;
    let mut second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    let make = |name: &str, more: &[&str]| {
        let pass = secret_file(&first, &format!("{name}.pass"), PASSPHRASE)?;
        let file = first.path(name);
        let arguments = [&["backup", shown_path(&file), "--passphrase-file", shown_path(&pass)], more].concat();
        anyhow::Ok((file.clone(), shown(&moor(&first, &arguments)?.output()?)))
    };
    // As long as there is one, it is as any other.
    let (fresh, (status, _, err)) = make("fresh", &["--without-majority"])?;
    ensure!(status == Some(0) && err.is_empty(), "{err}");
    second.kill();
    until(&first, "it has a majority", async || Ok(!view(&first).await?.majority)).await?;
    let (file, (status, out, err)) = make("refused", &[])?;
    ensure!(status == Some(1) && err.contains("`--without-majority` makes such a one"), "{out}{err}");
    ensure!(!file.exists(), "a file is left");
    let (stale, (status, out, err)) = make("stale", &["--without-majority"])?;
    ensure!(status == Some(0) && err.contains("no majority"), "{out}{err}");
    let redacted = first.path("redacted");
    let (status, _, err) =
        shown(&moor(&first, &["backup", "--redact", "--without-majority", shown_path(&redacted)])?.output()?);
    ensure!(status == Some(0) && err.contains("no majority"), "{err}");
    let text_of = std::fs::read_to_string(&redacted)?;
    let head: serde_json::Value = serde_json::from_str(text_of.lines().next().context("no line")?)?;
    ensure!(head["stale"]["index"].as_u64().is_some_and(|index| index > 0), "{head}");
    for (file, is_stale) in [(&fresh, false), (&stale, true)] {
        chown(file, Some(UID), Some(UID))?;
        let mut restored = Member::prepare()?;
        let output = restore(&restored, file, PASSPHRASE, &[])?;
        let said = text(&output.stdout);
        ensure!(output.status.success(), "{said}{}", text(&output.stderr));
        ensure!(said.contains("was made without a majority: it ends with entry") == is_stale, "{said}");
        restored.run()?;
        knows(&restored, &["n1"]).await?;
    }
    let member = Member::prepare()?;
    let output = restore(&member, &stale, PASSPHRASE, &["--json"])?;
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        told["stale"]["term"].as_u64().is_some_and(|term| term > 0) && told["stale"]["confirmed"].is_u64(),
        "{told}"
    );
    // That it was made is in the audit log of all, once a majority is back.
    second.run()?;
    let lines = async || {
        let mut admin = second.admin().await?;
        let mut parts = admin.backup(&BackupRequest::default()).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = parts.next().await? {
            bytes.extend_from_slice(&piece);
        }
        let lines = text(&bytes);
        let is_line = |line: &&str| line.contains(r#""what":"backup""#) && line.contains(r#""majority":false"#);
        anyhow::Ok(lines.lines().filter(is_line).count())
    };
    until(&first, "no majority comes back", async || Ok(view(&second).await?.majority)).await?;
    until(&first, "the lines are not delivered", async || Ok(lines().await? == 2)).await?;
    ensure!(first.terminate()?, "it does not stop:\n{}", first.log());
    Ok(())
}
