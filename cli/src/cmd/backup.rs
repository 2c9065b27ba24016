//! `moor backup` and `moor backup-key`

use crate::output;
use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use moor_api::admin::{BACKUP_MAGIC, BackupRequest, MIN_PASSPHRASE};
use moor_api::backup_key::{BackupIdentity, MAX_RECIPIENTS};
use moor_api::client::admin::{AdminClient, Parts};
use moor_api::passphrase;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Who opens it.
pub(crate) enum Lock<'a> {
    /// Whoever knows a passphrase: the one in this file, or the one that is typed.
    Passphrase(Option<&'a Path>),
    /// These public keys' private halves.
    Recipients(&'a [String]),
    /// Everybody: without secrets.
    Redacted,
}

/// `moor backup-key`
pub(crate) fn key(file: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let identity = BackupIdentity::generate()?;
    let recipient = identity.recipient()?;
    identity.create(file)?;
    if json {
        output::json(&serde_json::json!({ "file": file, "recipient": recipient }))?;
    } else {
        output::line(recipient)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A backup that is to be made: what was typed makes sense.
pub(crate) struct Wanted<'a> {
    file: &'a Path,
    /// Where it is written until it is whole.
    part: PathBuf,
    request: BackupRequest,
    is_redacted: bool,
}

impl<'a> Wanted<'a> {
    /// Looks at all that was typed or lies in files; a member is not needed for that.
    ///
    /// # Errors
    /// The file is there already; a passphrase that is not readable or too short; what is no recipient, or too many.
    pub(crate) fn read(file: &'a Path, lock: &Lock<'_>, without_majority: bool) -> anyhow::Result<Self> {
        let name = file.file_name().with_context(|| format!("'{}' is no name of a file", file.display()))?;
        ensure!(std::fs::symlink_metadata(file).is_err(), "'{}' exists already: give another name", file.display());
        let mut part = name.to_owned();
        part.push(format!(".part-{}", std::process::id()));
        let mut request = BackupRequest { passphrase: None, recipients: Vec::new(), without_majority };
        match lock {
            Lock::Passphrase(from) => {
                let from = from.map(passphrase::read).transpose()?;
                request.passphrase = from.map(|passphrase| long_enough(&passphrase)).transpose()?;
            }
            Lock::Recipients(keys) => {
                ensure!(keys.len() <= MAX_RECIPIENTS, "{} recipients: {MAX_RECIPIENTS} at most, please", keys.len());
                for (number, key) in (1..).zip(*keys) {
                    // What was given is not repeated: it may be a private key.
                    request.recipients.push(key.parse().with_context(|| format!("--recipient number {number}"))?);
                }
            }
            Lock::Redacted => {}
        }
        Ok(Self { file, part: file.with_file_name(part), request, is_redacted: matches!(lock, Lock::Redacted) })
    }

    /// Who opens it, for people.
    fn kind(&self) -> &'static str {
        match self.request.recipients[..] {
            _ if self.is_redacted => "without secrets: it cannot be restored",
            [] => "opened by its passphrase only",
            [_] => "opened by its recipient's private key only",
            _ => "opened by its recipients' private keys only",
        }
    }

    /// Makes it, and asks for the passphrase where none was given: who would type it for nothing?
    pub(crate) async fn make(mut self, client: &mut AdminClient, json: bool) -> anyhow::Result<ExitCode> {
        if !self.is_redacted && self.request.recipients.is_empty() && self.request.passphrase.is_none() {
            let passphrase = passphrase::ask_new("Passphrase for the backup: ")?;
            self.request.passphrase = Some(long_enough(&passphrase)?);
        }
        let Self { file, part, request, is_redacted } = &self;
        let written = write(client, request, part).await.and_then(|bytes| {
            std::fs::rename(part, file).with_context(|| format!("naming '{}'", file.display()))?;
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .with_context(|| format!("syncing '{}'", folder.display()))?;
            Ok(bytes)
        });
        let bytes = written.inspect_err(|_| {
            // What is not whole is of no use; the first failure is the one to report.
            let _ = std::fs::remove_file(part);
        })?;
        if json {
            output::json(
                &serde_json::json!({ "file": file, "bytes": bytes, "redacted": is_redacted, "recipients": request.recipients }),
            )?;
        } else {
            output::line(format_args!("{}: {}, {}", file.display(), output::bytes(bytes), self.kind()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The passphrase, as a member takes it.
fn long_enough(passphrase: &str) -> anyhow::Result<String> {
    let length = passphrase.chars().count();
    ensure!(length >= MIN_PASSPHRASE, "the passphrase has {length} characters: {MIN_PASSPHRASE} or more, please");
    Ok(passphrase.to_owned())
}

/// Writes the backup to a new file, durably; returns its size.
async fn write(client: &mut AdminClient, request: &BackupRequest, part: &PathBuf) -> anyhow::Result<u64> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(part).with_context(|| format!("creating '{}'", part.display()))?;
    let mut parts = client.backup(request).await.context("making a backup")?;
    let is_encrypted = request.passphrase.is_some() || !request.recipients.is_empty();
    let bytes = copy(&mut parts, &mut file, part, is_encrypted).await?;
    file.sync_all().with_context(|| format!("writing '{}'", part.display()))?;
    Ok(bytes)
}

async fn copy(parts: &mut Parts, file: &mut File, part: &Path, is_encrypted: bool) -> anyhow::Result<u64> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {bytes} {bytes_per_sec}")?);
    let mut bytes = 0;
    let mut beginning = Vec::with_capacity(BACKUP_MAGIC.len());
    while let Some(piece) = parts.next().await.context("the backup did not come whole")? {
        file.write_all(&piece).with_context(|| format!("writing '{}'", part.display()))?;
        beginning.extend_from_slice(&piece[..piece.len().min(BACKUP_MAGIC.len() - beginning.len())]);
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    // What that one sends is in order otherwise, and could not be restored.
    ensure!(
        !is_encrypted || beginning == BACKUP_MAGIC,
        "what came is not encrypted: the member runs an earlier release, which knows passphrases only"
    );
    Ok(bytes)
}
