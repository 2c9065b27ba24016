//! `make demo`: a server, an image and a node in a VM, from nothing to `booted`, with progress. On a terminal it stays until
//! Ctrl-C; without one it logs in by ssh itself, shows that, and ends. What it made is removed at the end.

use anyhow::Context as _;
use moor_lab::figures::Figures;
use moor_lab::process::{tied, wait_for};
use moor_lab::scenario::{BOOT_LIMIT, NODE, Scenario, Step};
use moor_lab::{Swtpm, Vm, vm};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::io::IsTerminal as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// After so long without news, the last line of the console shows that the node is alive.
const QUIET: Duration = Duration::from_secs(10);

/// How the supervisor calls the demo itself, with the folder for everything it makes.
const INSIDE: &str = "--inside";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let result = match (arguments.next(), arguments.next()) {
        (None, _) => supervise(),
        (Some(word), Some(dir)) if word == INSIDE => demo(Path::new(&dir)).map(|()| ExitCode::SUCCESS),
        _ => Err(anyhow::anyhow!("moor-demo takes no arguments")),
    };
    result.unwrap_or_else(|error| {
        eprintln!("demo: error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs the demo as a child and takes everything down afterwards, however it ends: what the demo starts dies with it (parent-death
/// signals), and only then is its folder removed, when nobody writes into it any more.
fn supervise() -> anyhow::Result<ExitCode> {
    // Before any thread is made, so that all of them have it.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("blocking signals")?;
    let dir = tempfile::Builder::new().prefix("moor-demo-").tempdir().context("making a folder for the demo")?;
    // moord runs as another user and has to reach its own folder in here.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;

    let program = std::env::current_exe().context("finding this program")?;
    // A process group of its own: Ctrl-C reaches the supervisor alone.
    let mut child = tied(program).arg(INSIDE).arg(dir.path()).process_group(0).spawn().context("starting the demo")?;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id out of range")?);
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            flag.store(true, Ordering::SeqCst);
            println!("\ndemo: stopping");
            // Not reaped before the main thread's wait, so the number is still its own.
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let status = child.wait().context("waiting for the demo")?;
    println!("demo: removing what was made");
    let path = dir.keep();
    wait_for("the removal of the demo's folder", Duration::from_secs(20), || {
        Ok(std::fs::remove_dir_all(&path).is_ok() || !path.exists())
    })?;
    Ok(match (interrupted.load(Ordering::SeqCst), status.success()) {
        (true, _) => ExitCode::from(130),
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::FAILURE,
    })
}

fn demo(dir: &Path) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut say = |what: &str| println!("[{:5.1} s] {what}", begin.elapsed().as_secs_f64());
    say("Mooring demo: a server, a sealed image, and a node in a VM");
    let mut scenario = Scenario::prepare(dir, &mut say)?;
    scenario.kvm = vm::kvm_works(&scenario.namespace, dir, &scenario.kernel());
    scenario.member.moor_ok(&["arm", NODE])?;
    let how = if scenario.kvm { "KVM" } else { "software emulation" };
    say(&format!("the node is armed for one enrolment; switching it on (QEMU, {how}, with a TPM 2.0)"));
    let tpm = Swtpm::start(&dir.join("tpm"))?;
    let started = Instant::now();
    let mut vm = scenario.power_on("vm", &tpm, 2222)?;
    follow(&scenario, &mut vm, &mut say)?;
    scenario.steps.push(Step { name: "node: power on to booted".into(), took: started.elapsed() });

    report(&scenario, &vm, dir)?;
    if std::io::stdout().is_terminal() {
        println!("\nThe node stays up until you press Ctrl-C.");
        while vm.is_running() {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    println!("[{:5.1} s] taking everything down", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Shows each state as it comes, until the node is booted.
fn follow(scenario: &Scenario, vm: &mut Vm, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let (mut seen, mut console_seen, mut heard) = (0, 0, false);
    let mut quiet_since = Instant::now();
    wait_for("the node's state 'booted'", BOOT_LIMIT, || {
        // Until the node has a token, only its console tells how far it is.
        let console = vm.console();
        for line in console.get(console_seen..).unwrap_or_default().lines().filter(|line| line.contains("moor-agent:"))
        {
            if !heard {
                say(&format!("  console: {}", line.trim()));
                quiet_since = Instant::now();
            }
        }
        console_seen = console.rfind('\n').map_or(0, |end| end + 1);
        let states = scenario.states()?;
        let mut booted = false;
        for event in states.iter().skip(seen) {
            say(&format!("  {NODE}: {} {}", event.state, event.detail));
            anyhow::ensure!(event.state != "failed", "the node failed: {}", event.detail);
            booted |= event.state == "booted";
            heard |= event.boot.is_some();
            quiet_since = Instant::now();
        }
        if quiet_since.elapsed() > QUIET {
            say(&format!("  {NODE} is busy; its console shows: {}", vm.console_tail(1).trim()));
            quiet_since = Instant::now();
        }
        seen = states.len();
        anyhow::ensure!(vm.is_running(), "the VM ended");
        std::thread::sleep(Duration::from_millis(450));
        Ok(booted)
    })
    .with_context(|| format!("the node's console ends with:\n{}\n{}", vm.console_tail(30), scenario.member.log_tail()))
}

fn report(scenario: &Scenario, vm: &Vm, dir: &Path) -> anyhow::Result<()> {
    println!("\nStages");
    for step in &scenario.steps {
        println!("  {:<34} {:7.1} s", step.name, step.took.as_secs_f64());
    }
    let figures = Figures::of(&scenario.states()?, scenario.image_size)?;
    println!("\nThe node's own stages (seconds since its kernel started; emulated)");
    for stage in &figures.stages {
        println!("  {:<14} {:7.1}  {}", stage.state, stage.uptime.as_secs_f64(), stage.detail);
    }
    let (fetched, size) = (mib(figures.fetched), mib(scenario.image_size));
    println!("\nFigures");
    println!("  fetched {fetched:.1} MiB of an image of {size:.1} MiB ({:.1} %)", fetched * 100.0 / size);
    println!("  memory: {:.0} MiB of {:.0} MiB in use", mib(figures.in_use), mib(figures.memory));

    println!("\nLog in (no password, no host key question: the SSH authority vouches for the node)");
    let ssh = vm.ssh(&scenario.namespace, NODE, &dir.join("known_hosts"), &dir.join("login"), &[]);
    let words: Vec<String> = ssh.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    println!("  {} {}", ssh.get_program().to_string_lossy(), words.join(" "));
    println!(
        "and ask the server\n  {} --socket {} why {NODE}",
        scenario.bins.path("moor").display(),
        scenario.member.socket().display()
    );
    println!("\nLogged in as root by ssh:");
    for command in ["hostname", "systemctl is-system-running", "findmnt -n -o SOURCE,FSTYPE,SIZE,USED /"] {
        let said = scenario.on_node(vm, command).with_context(|| format!("logging in by ssh to run '{command}'"))?;
        anyhow::ensure!(!said.trim().is_empty(), "'{command}' on the node has said nothing");
        println!("  root@{NODE}# {command}\n    {}", said.replace('\n', "\n    "));
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
