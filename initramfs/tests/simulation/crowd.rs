//! A server that takes no further connection (it is at its limit, or a gateway before it is) while it answers on those that there are: it is no server that
//! has failed. What it refuses is done without, and tried again later.

use super::sim::network::{Conduct, Server};
use super::sim::world::Sim;
use super::{FILES, HOUR, apart, open_with, two};
use moor_tether::reader::world::World as _;
use moor_tether::reader::{Reader, Settings, Standing};
use std::sync::Arc;
use std::time::Duration;

/// So many programs read at one time, each in another place and so each with a request of its own. Returns how long the longest read took.
async fn burst(sim: &Sim, reader: &Reader, places: std::ops::Range<u64>) -> Duration {
    let begun = sim.now();
    let reads = places.map(|index| {
        let (reader, (sender, receiver)) = (reader.clone(), tokio::sync::oneshot::channel());
        sim.spawn(Box::pin(async move { _ = sender.send((index, reader.read(apart(index), 5000).await)) }));
        receiver
    });
    for read in reads.collect::<Vec<_>>() {
        let (index, bytes) = read.await.unwrap();
        let start = usize::try_from(apart(index)).unwrap();
        assert!(bytes.unwrap() == FILES.sample.plaintext[start..start + 5000], "wrong bytes at {start}");
    }
    sim.since(begun)
}

/// A reader of these servers that knows them, and keeps nothing that it has read.
async fn reader_of(sim: &Sim, servers: &[Arc<Server>]) -> Reader {
    let reader = open_with(sim, servers, Settings { cache: 1, ..Settings::default() }).await;
    for index in 0..40 {
        reader.read(apart(index), 100).await.unwrap();
    }
    reader
}

#[test]
fn a_server_that_takes_no_further_connection_goes_on_with_those_that_there_are() {
    for seed in 0..20 {
        for most in 1..4 {
            let sim = Sim::new(seed);
            let world = sim.clone();
            let result = sim.run(HOUR, async move {
                let server = two(&world)[0].clone();
                let reader = reader_of(&world, std::slice::from_ref(&server)).await;
                server.behave(Conduct::Crowded(most));
                let took = burst(&world, &reader, 40..48).await;
                let member = reader.figures().members.remove(0);
                (took, member)
            });
            let (took, member) = result.unwrap_or_else(|| panic!("it hangs, {seed} {most}"));
            // Eight answers one after the other, of 10 ms each, and a try of a connection or two.
            assert!(took < Duration::from_millis(150), "{took:?}, {seed} {most}");
            assert_eq!((member.state, member.faults), (Standing::Good, 0), "{member:?}, {seed} {most}");
        }
    }
}

#[test]
fn what_was_refused_is_tried_again_later_and_not_all_the_time() {
    let sim = Sim::new(3);
    let world = sim.clone();
    let result = sim.run(HOUR, async move {
        let server = two(&world)[0].clone();
        let reader = reader_of(&world, std::slice::from_ref(&server)).await;
        server.behave(Conduct::Crowded(1));
        let refused = server.refused();
        for _ in 0..60 {
            burst(&world, &reader, 40..48).await;
            world.sleep(Duration::from_secs(1)).await;
        }
        let refused = server.refused() - refused;
        server.behave(Conduct::Good);
        world.sleep(Duration::from_secs(40)).await;
        server.most_open();
        burst(&world, &reader, 40..48).await;
        (refused, server.most_open(), reader.figures().members.remove(0))
    });
    let (refused, most_open, member) = result.unwrap();
    // Seven at first, and then one each five seconds.
    assert!((8..30).contains(&refused), "{refused}");
    assert_eq!((most_open, member.state, member.faults), (8, Standing::Good, 0), "{member:?}");
}

/// As a gateway does that has lost its server: who comes is sent away, and nothing comes to who is there.
#[test]
fn a_server_that_takes_no_connection_and_delivers_on_none_is_dead() {
    for seed in 0..20 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let result = sim.run(HOUR, async move {
            let servers = two(&world);
            let reader = reader_of(&world, &servers).await;
            let [one, other] = servers.each_ref().map(|server| server.requests().len());
            servers[usize::from(other > one)].behave(Conduct::Starves);
            let took = burst(&world, &reader, 40..48).await;
            let again = burst(&world, &reader, 48..56).await;
            let standings: Vec<_> = reader.figures().members.iter().map(|member| member.state).collect();
            for server in &servers {
                server.behave(Conduct::Good);
            }
            world.sleep(Duration::from_secs(40)).await;
            let back: Vec<_> = reader.figures().members.iter().map(|member| member.state).collect();
            (took, again, standings, back)
        });
        let (took, again, standings, back) = result.unwrap_or_else(|| panic!("it hangs, {seed}"));
        assert!(took < Duration::from_secs(1) && again < Duration::from_millis(100), "{took:?} {again:?}, {seed}");
        assert!(standings.iter().any(|standing| *standing != Standing::Good), "{standings:?}, {seed}");
        assert_eq!(back, [Standing::Good; 2], "{seed}");
    }
}

#[test]
fn the_only_server_that_takes_no_connection_and_delivers_on_none_is_told_of_and_comes_back() {
    for seed in 0..20 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let result = sim.run(HOUR, async move {
            let server = two(&world)[0].clone();
            let reader = reader_of(&world, std::slice::from_ref(&server)).await;
            server.behave(Conduct::Starves);
            let (gone, back) = (world.clone(), server.clone());
            world.spawn(Box::pin(async move {
                gone.sleep(Duration::from_secs(3)).await;
                back.behave(Conduct::Good);
            }));
            let found = (world.clone(), reader.clone());
            let (sender, receiver) = tokio::sync::oneshot::channel();
            world.spawn(Box::pin(async move {
                found.0.sleep(Duration::from_millis(2100)).await;
                _ = sender.send(found.1.figures().members[0].state);
            }));
            (burst(&world, &reader, 40..48).await, receiver.await.unwrap())
        });
        let (took, state) = result.unwrap_or_else(|| panic!("it hangs, {seed}"));
        // Two seconds without a byte are the limit of every server.
        assert_eq!(state, Standing::BackingOff, "{seed}");
        assert!(took < Duration::from_secs(6), "{took:?}, {seed}");
    }
}
