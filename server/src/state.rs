//! The member: what every handler needs. One value, shared.

use crate::authority::{self, Addresses, MemberIssuer};
use crate::certificate::Certificate;
use crate::collective::REMOVED;
use crate::collective::alive::Heartbeats;
use crate::collective::busy::Busy;
use crate::collective::identity::{self, Identity};
use crate::collective::recover;
use crate::config::Config;
use crate::content;
use crate::late::Waiting;
use crate::node::enroll::Enrollments;
use crate::node::nonce::Nonces;
use crate::node::rate::RateLimit;
use crate::node::refusals::Throttle;
use crate::observe::Requests;
use crate::secrets::{Keyring, Place, Ring, SealedSecret, UnwrapKey};
use crate::shares::Shares;
use crate::store::raft::{Calls, FOUNDER, Peer};
use crate::store::records::{MemberRecord, ProfileRecord, SiteRecord};
use crate::store::tables;
use crate::store::{Command, Outcome, Replicated, Snapshot, Store as _, StoreError};
use crate::traces::Traces;
use crate::trust::{self, Heard, Trust};
use anyhow::Context as _;
use moor_api::ids::{CollectiveId, NodeName, Sha256Digest};
use moor_api::node::MemberEndpoint;
use moor_api::problem::Problem;
use moor_api::trust::{Incarnation, SiteBundle};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

/// A running member.
pub struct Member {
    /// Its configuration.
    pub config: Config,
    /// Its store.
    pub store: Replicated,
    /// Its way to other members.
    pub calls: Arc<Calls>,
    /// Whom it believes to be a member, which authority its certificate is from, and the SSH authorities.
    pub trust: Trust,
    /// What nodes said of their trust.
    pub said: Heard,
    /// Issues its own certificate.
    pub issuer: MemberIssuer,
    /// Its certificate as it is now.
    pub certificate: Arc<Certificate>,
    /// The collective's keys.
    pub secrets: Keyring,
    /// The collective, as it was when this member was started: the version of the trust bundle is in [`Member::trust`].
    pub site: SiteRecord,
    /// This member.
    pub identity: Identity,
    /// Nonces it gave out.
    pub nonces: Nonces,
    /// Who says hello how often.
    pub hellos: RateLimit,
    /// Who tries how often to join.
    pub joins: RateLimit,
    /// Enrolments that wait for their TPM.
    pub enrollments: Enrollments,
    /// Refusals that come again and again.
    pub refusals: Throttle,
    /// Which nodes are alive.
    pub heartbeats: Heartbeats,
    /// How busy members are with nodes.
    pub busy: Busy,
    /// What it did without a majority.
    pub waiting: Waiting,
    /// What boots read.
    pub traces: Traces,
    /// What it was asked.
    pub requests: Requests,
    /// Who is sent bytes next.
    pub shares: Arc<Shares>,
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

/// A line of the audit log as of now.
#[must_use]
pub fn audit_entry(what: &str, fields: &serde_json::Value) -> serde_json::Value {
    serde_json::json!({ "time_ms": now_ms(), "what": what, "fields": fields })
}

/// The name of this machine, as far as a member may have it.
pub(crate) fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    if identity::check_name(&name).is_ok() { name } else { "member-1".into() }
}

/// Makes a new collective: its authorities, its store, its first member.
///
/// # Errors
/// There is one already, and it is not to be set aside; the state directory is not writable.
pub async fn init(config: &Config, addresses: Vec<String>, set_aside: bool) -> anyhow::Result<Identity> {
    let name = config.member_name.clone().unwrap_or_else(host_name);
    identity::check_name(&name)?;
    config.make_member(set_aside, async |keys| found(config, keys, name, addresses).await).await
}

async fn found(config: &Config, keys: &Path, name: String, addresses: Vec<String>) -> anyhow::Result<Identity> {
    let site = SiteRecord {
        collective: CollectiveId::random(),
        name: config.name.clone(),
        bundle_version: 1,
        created: now(),
        incarnation: Incarnation::FIRST,
    };
    let (key, unwrap) = (authority::create_member_key(keys)?, UnwrapKey::create(keys)?);
    let founder = MemberRecord::only(key.into(), unwrap, name.clone(), config.urls.clone());
    let versions = Ring::first(site.collective)?.record_for(&founder)?;
    let identity = Identity {
        number: FOUNDER,
        id: founder.id,
        name,
        addresses,
        site: site.clone(),
        met: Vec::new(),
        removed: Vec::new(),
        introduction: Vec::new(),
    };
    authority::create(keys, site.collective, &site.name, site.created)?;
    let Connections { calls, .. } = connections(config, keys, &identity)?;
    config.make_store().context("making the store")?;
    let store = Replicated::open(&config.store(), FOUNDER, calls).await.context("making the store")?;
    store.found(founder.peer()).await.context("making the collective")?;
    let founded = store.propose(Command::Found { site, founder, keys: versions }).await;
    store.close().await;
    if let Outcome::Refused(problem) = founded? {
        return Err(problem.into());
    }
    // It comes last: where it exists, everything else does.
    identity.write(&config.identity())?;
    Ok(identity)
}

/// What a member shows of itself, and its way to other members.
struct Connections {
    issuer: MemberIssuer,
    certificate: Arc<Certificate>,
    trust: Trust,
    calls: Arc<Calls>,
}

fn connections(config: &Config, keys: &Path, identity: &Identity) -> anyhow::Result<Connections> {
    let issuer = MemberIssuer {
        keys: keys.to_owned(),
        collective: identity.site.collective,
        incarnation: identity.site.incarnation,
        member: identity.id,
        addresses: addresses(config, identity)?,
        created: identity.site.created,
    };
    let certificate = Arc::new(Certificate::new(&issuer)?);
    let trust = Trust::open(keys, &identity.site)?;
    let tls = trust::peer_calls(&identity.site, &trust.taken(), certificate.clone())?;
    let introduction = match &identity.introduction[..] {
        [] => None,
        vouchers => Some(serde_json::to_vec(vouchers)?.into()),
    };
    let calls = Arc::new(Calls::new(identity.site.collective, tls, introduction));
    Ok(Connections { issuer, certificate, trust, calls })
}

/// Where this member is reached: by its URLs, at the addresses it listens on, and by what `init` was told.
fn addresses(config: &Config, identity: &Identity) -> anyhow::Result<Addresses> {
    let mut hosts = identity.addresses.clone();
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

/// What a blob is. In this order they are fetched: what is small does not wait for what is large, and of an image its boot files come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A script or file of a profile, or a log.
    Small,
    /// A kernel, an initramfs or a boot loader.
    BootFile,
    /// An image of so many bytes.
    Image(u64),
}

/// Blobs that records name and that are not in `dir`, those first that are to be fetched first.
///
/// # Errors
/// The database is damaged.
pub fn missing(view: &Snapshot, dir: &Path) -> Result<Vec<Sha256Digest>, StoreError> {
    let mut kinds = BTreeMap::new();
    contents(view, |blob, kind, _| {
        let known = kinds.entry(blob).or_insert(kind);
        *known = kind.min(*known);
    })?;
    let mut blobs: Vec<_> = kinds.into_iter().map(|(blob, kind)| (kind, blob)).collect();
    blobs.sort_unstable();
    Ok(content::lacking(dir, blobs.into_iter().map(|(_, blob)| blob).collect()))
}

/// Of a [`NodeRecord`](crate::store::records::NodeRecord): what names blobs. Members look through all nodes every few seconds.
#[derive(Deserialize)]
struct WithLogs {
    name: NodeName,
    #[serde(default)]
    boots: Vec<BootLogs>,
}

#[derive(Deserialize)]
struct BootLogs {
    #[serde(default)]
    evidence: Option<EventLog>,
}

#[derive(Deserialize)]
struct EventLog {
    #[serde(default)]
    event_log: Option<Sha256Digest>,
}

/// Gives each blob that a record names to `take`, with what it is, and a way to say that to people; returns the images that there are.
fn contents(
    view: &Snapshot,
    mut take: impl FnMut(Sha256Digest, Kind, &dyn Fn() -> String),
) -> Result<BTreeSet<String>, StoreError> {
    let mut images = BTreeSet::new();
    for image in view.images()? {
        let of = format!("image '{}' @{}", image.name, image.serial);
        take(image.blob, Kind::Image(image.size), &|| of.clone());
        take(image.kernel, Kind::BootFile, &|| format!("kernel of {of}"));
        take(image.initramfs, Kind::BootFile, &|| format!("initramfs of {of}"));
        for (name, blob) in &image.boot_loaders {
            take(*blob, Kind::BootFile, &|| format!("{name} of {of}"));
        }
        images.insert(image.digest.to_string());
    }
    for generation in view.all::<ProfileRecord>(tables::GENERATIONS)? {
        let manifest = &generation.manifest;
        for (path, blob) in
            manifest.files.iter().chain(manifest.scripts.values().flatten().map(|(path, blob)| (path, blob)))
        {
            take(*blob, Kind::Small, &|| format!("'{path}' of profile '{}' @{}", generation.name, generation.serial));
        }
    }
    view.find_map(tables::NODES, |node: WithLogs| {
        let logs = node.boots.iter().filter_map(|boot| boot.evidence.as_ref()?.event_log);
        for log in logs {
            take(log, Kind::Small, &|| format!("the firmware's log of a boot of {}", node.name));
        }
        None::<()>
    })?;
    Ok(images)
}

/// Blobs that records name, and images that there are.
pub(crate) fn named(view: &Snapshot) -> Result<(BTreeSet<Sha256Digest>, BTreeSet<String>), StoreError> {
    let mut named = BTreeSet::new();
    let images = contents(view, |blob, _, _| {
        named.insert(blob);
    })?;
    Ok((named, images))
}

/// Blobs that records name, and what each is, for people.
///
/// # Errors
/// The database is damaged.
pub fn described(view: &Snapshot) -> Result<BTreeMap<Sha256Digest, String>, StoreError> {
    let mut described = BTreeMap::new();
    contents(view, |blob, _, what| {
        described.entry(blob).or_insert_with(what);
    })?;
    Ok(described)
}

/// Removes blobs that no record names: what uploads left that were never imported, and generations that are gone. Young ones stay,
/// because an import may be under way.
///
/// # Errors
/// The store or the directory cannot be read.
pub fn collect(member: &Member) -> anyhow::Result<usize> {
    let (named, images) = named(&member.view()?)?;
    member.traces.retain(&images).context("removing the lists of images that are gone")?;
    content::collect(&member.config.blobs(), &named, Duration::from_hours(24))
}

/// What is to be done where a file of the store is damaged. A member never begins anew by itself: see [`database`](crate::store::database).
pub(crate) fn not_opened(error: StoreError, identity: &Identity) -> anyhow::Error {
    match error {
        StoreError::File { file, cause } if cause.is_damage() => anyhow::anyhow!(
            "'{}' is damaged ({cause}): on another member run `moor collective replace {name} {name}`, and here `moor collective join --set-aside` \
             with the invitation, which moves '{}' aside (where there is no other member: `moor restore BACKUP --set-aside`)",
            file.display(),
            file.parent().unwrap_or(&file).display(),
            name = identity.name
        ),
        error => error.into(),
    }
}

impl Member {
    /// Opens what `init` or `join` made.
    ///
    /// # Errors
    /// There is none; it is damaged; another process runs it.
    pub async fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        anyhow::ensure!(
            config.identity().exists(),
            "'{}' holds no member: make a new collective with `moord init`, or come to one with `moord join`",
            config.state_dir.display()
        );
        let identity = match recover::finish(&config)? {
            Some(identity) => identity,
            None => Identity::read(&config.identity())?,
        };
        let Connections { issuer, certificate, trust, calls } = connections(&config, &config.keys(), &identity)?;
        // Before the store, whose tasks would talk about their end after the reason was told.
        let path = config.waiting();
        let waiting = Waiting::open(&path).map_err(|error| not_opened(error.within(&path), &identity))?;
        let store = Replicated::open_up_to(config.level(), &config.store(), identity.number, calls.clone()).await;
        let store = store.map_err(|error| not_opened(error, &identity)).context("opening the store")?;
        let site = store.snapshot()?.site()?.unwrap_or_else(|| identity.site.clone());
        let secrets = Keyring::open(&config.keys(), site.collective, identity.id)?;
        secrets.refresh(&store.snapshot()?.key_versions()?)?;
        let nonces = Nonces::new(identity.id)?;
        content::sweep(&config.blobs());
        let traces = Traces::new(config.traces());
        let member = Self {
            config,
            store,
            calls,
            trust,
            said: Heard::default(),
            issuer,
            certificate,
            secrets,
            site,
            identity,
            nonces,
            hellos: RateLimit::default(),
            joins: RateLimit::default(),
            enrollments: Enrollments::default(),
            refusals: Throttle::default(),
            heartbeats: Heartbeats::default(),
            busy: Busy::default(),
            requests: Requests::default(),
            shares: Arc::default(),
            waiting,
            traces,
        };
        if member.waiting.is_removed() {
            member.calls.set_removed("it was told so before", REMOVED);
        }
        // What cannot be taken up now is tried again: until then the member is as it was.
        if let Err(error) = member.take_up() {
            tracing::error!("the authorities: {error:#}");
        }
        Ok(Arc::new(member))
    }

    /// Members that nodes may talk to: this one first, because the asker reaches it.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn endpoints(&self) -> Result<Vec<MemberEndpoint>, StoreError> {
        let mut endpoints = vec![MemberEndpoint { id: self.identity.id, urls: self.config.urls.clone() }];
        let others = self.view()?.members()?.into_values().filter(|member| !member.removed);
        endpoints.extend(
            others
                .filter(|member| member.id != self.identity.id)
                .map(|member| MemberEndpoint { id: member.id, urls: member.urls }),
        );
        Ok(endpoints)
    }

    /// The other members, as the records name them; none if they cannot be read.
    #[must_use]
    pub fn others(&self) -> Vec<Peer> {
        let members = self.view().and_then(|view| view.members()).unwrap_or_default();
        let others = members.into_values().filter(|member| !member.removed && member.id != self.identity.id);
        others.map(|member| member.peer()).collect()
    }

    /// What the boot payload carries.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn bundle(&self) -> anyhow::Result<SiteBundle> {
        let members = self.endpoints()?.into_iter().flat_map(|member| member.urls).collect();
        let taken = self.trust.taken();
        let ssh = self.trust.ssh().hosts.clone();
        Ok(trust::bundle(&self.site, &taken.held, taken.roots.clone(), members, ssh))
    }

    /// A consistent view of the store.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn view(&self) -> Result<Snapshot, StoreError> {
        self.store.snapshot()
    }

    /// The collective's keys as this member knows them now.
    ///
    /// # Errors
    /// The database is damaged; a version that is for this member does not open.
    pub fn ring(&self) -> anyhow::Result<Arc<Ring>> {
        self.secrets.refresh(&self.view()?.key_versions()?)
    }

    /// Encrypts a secret.
    ///
    /// # Errors
    /// This member has not the current keys; no randomness.
    pub fn seal(&self, place: Place<'_>, plaintext: &[u8]) -> anyhow::Result<SealedSecret> {
        self.ring()?.seal(place, plaintext)
    }

    /// Decrypts one.
    ///
    /// # Errors
    /// This member has not the keys that it is under; another place, or changed bytes.
    pub fn open_secret(&self, place: Place<'_>, secret: &SealedSecret) -> anyhow::Result<Zeroizing<Vec<u8>>> {
        let known = self.secrets.ring();
        // It may be under keys that this member has heard of a moment ago.
        let ring = if known.has(secret.key_version()) { known } else { self.ring()? };
        ring.open_secret(place, secret)
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
        self.propose(Command::Audit { entry: audit_entry(what, &fields) }).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::{BootRecord, Evidence, NodeRecord};
    use moor_api::ids::BootId;

    /// Blobs that are not found are collected.
    #[test]
    fn the_part_of_a_node_that_names_blobs_has_them_all() {
        let id = "00000000-0000-0000-0000-000000000001";
        let mut node: NodeRecord =
            serde_json::from_value(serde_json::json!({ "id": id, "name": "n1", "attributes": {} })).unwrap();
        let log = Sha256Digest([3; 32]);
        let evidence = Evidence { pcrs: Vec::new(), event_log: Some(log), reset_count: 1, firmware_version: 2 };
        let mut boot = BootRecord::new(BootId::from_bytes([2; 16]), false);
        node.boots.push(boot.clone());
        boot.evidence = Some(evidence);
        node.boots.push(boot);
        let part: WithLogs = serde_json::from_slice(&serde_json::to_vec(&node).unwrap()).unwrap();
        let logs: Vec<_> = part.boots.iter().map(|boot| boot.evidence.as_ref().and_then(|it| it.event_log)).collect();
        assert_eq!((part.name, logs), (node.name, vec![None, Some(log)]));
    }
}
