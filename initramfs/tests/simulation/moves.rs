//! Servers that fail one after the other, or all but one at once.

use super::sim::network::{Conduct, Server};
use super::sim::world::Sim;
use super::{FILES, HOUR, apart, open_with};
use moor_tether::reader::world::World as _;
use moor_tether::reader::{Reader, Settings, Standing};
use std::sync::Arc;
use std::time::Duration;

fn servers(sim: &Sim, count: usize) -> Vec<Arc<Server>> {
    let files = (&FILES.sample.file, &FILES.other);
    (0..count).map(|name| Server::new(sim, name, files, Duration::from_millis(5), 100_000_000)).collect()
}

#[test]
fn no_read_takes_a_second_while_three_of_four_servers_fall_silent_and_no_hedge_is_left() {
    for seed in 0..20 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let result = sim.run(HOUR, async move {
            let servers = servers(&world, 4);
            let reader = open_with(&world, &servers, Settings { cache: 600_000, ..Settings::default() }).await;
            for index in 0..40 {
                reader.read(apart(index), 100).await.unwrap();
            }
            // All are late at once: each of these reads would be hedged, and the account is not enough for them.
            let all_behave = |conduct| servers.iter().for_each(|server| server.behave(conduct));
            all_behave(Conduct::Late(40));
            let reads = (40..48).map(|index| {
                let (reader, (sender, receiver)) = (reader.clone(), tokio::sync::oneshot::channel());
                world.spawn(Box::pin(async move { _ = sender.send(reader.read(apart(index), 100).await) }));
                receiver
            });
            for read in reads.collect::<Vec<_>>() {
                read.await.unwrap().unwrap();
            }
            all_behave(Conduct::Good);
            let hedges = reader.figures().hedges;
            let current = current(&reader, &servers).await;
            for server in
                servers.iter().enumerate().filter(|(at, _)| *at != (current + 1) % 4).map(|(_, server)| server)
            {
                server.behave(Conduct::Silent);
            }
            let begun = world.now();
            reader.read(apart(60), 100).await.unwrap();
            (hedges, world.since(begun))
        });
        let (hedges, took) = result.unwrap();
        assert!(hedges >= 5, "only {hedges} hedges with seed {seed}");
        assert!(took < Duration::from_secs(1), "{took:?} with seed {seed}");
    }
}

/// Which server the next read goes to, most likely.
async fn current(reader: &Reader, servers: &[Arc<Server>]) -> usize {
    let before: Vec<_> = servers.iter().map(|server| server.requests().len()).collect();
    for index in 48..56 {
        reader.read(apart(index), 100).await.unwrap();
    }
    let more = |at: &usize| servers[*at].requests().len() - before[*at];
    (0..servers.len()).max_by_key(more).unwrap()
}

#[test]
fn a_server_whose_file_was_laid_anew_is_back_after_one_rest() {
    let sim = Sim::new(1);
    let world = sim.clone();
    let standing = sim.run(HOUR, async move {
        let servers = servers(&world, 2);
        let reader = open_with(&world, &servers, Settings { cache: 600_000, ..Settings::default() }).await;
        let busy = async |sim: Sim| {
            for index in 0..40 {
                reader.read(apart(index), 100).await.unwrap();
                sim.sleep(Duration::from_millis(20)).await;
            }
        };
        busy(world.clone()).await;
        servers[0].behave(Conduct::Refused);
        servers[1].behave(Conduct::Refused);
        world.sleep(Duration::from_millis(1)).await;
        servers[1].behave(Conduct::Good);
        // Either it is the one that is asked, or one in so many goes there.
        while reader.figures().members[0].state == Standing::Good {
            busy(world.clone()).await;
        }
        servers[0].behave(Conduct::Retags);
        // More than one rest of the first length, and less than that and one of the second.
        world.sleep(Duration::from_millis(700)).await;
        reader.figures().members[0].state
    });
    assert_eq!(standing, Some(Standing::Good));
}
