//! `imgutil test`.

use crate::cmd::error_line;
use crate::exec::Outcome;
use crate::trial::{self, Options};
use anyhow::Result;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The test could not be made.
const NO_VERDICT: u8 = 2;

/// Boots an image in a virtual machine and says whether it is good. Exit status: 0 good, 1 bad, 2 could not test.
///
/// The machine has a TPM and gets the image as a node does: from two throw-away servers, one of which is killed on the way. Then its
/// root, its writable layer, its services and its memory are looked at by ssh; of units that failed, the journal is shown. Everything
/// happens in namespaces that end with the test; moord must be beside imgutil or in PATH, and QEMU, swtpm and ssh be installed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgutil test node.moor --key-file node.key\n  imgutil test node.moor --key-file node.key --trust builder.pub --json"
)]
pub struct Args {
    /// The image.
    #[arg(value_name = "FILE.moor")]
    image: PathBuf,
    /// The image's key; `-` is standard input.
    #[arg(long, value_name = "KEY")]
    key_file: Option<PathBuf>,
    /// The node must find a signature (FILE.moor.sig) by one of these keys: a file of ssh-ed25519 lines, or one such line.
    #[arg(long, value_name = "PUBKEY")]
    trust: Vec<String>,
    /// Memory of the machine in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// How long the boot may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// Print the verdict as JSON.
    #[arg(long)]
    json: bool,
    /// Keep the console and the servers' logs, and say where.
    #[arg(long)]
    keep: bool,
    /// The folder of a test that runs in its cage already.
    #[arg(long, value_name = "DIR", hide = true)]
    caged: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let result = match &args.caged {
        None => enclosed(args),
        Some(dir) => caged(args, dir),
    };
    Ok(result.unwrap_or_else(|error| {
        eprintln!("imgutil: error: {}", error_line(&error));
        ExitCode::from(NO_VERDICT)
    }))
}

/// The same program with the same arguments, where all that it starts ends with it.
fn enclosed(args: &Args) -> Result<ExitCode> {
    let caged = trial::enclosed(
        |dir| {
            let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
            // Behind the subcommand, which is the first: `--` may follow.
            words.splice(1..1, ["--caged".into(), dir.into()]);
            words
        },
        args.keep,
    )?;
    if let Some(logs) = caged.logs {
        eprintln!("imgutil: the logs are in '{}'", logs.display());
    }
    Ok(match caged.outcome {
        Outcome::Exited(code) => ExitCode::from(code),
        signaled @ Outcome::Signaled(_) => ExitCode::from(signaled.code()),
    })
}

fn caged(args: &Args, dir: &std::path::Path) -> Result<ExitCode> {
    let verdict = trial::run(
        &Options {
            image: args.image.clone(),
            key_file: args.key_file.clone(),
            trust: args.trust.clone(),
            memory: args.memory,
            limit: Duration::from_secs(args.timeout),
        },
        dir,
    )?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        println!("{verdict}");
    }
    Ok(if verdict.good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
