//! `make demo`: a server, an image and a node in a VM, from nothing to `booted`, with progress. On a terminal it stays until
//! Ctrl-C; without one it logs in by ssh itself, shows that, and ends. What it made is removed at the end.

use anyhow::Context as _;
use moor_lab::process::wait_for;
use moor_lab::scenario::{NODE, Scenario};
use moor_lab::{Swtpm, Vm};
use nix::sys::signal::{SigSet, Signal};
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// From power on to `booted`, in emulation on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(480);

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> anyhow::Result<()> {
    // Before any thread or child is made: Ctrl-C is then waited for, and everything is taken down in order.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("blocking signals")?;
    let interrupts = signals;
    std::thread::spawn(move || watch_interrupt(interrupts));

    let begin = Instant::now();
    let mut say = |what: &str| println!("[{:5.1} s] {what}", begin.elapsed().as_secs_f64());
    say("Mooring demo: a server, a sealed image, and a node in a VM");
    let dir = tempfile::Builder::new().prefix("moor-demo-").tempdir().context("making a folder for the demo")?;
    // moord runs as another user and has to reach its own folder in here.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    REMOVE.set(dir.path().to_owned()).ok();

    let mut scenario = Scenario::prepare(dir.path(), &mut say)?;
    scenario.member.moor_ok(&["arm", NODE])?;
    say("the node is armed for one enrolment; switching it on (QEMU, software emulation, with a TPM 2.0)");
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    let started = Instant::now();
    let mut vm = scenario.power_on("vm", &tpm, 2222)?;
    follow(&scenario, &mut vm, &mut say)?;
    scenario.steps.push(moor_lab::scenario::Step { name: "node: power on to booted".into(), took: started.elapsed() });

    report(&scenario, &vm, dir.path())?;
    if std::io::stdout().is_terminal() {
        println!("\nThe node stays up until you press Ctrl-C.");
        while vm.is_running() {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    println!("[{:5.1} s] taking everything down", begin.elapsed().as_secs_f64());
    Ok(())
}

/// The folder that an interrupted demo removes.
static REMOVE: std::sync::OnceLock<std::path::PathBuf> = std::sync::OnceLock::new();

/// Ends the demo on a signal. Children die with the main thread (their parent-death signal); the folder is removed here.
fn watch_interrupt(signals: SigSet) {
    if signals.wait().is_ok() {
        println!("\ndemo: stopping; removing what was made");
        if let Some(dir) = REMOVE.get() {
            let _ = std::fs::remove_dir_all(dir);
        }
        std::process::exit(130);
    }
}

/// Shows each state as it comes, until the node is booted.
fn follow(scenario: &Scenario, vm: &mut Vm, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let (mut seen, mut console_seen) = (0, 0);
    wait_for("the node's state 'booted'", BOOT_LIMIT, || {
        // Until the node has a token, only its console tells how far it is.
        let console = vm.console();
        for line in console.get(console_seen..).unwrap_or_default().lines().filter(|line| line.contains("moor-agent:"))
        {
            if seen == 0 {
                say(&format!("  console: {}", line.trim()));
            }
        }
        console_seen = console.rfind('\n').map_or(0, |end| end + 1);
        let states = scenario.states()?;
        let mut booted = false;
        for event in states.iter().skip(seen) {
            say(&format!("  {NODE}: {} {}", event.state, event.detail));
            anyhow::ensure!(event.state != "failed", "the node failed: {}", event.detail);
            booted |= event.state == "booted";
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
    let states = scenario.states()?;
    println!("\nThe node's own stages (seconds since its kernel started; emulated)");
    for event in &states {
        if event.uptime_ms > 0 {
            println!("  {:<14} {:7.1}  {}", event.state, event.uptime_ms as f64 / 1000.0, event.detail);
        }
    }
    let booted = states.iter().rev().find(|event| event.state == "booted").context("no state 'booted'")?;
    let figure = |name: &str| booted.figures.get(name).copied();
    println!("\nFigures");
    if let Some(fetched) = figure("image.bytes_fetched") {
        println!(
            "  fetched {:.1} MiB of an image of {:.1} MiB ({:.1} %)",
            mib(fetched),
            mib(scenario.image_size),
            fetched as f64 * 100.0 / scenario.image_size as f64
        );
    }
    if let (Some(total), Some(available)) = (figure("memory.total"), figure("memory.available")) {
        println!("  memory: {:.0} MiB of {:.0} MiB in use", mib(total - available.min(total)), mib(total));
    }

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
        println!("  root@{NODE}# {command}\n    {}", scenario.on_node(vm, command)?.replace('\n', "\n    "));
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
