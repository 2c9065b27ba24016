//! Nodes boot while members die: three real members, machines that talk to them with the agent's and the tether's own code, and a member that is
//! killed over and over.

use anyhow::ensure;
use moor_api::ids::{BootId, NodeName};
use moor_lab::crowd::{boot_all, machines, publish, spread};
use moor_lab::{Bins, Collective};
use std::collections::{BTreeMap, BTreeSet};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A killed member is away for so long.
const AWAY: Duration = Duration::from_secs(2);
/// Each machine has booted within this time.
const LIMIT: Duration = Duration::from_mins(5);
/// What members were told has come to all of them within this time.
const DELIVERY: Duration = Duration::from_mins(1);
/// Chunks of the image that each machine reads.
const READS: u64 = 40;

/// So many machines boot twice, the second time with the identity of the first, each at a moment of its own within `within`; a member is killed every
/// so often, another one each time.
fn all_boot(count: usize, within: Duration, every: Duration) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-crowd-").tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bins = Bins::find()?;
    let (mut collective, mut crowd, site) = runtime.block_on(async {
        let collective = Collective::new(&bins, dir.path(), 3).await?;
        let mut admin = collective.admin(0).await?;
        let image = publish(&mut admin, 8 << 20).await?;
        let crowd = machines(&mut admin, dir.path(), "c", count, &BTreeMap::new()).await?;
        spread(&collective, &image).await?;
        let site = admin.site().await?.bundle;
        anyhow::Ok((collective, crowd, site))
    })?;
    let urls = collective.urls();
    let mut kills = 0;
    for round in ["the first boot", "the second boot"] {
        let began = Instant::now();
        let mut longest = std::thread::scope(|scope| {
            let booting = scope.spawn(|| boot_all(&mut crowd, &site, &urls, READS, (within, LIMIT)));
            let mut last = Instant::now();
            while !booting.is_finished() {
                sleep(Duration::from_millis(100));
                if last.elapsed() >= every {
                    last = Instant::now();
                    let at = kills % urls.len();
                    collective.kill(at);
                    sleep(AWAY);
                    collective.start(at)?;
                    kills += 1;
                }
            }
            booting.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the machines panicked")))
        })?;
        longest.sort_unstable();
        let (median, last) = (longest[count / 2], longest[count - 1]);
        println!(
            "{round} of {count}: all in {:.1?}, median {median:.1?}, longest {last:.1?}; {kills} kills so far",
            began.elapsed()
        );
        for machine in &mut crowd {
            machine.power_cycle()?;
        }
    }
    assert!(kills >= 3, "only {kills} kills: the machines were too quick");
    // What they said was kept: each is booted, twice. A member that heard no majority when it was told so delivers that later.
    runtime.block_on(async {
        let end = Instant::now() + DELIVERY;
        loop {
            let kept = booted(&collective).await?.len();
            if kept == 2 * count {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{kept} boots of {} that were reported are kept", 2 * count);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
}

/// The boots that ended well, as the leader knows them.
async fn booted(collective: &Collective) -> anyhow::Result<BTreeSet<(NodeName, Option<BootId>)>> {
    let leader = collective.leader().await?;
    let mut events = collective.admin(leader).await?.status(None, true, false).await?;
    let mut booted = BTreeSet::new();
    while let Some(event) = events.next().await? {
        if event.state == "booted" {
            booted.insert((event.node, event.boot));
        }
    }
    Ok(booted)
}

#[test]
fn every_node_boots_while_members_are_killed() -> anyhow::Result<()> {
    all_boot(24, Duration::from_secs(12), Duration::from_secs(4))
}

#[test]
#[ignore = "some minutes: make test-full"]
fn two_hundred_nodes_boot_while_a_member_is_killed_every_20_s() -> anyhow::Result<()> {
    all_boot(200, Duration::from_mins(1), Duration::from_secs(20))
}
