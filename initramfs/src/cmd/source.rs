//! Where an image is and what it has to be: the arguments that every command has which reads one from servers.

use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, OpenOptions, PublicKey};
use moor_tether::reader::{Address, AddressError, OpenError};
use moor_tether::tls::Trust;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest text that is read as a key: more than a key, so that a wrong file gets the right message.
const KEY_LIMIT: u64 = 128;
/// Longest file with signatures or signers.
const FILE_LIMIT: u64 = 1 << 20;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("authority").required(true))]
pub(super) struct Source {
    /// The image's key: 64 hexadecimal digits; `-` is standard input. Not needed for a plain image
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Where the image is: <https://HOST[:PORT]/PATH>. Several serve the same image in turn
    #[arg(long = "url", value_name = "URL")]
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
}

impl Source {
    /// The servers, resolved; and what is wrong with those that are done without.
    pub(super) fn addresses(&self) -> Result<(Vec<Address>, Vec<AddressError>)> {
        // Not left to the parser: whoever calls in a boot shows the first line that it gets, and a usage text has many.
        if self.urls.is_empty() {
            return Err(OpenError::NoMember.into());
        }
        Ok(Address::resolve_all(&self.urls)?)
    }

    /// Who vouches for them.
    pub(super) fn authority(&self) -> Result<Trust> {
        Ok(match (&self.site, &self.ca) {
            (Some(site), _) => Trust::site(site)?,
            (None, Some(ca)) => Trust::authority(ca)?,
            (None, None) => bail!("give the servers' authority with --ca or --site"),
        })
    }

    /// What the image has to be.
    pub(super) fn options(&self) -> Result<OpenOptions> {
        let trusted = match &self.trust {
            Some(path) => {
                let text =
                    String::from_utf8(read(path)?).map_err(|_| anyhow::anyhow!("'{}' is no text", path.display()))?;
                PublicKey::parse_list(&text).with_context(|| format!("cannot use '{}'", path.display()))?
            }
            None => Vec::new(),
        };
        Ok(OpenOptions {
            key: self.key_file.as_deref().map(read_key).transpose()?,
            pinned: self.digest.as_deref().map(|text| digits(text, "--digest")).transpose()?,
            trusted,
            signatures: self.signatures.as_deref().map(read).transpose()?,
            lineage: self.lineage.as_deref().map(|text| digits(&text.replace('-', ""), "--lineage")).transpose()?,
            minimum_serial: self.minimum_serial,
            require_encrypted: false,
        })
    }
}

fn digits<const N: usize>(text: &str, option: &str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).with_context(|| format!("{option} has {} hexadecimal digits", 2 * N))?;
    Ok(bytes)
}

/// A file of at most [`FILE_LIMIT`] bytes.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
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
