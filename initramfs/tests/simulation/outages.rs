//! No server at all: reads wait for as long as it lasts, and the console says so, neither too often nor too seldom.

use super::sim::network::Conduct;
use super::sim::world::Sim;
use super::{FILES, HOUR, pair};
use moor_tether::reader::world::World as _;
use moor_tether::reader::{ReadError, Reader, Standing};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

/// A read that somebody waits for meanwhile.
fn begin_read(world: &Sim, reader: &Reader) -> oneshot::Receiver<Result<Vec<u8>, ReadError>> {
    let (sender, receiver) = oneshot::channel();
    let reader = reader.clone();
    world.spawn(Box::pin(async move { _ = sender.send(reader.read(700_000, 4096).await) }));
    receiver
}

#[test]
fn an_outage_lasts_as_long_as_it_lasts_unless_the_machine_shuts_down() {
    let sim = Sim::new(4);
    let world = sim.clone();
    let waited = sim.run(HOUR, async move {
        let (servers, reader) = pair(&world, Vec::new()).await;
        for server in &servers {
            server.behave(Conduct::Refused);
        }
        let read = begin_read(&world, &reader);
        world.sleep(Duration::from_mins(20)).await;
        // Taken back in time, it is as if nobody had said it.
        reader.end(true);
        world.sleep(Duration::from_secs(20)).await;
        reader.end(false);
        world.sleep(Duration::from_mins(20)).await;
        reader.end(true);
        let ended = world.now();
        let result = read.await.unwrap();
        assert!(matches!(result, Err(ReadError::GaveUp)), "{result:?}");
        let waited = world.since(ended);
        // A server that comes back is in time for the next.
        servers[0].behave(Conduct::Good);
        world.sleep(Duration::from_secs(10)).await;
        reader.read(900_000, 4096).await.unwrap();
        waited
    });
    assert_eq!(waited, Some(Duration::from_secs(30)));
}

/// What a shutdown reads it reads one after the other, and most of it is in nobody's memory. That each read waited anew would hold the machine for as many
/// times as long.
#[test]
fn an_outage_at_shutdown_is_waited_out_once_and_not_by_each_read() {
    let sim = Sim::new(6);
    let world = sim.clone();
    let waited = sim.run(HOUR, async move {
        let (servers, reader) = pair(&world, Vec::new()).await;
        for server in &servers {
            server.behave(Conduct::Blackholed);
        }
        // So that both are found dead.
        let read = begin_read(&world, &reader);
        world.sleep(Duration::from_mins(2)).await;
        reader.end(true);
        let ended = world.now();
        assert!(matches!(read.await.unwrap(), Err(ReadError::GaveUp)));
        let first = world.since(ended);
        for index in 0..20 {
            let result = reader.read(super::apart(index), 100).await;
            assert!(matches!(result, Err(ReadError::GaveUp)), "{result:?}");
        }
        let all = world.since(ended);
        // A server that comes back makes an end of it, and an outage after that is a new one.
        servers[0].behave(Conduct::Good);
        world.sleep(Duration::from_secs(30)).await;
        reader.read(super::apart(30), 100).await.unwrap();
        servers[0].behave(Conduct::Refused);
        let begun = world.now();
        let result = reader.read(super::apart(31), 100).await;
        assert!(matches!(result, Err(ReadError::GaveUp)), "{result:?}");
        (first, all, world.since(begun))
    });
    let (first, all, again) = waited.unwrap();
    assert_eq!((first, all), (Duration::from_secs(30), Duration::from_secs(30)));
    assert!(again >= Duration::from_secs(30) && again < Duration::from_secs(31), "{again:?}");
}

/// A server that was away for long rests long. It is back when the other one goes: reads must not wait for the end of that rest.
#[test]
fn who_rests_long_is_asked_soon_when_nobody_else_is_left() {
    let mut rested = 0;
    for seed in 0..12 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let (took, was_at_rest) = sim
            .run(HOUR, async move {
                let (servers, reader) = pair(&world, Vec::new()).await;
                servers[1].behave(Conduct::Refused);
                for index in 0..600 {
                    reader.read(super::apart(index % 80), 100).await.unwrap();
                    world.sleep(Duration::from_secs(1)).await;
                }
                servers[1].behave(Conduct::Good);
                world.sleep(Duration::from_secs(1)).await;
                let was_at_rest = reader.figures().members[1].state == Standing::BackingOff;
                servers[0].behave(Conduct::Refused);
                let begun = world.now();
                reader.read(super::apart(81), 100).await.unwrap();
                (world.since(begun), was_at_rest)
            })
            .unwrap();
        assert!(took < Duration::from_millis(7500), "{seed}: {took:?}");
        rested += usize::from(was_at_rest);
    }
    assert!(rested > 6, "the server rested in {rested} of 12 runs");
}

/// A server that is cut off is no other than one that was switched off: who waits for it must not wait for the kernel, which says "hello" ever more rarely.
#[test]
fn a_server_that_was_cut_off_is_asked_within_two_seconds() {
    for seed in 0..40 {
        let sim = Sim::new(seed);
        let world = sim.clone();
        let late = sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            reader.read(0, 4096).await.unwrap();
            let all_behave = {
                let servers = servers.clone();
                move |conduct| servers.iter().for_each(|server| server.behave(conduct))
            };
            all_behave(Conduct::Blackholed);
            let lasts = Duration::from_secs(30) + Duration::from_millis(700 * seed);
            let (back, time) = (all_behave, world.clone());
            world.spawn(Box::pin(async move {
                time.sleep(lasts).await;
                back(Conduct::Good);
            }));
            let begun = world.now();
            reader.read(700_000, 4096).await.unwrap();
            world.since(begun).checked_sub(lasts).expect("nobody served it")
        });
        assert!(late.unwrap() < Duration::from_secs(2), "{seed}: {late:?}");
    }
}

/// What is logged, as the kernel's log gets it: a letter for the level, and the text.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<String>>);

impl std::io::Write for Said {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().push_str(std::str::from_utf8(part).unwrap());
        Ok(part.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the reader says while it runs in this way.
fn heard<T>(run: impl FnOnce() -> T) -> (T, String) {
    let said = Said::default();
    let writer = said.clone();
    let log = tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(move || writer.clone()).finish();
    let result = tracing::subscriber::with_default(log, run);
    let said = said.0.lock().unwrap().clone();
    (result, said)
}

/// What of it a `quiet` console shows.
fn on_console(said: &str) -> Vec<&str> {
    said.lines().filter(|line| line.contains("ERROR")).collect()
}

#[test]
fn a_server_that_is_started_again_is_not_told_on_the_console() {
    let (waited, said) = heard(|| {
        let sim = Sim::new(7);
        let world = sim.clone();
        sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            for server in &servers {
                server.behave(Conduct::Refused);
            }
            let (begun, back) = (world.now(), world.clone());
            world.spawn(Box::pin(async move {
                back.sleep(Duration::from_millis(400)).await;
                for server in &servers {
                    server.behave(Conduct::Good);
                }
            }));
            reader.read(700_000, 4096).await.unwrap();
            let waited = world.since(begun);
            world.sleep(Duration::from_mins(2)).await;
            waited
        })
    });
    let waited = waited.unwrap();
    assert!(waited > Duration::from_millis(400) && waited < Duration::from_secs(2), "{waited:?}");
    assert!(said.contains("fails and rests") && !said.contains("of the image answers"), "{said}");
}

#[test]
fn a_minute_without_any_server_is_one_line_on_the_console_and_no_error() {
    let (late, said) = heard(|| {
        let sim = Sim::new(5);
        let world = sim.clone();
        sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            reader.read(0, 4096).await.unwrap();
            for server in &servers {
                server.behave(Conduct::Refused);
            }
            let gone = world.now();
            let reads = (1..9_u64).map(|program| {
                let (reader, world, at) = (reader.clone(), world.clone(), program * 150_000);
                let (sender, receiver) = tokio::sync::oneshot::channel();
                let start = usize::try_from(at).unwrap();
                let task = world.clone();
                world.spawn(Box::pin(async move {
                    let good = reader.read(at, 4096).await.unwrap() == FILES.sample.plaintext[start..start + 4096];
                    _ = sender.send((good, task.since(gone)));
                }));
                receiver
            });
            let reads: Vec<_> = reads.collect();
            world.sleep(Duration::from_mins(1)).await;
            for server in &servers {
                server.behave(Conduct::Good);
            }
            let mut late = Duration::ZERO;
            for read in reads {
                let (good, took) = read.await.unwrap();
                assert!(good);
                late = late.max(took.checked_sub(Duration::from_mins(1)).expect("nobody served it"));
            }
            world.sleep(Duration::from_secs(1)).await;
            late
        })
    });
    assert!(late.unwrap() < Duration::from_secs(8), "{late:?}");
    let on_console = on_console(&said);
    assert!(
        matches!(on_console[..], [only] if only.contains("no server of the image answers; programs wait")),
        "{said}"
    );
    assert!(on_console[0].contains("refused"), "{said}");
    // The log has its end.
    assert!(said.contains("answers again; none did for 6"), "{said}");
}

#[test]
fn who_saw_a_long_outage_begin_on_the_console_sees_it_end() {
    let (read, said) = heard(|| {
        let sim = Sim::new(9);
        let world = sim.clone();
        sim.run(HOUR, async move {
            let (servers, reader) = pair(&world, Vec::new()).await;
            for server in &servers {
                server.behave(Conduct::Refused);
            }
            let back = world.clone();
            world.spawn(Box::pin(async move {
                back.sleep(Duration::from_mins(4)).await;
                for server in &servers {
                    server.behave(Conduct::Good);
                }
            }));
            let read = reader.read(700_000, 4096).await.unwrap() == FILES.sample.plaintext[700_000..704_096];
            world.sleep(Duration::from_mins(10)).await;
            read
        })
    });
    assert_eq!(read, Some(true));
    let on_console = on_console(&said);
    let [begun, goes_on @ .., end] = &on_console[..] else { panic!("{said}") };
    assert!(begun.contains("no server of the image answers; programs wait") && goes_on.len() == 2, "{said}");
    for line in goes_on {
        assert!(line.contains("no server of the image answers since "), "{said}");
    }
    assert!(end.contains("a server of the image answers again; none did for 2"), "{said}");
}
