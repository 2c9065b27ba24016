//! `imgutil exec`.

mod changes;

use crate::exec::{self, Bind, ExecError, Network, Options, Repository, SignalWatch, Trial, Window};
use anyhow::Context;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Run a command in a root tree like in a container
///
/// The command has its own processes, mounts, /dev, /proc and /run, the host's network and resolver, and few capabilities.
/// Services that packages bring are not started. Without COMMAND the tree's shell is run. The exit status is the
/// command's; 128 and the signal's number if a signal ended it; 127 or 126 if it was not found or could not be run.
///
/// An ordinary user can run commands in trees of his own: he is root in there, and his subordinate ids (/etc/subuid,
/// /etc/subgid) are the image's other users.
///
/// With --try the tree stays as it is: the command's changes are shown afterwards, and kept or dropped.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgutil exec ./tree\n  imgutil exec ./tree -- apt-get install -y htop\n  imgutil exec --repo ./debs ./tree -- apt-get install -y own-package\n  imgutil exec --try -v /srv/packages ./tree -- dpkg -i /srv/packages/mine.deb"
)]
pub struct Args {
    /// Show a file or directory of the host in the tree, read-only unless :rw is given; DST is SRC if left out
    #[arg(short = 'v', long = "volume", value_name = "SRC[:DST[:rw]]")]
    binds: Vec<Bind>,
    /// Show a repository beside the image's own: a directory of .deb files, one with repodata, or a source file
    #[arg(long = "repo", value_name = "FILE|DIR")]
    repositories: Vec<Repository>,
    /// The network that the command sees: the host's, or none but its own loopback
    #[arg(long, value_enum, default_value = "host")]
    net: Net,
    /// Try it: show what the command changes in the tree, and ask whether to keep it (without a terminal it is dropped)
    #[arg(long)]
    r#try: bool,
    /// With --try: keep the changes without asking, if the command succeeds
    #[arg(long, requires = "try", conflicts_with = "drop")]
    keep: bool,
    /// With --try: drop the changes without asking
    #[arg(long, requires = "try")]
    drop: bool,
    /// With --try: print the changes as JSON on standard output; what the command prints goes to standard error
    #[arg(long, requires = "try")]
    json: bool,
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
    options.repositories = args.repositories;
    options.network = match args.net {
        Net::Host => Network::Host,
        Net::None => Network::None,
    };
    options.terminal = if args.json { None } else { Window::of_this_process()? };
    if args.json {
        options.stdio = Some(changes::streams_for_json().context("cannot redirect the command's output")?);
    }
    let context = || format!("exec in '{}'", args.tree.display());
    let signals = SignalWatch::start(&exec::PASSED_ON)?;
    let trial = match &options.root {
        exec::Root::Tree(tree) if args.r#try => Some(Arc::new(Trial::begin(tree).with_context(context)?)),
        _ => None,
    };
    options.trial.clone_from(&trial);
    let result = exec::run(&options, Some(&signals));
    drop(options);
    // The user may end the question with Ctrl-C.
    drop(signals);
    let code = match result {
        Ok(finished) => {
            for warning in &finished.warnings {
                eprintln!("imgutil: warning: {warning}");
            }
            Ok(finished.outcome.code())
        }
        Err(ExecError::NotStarted { code, reason }) => {
            eprintln!("imgutil: error: {reason}");
            Ok(code)
        }
        Err(error) => Err(error),
    };
    if let Some(trial) = trial.and_then(Arc::into_inner) {
        let choice = match (&code, args.keep, args.drop) {
            // A command that failed is not what the user wanted to keep without a look.
            (Ok(0), true, _) => changes::Choice::Keep,
            (Ok(_), false, false) => changes::Choice::Ask,
            _ => changes::Choice::Drop,
        };
        changes::settle(trial, choice, args.json, code.is_ok()).with_context(context)?;
    }
    Ok(ExitCode::from(code.with_context(context)?))
}
