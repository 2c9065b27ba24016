//! The reader against real HTTPS servers: what it returns is the plaintext, whatever a server does, or it waits.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::authority::Authority;
use common::server::{Conduct, Server};
use common::{LINEAGE, Sample, noise, seal};
use moor_image::OpenOptions;
use moor_tether::reader::{Address, DEFAULT_CACHE, Https, OpenError, Reader, Real, Settings, Standing};
use moor_tether::tls::Trust;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const LIMIT: Duration = Duration::from_mins(1);
/// Until a fault is found that harms nobody. A server that is overtaken counts as slow after the third time in a row, and one that was
/// found slower is asked again after half a minute.
const FOUND: Duration = Duration::from_mins(3);

struct Site {
    runtime: Runtime,
    authority: Authority,
    tls: Arc<ClientConfig>,
    sample: Sample,
}

impl Site {
    fn new(length: usize, chunk_log2: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, authority.pem()).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let tls = Trust::authority(&ca).unwrap().config().clone();
        Self { runtime, authority, tls, sample: seal(noise(length, 1), chunk_log2) }
    }

    fn server(&self) -> Server {
        Server::new(&self.sample.file, &self.authority.identity())
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            key: Some(self.sample.key.clone()),
            pinned: Some(self.sample.sealed.digest),
            lineage: Some(LINEAGE),
            minimum_serial: Some(3),
            ..OpenOptions::default()
        }
    }

    fn try_open(&self, servers: &[&Server], options: &OpenOptions, cache: u64) -> Result<Reader, OpenError> {
        let addresses = servers.iter().map(|server| Address::resolve(&server.url()).unwrap()).collect();
        let world = Arc::new(Real::new(self.runtime.handle().clone()));
        let settings = Settings { cache, ..Settings::default() };
        self.runtime.block_on(Reader::open(Https::all(addresses, &self.tls), world, options, settings))
    }

    fn open(&self, servers: &[&Server]) -> Reader {
        self.try_open(servers, &self.options(), DEFAULT_CACHE).unwrap()
    }

    /// Reads everything in requests of `step` bytes and compares.
    fn check_all(&self, reader: &Reader, step: usize) {
        for (offset, expected) in (0..).step_by(step).zip(self.sample.plaintext.chunks(step)) {
            let got = self.read(reader, offset, step);
            assert!(got == expected, "other bytes at {offset}");
        }
    }

    fn read(&self, reader: &Reader, offset: u64, length: usize) -> Vec<u8> {
        self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, reader.read(offset, length)).await.expect("a read takes too long").unwrap()
        })
    }

    fn wait(what: &str, ready: impl FnMut() -> bool) {
        Self::wait_for(LIMIT, what, ready);
    }

    fn wait_for(limit: Duration, what: &str, mut ready: impl FnMut() -> bool) {
        let end = Instant::now() + limit;
        while !ready() {
            assert!(Instant::now() < end, "{what} does not happen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn standings(reader: &Reader) -> Vec<Standing> {
    reader.figures().members.iter().map(|member| member.state).collect()
}

#[test]
fn random_reads_give_the_plaintext() {
    let site = Site::new(3_000_017, 14);
    let (first, second) = (site.server(), site.server());
    // A cache of a few chunks, so that most reads go to a server.
    let reader = site.try_open(&[&first, &second], &site.options(), 100_000).unwrap();
    assert_eq!(reader.size(), 3_000_017);
    let mut runner = TestRunner::new(Config { cases: 48, failure_persistence: None, ..Config::default() });
    let reads = prop::collection::vec((0u64..3_100_000, 0usize..200_000), 1..8);
    runner
        .run(&reads, |reads| {
            // Side by side, as the kernel asks.
            let tasks: Vec<_> = reads
                .iter()
                .map(|&(offset, length)| {
                    let reader = reader.clone();
                    site.runtime.spawn(async move { reader.read(offset, length).await.unwrap() })
                })
                .collect();
            for ((offset, length), task) in reads.into_iter().zip(tasks) {
                let start = usize::try_from(offset).unwrap().min(site.sample.plaintext.len());
                let end = (start + length).min(site.sample.plaintext.len());
                prop_assert!(site.runtime.block_on(task).unwrap() == site.sample.plaintext[start..end]);
            }
            Ok(())
        })
        .unwrap();
    let figures = reader.figures();
    assert!(figures.cache_bytes <= 100_000, "{figures:?}");
    // A guess may still be on its way.
    Site::wait("the verification of all", || {
        let figures = reader.figures();
        figures.chunks_fetched == figures.chunks_verified
    });
    assert!(figures.members.iter().all(|member| member.requests > 1), "both serve: {figures:?}");
}

#[test]
fn a_table_of_several_pages_is_fetched_page_by_page() {
    let site = Site::new((1 << 14) * 2049 + 77, 14);
    let server = site.server();
    let reader = site.open(&[&server]);
    for offset in [0, (1 << 14) * 2047 + 3, (1 << 14) * 2048, (1 << 14) * 2049 + 70] {
        let start = usize::try_from(offset).unwrap();
        let end = (start + 40_000).min(site.sample.plaintext.len());
        assert!(site.read(&reader, offset, 40_000) == site.sample.plaintext[start..end]);
    }
}

#[test]
fn reading_forward_joins_chunks_into_ranges_and_fetches_nothing_twice() {
    let site = Site::new(8 << 20, 16);
    let server = site.server();
    let reader = site.open(&[&server]);
    site.check_all(&reader, 64 << 10);
    let figures = reader.figures();
    assert_eq!(figures.chunks_fetched, 128);
    assert!(server.requests() < 128 / 4, "{} requests for 128 chunks", server.requests());
    let bytes = figures.bytes_fetched;
    assert!(bytes < (9 << 20), "{bytes}");
    // All of it is in the cache now.
    site.check_all(&reader, 1 << 20);
    assert_eq!(reader.figures().bytes_fetched, bytes);
}

#[test]
fn who_wants_the_same_chunk_waits_for_the_same_flight() {
    let site = Site::new(1 << 20, 16);
    let server = site.server();
    let reader = site.open(&[&server]);
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let reader = reader.clone();
            site.runtime.spawn(async move { reader.read(500_000, 10).await.unwrap() })
        })
        .collect();
    for task in tasks {
        assert_eq!(site.runtime.block_on(task).unwrap(), site.sample.plaintext[500_000..500_010]);
    }
    assert_eq!(reader.figures().chunks_fetched, 1);
}

#[test]
fn the_other_server_takes_over_whatever_the_first_one_does() {
    let site = Site::new(2_000_000, 16);
    let other = seal(noise(2_000_000, 2), 16);
    let longer = seal(noise(2_100_000, 1), 16);
    for (conduct, words) in [
        (Conduct::Silent, "no chunk for"),
        (Conduct::StallsAfter(70_000), "no chunk for"),
        (Conduct::Slow, "no chunk for"),
        (Conduct::CutsAfter(70_000), "the connection broke"),
        (Conduct::FlipsBits, "is damaged"),
        (Conduct::Serves(other.file.clone()), "is damaged"),
        (Conduct::Serves(longer.file.clone()), "another file, or extended"),
        (Conduct::Serves(Arc::new(site.sample.file[..1_500_000].to_vec())), "is truncated"),
        (Conduct::NoRanges, "does not serve ranges"),
        (Conduct::ShiftsRanges, "other bytes than were asked for"),
        (Conduct::Status(404), "HTTP status 404"),
        (Conduct::Status(503), "HTTP status 503"),
        (Conduct::ChangesTags, "entity tag"),
    ] {
        let (bad, good) = (site.server(), site.server());
        let reader = site.try_open(&[&bad, &good], &site.options(), 200_000).unwrap();
        site.check_all(&reader, 300_000);
        bad.behave(conduct.clone());
        // It is asked now and then, whichever of the two the reader prefers.
        Site::wait_for(FOUND, &format!("the fault of {conduct:?}"), || {
            site.check_all(&reader, 100_000);
            reader.figures().members[0].faults > 0
        });
        let members = reader.figures().members;
        assert!(members[0].faults > 0, "{conduct:?}: {members:?}");
        assert!(members[0].last_fault.as_ref().unwrap().contains(words), "{conduct:?}: {members:?}");
        assert_eq!((members[1].faults, members[1].state), (0, Standing::Good), "{conduct:?}");
    }
}

#[test]
fn a_server_whose_certificate_has_expired_is_left_and_comes_back_with_a_new_one() {
    let site = Site::new(2_000_000, 16);
    let (mut bad, good) = (site.server(), site.server());
    let reader = site.try_open(&[&bad, &good], &site.options(), 200_000).unwrap();
    bad.present(&site.authority.expired());
    Site::wait("the fault", || {
        site.check_all(&reader, 300_000);
        reader.figures().members[0].last_fault.as_ref().is_some_and(|fault| fault.contains("not valid any more"))
    });
    bad.present(&site.authority.identity());
    Site::wait("the return", || standings(&reader)[0] == Standing::Good);
}

#[test]
fn a_killed_server_rests_and_comes_back_by_a_verified_read() {
    let site = Site::new(2_000_000, 16);
    let (mut bad, good) = (site.server(), site.server());
    let reader = site.try_open(&[&bad, &good], &site.options(), 200_000).unwrap();
    site.check_all(&reader, 300_000);
    bad.stop();
    site.check_all(&reader, 300_000);
    Site::wait("the fault", || {
        site.check_all(&reader, 700_000);
        standings(&reader)[0] == Standing::BackingOff
    });
    bad.start();
    let before = bad.requests();
    Site::wait("the return", || standings(&reader)[0] == Standing::Good);
    assert!(bad.requests() > before, "it came back without a read");
    site.check_all(&reader, 300_000);
}

#[test]
fn wrong_bytes_twice_exclude_a_server_for_good() {
    let site = Site::new(2_000_000, 16);
    let (bad, good) = (site.server(), site.server());
    let reader = site.try_open(&[&bad, &good], &site.options(), 200_000).unwrap();
    bad.behave(Conduct::FlipsBits);
    Site::wait("the exclusion", || {
        site.check_all(&reader, 300_000);
        standings(&reader)[0] == Standing::Excluded
    });
    bad.behave(Conduct::Good);
    let requests = bad.requests();
    std::thread::sleep(Duration::from_secs(2));
    site.check_all(&reader, 300_000);
    assert_eq!(bad.requests(), requests, "an excluded server was asked");
    assert_eq!(standings(&reader)[0], Standing::Excluded);
}

#[test]
fn an_outage_of_all_is_waited_out_without_an_error() {
    let site = Site::new(2_000_000, 16);
    let (mut first, mut second) = (site.server(), site.server());
    let reader = site.try_open(&[&first, &second], &site.options(), 100_000).unwrap();
    site.check_all(&reader, 300_000);
    first.stop();
    second.stop();
    let reads: Vec<_> = (0..20u64)
        .map(|index| {
            let reader = reader.clone();
            site.runtime.spawn(async move { reader.read(index * 100_000, 50_000).await })
        })
        .collect();
    Site::wait("the outage", || standings(&reader) == [Standing::BackingOff; 2]);
    std::thread::sleep(Duration::from_secs(3));
    assert!(reads.iter().any(|read| !read.is_finished()));
    second.start();
    for (index, read) in reads.into_iter().enumerate() {
        let got = site.runtime.block_on(async { tokio::time::timeout(LIMIT, read).await }).unwrap().unwrap().unwrap();
        assert!(got == site.sample.plaintext[index * 100_000..index * 100_000 + 50_000]);
    }
}

#[test]
fn servers_that_are_all_excluded_are_asked_again_rather_than_nobody() {
    let site = Site::new(500_000, 16);
    let server = site.server();
    let reader = site.try_open(&[&server], &site.options(), 100_000).unwrap();
    server.behave(Conduct::FlipsBits);
    let read = site.runtime.spawn({
        let reader = reader.clone();
        async move { reader.read(100, 400_000).await }
    });
    Site::wait("the exclusion", || standings(&reader) == [Standing::Excluded]);
    server.behave(Conduct::Good);
    let got = site.runtime.block_on(async { tokio::time::timeout(LIMIT, read).await }).unwrap().unwrap().unwrap();
    assert!(got == site.sample.plaintext[100..400_100]);
}

#[test]
fn opening_passes_over_servers_that_are_down_or_have_another_image() {
    let site = Site::new(500_000, 16);
    let (mut down, good, other) = (site.server(), site.server(), site.server());
    down.stop();
    other.behave(Conduct::Serves(seal(noise(500_000, 5), 16).file.clone()));
    let reader = site.open(&[&down, &other, &good]);
    site.check_all(&reader, 300_000);
    // Asked before the good one, or looked at after the first rush.
    Site::wait("the faults", || {
        let members = reader.figures().members;
        members[0].state == Standing::BackingOff
            && members[1]
                .last_fault
                .as_ref()
                .is_some_and(|fault| ["not the expected", "is damaged"].iter().any(|words| fault.contains(words)))
    });
}
