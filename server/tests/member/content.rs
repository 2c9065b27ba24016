//! Content among members: who has what, when nodes are offered an image, and a blob that came in part.

use crate::cli::{moor, shown};
use crate::collective::{blobs, invite, text, until, view, voters};
use crate::support::{Machine, Member, UID, import, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::CreateProfile;
use moor_api::node::Stage;
use moor_image::Dek;
use std::os::unix::fs::chown;
use std::time::Instant;

/// A further member, with more in its configuration; not started.
async fn invited(host: &Member, name: &str, more: &str) -> anyhow::Result<Member> {
    let member = Member::prepare()?;
    member.configure(more)?;
    let output = member.join(&invite(host, name, true, 60).await?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    Ok(member)
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
