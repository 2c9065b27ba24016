//! What a test found.

use super::boot::Outcome;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// Lines of the console that go with a boot that failed.
const CONSOLE: usize = 40;

/// The result of a test. More fields may be added.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// The image.
    pub image: PathBuf,
    /// Its digest.
    pub digest: String,
    /// Whether everything that was looked at is good.
    pub good: bool,
    /// Whether the machine ran on KVM; if not, times say nothing.
    pub kvm: bool,
    /// How long the test took.
    pub seconds: u64,
    /// What was looked at, in order.
    pub checks: Vec<Check>,
    /// The node's states, with the milliseconds since its kernel started.
    pub states: Vec<(String, u64)>,
    /// Figures of the machine in bytes, as it reported them when it was up.
    pub figures: BTreeMap<String, u64>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Its name: `boot`, `ssh`, `root`, `failover`, `overlay`, `services`, `memory`.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub good: bool,
    /// In a sentence.
    pub detail: String,
    /// What explains it: the end of a console, the journal of a unit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<Log>,
}

/// A piece of a log.
#[derive(Debug, Serialize)]
pub struct Log {
    /// Whose: a unit, or `console`.
    pub of: String,
    /// Its last lines.
    pub text: String,
}

impl Verdict {
    pub(super) fn new(image: &Path, digest: &str, kvm: bool) -> Self {
        Self {
            image: image.to_owned(),
            digest: digest.to_owned(),
            good: true,
            kvm,
            seconds: 0,
            checks: Vec::new(),
            states: Vec::new(),
            figures: BTreeMap::new(),
        }
    }

    /// Adds what was found.
    pub(super) fn add(&mut self, name: &'static str, good: bool, detail: impl Into<String>, logs: Vec<Log>) {
        self.good &= good;
        self.checks.push(Check { name, good, detail: detail.into(), logs });
    }

    /// Takes over how the boot ended; `console` gives so many last lines of it.
    pub(super) fn boot(&mut self, outcome: &Outcome, console: impl FnOnce(usize) -> String) {
        self.states = outcome.states.iter().map(|event| (event.state.clone(), event.uptime_ms)).collect();
        if let Some(last) = outcome.states.last() {
            self.figures.clone_from(&last.figures);
        }
        match &outcome.failure {
            None => {
                let how = if self.kvm { "" } else { " (emulated)" };
                self.add("boot", true, format!("up {} s after power on{how}", outcome.took.as_secs()), Vec::new());
                // Of one that was killed the node has to say that it had need of it.
                if outcome.killed_after.is_none() {
                    self.add(
                        "failover",
                        false,
                        "the second server had served next to nothing when the node was up, so it was not killed: test again",
                        Vec::new(),
                    );
                }
            }
            Some(reason) => {
                let console = Log { of: "console".into(), text: console(CONSOLE) };
                self.add("boot", false, reason.clone(), vec![console]);
                // Before that nothing is known of it.
                if let Some(state) = &outcome.killed_after {
                    let detail =
                        format!("one of two servers was killed in state '{state}', and the node did not come up");
                    self.add("failover", false, detail, Vec::new());
                }
            }
        }
    }
}

/// For people.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let word = if check.good { "good" } else { "BAD" };
            writeln!(f, "  {word:<5} {:<9} {}", check.name, printable(&check.detail))?;
        }
        for log in self.checks.iter().flat_map(|check| &check.logs) {
            writeln!(f, "--- {}", printable(&log.of))?;
            for line in log.text.lines() {
                writeln!(f, "{}", printable(line))?;
            }
        }
        let verdict = if self.good { "good" } else { "bad" };
        write!(f, "{}: {verdict}", printable(&self.image.display().to_string()))
    }
}

/// What a machine said may hold anything; a terminal gets none of its control characters.
fn printable(text: &str) -> String {
    crate::cmd::printable(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_boot_says_how_it_bore_the_loss_of_a_server() {
        for (failure, killed_after, expected) in [
            (None, Some("switch-root"), &[("boot", true)][..]),
            // Nothing was shown where nobody had need of that server.
            (None, None, &[("boot", true), ("failover", false)]),
            (Some("it is not up"), Some("switch-root"), &[("boot", false), ("failover", false)]),
            (Some("it is not up"), None, &[("boot", false)]),
        ] {
            let outcome = Outcome {
                failure: failure.map(str::to_owned),
                took: Duration::from_secs(80),
                killed_after: killed_after.map(str::to_owned),
                states: Vec::new(),
            };
            let mut verdict = Verdict::new(Path::new("a.moor"), "00", false);
            verdict.boot(&outcome, |lines| format!("the last {lines} lines"));
            let found: Vec<_> = verdict.checks.iter().map(|check| (check.name, check.good)).collect();
            assert_eq!((&found[..], verdict.good), (expected, expected.iter().all(|(_, good)| *good)));
            let logs: Vec<&str> = verdict.checks[0].logs.iter().map(|log| log.text.as_str()).collect();
            assert_eq!(logs, if failure.is_some() { vec!["the last 40 lines"] } else { Vec::new() });
        }
    }

    #[test]
    fn one_bad_finding_makes_it_bad_and_its_log_is_shown() {
        let mut verdict = Verdict::new(Path::new("a.moor"), "00", false);
        verdict.add("ssh", true, "root may log in", Vec::new());
        assert!(verdict.good);
        let log = Log { of: "x.service".into(), text: "no such\u{1b}[2Jfile\nend".into() };
        verdict.add("services", false, "failed: x.service", vec![log]);
        verdict.add("memory", true, "fine", Vec::new());
        assert!(!verdict.good);
        let text = verdict.to_string();
        assert!(text.contains("  BAD   services  failed: x.service\n"), "{text}");
        assert!(text.contains("--- x.service\nno such\\u{1b}[2Jfile\nend\n"), "{text}");
        assert!(text.ends_with("a.moor: bad"), "{text}");
        let json = serde_json::to_value(&verdict).expect("writes");
        assert_eq!(json["good"], false);
        assert_eq!(json["checks"][1]["logs"][0]["of"], "x.service");
        assert_eq!(json["checks"][0].get("logs"), None);
    }
}
