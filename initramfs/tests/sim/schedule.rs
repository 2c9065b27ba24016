//! One run: servers that change their conduct at random times, programs that read, and what came of it.

use super::network::{Conduct, Server, Way};
use super::world::{Random, Sim};
use crate::common::Sample;
use moor_image::OpenOptions;
use moor_tether::reader::world::{Path, World as _};
use moor_tether::reader::{Figures, Reader, Settings, Standing};
use std::sync::Arc;
use std::time::Duration;

/// The time in which conducts change; afterwards every server is good.
const UNREST: Duration = Duration::from_secs(20);
/// A read that is not done so long after that hangs.
const LIMIT: Duration = Duration::from_mins(3);
/// Reads of one program.
const READS: u64 = 30;
/// Longest read.
const LONGEST: u64 = 40_000;

/// What a run has shown.
pub(crate) struct Outcome {
    pub(crate) longest: Duration,
    pub(crate) figures: Figures,
    /// What each server was asked, and when.
    pub(crate) requests: Vec<Vec<(Duration, u64, u64)>>,
    /// Standings once all have been good for a while.
    pub(crate) standings: Vec<Standing>,
}

/// What is the same in all runs.
pub(crate) struct Files {
    pub(crate) sample: Sample,
    pub(crate) other: Arc<Vec<u8>>,
}

fn any_conduct(random: &mut Random) -> Conduct {
    match random.below(16) {
        0 => Conduct::Refused,
        1 => Conduct::Blackholed,
        2 => Conduct::Silent,
        3 => Conduct::Stalls(random.below(30_000)),
        4 => Conduct::Cuts(random.below(30_000)),
        5 => Conduct::Slow,
        6 => Conduct::Late(random.below(600)),
        7 => Conduct::Corrupt,
        8 => Conduct::OtherImage,
        9 => Conduct::NoRanges,
        10 => Conduct::Expired,
        11 => Conduct::Status(503),
        12 => Conduct::Retags,
        13 => Conduct::Crowded(random.below(4)),
        14 => Conduct::Starves,
        _ => Conduct::Good,
    }
}

async fn unrest(sim: Sim, server: Arc<Server>, mut random: Random) {
    loop {
        let quiet = random.millis(100, 6000);
        sim.sleep(quiet).await;
        if sim.now() > UNREST {
            break;
        }
        server.behave(any_conduct(&mut random));
        let lasts = random.millis(50, 8000);
        sim.sleep(lasts).await;
        if random.below(3) > 0 {
            server.behave(Conduct::Good);
        }
    }
    server.behave(Conduct::Good);
}

async fn program(sim: Sim, reader: Reader, files: Arc<Files>, mut random: Random) -> Result<Duration, String> {
    let plaintext = &files.sample.plaintext;
    let (mut longest, mut at) = (Duration::ZERO, 0);
    for _ in 0..READS {
        let pause = random.millis(0, 1200);
        sim.sleep(pause).await;
        // Some go on where they were, as most programs do.
        if random.below(3) == 0 {
            at = random.below(plaintext.len() as u64);
        }
        let length = usize::try_from(1 + random.below(LONGEST)).unwrap();
        let begun = sim.now();
        let got = reader.read(at, length).await.map_err(|error| format!("{error} at {begun:?}"))?;
        longest = longest.max(sim.since(begun));
        let start = usize::try_from(at).unwrap();
        let end = (start + length).min(plaintext.len());
        if got != plaintext[start..end] {
            return Err(format!("other bytes at {at}, read at {begun:?}"));
        }
        at = end as u64;
    }
    Ok(longest)
}

/// Runs one schedule. `is_guarded`: one server stays good.
///
/// # Errors
/// A wrong byte, an error, or no end.
pub(crate) fn run(files: &Arc<Files>, seed: u64, is_guarded: bool) -> Result<Outcome, String> {
    let (sim, mut random) = (Sim::new(seed), Random::new(!seed));
    let count = usize::try_from(2 + random.below(3)).unwrap();
    let guarded = usize::try_from(random.below(count as u64)).unwrap();
    let servers: Vec<_> = (0..count)
        .map(|index| {
            let delay = Duration::from_micros(100 + random.below(20_000));
            let bandwidth = (5 + random.below(400)) * 1_000_000;
            Server::new(&sim, index, (&files.sample.file, &files.other), delay, bandwidth)
        })
        .collect();
    let (world, files, reached) = (sim.clone(), files.clone(), servers.clone());
    let outcome = sim.run(LIMIT, async move {
        let options = OpenOptions { key: Some(files.sample.key.clone()), ..OpenOptions::default() };
        let paths = reached.iter().map(|server| Box::new(Way(server.clone())) as Box<dyn Path>).collect();
        let prefetch = (0..random.below(60)).map(|_| random.below(100)).collect();
        let settings = Settings { cache: 200_000, prefetch, ..Settings::default() };
        let reader = Reader::open(paths, Arc::new(world.clone()), &options, settings).await;
        let reader = reader.map_err(|error| error.to_string())?;
        for (index, server) in reached.iter().enumerate() {
            let random = Random::new(random.next());
            if !(is_guarded && index == guarded) {
                world.spawn(Box::pin(unrest(world.clone(), server.clone(), random)));
            }
        }
        let programs: Vec<_> = (0..=random.below(8))
            .map(|_| {
                let (sender, receiver) = tokio::sync::oneshot::channel();
                let run = program(world.clone(), reader.clone(), files.clone(), Random::new(random.next()));
                world.spawn(Box::pin(async move { _ = sender.send(run.await) }));
                receiver
            })
            .collect();
        let mut longest = Duration::ZERO;
        for program in programs {
            let result = program.await.map_err(|_| "a program was dropped".to_owned())?;
            longest = longest.max(result?);
        }
        let figures = reader.figures();
        // The longest rest, and a trial on the slowest line.
        let rest = (UNREST + Duration::from_mins(1)).saturating_sub(world.now()).max(Duration::from_secs(45));
        world.sleep(rest).await;
        let standings = reader.figures().members.iter().map(|member| member.state).collect();
        Ok::<_, String>((longest, figures, standings))
    });
    let (longest, figures, standings) = outcome.ok_or_else(|| "a read hangs".to_owned())??;
    let requests = servers.iter().map(|server| server.requests()).collect();
    Ok(Outcome { longest, figures, requests, standings })
}
