//! Files of a member's store that are not what they were: it does not start, and says what to do.

use crate::cli::{moor, shown};
use crate::collective::{define, knows, text, three, view, voters};
use crate::support::{Member, UID};
use anyhow::{Context as _, ensure};
use moord::collective::identity::Identity;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::{Duration, Instant};

/// What is in the records of the node, as the files have it.
const NOTE: &str = "a note that is looked for";
/// What `late.redb` holds from the first second on.
const MARK: &str = "confirmed";

fn has(bytes: &[u8], wanted: &str) -> bool {
    bytes.windows(wanted.len()).any(|part| part == wanted.as_bytes())
}

/// The same bytes with one bit of each place that holds `wanted` changed.
fn changed(bytes: &[u8], wanted: &str) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for at in 0..bytes.len() {
        if bytes[at..].starts_with(wanted.as_bytes()) {
            out[at] ^= 1;
        }
    }
    out
}

/// Puts a file there as the member wrote it.
fn put(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes)?;
    Ok(chown(path, Some(UID), Some(UID))?)
}

/// A member that was stopped in good order, with the node and the mark in its files.
async fn stopped() -> anyhow::Result<Member> {
    let mut member = Member::start()?;
    let attributes = [("info.note".to_owned(), NOTE.to_owned())].into();
    let request = moor_api::admin::DefineNodes { range: "n1".into(), attributes };
    ensure!(member.admin().await?.define(&request).await?.refused.is_empty(), "it is not defined");
    let end = Instant::now() + Duration::from_secs(20);
    while !has(&std::fs::read(member.path("state/store/late.redb"))?, MARK) {
        ensure!(Instant::now() < end, "no mark");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Twice, so that what is looked for was not written by the last change: a database goes back by one where that is torn.
    ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    member.run()?;
    ensure!(member.terminate()?, "it does not stop:\n{}", member.log());
    Ok(member)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_does_not_start_on_a_file_that_is_gone_cut_or_changed_and_says_what_to_do() -> anyhow::Result<()> {
    let mut member = stopped().await?;
    let name = Identity::read(&member.path("state/store/member.json"))?.name;
    let advice = format!("`moor collective replace {name} {name}`");
    for (file, needle) in [("log.redb", NOTE), ("log.journal", "moorjrn1"), ("member.redb", NOTE), ("late.redb", MARK)]
    {
        let path = member.path("state/store").join(file);
        let whole = std::fs::read(&path)?;
        ensure!(has(&whole, needle), "{file} does not hold what is changed in it");
        // A journal has two headers: a bit of the older one is nothing's.
        let count = if file == "log.journal" { 4 } else { 5 };
        let damages: [(&str, Option<Vec<u8>>); 5] = [
            ("gone", None),
            ("empty", Some(Vec::new())),
            ("cut", Some(whole[..10_000].to_vec())),
            ("something else", Some(vec![b'x'; whole.len()])),
            ("one bit changed", Some(changed(&whole, needle))),
        ];
        for (what, bytes) in damages.into_iter().take(count) {
            match &bytes {
                Some(bytes) => put(&path, bytes)?,
                None => std::fs::remove_file(&path)?,
            }
            let (status, out, err) = shown(&member.run_to_its_end()?);
            let line = err.lines().last().unwrap_or_default();
            ensure!(status == Some(1) && out.is_empty(), "{file} {what}: {status:?} {out}{err}");
            let damaged = format!("'{}' is damaged", path.display());
            let says = [damaged.as_str(), &advice, "`moor collective join --set-aside`"];
            ensure!(says.iter().all(|word| line.contains(*word)), "{file} {what}: {err}");
            // It begins nothing anew.
            ensure!(path.exists() == bytes.is_some(), "{file} {what}: it was made");
            put(&path, &whole)?;
        }
    }
    member.run()?;
    knows(&member, &["n1"]).await
}

/// Who has lost his log is let in anew by what the refusal says, and forgets no vote: he is another member.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_is_gone_is_replaced_as_it_is_told() -> anyhow::Result<()> {
    let [first, second, mut third] = three().await?;
    define(&first, "a").await?;
    third.kill();
    std::fs::remove_file(third.path("state/store/log.redb"))?;
    let error = text(&third.run_to_its_end()?.stderr);
    ensure!(error.contains("`moor collective replace m3 m3`"), "{error}");
    let file = first.path("invitation");
    let out = file.to_str().context("a path")?;
    let (status, said, err) = shown(&moor(&first, &["collective", "replace", "m3", "m3", "--out", out])?.output()?);
    ensure!(status == Some(0), "{said}{err}");
    let invitation = std::fs::read_to_string(&file)?;
    let output = third.join(&invitation)?;
    ensure!(text(&output.stderr).contains("`--set-aside` does"), "{}", text(&output.stderr));
    let output = third.join_by(&invitation, &["--set-aside"])?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    third.run()?;
    knows(&third, &["a"]).await?;
    let end = Instant::now() + Duration::from_secs(40);
    while view(&first).await?.members.iter().any(|member| member.number == 3) {
        ensure!(Instant::now() < end, "the old one stays:\n{}", first.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    voters(&second, 3).await?;
    Ok(())
}
