//! `moor-tether mount`.

use super::source::{self, Source};
use anyhow::{Context as _, Result};
use moor_tether::apart::Outside;
use moor_tether::control::{self, Control, Servers};
use moor_tether::disk::DiskCache;
use moor_tether::kmsg::{self, Kmsg};
use moor_tether::mount::{ImageFile, Mount};
use moor_tether::pressure::Pressure;
use moor_tether::reader::{Https, Reader, Real, Settings};
use moor_tether::state::{DEFAULT_PATH, Mode, State, StateFile};
use moor_tether::{daemon, seccomp, survive};
use nix::mount::{MntFlags, umount2};
use std::convert::Infallible;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Export a sealed image on HTTPS servers as the file DIR/image
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Chunks that earlier boots read, a JSON list in their order: they are fetched before anybody asks
    #[arg(long, value_name = "FILE")]
    prefetch: Option<PathBuf>,
    /// Keep sealed chunks in this partition or file, over restarts. One that cannot be used is done without
    #[arg(long, value_name = "FILE")]
    disk_cache: Option<PathBuf>,
    /// Its size in MiB at most, where it is a file. Without it the file has to be there, and grows as large as the image wants
    #[arg(long, value_name = "N", requires = "disk_cache")]
    disk_cache_size: Option<u64>,
    /// Where the tether tells others how it stands. Beside it are its control socket (.sock) and what is read in the first two minutes
    /// (-trace.json)
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    state: PathBuf,
    /// Stay in the foreground, log to standard error, and unmount on SIGTERM and SIGINT
    #[arg(long)]
    foreground: bool,
    /// Where to mount
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if !args.foreground && !daemon::is_background() {
        return daemon::start().context("cannot start the background process");
    }
    let mut refused = if args.foreground { Vec::new() } else { survive::prepare() };
    if !args.foreground {
        // Until it serves, it ends with whoever waits for that: the next try begins in the same place.
        survive::end_with_parent(true).context("cannot follow the process that waits")?;
    }
    // All that is needed by path: later there is none.
    let (addresses, unknown) = args.source.addresses()?;
    refused.extend(unknown.iter().map(ToString::to_string));
    let (trust, options) = (args.source.authority()?, args.source.options()?);
    let prefetch = prefetch(args)?;
    let state = StateFile::new(&args.state).with_context(|| format!("cannot write to '{}'", args.state.display()))?;
    let cache = args.disk_cache.as_ref().map(|path| DiskCache::new(path, args.disk_cache_size));
    let (kernel_log, null) = (Kmsg::open(), File::options().read(true).write(true).open("/dev/null"));
    let pressure = Pressure::open().inspect_err(|error| refused.push(format!("an eye on the memory: {error}"))).ok();
    let outside = if args.foreground {
        kmsg::log_to_stderr();
        Outside::here()
    } else {
        let outside = Outside::leave().context("cannot go into a mount namespace of its own")?;
        refused.extend(survive::stay_awake().err().map(|error| format!("staying awake: {error}")));
        outside
    };
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    threads.worker_threads(2).thread_name("reader").enable_all();
    if !args.foreground {
        // In the foreground one of them unmounts at the end.
        threads.on_thread_start(confine);
    }
    let runtime = threads.build().context("cannot start the reader's threads")?;
    let store = cache.as_ref().map(|cache| cache.find(runtime.handle()));
    let settings = Settings { prefetch, store, ..Settings::default() };
    let world = Arc::new(Real::new(runtime.handle().clone()));
    let paths = Https::all(addresses.clone(), trust.config());
    let reader = runtime.block_on(Reader::open(paths, world, &options, settings))?;
    drop(options);
    let socket = control::path(&args.state);
    let bound = socket.clone();
    let control = outside.run(move || Control::bind(&bound)).flatten();
    let control = control.with_context(|| format!("cannot listen at '{}'", socket.display()))?;
    let count = addresses.len();
    let servers = Servers::new(reader.clone(), addresses, trust);
    // Before the mount can be seen: whoever sees it may end it.
    let ends = if args.foreground { Some(runtime.block_on(async { Ends::new() })?) } else { None };
    let mounted = Mount::new(&args.dir, ImageFile::new(reader.clone(), runtime.handle().clone()), outside);
    let mut mount = mounted.inspect_err(|_| state.remove())?;
    let now = || {
        let disk = cache.as_ref().and_then(|cache| cache.status());
        State { disk, ..State::of(&reader, Mode::Tethered) }
    };
    state.write(&now()).with_context(|| format!("cannot write '{}'", args.state.display()))?;

    if let Some(ends) = ends {
        runtime.spawn(ends.unmount(args.dir.clone()));
    } else {
        // Whoever waits for the mount may look at this process at once.
        mount.settle();
        kmsg::log_to_kernel(kernel_log);
        confine();
        let null = null.context("cannot open /dev/null")?;
        survive::end_with_parent(false).context("cannot go on alone")?;
        daemon::say_ready().context("cannot tell that the mount is there")?;
        survive::let_go(&null).context("cannot let go of the standard streams")?;
        refused.extend(seccomp::confine().err().map(|error| error.to_string()));
    }
    for step in refused {
        tracing::warn!("goes on without {step}");
    }
    tracing::info!("serves image {} from {count} servers", hex::encode(reader.header().digest()));
    let ended = runtime.block_on(async {
        tokio::select! {
            never = state.follow(&reader, now) => match never {},
            never = follow(pressure.as_ref(), &reader) => match never {},
            ended = control.serve(servers) => match ended {
                Ok(never) => match never {},
                Err(error) => Err(error),
            },
            ended = tokio::task::spawn_blocking(move || mount.wait()) => ended.map_err(std::io::Error::other).flatten(),
        }
    });
    state.remove();
    // Reads that still wait for a server wait for nobody.
    runtime.shutdown_background();
    ended.context("the mount ended")?;
    Ok(ExitCode::SUCCESS)
}

async fn follow(pressure: Option<&Pressure>, reader: &Reader) -> Infallible {
    match pressure {
        Some(pressure) => pressure.follow(reader).await,
        None => std::future::pending().await,
    }
}

/// A tether that has more rights than it needs serves all the same.
fn confine() {
    if let Err(error) = survive::drop_capabilities() {
        tracing::warn!("keeps all capabilities: {error}");
    }
}

/// In the foreground a signal ends the mount, and the mount's end the program.
struct Ends {
    term: Signal,
    int: Signal,
}

impl Ends {
    /// From here on the signals wait for [`Self::unmount`].
    fn new() -> Result<Self> {
        let watch = |kind| signal(kind).context("cannot watch for signals");
        Ok(Self { term: watch(SignalKind::terminate())?, int: watch(SignalKind::interrupt())? })
    }

    async fn unmount(mut self, dir: PathBuf) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
        if let Err(error) = umount2(&dir, MntFlags::MNT_DETACH) {
            tracing::error!("cannot unmount '{}': {error}", dir.display());
        }
    }
}

fn prefetch(args: &Args) -> Result<Vec<u64>> {
    let Some(path) = &args.prefetch else { return Ok(Vec::new()) };
    serde_json::from_slice(&source::read(path)?).with_context(|| format!("'{}' is no list of chunks", path.display()))
}
