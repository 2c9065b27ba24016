//! `moor-tether fetch`.

use super::source::Source;
use anyhow::{Context as _, Result};
use moor_tether::kmsg::{self, Kmsg};
use moor_tether::progress::Progress;
use moor_tether::ram::{self, Claim, Ram};
use moor_tether::reader::{Https, Reader, Real, Settings};
use moor_tether::root;
use moor_tether::state::{DEFAULT_PATH, Mode, State, StateFile};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Bring a whole sealed image into memory, as the file DIR/image: afterwards no server is needed. What a process has left that was killed on the way
/// is verified, and not fetched again
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Size of the writable layer that is to come, in per cent of the memory: both have to fit
    #[arg(long, value_name = "N", default_value_t = 50)]
    overlay_percent: u16,
    /// Where it is told how far it has come
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    state: PathBuf,
    /// Log to standard error instead of the kernel's log
    #[arg(long)]
    foreground: bool,
    /// Where to put it
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.foreground {
        kmsg::log_to_stderr();
    } else {
        kmsg::log_to_kernel(Kmsg::open());
    }
    let (addresses, unknown) = args.source.addresses()?;
    for why in unknown {
        tracing::warn!("goes on without {why}");
    }
    let (trust, options) = (args.source.authority()?, args.source.options()?);
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = threads.worker_threads(2).enable_all().build().context("cannot start the reader's threads")?;
    let world = Arc::new(Real::new(runtime.handle().clone()));
    let paths = Https::all(addresses, trust.config());
    let reader = runtime.block_on(Reader::open(
        paths,
        world,
        &options,
        Settings { cache: ram::CACHE, ..Settings::default() },
    ))?;
    drop(options);
    let size = reader.size();
    let claim = Claim::new(&args.dir)?;
    let left = claim.left(size)?;
    let held = left.as_ref().map_or(Ok(0), Ram::held)?;
    root::check_memory_for_image(size, held, args.overlay_percent)?;
    let state = StateFile::new(&args.state).with_context(|| format!("cannot write to '{}'", args.state.display()))?;
    let mib = size.div_ceil(1 << 20);
    let ram = if let Some(left) = left {
        tracing::info!("goes on with an image that an earlier try has left: {} of {mib} MiB", held >> 20);
        left
    } else {
        claim.make(size)?
    };
    // From here on the place has a lock of its own.
    drop(claim);
    tracing::info!("brings the whole image into memory: {mib} MiB, from {} servers", reader.figures().members.len());
    let progress = Arc::new(Progress::new(size));
    let now = || State { arrived: Some(progress.arrived(Instant::now())), ..State::of(&reader, Mode::Untethered) };
    let filled = runtime.block_on(async {
        tokio::select! {
            filled = ram.fill(&reader, &progress) => filled,
            never = state.follow(&reader, now) => match never {},
        }
    });
    filled?;
    // What it says stays: nobody changes it any more.
    let last = State { is_whole: true, ..now() };
    state.write(&last).with_context(|| format!("cannot write '{}'", args.state.display()))?;
    ram.keep();
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}
