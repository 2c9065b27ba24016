//! Reaching a member: the local socket, or HTTPS with the site bundle and a token.

use crate::args::Connection;
use anyhow::{Context as _, bail};
use moor_api::client::admin::AdminClient;
use moor_api::trust::SiteBundle;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use zeroize::Zeroizing;

/// Connects as the options say.
pub(crate) async fn connect(options: &Connection) -> anyhow::Result<AdminClient> {
    let Some(server) = &options.server else {
        return AdminClient::unix(&options.socket).await.context(
            "is moord running here? (`systemctl status moord`; another member: --server, --site-file and --token-file)",
        );
    };
    let site = options.site_file.as_deref().context("--server needs --site-file")?;
    let text =
        std::fs::read_to_string(site).with_context(|| format!("reading the site bundle '{}'", site.display()))?;
    let bundle: SiteBundle = serde_json::from_str(&text)
        .with_context(|| format!("'{}' is not a site bundle (`moor site --bundle` prints one)", site.display()))?;
    let token = read_secret(options.token_file.as_deref().context("--server needs --token-file")?)?;
    Ok(AdminClient::https(server, &bundle, token.trim()).await?)
}

/// Reads a secret from a file that only its owner can read.
pub(crate) fn read_secret(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let meta = std::fs::metadata(path).with_context(|| format!("reading '{}'", path.display()))?;
    if meta.mode() & 0o077 != 0 {
        bail!("'{0}' can be read by others than its owner: `chmod 600 '{0}'`", path.display());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading '{}'", path.display()))?;
    Ok(Zeroizing::new(text))
}
