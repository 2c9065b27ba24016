//! Metrics and health of a real member.

use crate::collective::{invite, joined, knows, text, until, voters};
use crate::machine::Machine;
use crate::support::Member;
use anyhow::ensure;
use moor_api::node::Stage;
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// The samples of a scrape, by name with labels. Each family has its help and type before it; a histogram's samples have names of their own.
fn samples(text: &str) -> BTreeMap<String, String> {
    let (mut samples, mut family) = (BTreeMap::new(), ("", ""));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split_once(' ').unwrap();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let part = name.split('{').next().unwrap().strip_prefix(family.0);
            let is_of_it = match family.1 {
                "histogram" => matches!(part, Some("_bucket" | "_sum" | "_count")),
                _ => part == Some(""),
            };
            assert!(is_of_it, "{line} is of {family:?}");
            assert!(samples.insert(name.to_owned(), value.to_owned()).is_none(), "{line} twice");
        }
    }
    samples
}

/// The messages of a member's log that belong to a request.
fn messages(log: &str, id: &str) -> anyhow::Result<Vec<String>> {
    let lines = log.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>()?;
    let of_it = lines.into_iter().filter(|line| line["span"]["id"] == id);
    Ok(of_it.filter_map(|line| line["message"].as_str().map(str::to_owned)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_boot_is_followed_through_the_logs_of_members() -> anyhow::Result<()> {
    let mut first = Member::init()?;
    first.run_loud()?;
    let mut second = Member::prepare()?;
    let output = second.join(&invite(&first, "m2", false, 60).await?)?;
    ensure!(output.status.success(), "moord join: {}", text(&output.stderr));
    second.run_loud()?;
    first.publish().await?;
    let mut machine = Machine::new(&first).await?;
    first.define("n1", machine.uuid).await?;
    first.deploy("n1").await?;
    first.arm("n1", "once").await?;
    knows(&second, &["n1"]).await?;
    // The one that does not lead is asked, and asks the other.
    machine.asks(&second);
    machine.log_in(&mut machine.connect().await?, Stage::Boot).await?;
    let boot = machine.boot.to_string();
    let (asked, leads) = (messages(&second.log(), &boot)?, messages(&first.log(), &boot)?);
    for call in ["POST /node/v1/hello: 200", "POST /node/v1/enroll: 200", "POST /node/v1/session: 200"] {
        ensure!(asked.iter().any(|line| line.starts_with(call)), "{call} is not in {asked:?}");
    }
    for change in ["another member proposes: bind", "another member proposes: boot"] {
        ensure!(leads.iter().any(|line| line == change), "{change} is not in {leads:?}");
    }
    // Other requests are not among them, and what is no word is none of ours.
    machine.reboot()?;
    let other = messages(&first.log(), &machine.boot.to_string())?;
    ensure!(other.is_empty(), "{other:?}");
    let mut connection = machine.connect().await?;
    connection.set_request_id("a\"b c");
    machine.known(&mut connection).await?;
    ensure!(!second.log().contains("b c\""), "it went to the log as it came");
    ensure!(messages(&second.log(), "a\"b c")?.is_empty(), "it was believed");
    Ok(())
}

/// What a leader says five times a second, so that its followers know that it is there, is no request that stands in line with those of nodes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signs_of_life_are_no_requests() -> anyhow::Result<()> {
    const WINDOW: Duration = Duration::from_secs(3);
    let first = Member::start()?;
    let second = joined(&first, "m2", true).await?;
    voters(&first, 2).await?;
    for member in [&first, &second] {
        let look = async || {
            let now = samples(&member.admin().await?.metrics().await?);
            let requests: u64 = now["moord_requests_total{caller=\"member\",status=\"2xx\"}"].parse()?;
            Ok::<_, anyhow::Error>((requests, now["moord_majority"] == "1"))
        };
        // Other calls come and go, as those by which members tell each other who is alive: a few in a window.
        until(member, "members ask it all the time, or it hears of no majority", async || {
            let (before, _) = look().await?;
            tokio::time::sleep(WINDOW).await;
            let (after, hears) = look().await?;
            Ok(hears && after < before + 8)
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_member_says_how_it_is() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.define("n1", Uuid::new_v4()).await?;
    member.define("n2", Uuid::new_v4()).await?;
    let mut admin = member.admin().await?;
    let before = samples(&admin.metrics().await?);
    for (name, value) in [
        ("moord_leader", "1"),
        ("moord_majority", "1"),
        ("moord_members", "1"),
        ("moord_voters", "1"),
        ("moord_nodes", "2"),
        ("moord_nodes_enrolled", "0"),
    ] {
        assert_eq!(before.get(name).map(String::as_str), Some(value), "{name}: {before:?}");
    }
    // What was written last may not be applied yet.
    until(&member, "the log is not applied", async || {
        let now = samples(&member.admin().await?.metrics().await?);
        Ok(now["moord_log_last_index"] == now["moord_log_applied_index"])
    })
    .await?;
    let number = |samples: &BTreeMap<String, String>, name: &str| samples[name].parse::<u64>().unwrap();
    assert!(number(&before, "moord_state_free_bytes") > 0);
    assert_eq!(admin.nodes(None).await?.len(), 2);
    assert!(admin.nodes(Some("no-such")).await.is_err());
    let after = samples(&admin.metrics().await?);
    let grown = |name: &str| number(&after, name) - number(&before, name);
    assert_eq!(grown("moord_requests_total{caller=\"admin\",status=\"2xx\"}"), 1);
    assert_eq!(grown("moord_requests_total{caller=\"admin\",status=\"4xx\"}"), 1);
    let time = "moord_request_seconds_total{caller=\"admin\"}";
    assert!(after[time].parse::<f64>()? > before[time].parse::<f64>()?);
    for file in ["log.journal", "log.redb", "member.redb"] {
        let count = number(&after, &format!("moord_sync_seconds_count{{file=\"{file}\"}}"));
        assert!(count > 0, "{file} was synced when it was opened, or since");
        assert_eq!(number(&after, &format!("moord_sync_seconds_bucket{{file=\"{file}\",le=\"+Inf\"}}")), count);
        let seconds = |name: &str| after[&format!("moord_sync_{name}{{file=\"{file}\"}}")].parse::<f64>().unwrap();
        assert!(seconds("longest_seconds") > 0.0 && seconds("longest_seconds") <= seconds("seconds_sum"), "{file}");
    }
    Ok(())
}
