//! One module per noun; each command is a call of the API and a few lines that print the answer.

mod authority;
mod backup;
mod collective;
mod content;
mod image;
mod node;
mod profile;
mod status;
mod why;

use crate::args::{Cli, Collective, Command, Connection, Content, Init, Token};
use crate::connect::connect;
use crate::output;
use anyhow::Context as _;
use moor_api::admin::TokenRequest;
use moor_api::client::admin::AdminClient;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::ExitCode;

/// Runs one command.
pub(crate) async fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Init(init) => return Err(run_moord("init", init, &[])),
        Command::Collective(Collective::Join(join)) => return Err(run_moord("join", join, &[])),
        Command::Collective(Collective::Recover(recover)) => return Err(run_moord("recover", recover, &[])),
        Command::Restore { file, config, rest } => {
            let mut before = vec![file.as_os_str()];
            before.extend(cli.json.then_some(OsStr::new("--json")));
            let init = Init { config: config.clone(), rest: rest.clone() };
            return Err(run_moord("restore", &init, &before));
        }
        Command::BackupKey { file } => return backup::key(file, cli.json),
        Command::Backup { file, passphrase_file, recipients, redact, without_majority } => {
            let lock = match (passphrase_file, redact) {
                (_, true) => backup::Lock::Redacted,
                (file, false) if recipients.is_empty() => backup::Lock::Passphrase(file.as_deref()),
                (_, false) => backup::Lock::Recipients(recipients),
            };
            // A mistyped key is said as such, also where no member answers.
            let wanted = backup::Wanted::read(file, &lock, *without_majority)?;
            return wanted.make(&mut reach(&cli.connection).await?, cli.json).await;
        }
        _ => {}
    }
    let client = &mut reach(&cli.connection).await?;
    match cli.command {
        // They were run above.
        Command::Init(_) | Command::Restore { .. } | Command::Backup { .. } | Command::BackupKey { .. } => {
            Ok(ExitCode::SUCCESS)
        }
        Command::Collective(command) => collective::run(client, command, cli.json).await,
        Command::Authority(command) => authority::run(client, command, cli.json).await,
        Command::Node(command) => node::run(client, command, cli.json).await,
        Command::Arm(arm) => node::arm(client, &arm, cli.json).await,
        Command::Deploy(deploy) => node::deploy(client, &deploy, cli.json).await,
        Command::Status(args) => status::run(client, &args, cli.json).await,
        Command::Why { subject } => why::run(client, &subject, cli.json).await,
        Command::Log { node } => status::log(client, &node, cli.json).await,
        Command::Image(command) => image::run(client, command, cli.json).await,
        Command::Content(Content::Status { all }) => content::status(client, all, cli.json).await,
        Command::Profile(command) => profile::run(client, command, cli.json).await,
        Command::Site { bundle, known_hosts } => site(client, bundle, known_hosts, cli.json).await,
        Command::Token(Token::Create { name, out, hours }) => create_token(client, name, &out, hours).await,
    }
}

/// A member that answers. That it may be out of date is said once.
async fn reach(connection: &Connection) -> anyhow::Result<AdminClient> {
    let mut client = connect(connection).await?;
    let mut is_told = false;
    client.when_stale(move |why| {
        if !std::mem::replace(&mut is_told, true) {
            eprintln!("moor: warning: {why}: what is shown is what this member knows, and may be out of date");
        }
    });
    Ok(client)
}

/// What makes a member, or makes it anew, is the server's own program: it writes the server's state.
fn run_moord(verb: &str, init: &Init, before: &[&OsStr]) -> anyhow::Error {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|dir| dir.join("moord")))
        .filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| "moord".into());
    let mut command = std::process::Command::new(&program);
    command.arg(verb).args(before).arg("--config").arg(&init.config).args(&init.rest);
    let error = command.exec();
    anyhow::Error::new(error).context(format!("starting '{}': is the package moord installed?", program.display()))
}

async fn site(client: &mut AdminClient, bundle: bool, known_hosts: bool, as_json: bool) -> anyhow::Result<ExitCode> {
    let site = client.site().await?;
    if bundle {
        output::json(&site.bundle)?;
    } else if known_hosts {
        for line in &site.known_hosts {
            output::line(line)?;
        }
    } else if as_json {
        output::json(&site)?;
    } else {
        output::line(format_args!("collective: {} ({})", site.name, site.collective))?;
        output::line(format_args!("version: {}", site.version))?;
        for member in &site.members {
            let here = if member.id == site.member { " (answers)" } else { "" };
            output::line(format_args!("member: {} {}{here}", member.id, member.urls.join(" ")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create_token(client: &mut AdminClient, name: String, out: &Path, hours: u64) -> anyhow::Result<ExitCode> {
    // The file comes first: a token that cannot be kept is not made.
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(out)
        .with_context(|| format!("creating '{}'", out.display()))?;
    let made = client.create_token(&TokenRequest { name, lifetime: hours.saturating_mul(3600) }).await;
    let written = match made {
        Ok(made) => {
            let line = zeroize::Zeroizing::new(format!("{}\n", made.token));
            file.write_all(line.as_bytes())
                .and_then(|()| file.sync_all())
                .map(|()| made.expires)
                .map_err(anyhow::Error::from)
        }
        Err(error) => Err(error.into()),
    };
    match written {
        Ok(expires) => {
            let until = output::time_ms(expires.saturating_mul(1000));
            output::line(format_args!("the token is in '{}', good until {until}", out.display()))?;
        }
        Err(error) => {
            // The empty file is of no use; the error of the call is what matters.
            let _ = std::fs::remove_file(out);
            return Err(error.context("making a token"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
