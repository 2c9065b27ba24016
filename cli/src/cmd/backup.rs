//! `moor backup`

use crate::output;
use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use moor_api::admin::{BackupRequest, MIN_PASSPHRASE};
use moor_api::client::admin::{AdminClient, Parts};
use moor_api::passphrase;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(crate) async fn run(
    client: &mut AdminClient,
    file: &Path,
    passphrase_file: Option<&Path>,
    redact: bool,
    without_majority: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let name = file.file_name().with_context(|| format!("'{}' is no name of a file", file.display()))?;
    ensure!(std::fs::symlink_metadata(file).is_err(), "'{}' exists already: give another name", file.display());
    let mut request = BackupRequest { passphrase: None, without_majority };
    if !redact {
        let passphrase = match passphrase_file {
            Some(file) => passphrase::read(file)?,
            None => passphrase::ask_new("Passphrase for the backup: ")?,
        };
        let length = passphrase.chars().count();
        ensure!(length >= MIN_PASSPHRASE, "the passphrase has {length} characters: {MIN_PASSPHRASE} or more, please");
        request.passphrase = Some(passphrase.to_string());
    }
    let mut part = name.to_owned();
    part.push(format!(".part-{}", std::process::id()));
    let part = file.with_file_name(part);
    let written = write(client, &request, &part).await.and_then(|bytes| {
        std::fs::rename(&part, file).with_context(|| format!("naming '{}'", file.display()))?;
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("syncing '{}'", folder.display()))?;
        Ok(bytes)
    });
    let bytes = written.inspect_err(|_| {
        // What is not whole is of no use; the first failure is the one to report.
        let _ = std::fs::remove_file(&part);
    })?;
    if json {
        output::json(&serde_json::json!({ "file": file, "bytes": bytes, "redacted": redact }))?;
    } else {
        let kind = if redact { "without secrets: it cannot be restored" } else { "opened by its passphrase only" };
        output::line(format_args!("{}: {}, {kind}", file.display(), output::bytes(bytes)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the backup to a new file, durably; returns its size.
async fn write(client: &mut AdminClient, request: &BackupRequest, part: &PathBuf) -> anyhow::Result<u64> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(part).with_context(|| format!("creating '{}'", part.display()))?;
    let mut parts = client.backup(request).await.context("making a backup")?;
    let bytes = copy(&mut parts, &mut file, part).await?;
    file.sync_all().with_context(|| format!("writing '{}'", part.display()))?;
    Ok(bytes)
}

async fn copy(parts: &mut Parts, file: &mut File, part: &Path) -> anyhow::Result<u64> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {bytes} {bytes_per_sec}")?);
    let mut bytes = 0;
    while let Some(piece) = parts.next().await.context("the backup did not come whole")? {
        file.write_all(&piece).with_context(|| format!("writing '{}'", part.display()))?;
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    Ok(bytes)
}
