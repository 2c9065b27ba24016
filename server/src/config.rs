//! `moord.toml`: where the member keeps its state and where it listens.

use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The configuration file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the collective, for people.
    #[serde(default = "default_name")]
    pub name: String,
    /// Store, keys, blobs and the working directories of profiles.
    #[serde(default = "default_state")]
    pub state_dir: PathBuf,
    /// Unix socket of the admin API.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Addresses to listen on for HTTPS.
    #[serde(default = "default_listen")]
    pub listen: Vec<SocketAddr>,
    /// How nodes reach this member: `https://ADDRESS:PORT`, best first.
    pub urls: Vec<String>,
    /// Where shipped profiles are.
    #[serde(default = "default_templates")]
    pub templates: PathBuf,
    /// User ids that may use the socket, besides root and the member's own.
    #[serde(default)]
    pub admin_uids: Vec<u32>,
}

fn default_name() -> String {
    "mooring".into()
}

fn default_state() -> PathBuf {
    "/var/lib/mooring".into()
}

fn default_socket() -> PathBuf {
    "/run/mooring/api.sock".into()
}

fn default_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 443))]
}

fn default_templates() -> PathBuf {
    "/usr/share/mooring/profiles".into()
}

impl Config {
    /// Reads and checks it.
    ///
    /// # Errors
    /// In one line: the file, the place in it, and what is wrong.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading the configuration '{}'", path.display()))?;
        let config: Self = toml::from_str(&text)
            .map_err(|error| anyhow::anyhow!("'{}': {}", path.display(), error.to_string().replace('\n', " ")))?;
        anyhow::ensure!(
            !config.urls.is_empty(),
            "'{}': 'urls' is empty: say how nodes reach this member",
            path.display()
        );
        for url in &config.urls {
            moor_api::client::node::parse_https(url).with_context(|| format!("'{}': 'urls'", path.display()))?;
        }
        Ok(config)
    }

    /// The database.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.state_dir.join("store/member.redb")
    }

    /// Private keys and certificates.
    #[must_use]
    pub fn keys(&self) -> PathBuf {
        self.state_dir.join("store/keys")
    }

    /// Content by SHA-256.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.state_dir.join("blobs")
    }

    /// What nodes read of their images while they booted.
    #[must_use]
    pub fn traces(&self) -> PathBuf {
        self.state_dir.join("traces")
    }

    /// Working directories of profiles.
    #[must_use]
    pub fn profiles(&self) -> PathBuf {
        self.state_dir.join("profiles")
    }
}
