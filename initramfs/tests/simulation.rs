//! The reader on a simulated network: no wrong byte, no error and no hang, whatever servers do and when.
//!
//! `MOOR_SEED=N` repeats the schedules from seed N on, `MOOR_SCHEDULES=N` runs so many of each kind. Otherwise the first seed is taken
//! from the commit, so that every commit tries others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "simulation/crowd.rs"]
mod crowd;
#[path = "simulation/gather.rs"]
mod gather;
#[path = "simulation/guesses.rs"]
mod guesses;
#[path = "simulation/moves.rs"]
mod moves;
#[path = "simulation/outages.rs"]
mod outages;
#[path = "../../tests/seed.rs"]
mod seed;
mod sim;

use common::{Sample, noise, seal};
use moor_image::OpenOptions;
use moor_tether::reader::world::{Path, World as _};
use moor_tether::reader::{Figures, Reader, Settings, Standing};
use seed::{first_seed, number};
use sim::network::{Conduct, Server, Way};
use sim::schedule::{Files, Outcome, run};
use sim::world::Sim;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

/// Schedules of each kind.
const SCHEDULES: u64 = 250;
/// The same where there is time.
const MANY_SCHEDULES: u64 = 5000;
/// Hedges that are free at the start.
const FREE_HEDGES: u64 = 4;

static FILES: LazyLock<Arc<Files>> = LazyLock::new(|| {
    let sample = seal(noise(1_500_000, 1), 14);
    let other = seal(noise(1_500_000, 2), 14).file;
    Arc::new(Files { sample, other })
});

/// Runs schedules on all cores, and says which seeds failed, and how.
fn all(schedules: u64, is_guarded: bool, judge: impl Fn(&Outcome) -> Result<(), String> + Sync) {
    let (first, count) = (first_seed(), number("MOOR_SCHEDULES").unwrap_or(schedules));
    println!("schedules {first} to {}; MOOR_SEED={first} repeats them", first + count - 1);
    let (next, failed) = (Mutex::new(first..first + count), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                loop {
                    let Some(seed) = next.lock().unwrap().next() else { return };
                    let result = run(&FILES, seed, is_guarded).and_then(|outcome| judge(&outcome));
                    if let Err(why) = result {
                        failed.lock().unwrap().push(format!("MOOR_SEED={seed} MOOR_SCHEDULES=1: {why}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let (some, more) = failed.split_at(failed.len().min(10));
    assert!(some.is_empty(), "{}\nand {} more", some.join("\n"), more.len());
}

fn hedges_are_few(outcome: &Outcome) -> Result<(), String> {
    let requests: u64 = outcome.figures.members.iter().map(|member| member.requests).sum();
    let allowed = FREE_HEDGES + requests / 20;
    if outcome.figures.hedges > allowed {
        return Err(format!("{} hedges in {requests} requests", outcome.figures.hedges));
    }
    Ok(())
}

fn servers_do_anything(schedules: u64) {
    all(schedules, false, |outcome| {
        hedges_are_few(outcome)?;
        // Once they have been good for a while, all are taken back, but those that lied twice.
        let is_back = |standing| matches!(standing, Standing::Good | Standing::Excluded);
        if outcome.standings.iter().any(|standing| !is_back(*standing)) {
            return Err(format!("all are good again, and the reader takes them for {:?}", outcome.standings));
        }
        Ok(())
    });
}

fn one_server_stays_good(schedules: u64) {
    all(schedules, true, |outcome| {
        hedges_are_few(outcome)?;
        if outcome.longest >= Duration::from_secs(1) {
            return Err(format!("a read took {:?}", outcome.longest));
        }
        Ok(())
    });
}

#[test]
fn any_server_may_do_anything() {
    servers_do_anything(SCHEDULES);
}

#[test]
fn while_one_server_is_good_no_read_takes_a_second() {
    one_server_stays_good(SCHEDULES);
}

#[test]
#[ignore = "minutes: make test-full"]
fn any_server_may_do_anything_in_thousands_of_schedules() {
    servers_do_anything(MANY_SCHEDULES);
}

#[test]
#[ignore = "minutes: make test-full"]
fn while_one_server_is_good_no_read_takes_a_second_in_thousands_of_schedules() {
    one_server_stays_good(MANY_SCHEDULES);
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let runs = [0, 0, 1].map(|more| run(&FILES, first_seed() + more, false).unwrap());
    assert_eq!(runs[0].requests, runs[1].requests);
    assert_eq!((runs[0].longest, &runs[0].figures), (runs[1].longest, &runs[1].figures));
    assert_ne!(runs[0].requests, runs[2].requests);
}

/// Two servers, each so many milliseconds away, with so many bytes per second.
fn two_of(sim: &Sim, ways: [(u64, u64); 2]) -> [Arc<Server>; 2] {
    let server = |name: usize| {
        let (delay, bandwidth) = ways[name];
        Server::new(sim, name, (&FILES.sample.file, &FILES.other), Duration::from_millis(delay), bandwidth)
    };
    [0, 1].map(server)
}

/// Two servers, 5 ms away each.
fn two(sim: &Sim) -> [Arc<Server>; 2] {
    two_of(sim, [(5, 100_000_000); 2])
}

/// The same, and a reader of both with a small cache.
async fn pair(sim: &Sim, prefetch: Vec<u64>) -> ([Arc<Server>; 2], Reader) {
    let servers = two(sim);
    let reader = open(sim, &servers, prefetch).await;
    (servers, reader)
}

async fn open(sim: &Sim, servers: &[Arc<Server>; 2], prefetch: Vec<u64>) -> Reader {
    open_with(sim, servers, Settings { cache: 600_000, prefetch, ..Settings::default() }).await
}

async fn open_with(sim: &Sim, servers: &[Arc<Server>], settings: Settings) -> Reader {
    open_sample(sim, servers, &FILES.sample, settings).await
}

async fn open_sample(sim: &Sim, servers: &[Arc<Server>], sample: &Sample, settings: Settings) -> Reader {
    let paths = servers.iter().map(|server| Box::new(Way(server.clone())) as Box<dyn Path>).collect();
    let options = OpenOptions { key: Some(sample.key.clone()), ..OpenOptions::default() };
    Reader::open(paths, Arc::new(sim.clone()), &options, settings).await.unwrap()
}

const HOUR: Duration = Duration::from_hours(1);

#[test]
fn a_member_that_is_dead_or_lies_from_the_beginning_does_not_keep_from_opening() {
    let conducts = [
        Conduct::Refused,
        Conduct::Blackholed,
        Conduct::Silent,
        Conduct::Stalls(100),
        Conduct::Slow,
        Conduct::Late(5000),
        Conduct::Corrupt,
        Conduct::OtherImage,
        Conduct::NoRanges,
        Conduct::Expired,
        Conduct::Status(503),
    ];
    for (seed, conduct) in (0..).zip(conducts) {
        for bad in 0..2 {
            let sim = Sim::new(seed);
            let world = sim.clone();
            let took = sim.run(HOUR, async move {
                let servers = two(&world);
                servers[bad].behave(conduct);
                open(&world, &servers, Vec::new()).await;
                world.now()
            });
            // Five ways over the network, twice where the bad one comes first.
            assert!(took.unwrap() < Duration::from_millis(200), "{conduct:?} of {bad}: {took:?}");
        }
    }
}

#[test]
fn the_first_read_of_all_is_taken_over_from_a_member_that_does_not_answer_it() {
    for (seed, conduct) in
        (0..).zip([Conduct::Silent, Conduct::Blackholed, Conduct::Stalls(0), Conduct::Slow, Conduct::Refused])
    {
        for bad in 0..2 {
            let sim = Sim::new(seed);
            let world = sim.clone();
            let took = sim.run(HOUR, async move {
                let (servers, reader) = pair(&world, Vec::new()).await;
                servers[bad].behave(conduct);
                let begun = world.now();
                reader.read(700_000, 4096).await.unwrap();
                world.since(begun)
            });
            assert!(took.unwrap() < Duration::from_millis(500), "{conduct:?} of {bad}: {took:?}");
        }
    }
}

#[test]
fn while_all_are_slow_hardly_a_request_is_sent_twice() {
    let sim = Sim::new(1);
    let world = sim.clone();
    let figures = sim.run(HOUR, async move {
        let (servers, reader) = pair(&world, Vec::new()).await;
        for index in 0..40 {
            reader.read(index * 30_000, 100).await.unwrap();
        }
        for server in &servers {
            server.behave(Conduct::Late(700));
        }
        let before = reader.figures();
        for round in 0..40_u64 {
            let reads = (0..8).map(|program| {
                let (reader, at) = (reader.clone(), (round * 8 + program) * 76_543 % 1_400_000);
                let (sender, receiver) = tokio::sync::oneshot::channel();
                world.spawn(Box::pin(async move { _ = sender.send(reader.read(at, 100).await.is_ok()) }));
                receiver
            });
            for read in reads.collect::<Vec<_>>() {
                assert!(read.await.unwrap());
            }
        }
        (before, reader.figures())
    });
    let (before, after) = figures.unwrap();
    let requests = |figures: &Figures| figures.members.iter().map(|member| member.requests).sum::<u64>();
    let (hedges, asked) = (after.hedges - before.hedges, requests(&after) - requests(&before));
    assert!(hedges <= FREE_HEDGES + asked / 50 && asked > 150, "{hedges} hedges in {asked} requests");
}

/// Places in different chunks, of which no two in a row are near each other: neither the cache nor read-ahead has a part in such reads.
fn apart(index: u64) -> u64 {
    (index * 37 % 91) << 14
}

#[test]
fn a_read_that_its_server_keeps_waiting_is_answered_by_the_other() {
    let mut won = 0;
    for seed in 0..10 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let result = sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            for index in 0..40 {
                reader.read(apart(index), 100).await.unwrap();
            }
            let [one, other] = servers.each_ref().map(|server| server.requests().len());
            servers[usize::from(other > one)].behave(Conduct::Late(150));
            let begun = world.now();
            reader.read(apart(40), 100).await.unwrap();
            (world.since(begun), reader.figures().hedges_won)
        });
        let (took, hedges_won) = result.unwrap();
        assert!(took < Duration::from_millis(100), "{took:?} with seed {seed}");
        won += hedges_won;
    }
    // One request in 32 goes to the other server anyway.
    assert!(won >= 8, "{won} of 10");
}

#[test]
fn a_server_that_was_slow_before_keeps_a_read_no_longer_than_one_that_was_not() {
    for (seed, bad) in (0..10).zip([0, 1].into_iter().cycle()) {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let took = sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            // Half of the times that are remembered are of almost a second, and the latest are not.
            for (conduct, count) in [(Conduct::Late(980), 60), (Conduct::Good, 60)] {
                for server in &servers {
                    server.behave(conduct);
                }
                world.sleep(Duration::from_mins(1)).await;
                for index in 0..count {
                    reader.read(apart(index), 100).await.unwrap();
                }
            }
            servers[bad].behave(Conduct::Silent);
            let mut longest = Duration::ZERO;
            for index in 60..64 {
                let begun = world.now();
                reader.read(apart(index), 100).await.unwrap();
                longest = longest.max(world.since(begun));
            }
            longest
        });
        assert!(took.unwrap() < Duration::from_millis(600), "{took:?} with seed {seed}");
    }
}

/// How many requests two servers got while so many programs made 300 reads together, of one run after the other.
fn shares(ways: [(u64, u64); 2], programs: u64) -> Vec<[u64; 2]> {
    let run = |seed: u64| {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let servers = sim.run(HOUR, async move {
            let servers = two_of(&world, ways);
            let reader = open(&world, &servers, Vec::new()).await;
            let programs = (0..programs).map(|program| {
                let (reader, (sender, receiver)) = (reader.clone(), tokio::sync::oneshot::channel());
                world.spawn(Box::pin(async move {
                    for index in (program..300).step_by(usize::try_from(programs).unwrap()) {
                        reader.read(apart(index), 100).await.unwrap();
                    }
                    _ = sender.send(());
                }));
                receiver
            });
            for program in programs.collect::<Vec<_>>() {
                program.await.unwrap();
            }
            servers
        });
        servers.unwrap().map(|server| server.requests().len() as u64)
    };
    (0..10).map(run).collect()
}

#[test]
fn the_nearer_server_is_asked() {
    let shares = shares([(15, 100_000_000), (1, 100_000_000)], 1);
    let [far, near] = [0, 1].map(|server| shares.iter().map(|share| share[server]).sum::<u64>());
    assert!(near > 4 * far, "of the requests of each run {shares:?} went to the far and the near server");
}

#[test]
fn two_servers_on_slow_lines_share_what_many_programs_read() {
    for [one, other] in shares([(5, 1_000_000); 2], 8) {
        let few = (one + other) / 5;
        assert!(one > few && other > few, "{one} and {other}");
    }
}

#[test]
fn a_server_with_another_image_is_excluded_and_told_of_and_nothing_of_it_is_read() {
    let sim = Sim::new(2);
    let world = sim.clone();
    let members = sim.run(HOUR, async move {
        let (servers, reader) = pair(&world, Vec::new()).await;
        servers[0].behave(Conduct::OtherImage);
        for index in 0..600_u64 {
            let at = index * 77_777 % 1_400_000;
            let start = usize::try_from(at).unwrap();
            assert!(reader.read(at, 100).await.unwrap() == FILES.sample.plaintext[start..start + 100]);
            world.sleep(Duration::from_millis(100)).await;
        }
        reader.figures().members
    });
    let members = members.unwrap();
    assert_eq!((members[0].state, members[1].state), (Standing::Excluded, Standing::Good));
    assert!(members[0].last_fault.as_ref().unwrap().contains("is damaged"), "{members:?}");
}

#[test]
fn a_server_that_was_excluded_and_mended_is_asked_when_no_other_answers() {
    let sim = Sim::new(11);
    let world = sim.clone();
    let took = sim.run(HOUR, async move {
        let (servers, reader) = pair(&world, Vec::new()).await;
        let standing = || reader.figures().members[0].state;
        servers[0].behave(Conduct::Corrupt);
        let mut index = 0;
        while standing() != Standing::Excluded {
            reader.read(apart(index), 100).await.unwrap();
            world.sleep(Duration::from_millis(100)).await;
            index += 1;
        }
        servers[0].behave(Conduct::Good);
        world.sleep(Duration::from_mins(5)).await;
        assert_eq!(standing(), Standing::Excluded, "it was asked although another answers");
        servers[1].behave(Conduct::Refused);
        let begun = world.now();
        let bytes = reader.read(700_000, 4096).await.unwrap();
        assert!(bytes == FILES.sample.plaintext[700_000..704_096]);
        world.since(begun)
    });
    // The longest rest, which it was in.
    assert!(took.expect("the root stands still") < Duration::from_secs(40), "{took:?}");
}
