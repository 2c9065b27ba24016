//! From power on to `booted`, with one of the servers killed on the way.

use super::collective::{MAC, NODE, Site, UUID};
use super::standstill::Standstill;
use anyhow::{Context as _, Result};
use moor_api::admin::{Refusal, StatusEvent};
use moor_api::client::admin::AdminClient;
use moor_vm::{Member, Namespace, Swtpm, Vm, VmOptions};
use std::path::Path;
use std::time::{Duration, Instant};

/// Port on the namespace's loopback that leads to the machine's sshd.
const SSH_PORT: u16 = 2222;
/// How often the server is asked how far the node is.
const POLL: Duration = Duration::from_millis(500);
/// So much of an image, at least, has come from a server that is worth killing.
const SERVED: u64 = 64 << 10;
/// The state from which the machine lives of its tether: the root is there, the system's own start is all to come.
const TETHERED: &str = "switch-root";

/// What is switched on.
pub(super) struct Machine<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) dir: &'a Path,
    pub(super) memory: u32,
    pub(super) kvm: bool,
    pub(super) limit: Duration,
}

/// How a boot ended.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Why it is not up.
    pub(super) failure: Option<String>,
    pub(super) took: Duration,
    /// The state in which the second server was killed.
    pub(super) killed_after: Option<String>,
    pub(super) states: Vec<StatusEvent>,
}

impl Outcome {
    pub(super) fn is_booted(&self) -> bool {
        self.failure.is_none()
    }
}

/// Boots the node; returns when it is up, has failed, or the time is over.
///
/// # Errors
/// The machine or its TPM could not be made, or the server does not answer: nothing that the image could be blamed for.
pub(super) fn boot(machine: &Machine<'_>, site: &mut Site, say: &dyn Fn(&str)) -> Result<(Vm, Outcome)> {
    let tpm = Swtpm::start(&machine.dir.join("tpm"))?;
    let options = VmOptions {
        kernel: site.kernel.clone(),
        initramfs: site.initramfs.clone(),
        command_line: site.command_line.clone(),
        uuid: UUID.into(),
        mac: MAC.into(),
        memory: machine.memory,
        ssh_port: SSH_PORT,
        disks: Vec::new(),
        kvm: machine.kvm,
    };
    let begin = Instant::now();
    let idle = served(&site.second);
    let mut vm = Vm::start(machine.namespace, &machine.dir.join("vm"), &options, Some(&tpm))?;
    // It ends with the machine, which has its socket.
    vm.keep(tpm);
    let mut outcome = Outcome { failure: None, took: Duration::ZERO, killed_after: None, states: Vec::new() };
    let mut standstill = Standstill::default();
    loop {
        std::thread::sleep(POLL);
        let known = site.runtime.block_on(known(&site.first)).context("the test's own server does not answer")?;
        let Known { states, refusals } = known;
        for event in states.iter().skip(outcome.states.len()) {
            say(&format!("  {}: {}", event.state, event.detail));
        }
        outcome.states = states;
        outcome.took = begin.elapsed();
        let word = |word: &str| outcome.states.iter().find(|event| event.state == word);
        // First: what is up needs no server to come up, and the death of one shows nothing.
        if word("booted").is_some() {
            break;
        }
        if outcome.killed_after.is_none() && word(TETHERED).is_some() && served(&site.second) > idle + SERVED {
            site.second.kill();
            let state = outcome.states.last().map(|event| event.state.clone());
            say("  (killing the second server, which has served a part of the root)");
            outcome.killed_after = state;
        }
        if let Some(failed) = word("failed") {
            outcome.failure = Some(format!("the node says that it failed: {}", failed.detail));
            break;
        }
        if let Err(error) = vm.check_running() {
            outcome.failure =
                Some(format!("the machine went off: {}", error.to_string().lines().next().unwrap_or_default()));
            break;
        }
        if let Some(reason) = standstill.look(&outcome.states, &refusals, Instant::now()) {
            outcome.failure = Some(format!("the node was refused, and waits for somebody to mend it: {reason}"));
            break;
        }
        if begin.elapsed() > machine.limit {
            let last = outcome.states.last().map_or("nothing", |event| event.state.as_str());
            outcome.failure = Some(format!("it is not up after {} s; its last state: {last}", machine.limit.as_secs()));
            break;
        }
    }
    Ok((vm, outcome))
}

/// What a server knows of the node.
struct Known {
    states: Vec<StatusEvent>,
    refusals: Vec<Refusal>,
}

async fn known(member: &Member) -> Result<Known> {
    let mut client = AdminClient::unix(&member.socket()).await?;
    let mut lines = client.status(Some(NODE), true, false).await?;
    let mut states = Vec::new();
    while let Some(event) = lines.next().await? {
        // The server's own words (pending) come before the first boot.
        if event.boot.is_some() {
            states.push(event);
        }
    }
    Ok(Known { states, refusals: client.why(NODE).await?.refusals })
}

/// Bytes that a server has written so far, to sockets above all (`wchar`, proc(5)).
fn served(member: &Member) -> u64 {
    let Some(id) = member.id() else { return 0 };
    let text = std::fs::read_to_string(format!("/proc/{id}/io")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("wchar:")?.trim().parse().ok()).unwrap_or(0)
}
