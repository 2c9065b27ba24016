//! Content among members: who has what, when nodes are offered an image, and a blob that came in part.

use crate::cli::{moor, shown};
use crate::collective::{blobs, invite, joined, text, until, view, voters};
use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{Member, UID, import, refusal, sealed};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CreateProfile, ImportImage};
use moor_api::client::admin::AdminClient;
use moor_api::deploy::PhaseName;
use moor_api::node::Stage;
use moor_image::Dek;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Cursor;
use std::os::unix::fs::{FileExt as _, chown};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// A further member, with more in its configuration; not started.
pub(crate) async fn invited(host: &Member, name: &str, more: &str) -> anyhow::Result<Member> {
    let member = Member::prepare()?;
    member.configure(more)?;
    let output = member.join(&invite(host, name, true, 60).await?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    Ok(member)
}

/// Imports an image with this initramfs, whose blob is returned.
pub(crate) async fn with_initramfs(member: &Member, serial: u64, initramfs: Vec<u8>) -> anyhow::Result<String> {
    let mut admin = member.admin().await?;
    let dek = Dek::generate()?;
    let image = admin.add_blob(Cursor::new(sealed("root", [7; 16], serial, Some(&dek))?), |_| {}).await?.blob;
    let kernel = admin.add_blob(Cursor::new(b"kernel".to_vec()), |_| {}).await?.blob;
    let initramfs = admin.add_blob(Cursor::new(initramfs), |_| {}).await?.blob;
    let boot_loaders = BTreeMap::new();
    let (name, key) = ("root".parse()?, Some(dek.to_hex().to_string()));
    let request = ImportImage { name, image, key, signatures: None, kernel, initramfs, boot_loaders };
    admin.import_image(&request).await?;
    Ok(initramfs.to_string())
}

/// Two members that hold a blob of 24 MiB, of which no part is as another, and a third that is to fetch it; and the name of the first.
async fn two_with_a_large_blob(pace: &str) -> anyhow::Result<([Member; 3], String, String)> {
    let first = Member::start()?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut bytes = vec![0; 24 << 20];
    random.fill(&mut bytes);
    let blob = with_initramfs(&first, 1, bytes).await?;
    let second = joined(&first, "m2", true).await?;
    let own = voters(&first, 2).await?.members[0].name.clone();
    until(&second, "the content did not come", async || Ok(blobs(&second)? == blobs(&first)?)).await?;
    let third = invited(&first, "m3", pace).await?;
    Ok(([first, second, third], blob, own))
}

/// What a member has written of from whom a blob came.
fn came_from(member: &Member, blob: &str) -> String {
    let (log, said) = (member.log(), format!("blob {blob} came from "));
    log.split(&said).nth(1).and_then(|rest| rest.split(", from byte").next()).unwrap_or_default().to_owned()
}

/// Where a member keeps a blob.
fn place(member: &Member, blob: &str) -> PathBuf {
    member.path("state/blobs").join(&blob[..2]).join(blob)
}

/// Sends what nothing names; its digest.
async fn orphan(admin: &mut AdminClient) -> anyhow::Result<String> {
    Ok(admin.add_blob(Cursor::new(b"an upload that was given up".to_vec()), |_| {}).await?.blob.to_string())
}

/// Makes all that a member has older than any import that may be under way.
fn age(member: &Member) -> anyhow::Result<()> {
    for blob in blobs(member)?.keys() {
        File::open(place(member, blob))?.set_modified(SystemTime::now() - Duration::from_hours(25))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_generation_that_a_boot_began_with_outlives_the_collection_and_what_nothing_names_does_not()
-> anyhow::Result<()> {
    let (mut member, machine) = prepared().await?;
    let mut admin = member.admin().await?;
    member.write_profile("p", "files/motd", "the first")?;
    admin.publish(&"p".parse()?).await?;
    member.arm("n1", "once").await?;
    let mut boot = machine.connect().await?;
    let token = machine.log_in(&mut boot, Stage::Boot).await?.token;
    member.write_profile("p", "files/motd", "the second")?;
    admin.publish(&"p".parse()?).await?;
    let named = blobs(&member)?;
    let orphan = orphan(&mut admin).await?;
    age(&member)?;
    ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    member.run()?;
    until(&member, "what nothing names stays", async || Ok(!blobs(&member)?.contains_key(&orphan))).await?;
    assert_eq!(blobs(&member)?, named);
    let mut boot = machine.connect().await?;
    boot.set_token(&token)?;
    assert_eq!(&boot.file("motd", 100).await?[..], b"the first");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_collected_without_a_majority() -> anyhow::Result<()> {
    let mut first = Member::start()?;
    let mut second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    let orphan = orphan(&mut first.admin().await?).await?;
    age(&first)?;
    second.kill();
    first.kill();
    first.run_loud()?;
    until(&first, "it does not say so", async || Ok(first.log().contains("nothing is collected"))).await?;
    ensure!(blobs(&first)?.contains_key(&orphan), "it collects what others may have named meanwhile");
    second.run()?;
    until(&first, "it is never collected", async || Ok(!blobs(&first)?.contains_key(&orphan))).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_not_come_to_a_member_yet_is_to_be_asked_of_another() -> anyhow::Result<()> {
    let (member, machine) = prepared().await?;
    member.write_profile("p", "files/motd", "welcome")?;
    member.write_profile("p", "scripts/pre/10-x", "true")?;
    let (mut admin, profile) = (member.admin().await?, "p".parse()?);
    admin.publish(&profile).await?;
    member.arm("n1", "once").await?;
    let mut boot = machine.connect().await?;
    machine.log_in(&mut boot, Stage::Boot).await?;
    let image = boot.image().await?.digest;
    boot.file("motd", 100).await?;
    boot.script(PhaseName::Pre, "10-x", 100).await?;
    for blob in blobs(&member)?.keys() {
        std::fs::remove_file(place(&member, blob))?;
    }
    for (what, answer) in [
        ("a file", boot.file("motd", 100).await),
        ("a script", boot.script(PhaseName::Pre, "10-x", 100).await),
        ("the kernel", admin.boot_file(&profile, "kernel", 100).await),
        ("the initramfs", admin.boot_file(&profile, "initramfs", 100).await),
        ("the image", admin.image(image, 1 << 20).await),
    ] {
        let problem =
            answer.err().and_then(|error| error.problem().cloned()).with_context(|| format!("{what} is there"))?;
        ensure!(problem.status == 503, "{what}: {problem:?}");
        ensure!(problem.detail.contains("has not come to this member yet: ask another"), "{what}: {problem}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_cannot_keep_content_says_so_once_and_has_it_when_it_can() -> anyhow::Result<()> {
    let first = Member::start()?;
    let mut second = invited(&first, "m2", "").await?;
    second.run()?;
    voters(&first, 2).await?;
    // As good as a full disk: nothing can be written.
    let place = second.path("state/blobs");
    chown(&place, Some(0), Some(0))?;
    first.publish().await?;
    let says = || second.log().matches("cannot be kept in").count();
    until(&second, "it does not say so", async || Ok(says() > 0)).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(says(), 1, "it is said again and again:\n{}", second.log());
    chown(&place, Some(UID), Some(UID))?;
    until(&second, "the content did not come", async || Ok(blobs(&second)? == blobs(&first)?)).await?;
    until(&second, "it does not say so", async || Ok(second.log().contains("content is kept again"))).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_comes_no_faster_than_its_bound() -> anyhow::Result<()> {
    let first = Member::start()?;
    with_initramfs(&first, 1, vec![7; 4 << 20]).await?;
    let mut second = invited(&first, "m2", "content_mib_per_second = 1\n").await?;
    second.run()?;
    let began = Instant::now();
    until(&second, "the content did not come", async || Ok(blobs(&second)? == blobs(&first)?)).await?;
    let took = began.elapsed();
    ensure!(took >= Duration::from_secs(3), "4 MiB at 1 MiB/s came in {took:?}");
    Ok(())
}

/// A member that joins has hours of images to fetch, and meanwhile a profile is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_small_and_was_published_meanwhile_does_not_wait_for_what_is_large() -> anyhow::Result<()> {
    let first = Member::start()?;
    let mut large = Vec::new();
    for serial in 1..5 {
        large.push(with_initramfs(&first, serial, vec![u8::try_from(serial)?; 3 << 20]).await?);
    }
    let mut second = invited(&first, "m2", "content_mib_per_second = 1\n").await?;
    second.run()?;
    let here = || -> anyhow::Result<usize> {
        let here = blobs(&second)?;
        Ok(large.iter().filter(|blob| here.contains_key(*blob)).count())
    };
    until(&second, "nothing comes", async || Ok(here()? > 0)).await?;
    let before = blobs(&first)?;
    let mut admin = first.admin().await?;
    let template = "debian-diskless".to_owned();
    admin.create_profile(&CreateProfile { name: "p".parse()?, image: "root".parse()?, template }).await?;
    first.write_profile("p", "scripts/pre/10-x", "echo published meanwhile")?;
    admin.publish(&"p".parse()?).await?;
    let after = blobs(&first)?;
    let new: Vec<_> = after.keys().filter(|blob| !before.contains_key(*blob)).collect();
    ensure!(!new.is_empty(), "nothing was published");
    let has_new = async || Ok(new.iter().all(|blob| blobs(&second).is_ok_and(|here| here.contains_key(*blob))));
    until(&second, "what is new did not come", has_new).await?;
    ensure!(here()? < large.len(), "it came after everything else");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_offered_an_image_once_enough_members_hold_it_and_ever_after() -> anyhow::Result<()> {
    let three = "image_copies = 3\n";
    let mut first = Member::init()?;
    first.configure(three)?;
    first.run()?;
    let (mut second, mut third) = (invited(&first, "m2", three).await?, invited(&first, "m3", three).await?);
    second.run()?;
    third.run()?;
    voters(&first, 3).await?;
    third.kill();
    let mut admin = first.admin().await?;
    let image = import(&mut admin, "root", [7; 16], 1, Some(&Dek::generate()?)).await?;
    let template = "debian-diskless".to_owned();
    admin.create_profile(&CreateProfile { name: "p".parse()?, image: "root".parse()?, template }).await?;
    admin.publish(&"p".parse()?).await?;
    let machine = Machine::new(&first).await?;
    first.define("n1", machine.uuid).await?;
    first.deploy("n1").await?;
    first.arm("n1", "once").await?;
    until(&second, "the image did not come", async || Ok(blobs(&second)? == blobs(&first)?)).await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let (_, detail) = refusal(connection.image().await);
    ensure!(detail.contains("image 'root' @1 is on too few members so far"), "{detail}");
    let status = |more: &[&str]| anyhow::Ok(shown(&moor(&first, &[&["content", "status"], more].concat())?.output()?));
    let (code, out, err) = status(&[])?;
    ensure!(code == Some(0) && err.contains("member m3 does not answer"), "{err}");
    let own = &view(&first).await?.members[0].name;
    let line = format!("image 'root' @1: 2 of 3 members ({own} m2), nodes wait for 3\n");
    ensure!(out.contains(&line), "{line:?} is not in {out}");
    // The third comes back: the answer is waited for.
    third.run()?;
    until(&third, "the image did not come", async || Ok(blobs(&third)? == blobs(&first)?)).await?;
    let offer = connection.image().await?;
    assert_eq!(offer.digest, image.digest);
    let (code, out, err) = status(&["--all"])?;
    ensure!(code == Some(0) && err.is_empty(), "{err}");
    ensure!(out.contains(&format!("image 'root' @1: 3 of 3 members ({own} m2 m3)\n")), "{out}");
    ensure!(out.contains("kernel of image 'root' @1: 3 of 3"), "{out}");
    // What was offered stays: deaths take no image from the nodes.
    third.kill();
    second.kill();
    assert_eq!(connection.image().await?.digest, image.digest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_came_in_part_is_gone_on_with_and_a_spoilt_one_comes_anew() -> anyhow::Result<()> {
    let first = Member::start()?;
    first.publish().await?;
    let mut second = invited(&first, "m2", "content_mib_per_second = 1\n").await?;
    let whole = blobs(&first)?;
    let (image, size) = whole.iter().max_by_key(|(_, size)| **size).context("no blobs")?;
    let (kernel, _) = whole.iter().find(|(_, size)| **size == 6).context("no kernel")?;
    let bytes = std::fs::read(first.path("state/blobs").join(&image[..2]).join(image))?;
    for (blob, begun) in [(image, &bytes[..150_000]), (kernel, b"spoilt".as_slice())] {
        let path = second.path("state/blobs").join(format!(".partial-{blob}"));
        std::fs::write(&path, begun)?;
        chown(&path, Some(UID), Some(UID))?;
    }
    let began = Instant::now();
    second.run_loud()?;
    until(&second, "the content did not come", async || Ok(blobs(&second)? == whole)).await?;
    println!("{size} bytes, of which 150000 were there, in {:.1} s", began.elapsed().as_secs_f32());
    let log = second.log();
    ensure!(log.contains(&format!("blob {image} came from")) && log.contains("from byte 149999 on"), "{log}");
    ensure!(log.contains(&format!("blob {kernel} came from")), "{log}");
    for name in std::fs::read_dir(second.path("state/blobs"))? {
        ensure!(name?.path().is_dir(), "something is left");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_comes_from_several_members_and_one_that_dies_meanwhile_does_not_matter() -> anyhow::Result<()> {
    let ([first, mut second, mut third], blob, own) = two_with_a_large_blob("content_mib_per_second = 6\n").await?;
    third.run_loud()?;
    let partial = third.path("state/blobs").join(format!(".partial-{blob}"));
    until(&third, "the content does not come", async || {
        Ok(std::fs::metadata(&partial).is_ok_and(|found| found.len() >= 6 << 20))
    })
    .await?;
    second.kill();
    ensure!(partial.exists() && !place(&third, &blob).exists(), "it came before the other one died");
    until(&third, "the content did not come", async || Ok(blobs(&third)? == blobs(&first)?)).await?;
    let from = came_from(&third, &blob);
    ensure!(from == format!("{own} and m2") || from == format!("m2 and {own}"), "it came from {from}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_wrong_bytes_is_found_and_asked_no_more() -> anyhow::Result<()> {
    let ([first, second, mut third], blob, own) = two_with_a_large_blob("content_mib_per_second = 16\n").await?;
    // A disk that is going: something in every piece.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(place(&second, &blob))?;
    for at in (0..24).map(|mib| (mib << 20) + 77) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
    }
    third.run_loud()?;
    until(&third, "the content did not come", async || Ok(blobs(&third)? == blobs(&first)?)).await?;
    let bytes = std::fs::read(place(&third, &blob))?;
    ensure!(bytes == std::fs::read(place(&first, &blob))?, "what came is something else");
    ensure!(came_from(&third, &blob) == own, "it came from {}", came_from(&third, &blob));
    let said = format!("member m2 sent wrong bytes of blob {blob}");
    until(&third, "it is not found", async || Ok(third.log().contains(&said))).await?;
    let log = third.log();
    ensure!(!log.contains(&format!("member {own} sent wrong bytes")), "{log}");
    let next = with_initramfs(&first, 2, vec![5; 8 << 20]).await?;
    // It is said a moment after it is there.
    until(&third, "the next one did not come", async || Ok(!came_from(&third, &next).is_empty())).await?;
    ensure!(came_from(&third, &next) == own, "it came from {}", came_from(&third, &next));
    Ok(())
}
