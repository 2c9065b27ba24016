//! What is looked at on a node that is up, by ssh and with nothing but what every node has.

use super::Subject;
use super::collective::{NODE, SECOND_PORT, Site};
use super::verdict::{Log, Verdict};
use crate::progress::bytes_text;
use anyhow::{Context as _, Result, anyhow, bail};
use moor_vm::{Namespace, Vm};
use serde::Deserialize;
use std::time::Duration;

/// How long one command may take on the node.
const COMMAND: Duration = Duration::from_mins(3);
/// Lines of a failed unit's journal.
const JOURNAL: usize = 40;
/// What is written on the overlay and taken away again, in MiB. It cannot be compressed.
const WRITTEN: u64 = 32;

/// The way to the node.
pub(super) struct Login<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) vm: &'a Vm,
    pub(super) site: &'a Site,
}

impl Login<'_> {
    /// Runs a command as root; its output.
    fn run(&self, command: &str) -> Result<String> {
        let bounded = format!("timeout {} sh -c '{}'", COMMAND.as_secs(), command.replace('\'', "'\\''"));
        let site = self.site;
        let output = self.vm.ssh_output(self.namespace, NODE, &site.known_hosts, &site.login, &[&bounded])?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "'{command}' ended with {}: {}",
                output.status,
                said.trim().lines().last().unwrap_or("it said nothing")
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }
}

/// All of them. What cannot be looked at is bad: the same machine has just said that it is up.
/// `killed` is the state in which the second server was killed, if it was.
pub(super) fn run(login: &Login<'_>, subject: &Subject, killed: Option<&str>, verdict: &mut Verdict) {
    let mut add = |name: &'static str, found: Result<Found>| match found {
        Ok(Found { good, detail, logs }) => verdict.add(name, good, detail, logs),
        Err(error) => verdict.add(name, false, format!("{error:#}"), Vec::new()),
    };
    let ssh = ssh(login);
    let reachable = ssh.as_ref().is_ok_and(|found| found.good);
    add("ssh", ssh);
    if !reachable {
        return;
    }
    let tether = tether(login);
    if let Some(state) = killed {
        add("failover", tether.as_ref().map(|tether| failover(tether, state)).map_err(|error| anyhow!("{error:#}")));
    }
    add("root", tether.and_then(|tether| root(login, subject, &tether)));
    add("overlay", overlay(login));
    add("services", services(login));
    add("memory", memory(login));
}

/// What was found.
struct Found {
    good: bool,
    detail: String,
    logs: Vec<Log>,
}

impl Found {
    fn new(good: bool, detail: impl Into<String>) -> Self {
        Self { good, detail: detail.into(), logs: Vec::new() }
    }
}

fn ssh(login: &Login<'_>) -> Result<Found> {
    let name = login.run("uname -n")?;
    Ok(Found::new(
        name == NODE,
        format!("root logs in as on any node, the host key is certified; the machine calls itself '{name}'"),
    ))
}

/// A part of what `moor-tether status --json` prints.
#[derive(Debug, Deserialize)]
struct Tether {
    digest: String,
    bytes_fetched: u64,
    members: Vec<Server>,
}

#[derive(Debug, Deserialize)]
struct Server {
    url: String,
    bytes: u64,
    faults: u64,
}

fn tether(login: &Login<'_>) -> Result<Tether> {
    let text = login.run("moor-tether status --json")?;
    serde_json::from_str(&text).context("the tether's status makes no sense")
}

/// Whether the node had something of the server that was killed, so that it had to go on with the other one.
fn failover(tether: &Tether, state: &str) -> Found {
    let killed = format!(":{SECOND_PORT}");
    let is_killed = |server: &&Server| server.url.split('/').nth(2).is_some_and(|place| place.ends_with(&killed));
    match tether.members.iter().find(is_killed).map_or(0, |server| server.bytes) {
        0 => Found::new(
            false,
            format!("one of two servers was killed in state '{state}', but the node had nothing of it: test again"),
        ),
        bytes => Found::new(
            true,
            format!(
                "one of two servers was killed in state '{state}', after the node had had {} of the root from it",
                bytes_text(bytes)
            ),
        ),
    }
}

fn root(login: &Login<'_>, subject: &Subject, tether: &Tether) -> Result<Found> {
    let kind = login.run("findmnt -n -o FSTYPE /")?;
    if kind != "overlay" {
        return Ok(Found::new(false, format!("the root is {kind}, not an overlay on the image")));
    }
    let below = login.run("findmnt -n -o FSTYPE /run/mooring/root/lower")?;
    if tether.digest != subject.digest {
        return Ok(Found::new(false, format!("the root is another image, {}", tether.digest)));
    }
    let servers: Vec<String> = tether
        .members
        .iter()
        .map(|server| {
            let place = server.url.split('/').nth(2).unwrap_or_default();
            format!("{} by {place} ({} faults)", bytes_text(server.bytes), server.faults)
        })
        .collect();
    Ok(Found::new(
        below == "squashfs",
        format!(
            "tethered, of the right digest, {below} below; {} of {} fetched: {}",
            bytes_text(tether.bytes_fetched),
            bytes_text(subject.size),
            servers.join(", ")
        ),
    ))
}

fn overlay(login: &Login<'_>) -> Result<Found> {
    let device = login.run("findmnt -n -o SOURCE /run/mooring/root/writable")?;
    let Some(zram) = device.strip_prefix("/dev/zram") else {
        return Ok(Found::new(false, format!("the writable layer is on '{device}', not on compressed memory")));
    };
    // The third number is the memory that the disk takes (kernel, admin-guide/blockdev/zram.rst).
    let script = format!(
        "used() {{ sync; read -r data stored used rest < /sys/block/zram{zram}/mm_stat; echo \"$used\"; }}; \
         set -e; used; dd if=/dev/urandom of=/var/imgutil-test bs=1M count={WRITTEN} 2>/dev/null; used; \
         rm /var/imgutil-test; used"
    );
    let text = login.run(&script)?;
    let figures: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    let [before, full, after] = figures[..] else { bail!("the memory disk's figures make no sense: {text}") };
    let (taken, kept) = (full.saturating_sub(before), after.saturating_sub(before));
    let written = WRITTEN << 20;
    let detail = format!(
        "{} written took {} of memory, {} after they were removed",
        bytes_text(written),
        bytes_text(taken),
        bytes_text(kept)
    );
    // A little more or less is what else the system did meanwhile.
    Ok(Found::new(taken >= written / 8 * 7 && kept <= written / 4, detail))
}

fn services(login: &Login<'_>) -> Result<Found> {
    // Its status says the same as its word.
    let word = login.run("systemctl is-system-running --wait || true")?;
    let listing = login.run("systemctl list-units --failed --plain --no-legend --no-pager")?;
    let failed: Vec<&str> = listing.lines().filter_map(|line| line.split_whitespace().next()).collect();
    if failed.is_empty() {
        return Ok(Found::new(word == "running", format!("systemd says '{word}'")));
    }
    let logs = failed
        .iter()
        .map(|unit| {
            let command = format!("journalctl -b --no-pager -o short-monotonic -n {JOURNAL} -u \"{unit}\"");
            let text = login.run(&command).unwrap_or_else(|error| format!("no journal: {error:#}"));
            Log { of: (*unit).to_owned(), text }
        })
        .collect();
    Ok(Found { good: false, detail: format!("systemd says '{word}'; failed: {}", failed.join(", ")), logs })
}

fn memory(login: &Login<'_>) -> Result<Found> {
    let text = login.run("cat /proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .with_context(|| format!("/proc/meminfo has no {name}"))
    };
    let (total, available) = (field("MemTotal")? << 10, field("MemAvailable")? << 10);
    let detail = format!("{} of {} are free for programs", bytes_text(available), bytes_text(total));
    Ok(Found::new(available >= total / 10, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_the_node_had_nothing_of_shows_nothing_by_its_death() {
        for (bytes, good) in [("[700, 0]", false), ("[700, 4096]", true), ("[0, 1]", true), ("[5]", false)] {
            let bytes: Vec<u64> = serde_json::from_str(bytes).expect("numbers");
            let members: Vec<String> = bytes
                .iter()
                .zip(["https://10.0.2.2:8443/v1/blobs/aa", "https://10.0.2.2:8444/v1/blobs/aa"])
                .map(|(bytes, url)| format!("{{\"url\": \"{url}\", \"bytes\": {bytes}, \"faults\": 1}}"))
                .collect();
            let text = format!("{{\"digest\": \"aa\", \"bytes_fetched\": 1, \"members\": [{}]}}", members.join(","));
            let found = failover(&serde_json::from_str(&text).expect("a status"), "switch-root");
            assert_eq!(found.good, good, "{bytes:?}: {}", found.detail);
            assert!(
                found.detail.starts_with("one of two servers was killed in state 'switch-root'"),
                "{}",
                found.detail
            );
        }
    }
}
