//! `moor status`, `moor log`.

use crate::args::Status;
use crate::output;
use moor_api::admin::StatusEvent;
use moor_api::client::admin::AdminClient;
use moor_api::ids::NodeName;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;

pub(crate) async fn run(client: &mut AdminClient, args: &Status, json: bool) -> anyhow::Result<ExitCode> {
    // Known before the stream starts, because the connection serves nothing else then.
    let mut waiting: BTreeMap<NodeName, bool> = BTreeMap::new();
    if args.until_booted {
        for node in client.nodes(args.range.as_deref()).await? {
            waiting.insert(node.name, false);
        }
    }
    let mut events = client.status(args.range.as_deref(), args.history, args.watch).await?;
    while let Some(event) = events.next().await? {
        if json {
            output::line(serde_json::to_string(&event)?)?;
        } else {
            output::line(describe(&event))?;
        }
        if args.until_booted {
            if event.state == "failed" {
                return Ok(ExitCode::FAILURE);
            }
            waiting.insert(event.node, event.state == "booted");
            if waiting.values().all(|booted| *booted) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
    ended(args.watch)
}

/// A watch has no end of its own: a script must not take it for success.
fn ended(watch: bool) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        !watch,
        "the member ended the watch, because it stops, took in a snapshot of the others, or because this end was too slow: begin again"
    );
    Ok(ExitCode::SUCCESS)
}

/// `node: state: detail [at boot + seconds] {figures}`.
fn describe(event: &StatusEvent) -> String {
    let mut text = format!("{}: {}", event.node, event.state);
    if !event.detail.is_empty() {
        text.push_str(": ");
        text.push_str(&event.detail);
    }
    if event.uptime_ms > 0 {
        // Writing to a string cannot fail.
        let _ = write!(text, " [{}.{:03} s]", event.uptime_ms / 1000, event.uptime_ms % 1000);
    }
    for (name, value) in &event.figures {
        let shown = if name.contains("bytes") || name.contains("size") || name.contains("memory") {
            output::bytes(*value)
        } else {
            value.to_string()
        };
        let _ = write!(text, " {name}={shown}");
    }
    text
}

pub(crate) async fn log(client: &mut AdminClient, node: &NodeName, json: bool) -> anyhow::Result<ExitCode> {
    let mut events = client.log(node.as_str()).await?;
    while let Some(event) = events.next().await? {
        if json {
            output::line(serde_json::to_string(&event)?)?;
            continue;
        }
        for line in event.text.lines() {
            output::line(format_args!("{node}: {} {}: {line}", output::time_ms(event.time_ms), event.phase))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::ended;

    #[test]
    fn a_watch_that_ends_by_itself_is_no_success() {
        assert!(ended(false).is_ok());
        assert!(ended(true).unwrap_err().to_string().contains("begin again"));
    }
}
