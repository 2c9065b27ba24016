//! `imgutil exec`.

use crate::exec::{self, Bind, ExecError, Network, Options, SignalWatch, Window};
use anyhow::Context;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Run a command in a root tree like in a container
///
/// The command has its own processes, mounts, /dev, /proc and /run, the host's network and resolver, and few capabilities.
/// Services that packages bring are not started. Without COMMAND the tree's shell is run. The exit status is the
/// command's; 128 and the signal's number if a signal ended it; 127 or 126 if it was not found or could not be run.
///
/// An ordinary user can run commands in trees of his own: he is root in there, and his subordinate ids (/etc/subuid,
/// /etc/subgid) are the image's other users.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show a file or directory of the host in the tree, read-only unless :rw is given; DST is SRC if left out
    #[arg(short = 'v', long = "volume", value_name = "SRC[:DST[:rw]]")]
    binds: Vec<Bind>,
    /// The network that the command sees: the host's, or none but its own loopback
    #[arg(long, value_enum, default_value = "host")]
    net: Net,
    /// The root tree
    tree: PathBuf,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Net {
    Host,
    None,
}

/// Runs it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut options = Options::in_tree(&args.tree, args.command)?;
    options.binds = args.binds;
    options.network = match args.net {
        Net::Host => Network::Host,
        Net::None => Network::None,
    };
    options.terminal = Window::of_this_process()?;
    let signals = SignalWatch::start(&exec::PASSED_ON)?;
    match exec::run(&options, Some(&signals)) {
        Ok(finished) => {
            for warning in &finished.warnings {
                eprintln!("imgutil: warning: {warning}");
            }
            Ok(ExitCode::from(finished.outcome.code()))
        }
        Err(ExecError::NotStarted { code, reason }) => {
            eprintln!("imgutil: error: {reason}");
            Ok(ExitCode::from(code))
        }
        Err(error) => Err(error).with_context(|| format!("exec in '{}'", args.tree.display())),
    }
}
