//! `moord.toml`: where the member keeps its state and where it listens.

use crate::store::raft::Places;
use crate::store::{Level, StoreError, database};
use anyhow::Context as _;
use moor_api::deploy::Cidr;
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
    /// Name of this member among the members; the machine's name if there is none. The invitation decides for one that joins.
    #[serde(default)]
    pub member_name: Option<String>,
    /// How nodes reach this member: `https://ADDRESS:PORT`, best first.
    pub urls: Vec<String>,
    /// Where shipped profiles are.
    #[serde(default = "default_templates")]
    pub templates: PathBuf,
    /// Connections of one client (an address) at a time; more are closed at once. Higher where many nodes come through one address.
    #[serde(default = "default_connections")]
    pub connections_per_address: std::num::NonZeroU32,
    /// Connections of all clients together at a time, other members' apart; none: 65,536. Never more than the limit of open files has room for.
    #[serde(default)]
    pub connections: Option<std::num::NonZeroU32>,
    /// User ids that may use the socket, besides root and the member's own.
    #[serde(default)]
    pub admin_uids: Vec<u32>,
    /// So many seconds a member without a majority goes on answering nodes that it knows.
    #[serde(default = "default_stale")]
    pub stale_seconds: u64,
    /// And so many it goes on giving them secrets, the keys of their images among them. Never longer than it answers.
    #[serde(default = "default_stale_secrets")]
    pub stale_secrets_seconds: u64,
    /// So many MiB of content this member fetches from others in a second at most; none: as fast as it comes.
    #[serde(default)]
    pub content_mib_per_second: Option<std::num::NonZeroU32>,
    /// So many members hold an image before nodes are offered it; none: a majority of those that vote. Never more than there are members.
    #[serde(default)]
    pub image_copies: Option<std::num::NonZeroU32>,
    /// Networks that this member is near to: nodes in them are sent to it before others. At most [`MAX_NEAR`].
    #[serde(default)]
    pub near: Vec<Cidr>,
    /// For tests of rolling upgrades: the member does as one of a release that knows feature levels up to this one.
    #[serde(default)]
    pub max_feature_level: Option<std::num::NonZeroU32>,
}

/// Networks that a member may be near to.
const MAX_NEAR: usize = 256;

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

fn default_stale() -> u64 {
    24 * 3600
}

fn default_stale_secrets() -> u64 {
    3600
}

fn default_connections() -> std::num::NonZeroU32 {
    std::num::NonZeroU32::MIN.saturating_add(1023)
}

fn default_templates() -> PathBuf {
    "/usr/share/mooring/profiles".into()
}

fn make_dir(path: &Path, mode: u32) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("making '{}'", path.display()))
}

impl Config {
    /// Reads and checks it.
    ///
    /// # Errors
    /// In one line: the file, the place in it, and what is wrong.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading the configuration '{}'", path.display()))?;
        let config: Self = toml::from_str(&text)
            .map_err(|error| anyhow::anyhow!("'{}': {}", path.display(), error.to_string().replace('\n', " ")))?;
        anyhow::ensure!(
            !config.urls.is_empty(),
            "'{}': 'urls' is empty: say how nodes reach this member",
            path.display()
        );
        anyhow::ensure!(
            config.near.len() <= MAX_NEAR,
            "'{}': 'near' has {} networks, and {MAX_NEAR} are allowed",
            path.display(),
            config.near.len()
        );
        for url in &config.urls {
            moor_api::client::node::parse_https(url).with_context(|| format!("'{}': 'urls'", path.display()))?;
        }
        Ok(config)
    }

    /// The newest feature level that this member's release knows.
    #[must_use]
    pub fn level(&self) -> Level {
        self.max_feature_level.map_or(Level::NEWEST, |most| Level(most.get()).min(Level::NEWEST))
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> Places {
        Places::in_dir(&self.state_dir.join("store"))
    }

    /// What waits for a majority.
    #[must_use]
    pub fn waiting(&self) -> PathBuf {
        self.state_dir.join("store/late.redb")
    }

    /// Who this member is.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.state_dir.join("store/member.json")
    }

    /// What a recovery is about to make of this member.
    #[must_use]
    pub fn recovering(&self) -> PathBuf {
        self.state_dir.join("store/recovering.json")
    }

    /// Makes a new member: its directories, and by `make`, which is given the one for its keys, what is in them. What has the member's place
    /// already is moved aside, and back where `make` fails.
    ///
    /// # Errors
    /// There is a member already that is not to be set aside, or one that runs; a directory cannot be made; those of `make`.
    pub async fn make_member<T>(
        &self,
        set_aside: bool,
        make: impl AsyncFnOnce(&Path) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        anyhow::ensure!(
            set_aside || !self.identity().exists(),
            "'{}' holds a member already: nothing was changed (to begin anew, move it away: `--set-aside` does)",
            self.state_dir.display()
        );
        // What an earlier, interrupted try has left belongs to nobody; but it may be more than that.
        let aside = self.set_store_aside()?;
        let made = match self.make_directories() {
            Ok(keys) => make(&keys).await,
            Err(error) => Err(error),
        };
        match made {
            Ok(made) => {
                if let Some(aside) = aside {
                    tracing::info!("what was there before is in '{}'", aside.display());
                }
                Ok(made)
            }
            Err(error) => {
                self.put_back(aside).inspect_err(|_| tracing::error!("{error:#}"))?;
                Err(error)
            }
        }
    }

    /// Where it lies now, if there was one.
    fn set_store_aside(&self) -> anyhow::Result<Option<PathBuf>> {
        let store = self.state_dir.join("store");
        if !store.exists() {
            return Ok(None);
        }
        let Places { state, log, .. } = self.store();
        anyhow::ensure!(
            ![state, log, self.waiting()].iter().any(|file| database::is_open(file)),
            "the member in '{}' runs: nothing was changed; stop it first",
            self.state_dir.display()
        );
        let aside = self.state_dir.join(format!("store.aside-{}", crate::state::now_ms()));
        std::fs::rename(&store, &aside)
            .with_context(|| format!("setting '{}' aside as '{}'", store.display(), aside.display()))?;
        Ok(Some(aside))
    }

    fn make_directories(&self) -> anyhow::Result<PathBuf> {
        make_dir(&self.state_dir, 0o750)?;
        make_dir(&self.state_dir.join("store"), 0o700)?;
        make_dir(&self.blobs(), 0o750)?;
        make_dir(&self.profiles(), 0o750)?;
        make_dir(&self.keys(), 0o700)?;
        Ok(self.keys())
    }

    /// Takes away what was made a moment ago, by this process, and puts back what lay in its place.
    fn put_back(&self, aside: Option<PathBuf>) -> anyhow::Result<()> {
        let store = self.state_dir.join("store");
        if store.exists() {
            std::fs::remove_dir_all(&store).with_context(|| format!("removing '{}'", store.display()))?;
        }
        if let Some(aside) = aside {
            std::fs::rename(&aside, &store)
                .with_context(|| format!("moving '{}' back to '{}'", aside.display(), store.display()))?;
        }
        Ok(())
    }

    /// Makes the files of a new member's store: from then on they are there, or the member does not start.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn make_store(&self) -> Result<(), StoreError> {
        self.store().make()?;
        database::make(&self.waiting())
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
