//! What systemd says of the system, and the figures that go with `booted`.

use crate::handover::RunDir;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// How often systemd is asked.
const POLL: Duration = Duration::from_secs(1);

/// How long one question may take.
const ANSWER: Duration = Duration::from_secs(30);

/// How long it may take while this service has to end: half of what its unit gives it.
const STOPPING: Duration = Duration::from_secs(5);

/// How the start of the system ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All of it runs.
    Running,
    /// It is up, and these units failed.
    Degraded(Vec<String>),
    /// It is not up.
    NotUp(String),
}

/// Waits until the system is up. It polls: this service's own start must not be waited for, and `--wait` would hold a job.
pub(super) async fn wait_up(limit: Duration) -> Outcome {
    let begin = Instant::now();
    loop {
        let word = ask(&["is-system-running"]).await;
        match word.trim() {
            "running" => return Outcome::Running,
            "degraded" => return Outcome::Degraded(failed_units(&ask(&FAILED).await)),
            "maintenance" => return Outcome::NotUp("the system is in maintenance mode (rescue or emergency)".into()),
            "stopping" => return Outcome::NotUp("the system is going down".into()),
            other if begin.elapsed() > limit => {
                let jobs = ask(&["list-jobs", "--plain", "--no-legend", "--no-pager"]).await;
                let jobs: Vec<&str> = jobs.lines().filter_map(|line| line.split_whitespace().nth(1)).take(8).collect();
                let minutes = limit.as_secs() / 60;
                return Outcome::NotUp(format!(
                    "the system is not up after {minutes} minutes ('{other}'), it waits for: {}",
                    jobs.join(", ")
                ));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

const FAILED: [&str; 5] = ["list-units", "--failed", "--plain", "--no-legend", "--no-pager"];

/// What systemctl prints, whatever its status: that of `is-system-running` says the same as its word.
async fn ask(arguments: &[&str]) -> String {
    output("systemctl", arguments).await
}

async fn output(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(ANSWER, command.output()).await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => String::new(),
    }
}

/// Whether the machine shuts down; `None` without an answer in time. On a thread: where the root stands still, to start a program never ends.
pub(super) fn is_stopping() -> Option<bool> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let asked = std::process::Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).output();
        let _ = tell.send(asked.is_ok_and(|output| output.stdout.trim_ascii() == b"stopping"));
    });
    told.recv_timeout(STOPPING).ok()
}

fn failed_units(listing: &str) -> Vec<String> {
    listing.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The last lines of each unit's journal.
pub(super) async fn journal(units: &[String]) -> String {
    let mut text = String::new();
    for unit in units.iter().take(20) {
        let _ = writeln!(text, "--- {unit}");
        text.push_str(&output("journalctl", &["--no-pager", "-o", "cat", "-b", "-n", "30", "-u", unit]).await);
    }
    text
}

/// The part of the tether's state that is reported.
#[derive(Deserialize)]
struct TetherState {
    image_size: u64,
    bytes_fetched: u64,
}

/// Bytes of the image and of memory. What cannot be read is absent.
pub(super) fn figures(run: &RunDir) -> BTreeMap<String, u64> {
    let mut figures = BTreeMap::new();
    if let Ok(state) = crate::handover::read_json::<TetherState>(&run.path("tether.json")) {
        figures.insert("image.size".to_owned(), state.image_size);
        figures.insert("image.bytes_fetched".to_owned(), state.bytes_fetched);
    }
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    for (field, name) in [("MemTotal", "memory.total"), ("MemAvailable", "memory.available")] {
        if let Some(bytes) = meminfo(&memory, field) {
            figures.insert(name.to_owned(), bytes);
        }
    }
    figures
}

fn meminfo(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read() {
        let text = "MemTotal:        2030280 kB\nMemFree:  100 kB\nMemAvailable:    1800000 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(2_030_280 * 1024));
        assert_eq!(meminfo(text, "MemAvailable"), Some(1_800_000 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let state = r#"{"image_size":100,"bytes_fetched":7,"chunks_fetched":1,"members":[]}"#;
        std::fs::write(run.path("tether.json"), state).unwrap();
        let figures = figures(&run);
        assert_eq!(figures["image.bytes_fetched"], 7);
        assert!(figures["memory.total"] > figures["memory.available"]);
    }

    #[test]
    fn failed_units_are_named() {
        let listing = "systemd-networkd-wait-online.service loaded failed failed Wait for Network\nx.mount loaded failed failed x\n";
        assert_eq!(failed_units(listing), ["systemd-networkd-wait-online.service", "x.mount"]);
        assert!(failed_units("").is_empty());
    }
}
