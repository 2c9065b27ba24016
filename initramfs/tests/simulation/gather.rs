//! What a server does in the middle of an answer, while chunks of it are gathered to be verified together: some are there and not verified, some
//! are verified and not handed out, of one a part is on its way. Whoever is asked instead begins with the first that was not handed out.

use super::sim::network::{Conduct, Server};
use super::sim::world::Sim;
use super::{FILES, HOUR, open_with, two_of};
use moor_tether::reader::world::World as _;
use moor_tether::reader::{Figures, Settings, Standing};
use std::sync::Arc;
use std::time::Duration;

/// Bytes per second of both servers, and what comes of it: a chunk of 16 KiB comes within the time that one is waited for, or long after it.
const LINES: [u64; 2] = [160_000_000, 4_000_000];
/// What is read in the end, in chunks: several times what is verified together.
const CHUNKS: u64 = 48;
/// All that a server can do to an answer that is under way.
const CONDUCTS: [Conduct; 5] =
    [Conduct::Stalls(0), Conduct::Cuts(0), Conduct::Slow, Conduct::Blackholed, Conduct::Refused];

/// One read of an answer that the server that gives it spoils.
#[derive(Debug, Clone, Copy)]
struct Case {
    line: u64,
    conduct: Conduct,
    /// How much of the answer's time is over by then, in per cent.
    at: u64,
    /// Whether the answer is under way before anybody wants it.
    is_guess: bool,
}

/// The server that has been asked for more since it had been asked for so many.
fn asked(servers: &[Arc<Server>; 2], before: [usize; 2]) -> &Arc<Server> {
    let bytes = |at: usize| servers[at].requests()[before[at]..].iter().map(|(_, _, length)| length).sum::<u64>();
    &servers[usize::from(bytes(1) > bytes(0))]
}

fn play(seed: u64, case: Case) -> (Duration, Figures) {
    let sim = Sim::new(seed);
    let world = sim.clone();
    let result = sim.run(HOUR, async move {
        let servers = two_of(&world, [(2, case.line); 2]);
        let prefetch = if case.is_guess { (0..CHUNKS).collect() } else { Vec::new() };
        // A list is prefetched from the opening on. Without one, other reads come first, so that it is known how quick the servers are.
        let settings = Settings { cache: 4 << 20, prefetch, ..Settings::default() };
        let before = servers.each_ref().map(|server| server.requests().len());
        let reader = open_with(&world, &servers, settings).await;
        if !case.is_guess {
            for chunk in 60..90 {
                reader.read(chunk << 14, 100).await.unwrap();
            }
        }
        let before = if case.is_guess { before } else { servers.each_ref().map(|server| server.requests().len()) };
        let length = usize::try_from(CHUNKS << 14).unwrap();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (read, time) = (reader.clone(), world.clone());
        let wait = Duration::from_nanos((CHUNKS << 14) * 1_000_000_000 / case.line * case.at / 100);
        // The way to the server comes first, and before a guess the page of hashes.
        let spoilt = Duration::from_millis(if case.is_guess { 4 } else { 2 }) + wait;
        let later = if case.is_guess { spoilt + Duration::from_millis(1) } else { Duration::ZERO };
        world.spawn(Box::pin(async move {
            time.sleep(later).await;
            let begun = time.now();
            let bytes = read.read(0, length).await;
            _ = sender.send((bytes, time.since(begun)));
        }));
        world.sleep(spoilt).await;
        asked(&servers, before).behave(case.conduct);
        let (bytes, took) = receiver.await.unwrap();
        assert!(bytes.unwrap() == FILES.sample.plaintext[..length], "wrong bytes: {case:?}");
        let figures = reader.figures();
        for server in &servers {
            server.behave(Conduct::Good);
        }
        world.sleep(Duration::from_mins(1)).await;
        let standings: Vec<_> = reader.figures().members.iter().map(|member| member.state).collect();
        assert_eq!(standings, [Standing::Good; 2], "{case:?}");
        (took, figures)
    });
    result.unwrap_or_else(|| panic!("it hangs: {case:?}"))
}

#[test]
fn an_answer_that_is_spoilt_while_it_is_gathered_costs_neither_a_byte_nor_a_second() {
    let (mut moved, mut hedged, mut seed) = (0, 0, 0);
    for (line, is_guess) in LINES.into_iter().flat_map(|line| [(line, false), (line, true)]) {
        for conduct in CONDUCTS {
            for at in (0..100).step_by(4) {
                let case = Case { line, conduct, at, is_guess };
                seed += 1;
                let (took, figures) = play(seed, case);
                let alone = Duration::from_nanos((CHUNKS << 14) * 1_000_000_000 / line);
                assert!(took < Duration::from_secs(1) + alone, "{took:?}: {case:?}");
                moved += figures.members.iter().map(|member| member.faults).sum::<u64>();
                hedged += figures.hedges_won;
                // What was handed out is not fetched again. 32 chunks were there before; two servers may verify the same few.
                let most = CHUNKS + 32 + 24;
                assert!(figures.chunks_fetched <= most, "{} chunks fetched: {case:?}", figures.chunks_fetched);
            }
        }
    }
    // Both ways out of it were taken.
    assert!(moved > 100 && hedged > 20, "{moved} faults, {hedged} hedges won");
}

#[test]
fn an_answer_that_comes_in_drips_is_one_request() {
    // A chunk every 8 ms: each is verified alone, and the next is on its way meanwhile.
    let sim = Sim::new(1);
    let world = sim.clone();
    let requests = sim.run(HOUR, async move {
        let servers = two_of(&world, [(1, 2_000_000); 2]);
        let reader = open_with(&world, &servers, Settings { cache: 4 << 20, ..Settings::default() }).await;
        let before = servers.each_ref().map(|server| server.requests().len());
        let length = usize::try_from(CHUNKS << 14).unwrap();
        assert!(reader.read(0, length).await.unwrap() == FILES.sample.plaintext[..length]);
        let chunks =
            |at: usize| servers[at].requests()[before[at]..].iter().filter(|(_, _, length)| *length > 40_000).count();
        (chunks(0) + chunks(1), reader.figures())
    });
    let (requests, figures) = requests.unwrap();
    assert_eq!((requests, figures.hedges), (1, 0), "{figures:?}");
    assert_eq!(figures.chunks_fetched, CHUNKS);
}
