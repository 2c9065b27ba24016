//! The member: what every handler needs. One value, shared.

use crate::authority::{Addresses, Authority, MemberIssuer};
use crate::config::Config;
use crate::content;
use crate::node::enroll::Enrollments;
use crate::node::nonce::Nonces;
use crate::node::rate::RateLimit;
use crate::node::refusals::Throttle;
use crate::node::report::Heartbeats;
use crate::secrets::DataKey;
use crate::store::records::{ProfileRecord, SiteRecord};
use crate::store::tables;
use crate::store::{Command, Local, Outcome, Snapshot, Store as _, StoreError};
use crate::traces::Traces;
use anyhow::Context as _;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::node::MemberEndpoint;
use moor_api::problem::Problem;
use moor_api::trust::SiteBundle;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A running member.
pub struct Member {
    /// Its configuration.
    pub config: Config,
    /// Its store.
    pub store: Local,
    /// Its keys.
    pub authority: Authority,
    /// Issues its own certificate.
    pub issuer: MemberIssuer,
    /// The data key.
    pub secrets: DataKey,
    /// The collective.
    pub site: SiteRecord,
    /// Nonces it gave out.
    pub nonces: Nonces,
    /// Who says hello how often.
    pub hellos: RateLimit,
    /// Enrolments that wait for their TPM.
    pub enrollments: Enrollments,
    /// Refusals that come again and again.
    pub refusals: Throttle,
    /// Who is alive.
    pub heartbeats: Heartbeats,
    /// What boots read.
    pub traces: Traces,
}

/// Unix seconds.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Unix milliseconds.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn make_dir(path: &Path, mode: u32) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("making '{}'", path.display()))
}

/// Makes a new collective: its authorities, its store, its first member.
///
/// # Errors
/// There is one already; the state directory is not writable.
pub async fn init(config: &Config, addresses: Vec<String>) -> anyhow::Result<SiteRecord> {
    let keys = config.keys();
    anyhow::ensure!(
        !config.database().exists(),
        "'{}' holds a member already: nothing was changed (to begin anew, move it away)",
        config.state_dir.display()
    );
    make_dir(&config.state_dir, 0o750)?;
    make_dir(&config.state_dir.join("store"), 0o700)?;
    make_dir(&config.blobs(), 0o750)?;
    make_dir(&config.profiles(), 0o750)?;
    // An earlier, interrupted init may have left keys that nobody uses.
    if keys.exists() {
        std::fs::remove_dir_all(&keys).with_context(|| format!("removing '{}'", keys.display()))?;
    }
    make_dir(&keys, 0o700)?;
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: config.name.clone(),
        member: MemberId::random(),
        bundle_version: 1,
        created: now(),
        addresses,
    };
    Authority::create(&keys, site.collective, &site.name)?;
    DataKey::create(&keys.join("data.key"))?;
    // The store comes last: where it exists, everything else does.
    let store = Local::open(&config.database()).context("making the store")?;
    match store.propose(Command::Found { site: site.clone() }).await? {
        Outcome::Refused(problem) => Err(problem.into()),
        _ => Ok(site),
    }
}

/// Where this member is reached: by its URLs, at the addresses it listens on, and by what `init` was told.
fn addresses(config: &Config, site: &SiteRecord) -> anyhow::Result<Addresses> {
    let mut hosts = site.addresses.clone();
    for url in &config.urls {
        hosts.push(moor_api::client::node::parse_https(url)?.0);
    }
    let listening = config.listen.iter().map(std::net::SocketAddr::ip).filter(|ip| !ip.is_unspecified());
    hosts.extend(listening.map(|ip| ip.to_string()));
    let mut addresses = Addresses::default();
    for host in hosts {
        match host.parse() {
            Ok(ip) if !addresses.ips.contains(&ip) => addresses.ips.push(ip),
            Err(_) if !addresses.names.contains(&host) => addresses.names.push(host),
            _ => {}
        }
    }
    Ok(addresses)
}

/// Removes blobs that no record names: what uploads left that were never imported, and generations that are gone. Young ones stay,
/// because an import may be under way.
///
/// # Errors
/// The store or the directory cannot be read.
pub fn collect(member: &Member) -> anyhow::Result<usize> {
    let view = member.view()?;
    let (mut named, mut images) = (BTreeSet::new(), BTreeSet::new());
    for image in view.images()? {
        images.insert(image.digest.to_string());
        named.extend([image.blob, image.kernel, image.initramfs]);
    }
    for generation in view.all::<ProfileRecord>(tables::GENERATIONS)? {
        named.extend(generation.manifest.files.into_values());
        named.extend(generation.manifest.scripts.into_values().flatten().map(|(_, blob)| blob));
    }
    for node in view.nodes()? {
        named.extend(node.boots.into_iter().filter_map(|boot| boot.evidence?.event_log));
    }
    member.traces.retain(&images).context("removing the lists of images that are gone")?;
    content::collect(&member.config.blobs(), &named, Duration::from_hours(24))
}

impl Member {
    /// Opens what `init` made.
    ///
    /// # Errors
    /// There is none; it is damaged; another process runs it.
    pub fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let database = config.database();
        anyhow::ensure!(
            database.exists(),
            "'{}' holds no member: make one with `moord init`",
            config.state_dir.display()
        );
        let store = Local::open(&database).with_context(|| format!("opening the store '{}'", database.display()))?;
        let site = store.snapshot()?.site()?.with_context(|| {
            format!(
                "'{}' was not initialised to its end: move it away and run `moord init` again",
                config.state_dir.display()
            )
        })?;
        let authority = Authority::open(&config.keys())?;
        let issuer = MemberIssuer {
            keys: config.keys(),
            collective: site.collective,
            member: site.member,
            addresses: addresses(&config, &site)?,
            created: site.created,
        };
        let secrets = DataKey::open(&config.keys().join("data.key"), site.collective)?;
        let nonces = Nonces::new(site.member)?;
        content::sweep(&config.blobs());
        let traces = Traces::new(config.traces());
        Ok(Arc::new(Self {
            config,
            store,
            authority,
            issuer,
            secrets,
            site,
            nonces,
            hellos: RateLimit::default(),
            enrollments: Enrollments::default(),
            refusals: Throttle::default(),
            heartbeats: Heartbeats::default(),
            traces,
        }))
    }

    /// Members that nodes may talk to.
    #[must_use]
    pub fn endpoints(&self) -> Vec<MemberEndpoint> {
        vec![MemberEndpoint { id: self.site.member, urls: self.config.urls.clone() }]
    }

    /// What the boot payload carries.
    ///
    /// # Errors
    /// Never, for keys that were opened.
    pub fn bundle(&self) -> anyhow::Result<SiteBundle> {
        Ok(SiteBundle {
            version: self.site.bundle_version,
            collective: self.site.collective,
            name: self.site.name.clone(),
            roots: vec![self.authority.root_pem.clone()],
            members: self.config.urls.clone(),
            ssh_host_authorities: vec![self.authority.ssh_host_line()?],
            built: self.site.created,
        })
    }

    /// A consistent view of the store.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn view(&self) -> Result<Snapshot, StoreError> {
        self.store.snapshot()
    }

    /// Proposes a change; a refusal becomes an error.
    ///
    /// # Errors
    /// Refused, or the store failed.
    pub async fn propose(&self, command: Command) -> Result<Outcome, Problem> {
        match self.store.propose(command).await? {
            Outcome::Refused(problem) => Err(problem),
            done => Ok(done),
        }
    }

    /// Writes an audit line; durable when it returns.
    ///
    /// # Errors
    /// The store failed: then what was to be recorded must not happen.
    pub async fn audit(&self, what: &str, fields: serde_json::Value) -> Result<(), Problem> {
        let entry = serde_json::json!({ "time_ms": now_ms(), "what": what, "fields": fields });
        self.propose(Command::Audit { entry }).await.map(drop)
    }
}
