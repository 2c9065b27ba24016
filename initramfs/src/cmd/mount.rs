//! `moor-tether mount`.

use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, OpenOptions, PublicKey};
use moor_tether::mount::{ImageFile, Mount};
use moor_tether::reader::{Address, Https, Reader, Real, Settings};
use moor_tether::state::{DEFAULT_PATH, StateFile};
use moor_tether::{daemon, kmsg, survive, tls};
use nix::mount::{MntFlags, umount2};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};
use zeroize::Zeroizing;

/// Longest text that is read as a key: more than a key, so that a wrong file gets the right message.
const KEY_LIMIT: u64 = 128;
/// Longest file with signatures or signers.
const FILE_LIMIT: u64 = 1 << 20;

/// Export a sealed image on HTTPS servers as the file DIR/image
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("authority").required(true))]
pub(crate) struct Args {
    /// The image's key: 64 hexadecimal digits; `-` is standard input. Not needed for a plain image
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Where the image is: <https://HOST[:PORT]/PATH>. Several serve the same image in turn
    #[arg(long = "url", value_name = "URL", required = true)]
    urls: Vec<String>,
    /// The servers' certificates are issued under this authority (PEM), for the names or addresses in the URLs
    #[arg(long, value_name = "FILE", group = "authority")]
    ca: Option<PathBuf>,
    /// The servers are members of the collective of this site bundle
    #[arg(long, value_name = "FILE", group = "authority")]
    site: Option<PathBuf>,
    /// The image must have this digest
    #[arg(long, value_name = "HEX")]
    digest: Option<String>,
    /// The image must be of this lineage
    #[arg(long, value_name = "UUID")]
    lineage: Option<String>,
    /// The image's serial must be at least this
    #[arg(long, value_name = "N")]
    minimum_serial: Option<u64>,
    /// One of these keys (ssh-ed25519 lines) must have signed the image
    #[arg(long, value_name = "FILE")]
    trust: Option<PathBuf>,
    /// The image's signatures, its FILE.moor.sig
    #[arg(long, value_name = "FILE")]
    signatures: Option<PathBuf>,
    /// Chunks that earlier boots read, a JSON list in their order: they are fetched before anybody asks
    #[arg(long, value_name = "FILE")]
    prefetch: Option<PathBuf>,
    /// Where the tether tells others how it stands; what is read in the first two minutes goes to FILE's name with -trace.json
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
    let refused = if args.foreground { Vec::new() } else { survive::prepare() };
    let (addresses, tls, options) = (addresses(&args.urls)?, tls(args)?, options(args)?);
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    threads.worker_threads(2).thread_name("reader").enable_all();
    if !args.foreground {
        // In the foreground one of them unmounts at the end.
        threads.on_thread_start(confine);
    }
    let runtime = threads.build().context("cannot start the reader's threads")?;
    if args.foreground {
        kmsg::log_to_stderr();
    }
    let settings = Settings { prefetch: prefetch(args)?, ..Settings::default() };
    let world = Arc::new(Real::new(runtime.handle().clone()));
    let reader = runtime.block_on(Reader::open(Https::all(addresses, &tls), world, &options, settings))?;
    drop(options);
    let state = StateFile::new(&args.state).with_context(|| format!("cannot write to '{}'", args.state.display()))?;
    // Before the mount can be seen: whoever sees it may end it.
    let ends = if args.foreground { Some(runtime.block_on(async { Ends::new() })?) } else { None };
    let mount = Mount::new(&args.dir, ImageFile::new(reader.clone(), runtime.handle().clone()))?;
    state
        .write(&moor_tether::state::State::of(&reader))
        .with_context(|| format!("cannot write '{}'", args.state.display()))?;

    if let Some(ends) = ends {
        runtime.spawn(ends.unmount(args.dir.clone()));
    } else {
        kmsg::log_to_kernel();
        daemon::say_ready().context("cannot tell that the mount is there")?;
        survive::let_go().context("cannot let go of the standard streams")?;
        let ending = reader.clone();
        let watch = move || {
            confine();
            match survive::wait_for_shutdown() {
                Ok(()) => ending.end(),
                Err(error) => tracing::warn!("cannot see a shutdown: {error}"),
            }
        };
        std::thread::Builder::new().name("shutdown".into()).spawn(watch).context("cannot watch for a shutdown")?;
        confine();
    }
    for step in refused {
        tracing::warn!("goes on without {step}");
    }
    tracing::info!("serves image {} from {} servers", hex::encode(reader.header().digest()), args.urls.len());
    let ended = runtime.block_on(async {
        tokio::select! {
            () = state.follow(&reader) => Ok(()),
            ended = tokio::task::spawn_blocking(move || mount.wait()) => ended.map_err(std::io::Error::other).flatten(),
        }
    });
    state.remove();
    // Reads that still wait for a server wait for nobody.
    runtime.shutdown_background();
    ended.context("the mount ended")?;
    Ok(ExitCode::SUCCESS)
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

fn addresses(urls: &[String]) -> Result<Vec<Address>> {
    urls.iter().map(|url| Ok(Address::resolve(url)?)).collect()
}

fn tls(args: &Args) -> Result<Arc<rustls::ClientConfig>> {
    Ok(match (&args.site, &args.ca) {
        (Some(site), _) => tls::site(site)?,
        (None, Some(ca)) => tls::authority(ca)?,
        (None, None) => bail!("give the servers' authority with --ca or --site"),
    })
}

fn options(args: &Args) -> Result<OpenOptions> {
    let trusted = match &args.trust {
        Some(path) => {
            let text =
                String::from_utf8(read(path)?).map_err(|_| anyhow::anyhow!("'{}' is no text", path.display()))?;
            PublicKey::parse_list(&text).with_context(|| format!("cannot use '{}'", path.display()))?
        }
        None => Vec::new(),
    };
    Ok(OpenOptions {
        key: args.key_file.as_deref().map(read_key).transpose()?,
        pinned: args.digest.as_deref().map(|text| digits(text, "--digest")).transpose()?,
        trusted,
        signatures: args.signatures.as_deref().map(read).transpose()?,
        lineage: args.lineage.as_deref().map(|text| digits(&text.replace('-', ""), "--lineage")).transpose()?,
        minimum_serial: args.minimum_serial,
        require_encrypted: false,
    })
}

fn prefetch(args: &Args) -> Result<Vec<u64>> {
    let Some(path) = &args.prefetch else { return Ok(Vec::new()) };
    serde_json::from_slice(&read(path)?).with_context(|| format!("'{}' is no list of chunks", path.display()))
}

fn digits<const N: usize>(text: &str, option: &str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).with_context(|| format!("{option} has {} hexadecimal digits", 2 * N))?;
    Ok(bytes)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let context = || format!("cannot read '{}'", path.display());
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(context)?;
    file.take(FILE_LIMIT).read_to_end(&mut bytes).with_context(context)?;
    Ok(bytes)
}

fn read_key(path: &Path) -> Result<Dek> {
    // Large enough for all that is read: growing would leave copies of the key behind.
    let mut text = Zeroizing::new(Vec::with_capacity(256));
    if path == Path::new("-") {
        let input = std::io::stdin().lock().take(KEY_LIMIT).read_to_end(&mut text);
        input.context("cannot read the key from standard input")?;
        return Dek::from_hex(&text).context("standard input holds no key");
    }
    let context = || format!("cannot read the key file '{}'", path.display());
    let file = std::fs::File::open(path).with_context(context)?;
    file.take(KEY_LIMIT).read_to_end(&mut text).with_context(context)?;
    Dek::from_hex(&text).with_context(|| format!("'{}' holds no key", path.display()))
}
