//! What the demo has to show of a boot (issue 2, "What it must show"). A figure that cannot be had is an error: a demo without it would
//! show less than it says, and nobody would notice.

use anyhow::{Context as _, ensure};
use moor_api::admin::StatusEvent;
use std::time::Duration;

/// The state that ends a boot.
const BOOTED: &str = "booted";

/// A stage of a boot as the node told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its name.
    pub state: String,
    /// Since the node's kernel started.
    pub uptime: Duration,
    /// A sentence, or nothing.
    pub detail: String,
}

/// The figures of a boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// The node's own stages, in order; the last one is `booted`.
    pub stages: Vec<Stage>,
    /// Bytes of the image that were fetched until then.
    pub fetched: u64,
    /// Bytes of memory that the node has.
    pub memory: u64,
    /// Bytes of it that are in use.
    pub in_use: u64,
}

impl Figures {
    /// Those of the last boot in `events`, of an image of `image_size` bytes.
    ///
    /// # Errors
    /// One is missing or cannot be true; the sentence names it.
    pub fn of(events: &[StatusEvent], image_size: u64) -> anyhow::Result<Self> {
        let booted = events.iter().rev().find(|event| event.state == BOOTED);
        let booted = booted.context("the node has not reported the state 'booted'")?;
        let figure = |name: &str| {
            let value = booted.figures.get(name).copied();
            value.with_context(|| {
                format!("the node has not reported the figure '{name}' with its state 'booted': it could not read it")
            })
        };
        let stages = stages(events, booted)?;
        let fetched = figure("image.bytes_fetched")?;
        let (memory, available) = (figure("memory.total")?, figure("memory.available")?);
        ensure!(image_size > 0, "the sealed image has no size");
        ensure!(
            fetched > 0 && fetched <= image_size,
            "the node reports {fetched} bytes fetched of an image of {image_size}: a boot fetches some of it at least, and all of it at most"
        );
        let in_use = memory.checked_sub(available).filter(|in_use| *in_use > 0).with_context(|| {
            format!("the node reports {available} bytes of memory available of {memory}: a node that runs uses some")
        })?;
        Ok(Self { stages, fetched, memory, in_use })
    }
}

/// The stages of the boot that ended in `booted`, each with its time.
fn stages(events: &[StatusEvent], booted: &StatusEvent) -> anyhow::Result<Vec<Stage>> {
    let boot = booted.boot.context("the state 'booted' names no boot")?;
    let mut stages: Vec<Stage> = Vec::new();
    for event in events.iter().filter(|event| event.boot == Some(boot)) {
        let uptime = Duration::from_millis(event.uptime_ms);
        ensure!(!uptime.is_zero(), "the node has not reported when it reached its stage '{}'", event.state);
        stages.push(Stage { state: event.state.clone(), uptime, detail: event.detail.clone() });
    }
    ensure!(
        stages.len() > 1,
        "the node has reported its state 'booted' and no stage before it: how long each took cannot be said"
    );
    Ok(stages)
}
