//! What `moord` does: from arguments to a member, as whom it runs, and how it ends.

use crate::args::{Cli, Command};
use crate::backup::lock::{Opener, SealedError};
use crate::backup::sealed::Sealed;
use crate::backup::{self, Stale};
use crate::collective;
use crate::collective::identity::Identity;
use crate::collective::invite::Invitation;
use crate::config::Config;
use crate::state::{self, Member};
use crate::{listener, router};
use anyhow::{Context as _, bail};
use moor_api::admin::UnreadableSecret;
use moor_api::backup_key::BackupIdentity;
use moor_api::passphrase;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, User, geteuid, setgroups, setresgid, setresuid};
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

/// The user that packages make for the member.
const USER: &str = "mooring";

/// What is logged unless `MOORD_LOG` says otherwise. A member that is down is said once by [`crate::store::raft`], and not four times a second.
const LOG: &str = "info,openraft=error";

/// What nothing names any more is looked for so often.
const COLLECT: Duration = Duration::from_hours(24);
/// Where no majority answered, it is looked for again after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// Runs a command.
///
/// # Errors
/// In one line: what failed, where, and what to do.
pub fn main(cli: Cli) -> anyhow::Result<()> {
    // Everything else may use TLS or keys.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another cryptographic provider is installed"))?;
    // A core dump would hold every key of the site.
    nix::sys::prctl::set_dumpable(false).context("switching core dumps off")?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("MOORD_LOG").unwrap_or_else(|_| LOG.into());
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match std::env::var("MOORD_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().flatten_event(true).init(),
        Ok(other) if other != "text" => bail!("MOORD_LOG_FORMAT is 'text' or 'json', not '{other}'"),
        _ => log.with_ansi(colours).init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting")?;
    match cli.command {
        Command::Init { config, addresses, name, set_aside } => {
            runtime.block_on(init(&config, addresses, name, set_aside))
        }
        Command::Join { config, addresses, invitation, set_aside } => {
            runtime.block_on(join(&config, addresses, &invitation, set_aside))
        }
        Command::Restore { file, config, addresses, passphrase_file, identity, blobs, set_aside, json } => {
            let from = Source { file, passphrase_file, identity, blobs, set_aside };
            runtime.block_on(restore(&config, addresses, from, json))
        }
        Command::Recover { config, force } => runtime.block_on(recover(&config, force)),
        Command::Run { config } => {
            if geteuid().is_root() {
                bail!(
                    "moord does not run as root: start it as the user that owns its state (`systemctl start moord`, or `setpriv --reuid {USER} …`)"
                );
            }
            let done = runtime.block_on(run(Config::read(&config)?));
            // A watcher that never ends must not keep the process.
            runtime.shutdown_background();
            done
        }
    }
}

/// The configuration of a member to be, whose state this process may write from now on.
fn prepare(path: &Path, addresses: &[String]) -> anyhow::Result<Config> {
    for address in addresses {
        let is_name =
            !address.is_empty() && address.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
        if address.parse::<IpAddr>().is_err() && !is_name {
            bail!("'{address}' is neither an IP address nor a host name");
        }
    }
    if !path.exists() {
        write_config(path, addresses)?;
    }
    let config = Config::read(path)?;
    become_owner(&config.state_dir)?;
    private_files();
    Ok(config)
}

async fn init(path: &Path, addresses: Vec<String>, name: Option<String>, set_aside: bool) -> anyhow::Result<()> {
    let mut config = prepare(path, &addresses)?;
    if let Some(name) = name {
        config.name = name;
    }
    let identity = state::init(&config, addresses, set_aside).await?;
    println!(
        "collective {} ({}), member {} ({})",
        identity.site.name, identity.site.collective, identity.name, identity.id
    );
    println!("reached at {}; start it with `moord run --config {}`", config.urls.join(", "), path.display());
    Ok(())
}

async fn join(path: &Path, addresses: Vec<String>, file: &Path, set_aside: bool) -> anyhow::Result<()> {
    // Read before this process becomes the member's user, whom the file may be hidden from.
    let invitation = read_invitation(file)?;
    let config = prepare(path, &addresses)?;
    let identity = collective::join::join(&config, &invitation, addresses, set_aside).await?;
    println!(
        "this is member {} ({}) of collective {}; start it with `moord run --config {}`",
        identity.name,
        identity.number,
        identity.site.name,
        path.display()
    );
    Ok(())
}

/// What a collective is restored from.
struct Source {
    file: PathBuf,
    passphrase_file: Option<PathBuf>,
    identity: Option<PathBuf>,
    blobs: Option<PathBuf>,
    set_aside: bool,
}

async fn restore(path: &Path, addresses: Vec<String>, from: Source, as_json: bool) -> anyhow::Result<()> {
    // Opened and read before this process becomes the member's user, whom they may be hidden from.
    let what = || format!("the backup '{}'", from.file.display());
    let file = std::fs::File::open(&from.file).with_context(what)?;
    let sealed = Sealed::begin(file).with_context(what)?;
    let opener = match (&from.identity, &from.passphrase_file) {
        (Some(file), _) => Opener::Identity(BackupIdentity::read(file)?),
        (None, Some(file)) => Opener::Passphrase(passphrase::read(file)?),
        (None, None) if sealed.wants_passphrase() => Opener::Passphrase(passphrase::ask("Passphrase of the backup: ")?),
        (None, None) => return Err(anyhow::Error::from(SealedError::WantsIdentity).context(what())),
    };
    let config = prepare(path, &addresses)?;
    let restored = backup::restore::restore(&config, sealed, opener, addresses, from.blobs, from.set_aside);
    let restored = restored.await.with_context(what)?;
    if as_json {
        println!("{}", serde_json::to_string(&restored)?);
        return Ok(());
    }
    println!(
        "collective {} as it was at {}: {} nodes; this is its only member, {} ({})",
        restored.collective,
        time_of(restored.created)?,
        restored.nodes,
        restored.member,
        restored.number
    );
    if let Some(Stale { term, index, confirmed }) = restored.stale {
        let confirmed = confirmed.map(time_of).transpose()?;
        println!(
            "the backup was made without a majority: it ends with entry {index} of term {term}, and what others agreed about after that is not in \
             it; the member that made it last knew of a majority at {}",
            confirmed.as_deref().unwrap_or("a time that is not known")
        );
    }
    if restored.taken > 0 {
        println!("{} blobs were taken from the given directory", restored.taken);
    }
    for missing in &restored.missing {
        println!("missing: {}: {}", missing.of, missing.blob);
    }
    if !restored.missing.is_empty() {
        println!(
            "{} blobs are missing, and nodes that need them wait: copy them from another member's directory of blobs into '{}', or import the same images again",
            restored.missing.len(),
            config.blobs().display()
        );
    }
    println!("start it with `moord run --config {}`", path.display());
    Ok(())
}

/// A time in Unix seconds, for people.
fn time_of(seconds: u64) -> anyhow::Result<String> {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    Ok(time::OffsetDateTime::from_unix_timestamp(i64::try_from(seconds)?)?.format(&format)?)
}

async fn recover(path: &Path, force: bool) -> anyhow::Result<()> {
    let config = prepare(path, &[])?;
    if let Some(identity) = collective::recover::finish(&config)? {
        println!("the recovery that was interrupted is finished");
        recovered(&identity, path);
        return Ok(());
    }
    let (recovery, prospect) = collective::recover::Recovery::open(&config).await?;
    let (term, index) = prospect.newest;
    println!("no other member answers: {}", prospect.others.join(", "));
    prospect.strangers.iter().for_each(|line| println!("{line}"));
    println!(
        "this member's log ends with entry {index} of term {term}: what the others acknowledged after it, without this member, is lost"
    );
    for (blob, what) in &prospect.missing {
        println!("missing here, and lost unless it is somewhere else: {what}: {blob}");
    }
    prospect.unreadable.iter().for_each(unreadable);
    println!("the others are members no more: if one comes back, stop it, and let it join anew with `--set-aside`");
    if !force {
        bail!("nothing was changed: `--force` makes this member a collective of one");
    }
    let done = recovery.go_on(&config).await?;
    // What its log had, and its tables had not.
    done.unreadable.iter().filter(|secret| !prospect.unreadable.contains(secret)).for_each(unreadable);
    recovered(&done.identity, path);
    Ok(())
}

fn unreadable(UnreadableSecret { of, version, remedy }: &UnreadableSecret) {
    println!(
        "lost, because it does not open with the keys that are here (it is under version {version} of them): {of}: {remedy}"
    );
}

fn recovered(identity: &Identity, config: &Path) {
    println!(
        "this is member {} ({}), the only one of collective {}; start it with `moord run --config {}`",
        identity.name,
        identity.number,
        identity.site.name,
        config.display()
    );
}

fn read_invitation(file: &Path) -> anyhow::Result<Invitation> {
    let mut text = Zeroizing::new(String::new());
    let limit = 128 << 10;
    if file == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(limit)
            .read_to_string(&mut text)
            .context("reading the invitation from standard input")?;
    } else {
        std::fs::File::open(file)
            .and_then(|open| open.take(limit).read_to_string(&mut text))
            .with_context(|| format!("reading the invitation '{}'", file.display()))?;
    }
    Invitation::from_text(&text)
}

/// A first configuration, from what is known: how the member is reached.
fn write_config(path: &Path, addresses: &[String]) -> anyhow::Result<()> {
    if addresses.is_empty() {
        bail!(
            "there is no configuration '{}': give `--address ADDRESS` (how nodes reach this machine), and one is written",
            path.display()
        );
    }
    let urls: Vec<String> = addresses
        .iter()
        .map(|address| match address.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => format!("\"https://[{v6}]\""),
            _ => format!("\"https://{address}\""),
        })
        .collect();
    let mut text = String::from("# How nodes reach this member, best first.\n");
    writeln!(text, "urls = [{}]", urls.join(", "))?;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("making '{}'", parent.display()))?;
    }
    crate::files::write(path, text.as_bytes(), 0o644).with_context(|| format!("writing '{}'", path.display()))
}

/// Root hands the state to the user that the member runs as, and becomes that user: nothing of it may end up root's.
fn become_owner(state: &Path) -> anyhow::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let owner = std::fs::metadata(state).ok().map(|meta| (meta.uid(), meta.gid())).filter(|(uid, _)| *uid != 0);
    let (uid, gid) = if let Some((uid, gid)) = owner {
        (Uid::from_raw(uid), Gid::from_raw(gid))
    } else {
        let user = User::from_name(USER).context("looking the user up")?;
        let Some(user) = user else {
            bail!(
                "moord does not run as root, and there is no user '{USER}': `install -d -o USER {}`, and try again",
                state.display()
            );
        };
        std::fs::create_dir_all(state).with_context(|| format!("making '{}'", state.display()))?;
        chown(state, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .with_context(|| format!("giving '{}' to {USER}", state.display()))?;
        (user.uid, user.gid)
    };
    setgroups(&[gid]).context("dropping groups")?;
    setresgid(gid, gid, gid).context("changing the group")?;
    setresuid(uid, uid, uid).context("changing the user")?;
    // The kernel switches it on or off with the user.
    nix::sys::prctl::set_dumpable(false).context("switching core dumps off")
}

/// The database makes its own files, with whatever mode the mask leaves.
fn private_files() {
    umask(Mode::from_bits_truncate(0o077));
}

/// Each connection is a file, and the usual limit is 1024.
fn raise_file_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("raising the limit of open files: {error}");
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    private_files();
    raise_file_limit();
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let asked = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop");
        asked.cancel();
    });
    let member = Member::open(config).await?;
    tracing::info!(
        "member {} ({}) of collective {} ({})",
        member.identity.name,
        member.identity.id,
        member.site.name,
        member.site.collective
    );
    let app = router(&member);
    tokio::spawn(collect(member.clone()));
    tokio::spawn(crate::heap::tidy());
    let upkeep = tokio::spawn(collective::upkeep::run(member.clone(), stop.clone()));
    let (watched, ends) = (member.clone(), stop.clone());
    let broken = tokio::spawn(async move {
        tokio::select! {
            why = watched.store.failed() => {
                ends.cancel();
                Some(why)
            }
            () = ends.cancelled() => None,
        }
    });
    listener::serve(member.clone(), app, stop).await?;
    upkeep.await?;
    // Before the store is closed, which ends its tasks too.
    let broken = broken.await?;
    member.store.close().await;
    if let Some(why) = broken {
        return Err(why.into());
    }
    tracing::info!("stopped");
    Ok(())
}

/// At the start and once a day: what nothing names any more goes. A member that does not know all that was agreed does not know what is named,
/// so without a majority nothing goes.
async fn collect(member: Arc<Member>) {
    loop {
        if let Err(error) = member.store.linearize().await {
            tracing::debug!("nothing is collected: {error}");
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        let collector = member.clone();
        match tokio::task::spawn_blocking(move || state::collect(&collector)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::info!("{count} blobs that nothing names any more were removed"),
            Ok(Err(error)) => tracing::warn!("collecting blobs: {error:#}"),
            Err(error) => tracing::warn!("collecting blobs: {error}"),
        }
        tokio::time::sleep(COLLECT).await;
    }
}
