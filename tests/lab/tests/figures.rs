//! The demo shows every figure that it promises, or says which one it cannot have.
#![allow(clippy::unwrap_used)] // tests and their helpers

use moor_api::admin::StatusEvent;
use moor_api::ids::BootId;
use moor_lab::figures::Figures;

const IMAGE: u64 = 200 << 20;

fn event(boot: Option<BootId>, state: &str, uptime_ms: u64, figures: &[(&str, u64)]) -> StatusEvent {
    StatusEvent {
        node: "n1".parse().unwrap(),
        boot,
        state: state.into(),
        detail: String::new(),
        time_ms: 1,
        uptime_ms,
        figures: figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
    }
}

/// A boot as a node reports it, behind a change that the server made itself.
fn good() -> Vec<StatusEvent> {
    let boot = Some(BootId::random());
    vec![
        event(None, "pending", 0, &[]),
        event(boot, "image", 20_000, &[]),
        event(
            boot,
            "booted",
            60_000,
            &[("image.bytes_fetched", 30 << 20), ("memory.total", 2 << 30), ("memory.available", 1 << 30)],
        ),
    ]
}

#[test]
fn all_figures_of_a_boot_are_there() {
    let figures = Figures::of(&good(), IMAGE).unwrap();
    let stages: Vec<&str> = figures.stages.iter().map(|stage| stage.state.as_str()).collect();
    assert_eq!(stages, ["image", "booted"]);
    assert_eq!((figures.fetched, figures.memory, figures.in_use), (30 << 20, 2 << 30, 1 << 30));
}

#[test]
fn a_figure_that_cannot_be_had_is_a_sentence() {
    type Change = fn(&mut Vec<StatusEvent>);
    let cases: [(&str, Change); 10] = [
        ("not reported the state 'booted'", |events| drop(events.pop())),
        ("figure 'image.bytes_fetched'", |events| {
            events[2].figures.remove("image.bytes_fetched");
        }),
        ("figure 'memory.total'", |events| {
            events[2].figures.remove("memory.total");
        }),
        ("figure 'memory.available'", |events| {
            events[2].figures.remove("memory.available");
        }),
        ("0 bytes fetched", |events| {
            events[2].figures.insert("image.bytes_fetched".into(), 0);
        }),
        ("bytes fetched of an image", |events| {
            events[2].figures.insert("image.bytes_fetched".into(), IMAGE + 1);
        }),
        ("memory available of", |events| {
            events[2].figures.insert("memory.available".into(), 3 << 30);
        }),
        ("when it reached its stage 'image'", |events| events[1].uptime_ms = 0),
        ("when it reached its stage 'booted'", |events| events[2].uptime_ms = 0),
        ("no stage before it", |events| drop(events.remove(1))),
    ];
    for (says, change) in cases {
        let mut events = good();
        change(&mut events);
        let error = Figures::of(&events, IMAGE).unwrap_err().to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{says}: {error}");
    }
    assert!(Figures::of(&good(), 0).unwrap_err().to_string().contains("no size"));
}
