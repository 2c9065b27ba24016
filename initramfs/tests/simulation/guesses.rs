//! What is fetched before anybody asks for it, and what is kept of it.

use super::common::{noise, seal};
use super::sim::network::Server;
use super::sim::world::Sim;
use super::{HOUR, open_sample, open_with, pair, two};
use moor_tether::reader::world::World as _;
use moor_tether::reader::{AT_REST_AFTER, Reader, Settings, Trace};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn while_memory_is_short_nothing_is_fetched_on_a_guess() {
    let sim = Sim::new(6);
    let world = sim.clone();
    let counts = sim.run(HOUR, async move {
        let (_servers, reader) = pair(&world, Vec::new()).await;
        let mut counts = Vec::new();
        // In a row, each time in another part of the image.
        for (is_short, from) in [(true, 0), (false, 30), (true, 60)] {
            reader.save_memory(is_short);
            let before = reader.figures().chunks_fetched;
            for chunk in from..from + 16 {
                reader.read(chunk << 14, 100).await.unwrap();
            }
            // The member that was not asked yet is looked at a second after the start.
            world.sleep(Duration::from_millis(50)).await;
            counts.push(reader.figures().chunks_fetched - before);
        }
        counts
    });
    let counts = counts.unwrap();
    assert_eq!((counts[0], counts[2]), (16, 16), "{counts:?}");
    assert!(counts[1] > 16, "read-ahead has no part in this: {counts:?}");
}

#[test]
fn a_reader_at_rest_keeps_little_and_the_next_read_takes_it_again() {
    let sim = Sim::new(8);
    let world = sim.clone();
    let seen = sim.run(HOUR, async move {
        let reader = open_with(&world, &two(&world), Settings { cache: 1_400_000, ..Settings::default() }).await;
        let cache = |reader: &Reader| (reader.figures().cache_bytes, reader.figures().cache_limit);
        for chunk in 0..90 {
            reader.read(chunk << 14, 100).await.unwrap();
            reader.rest();
        }
        let busy = cache(&reader);
        world.sleep(AT_REST_AFTER).await;
        reader.rest();
        let at_rest = cache(&reader);
        reader.read(0, 100).await.unwrap();
        let again = cache(&reader);
        // Memory is short and stays so, whoever reads.
        reader.save_memory(true);
        world.sleep(AT_REST_AFTER).await;
        reader.rest();
        reader.read(0, 100).await.unwrap();
        (busy, at_rest, again, cache(&reader))
    });
    let (busy, at_rest, again, short) = seen.unwrap();
    assert!(busy.0 > at_rest.1 && busy.1 > at_rest.1, "{busy:?}, {at_rest:?}");
    assert!(at_rest.0 <= at_rest.1);
    assert_eq!(again.1, busy.1);
    assert_eq!(short.1, at_rest.1);
}

#[test]
fn what_earlier_boots_read_is_there_before_it_is_asked_for() {
    // No two are neighbours: read-ahead has no part in this.
    let list: Vec<u64> = (0..40).map(|index| index * 17 % 45 * 2).collect();
    let time = |prefetch: Vec<u64>, list: Vec<u64>| {
        let sim = Sim::new(3);
        let world = sim.clone();
        let result = sim.run(HOUR, async move {
            let (_servers, reader) = pair(&world, prefetch).await;
            let begun = world.now();
            for chunk in list {
                reader.read(chunk << 14, 4096).await.unwrap();
                // What a program does between reads.
                world.sleep(Duration::from_millis(3)).await;
            }
            (world.since(begun), reader.figures().chunks_fetched)
        });
        result.unwrap()
    };
    let (cold, cold_chunks) = time(Vec::new(), list.clone());
    let (warm, warm_chunks) = time(list.clone(), list.clone());
    assert!(warm * 3 < cold * 2, "{warm:?} with, {cold:?} without");
    assert!(warm_chunks <= cold_chunks + 2, "{warm_chunks} with, {cold_chunks} without");
    // A list of other chunks costs what fits into half of the cache, and no more.
    let (_, wrong_chunks) = time((50..90).collect(), (0..20).map(|index| index * 2).collect());
    assert!(wrong_chunks <= 20 + 600_000 / 2 / (1 << 14) + 16, "{wrong_chunks}");
}

/// Reads chunks one after the other, with a little time between; how many chunks were fetched then.
fn fetched(cache: u64, prefetch: Vec<u64>, reads: Vec<u64>) -> u64 {
    let sim = Sim::new(9);
    let world = sim.clone();
    let fetched = sim.run(HOUR, async move {
        let reader = open_with(&world, &two(&world), Settings { cache, prefetch, ..Settings::default() }).await;
        for chunk in reads {
            reader.read(chunk << 14, 4096).await.unwrap();
            world.sleep(Duration::from_millis(20)).await;
        }
        reader.figures().chunks_fetched
    });
    fetched.unwrap()
}

#[test]
fn what_is_prefetched_is_fetched_once_whatever_else_a_boot_reads_meanwhile() {
    // No two are neighbours, so that nothing but the list is a guess. The cache holds twelve chunks.
    let listed: Vec<u64> = (0..23).map(|index| index * 5 % 23 * 4).collect();
    let reads: Vec<u64> = listed.iter().flat_map(|chunk| [*chunk, chunk + 2]).filter(|chunk| *chunk < 91).collect();
    let (with, without) = (fetched(200_000, listed, reads.clone()), fetched(200_000, Vec::new(), reads));
    assert!(with <= without + 1, "{with} with, {without} without");
}

#[test]
fn where_earlier_boots_stopped_nothing_is_guessed() {
    let runs: Vec<u64> = [0_u64, 20, 40, 60].into_iter().flat_map(|first| first..first + 6).collect();
    let (with, without) =
        (fetched(1_400_000, runs.clone(), runs.clone()), fetched(1_400_000, Vec::new(), runs.clone()));
    assert_eq!(with, runs.len() as u64);
    assert!(without > with, "read-ahead has no part in this: {without}");
    // A reader that goes on all the same is followed again.
    let on: Vec<u64> = runs.iter().copied().chain(66..82).collect();
    let beyond = fetched(1_400_000, runs, on.clone());
    assert!(beyond > on.len() as u64, "{beyond} of {}", on.len());
}

/// A boot of Debian 12 that was recorded in a VM, at its own pace, in an image of smaller chunks and with a cache of as many: with the list that it
/// makes it fetched 54 MB, and 34 MB without.
#[test]
fn a_recorded_boot_fetches_less_with_its_list_than_without() {
    let recorded = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/lab/traces/debian-12.json");
    let trace: Trace = serde_json::from_slice(&std::fs::read(recorded).unwrap()).unwrap();
    let list: Vec<u64> = trace.reads.iter().map(|(chunk, _)| *chunk).collect();
    let chunks = usize::try_from(list.iter().max().unwrap() + 1).unwrap();
    let sample = Arc::new(seal(noise(chunks << 14, 3), 14));
    let fetched = |prefetch: Vec<u64>| {
        let (sim, sample, reads) = (Sim::new(10), sample.clone(), trace.reads.clone());
        let world = sim.clone();
        let fetched = sim.run(HOUR, async move {
            let file = (&sample.file, &sample.file);
            let servers = [0, 1].map(|name| Server::new(&world, name, file, Duration::from_millis(1), 100_000_000));
            let reader =
                open_sample(&world, &servers, &sample, Settings { cache: 128 << 14, prefetch, ..Settings::default() });
            let reader = reader.await;
            for (chunk, at) in reads {
                world.sleep(Duration::from_millis(at.into()).saturating_sub(world.now())).await;
                reader.read(chunk << 14, 4096).await.unwrap();
                // As the tether does once a second.
                reader.rest();
            }
            reader.figures().chunks_fetched
        });
        fetched.unwrap()
    };
    let (with, without) = (fetched(list.clone()), fetched(Vec::new()));
    println!("{with} chunks with a list, {without} without, of {} that are read", list.len());
    assert!(with < without && with <= list.len() as u64 * 11 / 10, "{with} with, {without} without");
}

#[test]
fn guesses_over_gaps_leave_connections_for_what_is_wanted() {
    let sim = Sim::new(12);
    let world = sim.clone();
    let most = sim.run(HOUR, async move {
        let reader = open_with(&world, &two(&world), Settings { cache: 1_400_000, ..Settings::default() }).await;
        // Every other chunk of a part is there, so that what is fetched ahead there comes in pieces.
        for index in 0..17 {
            reader.read((56 + index * 7 % 17 * 2) << 14, 100).await.unwrap();
        }
        let requests = |reader: &Reader| reader.figures().members.iter().map(|member| member.requests).sum::<u64>();
        let mut most = 0;
        for chunk in 0..80_u64 {
            let (before, begun) = (requests(&reader), world.now());
            reader.read(chunk << 14, 100).await.unwrap();
            if world.since(begun).is_zero() {
                // It was there: what it made begin has begun in this instant, and nothing has ended.
                world.sleep(Duration::from_micros(1)).await;
                most = most.max(requests(&reader) - before);
            }
            world.sleep(Duration::from_millis(50)).await;
        }
        most
    });
    // Of the eight connections to a server two are left.
    assert!((2..=6).contains(&most.unwrap()), "{most:?} at one time");
}
