//! `moor-agent`: parses arguments and calls the library.

use clap::{Parser, Subcommand};
use moor_agent::boot::states::EndAction;
use moor_agent::handover::{RUN_DIR, RunDir};
use moor_agent::{boot, console, identity, onboot, process, scripts};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The boot ended, the stage is closed: the initramfs may show a shell or reboot. Any other status but 0 says that the stage may be
/// open, and then nobody may get a shell.
const HELD: u8 = 3;

/// How long the reason stands on the console before a reboot.
const READ_TIME: Duration = Duration::from_secs(20);

/// The node's agent.
#[derive(Parser)]
#[command(name = "moor-agent", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boots this node, in the initramfs: finds a member, proves the node's identity, brings its root to DIR, closes the boot stage.
    /// Exit status 0: switch to DIR; 3: it failed and the boot stage is closed; another: the boot stage may be open.
    Boot {
        /// Where the root is made.
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
        /// The program that reads images.
        #[arg(long, value_name = "FILE", default_value = "/usr/bin/moor-tether")]
        tether: PathBuf,
    },
    /// Closes the boot stage, before a shell is shown in the initramfs. Exit status 0: it is closed.
    CloseStage,
    /// Accompanies the running system: reports that it is up, runs the phase 'onboot', renews certificates.
    Onboot,
    /// Prints the states of a boot as a table.
    States,
    /// Becomes a script of a phase.
    #[command(hide = true)]
    RunScript {
        #[arg(long)]
        root: Option<PathBuf>,
        script: PathBuf,
    },
}

fn main() -> ExitCode {
    moor_api::fail_stop::abort_on_panic();
    let command = Cli::parse().command;
    if let Command::RunScript { root, script } = &command {
        return match scripts::become_script(root.as_deref(), script) {
            Ok(never) => match never {},
            Err(error) => failure(&error),
        };
    }
    if let Command::States = command {
        print!("{}", boot::states::table_text());
        return ExitCode::SUCCESS;
    }
    process::protect();
    identity::silence_libtss2();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter("warn,mozim=error").init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure(&anyhow::Error::new(error).context("starting the runtime")),
    };
    let run = RunDir::new(RUN_DIR);
    match command {
        Command::Boot { root, tether } => {
            if let Err(error) = process::check_initramfs() {
                return failure(&error);
            }
            let options = boot::Options {
                root,
                site: moor_api::trust::SITE_FILE.into(),
                run,
                command_line: boot::kernel_arguments::COMMAND_LINE.into(),
                tether,
            };
            let (end, reason) = runtime.block_on(boot::run(options));
            finish(end, &reason)
        }
        Command::CloseStage => match close_stage(&run) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failure(&error),
        },
        Command::Onboot => match runtime.block_on(onboot::run(run)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failure(&error.into()),
        },
        Command::States | Command::RunScript { .. } => ExitCode::SUCCESS,
    }
}

fn failure(error: &anyhow::Error) -> ExitCode {
    console::say("error", &format!("{error:#}"));
    ExitCode::FAILURE
}

fn finish(end: EndAction, reason: &str) -> ExitCode {
    match end {
        EndAction::Ready => ExitCode::SUCCESS,
        EndAction::Reboot => {
            console::say("failed", &format!("{reason}; rebooting in {} s", READ_TIME.as_secs()));
            std::thread::sleep(READ_TIME);
            process::reboot();
            ExitCode::FAILURE
        }
        EndAction::Hold | EndAction::Back(_) => {
            console::say("held", "the boot stage is closed: this machine can ask for no secrets until a cold reboot");
            ExitCode::from(HELD)
        }
    }
}

fn close_stage(run: &RunDir) -> anyhow::Result<()> {
    run.create()?;
    let soft_key = run.soft_key();
    if soft_key.exists() {
        // Whoever gets the shell could open a session with it.
        std::fs::remove_file(&soft_key)?;
    }
    let mut identity = identity::Identity::open(&soft_key, Duration::from_secs(10))?;
    // Also when it seems closed: that says so of one bank, and this closes all of them.
    identity.close_boot_stage()?;
    if !identity.is_tpm() {
        std::fs::remove_file(&soft_key)?;
    }
    Ok(())
}
