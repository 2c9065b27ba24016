//! Machines without an operating system: they know members, prove themselves by a soft key and read the image with the agent's and the tether's own
//! code, all in one process. For what takes many of them.

use crate::Collective;
use anyhow::{Context as _, bail, ensure};
use futures_util::future::try_join_all;
use moor_agent::identity::soft::SoftKey;
use moor_agent::identity::{self, Identity, IdentityError};
use moor_agent::members::Members;
use moor_api::admin::{ArmRequest, CreateProfile, DefineNodes, DeployRequest, ImageView, ImportImage};
use moor_api::client::ClientError;
use moor_api::client::admin::AdminClient;
use moor_api::client::session::SessionKey;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::BootId;
use moor_api::node::{
    Hello, ImageOffer, KeyRequest, KnownNode, NextStep, SessionReply, Stage, StageClosed, StatusReport,
};
use moor_api::problem::Code;
use moor_api::trust::SiteBundle;
use moor_image::{Dek, Metadata, OpenOptions, Payload, SealOptions, Sealer};
use moor_tether::reader::{Address, Https, Reader, Real, Settings};
use std::collections::BTreeMap;
use std::io::{Cursor, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The profile that they boot, and its image.
pub const PROFILE: &str = "crowd";
/// Between two tries of a boot, at most.
const PAUSE: u64 = 1000;
/// Cache of one machine.
const CACHE: u64 = 1 << 20;

/// Puts a sealed image of so many bytes into the catalogue, and publishes [`PROFILE`] with it.
///
/// # Errors
/// The member refuses.
pub async fn publish(admin: &mut AdminClient, bytes: usize) -> anyhow::Result<ImageView> {
    let view = image(admin, PROFILE, bytes).await?;
    let create = CreateProfile { name: PROFILE.parse()?, image: PROFILE.parse()?, template: "debian-diskless".into() };
    admin.create_profile(&create).await?;
    admin.publish(&create.name).await?;
    Ok(view)
}

/// Puts a sealed image of so many bytes into the catalogue.
///
/// # Errors
/// The member refuses.
pub async fn image(admin: &mut AdminClient, name: &str, bytes: usize) -> anyhow::Result<ImageView> {
    let key = Dek::generate()?;
    let options = SealOptions {
        lineage: Uuid::new_v4().into_bytes(),
        serial: 1,
        created: 1_700_000_000,
        chunk_log2: 16,
        payload: Payload::Opaque,
        key: Some(key.clone()),
    };
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options)?;
    sealer.write_all(&vec![42; bytes])?;
    let metadata = |summary: moor_image::PayloadSummary| Metadata {
        name: name.to_owned(),
        os: "test-1".into(),
        payload_sha256: hex::encode(summary.sha256),
        ..Metadata::default()
    };
    let (file, _) = sealer.finish(metadata, None)?;
    let image = admin.add_blob(Cursor::new(file.into_inner()), |_| {}).await?.blob;
    let kernel = admin.add_blob(Cursor::new(b"kernel".to_vec()), |_| {}).await?.blob;
    let initramfs = admin.add_blob(Cursor::new(b"initramfs".to_vec()), |_| {}).await?.blob;
    let import = ImportImage {
        name: name.parse()?,
        image,
        key: Some(key.to_hex().to_string()),
        signatures: None,
        kernel,
        initramfs,
        boot_loaders: BTreeMap::new(),
    };
    Ok(admin.import_image(&import).await?)
}

/// A machine that is a node.
pub struct Machine {
    uuid: Uuid,
    identity: Identity,
    session: SessionKey,
    boot: BootId,
    /// Whether the boot stage of this boot is over.
    is_closed: bool,
    sequence: u64,
}

/// So many machines, each defined as a node with these attributes, armed once and told to boot [`PROFILE`]. Their names begin with `name`, their keys
/// lie in `keys`.
///
/// # Errors
/// The member refuses.
pub async fn machines(
    admin: &mut AdminClient,
    keys: &Path,
    name: &str,
    count: usize,
    attributes: &BTreeMap<String, String>,
) -> anyhow::Result<Vec<Machine>> {
    let mut machines = Vec::with_capacity(count);
    for number in 0..count {
        let machine = Machine::new(&keys.join(format!("{number}.key")))?;
        let mut attributes = attributes.clone();
        attributes.insert("id.uuid".to_owned(), machine.uuid.to_string());
        let changed = admin.define(&DefineNodes { range: format!("{name}{number:04}"), attributes }).await?;
        ensure!(changed.refused.is_empty(), "{changed:?}");
        machines.push(machine);
    }
    let range = format!("{name}[0000-{:04}]", count.saturating_sub(1));
    admin.arm(&ArmRequest { range: range.clone(), until: "once".into() }).await?;
    admin.deploy(&DeployRequest { range, profile: PROFILE.parse()? }).await?;
    Ok(machines)
}

/// What stopped a boot for now.
fn is_closed(error: &IdentityError) -> bool {
    matches!(error, IdentityError::Refused(problem) if problem.code == Code::StageClosed)
}

impl Machine {
    fn new(key: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            uuid: Uuid::new_v4(),
            identity: Identity::Soft(SoftKey::open(key)?),
            session: SessionKey::generate()?,
            boot: BootId::random(),
            is_closed: false,
            sequence: 0,
        })
    }

    fn hello(&self) -> Hello {
        Hello {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            capabilities: self.identity.capabilities(),
            uuid: Some(self.uuid),
            serial: None,
            macs: Vec::new(),
            arch: "x86_64".into(),
            boot: self.boot,
        }
    }

    /// Off and on: another boot.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn power_cycle(&mut self) -> anyhow::Result<()> {
        self.session = SessionKey::generate()?;
        (self.boot, self.is_closed, self.sequence) = (BootId::random(), false, 0);
        Ok(())
    }

    /// The certificate of its session, for connections that carry its token.
    ///
    /// # Errors
    /// The bundle is not usable.
    pub fn tls(&self, site: &SiteBundle) -> anyhow::Result<rustls::ClientConfig> {
        Ok(member_tls_config(site, Some(&self.session))?)
    }

    /// The boot that it is in.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        self.boot
    }

    /// Its session key.
    #[must_use]
    pub fn session(&self) -> &SessionKey {
        &self.session
    }

    /// The public half of that, as tokens name it.
    #[must_use]
    pub fn session_key(&self) -> Vec<u8> {
        self.session.public_key()
    }

    /// hello, enrolment where the member asks for it, session; its token is in use from then on. A nonce is good where it was given out, so all of it
    /// goes to one member.
    ///
    /// # Errors
    /// A member refuses, or the connection breaks.
    pub async fn log_in(
        &mut self,
        site: &SiteBundle,
        members: &mut Members,
        stage: Stage,
    ) -> Result<(KnownNode, SessionReply), IdentityError> {
        let hello = self.hello();
        let Self { identity, session, boot, .. } = self;
        let connection = members.connection().await?;
        let reply = connection.hello(&hello).await?;
        if let Some(problem) = reply.refusal {
            return Err(ClientError::Problem(problem).into());
        }
        let known = reply.node.ok_or_else(|| ClientError::Config("a hello without an answer".into()))?;
        let nonce = if known.next == NextStep::Enroll {
            identity::enroll(connection, identity, site.collective, &known, *boot, session).await?.nonce
        } else {
            known.nonce.clone()
        };
        let reply =
            identity::session(connection, identity, site.collective, &known, &nonce, *boot, stage, session).await?;
        members.set_token(reply.token.clone())?;
        Ok((known, reply))
    }

    /// Boots until it has said `booted`, however often it has to begin anew: how long that took.
    ///
    /// # Errors
    /// It has not within `limit`: what stopped it last.
    pub async fn boot(
        &mut self,
        site: &SiteBundle,
        urls: &[String],
        reads: u64,
        limit: Duration,
    ) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let mut urls = urls.to_vec();
        loop {
            let turn = fastrand::usize(0..urls.len());
            urls.rotate_left(turn);
            let error = match tokio::time::timeout(limit, self.try_boot(site, &urls, reads)).await {
                Ok(Ok(())) => return Ok(began.elapsed()),
                Ok(Err(error)) => error,
                Err(_) => anyhow::anyhow!("it hangs"),
            };
            if began.elapsed() > limit {
                return Err(error.context(format!("not booted within {} s", limit.as_secs())));
            }
            tokio::time::sleep(Duration::from_millis(fastrand::u64(PAUSE / 4..PAUSE))).await;
        }
    }

    async fn try_boot(&mut self, site: &SiteBundle, urls: &[String], reads: u64) -> anyhow::Result<()> {
        if !self.is_closed {
            let mut members = Members::new(site, &self.session, urls.to_vec())?;
            match self.log_in(site, &mut members, Stage::Boot).await {
                Ok((known, _)) => self.boot_stage(site, &mut members, &known, reads).await?,
                // The answer to its word of that was lost.
                Err(error) if is_closed(&error) => {}
                Err(error) => return Err(error.into()),
            }
            self.is_closed = true;
            self.session = SessionKey::generate()?;
        }
        let mut members = Members::new(site, &self.session, urls.to_vec())?;
        self.log_in(site, &mut members, Stage::Run).await?;
        self.say(&mut members, "booted").await
    }

    async fn say(&mut self, members: &mut Members, state: &str) -> anyhow::Result<()> {
        self.sequence += 1;
        let report = StatusReport {
            boot: self.boot,
            sequence: self.sequence,
            state: state.into(),
            detail: String::new(),
            uptime_ms: 1,
            figures: BTreeMap::new(),
        };
        Ok(members.call(async |member| member.status(&report).await).await?)
    }

    async fn boot_stage(
        &mut self,
        site: &SiteBundle,
        members: &mut Members,
        known: &KnownNode,
        reads: u64,
    ) -> anyhow::Result<()> {
        let document = members.call(async |member| member.config().await).await?;
        ensure!(document.node.name == known.name, "the settings of {}, not of {}", document.node.name, known.name);
        let offer = members.call(async |member| member.image().await).await?;
        let request = KeyRequest { digest: offer.digest };
        let envelope = members.call(async |member| member.image_key(&request).await).await?;
        let Ok(key) = <[u8; 32]>::try_from(envelope.wrapped.0.as_slice()) else { bail!("a key of another length") };
        self.say(members, "image").await?;
        read(site, &offer, Dek::from_bytes(key), reads).await?;
        let closed = StageClosed { boot: self.boot };
        members.call(async |member| member.stage_closed(&closed).await).await?;
        Ok(())
    }
}

/// Lets all machines boot, each at a moment of its own within `spread`, and gives how long each took. Blocks; what members do meanwhile is up to
/// another thread.
///
/// # Errors
/// The first one that has not booted within `limit`.
pub fn boot_all(
    machines: &mut [Machine],
    site: &SiteBundle,
    urls: &[String],
    reads: u64,
    (spread, limit): (Duration, Duration),
) -> anyhow::Result<Vec<Duration>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let boots = machines.iter_mut().enumerate().map(|(number, machine)| async move {
        tokio::time::sleep(spread.mul_f64(fastrand::f64())).await;
        machine.boot(site, urls, reads, limit).await.with_context(|| format!("machine {number}"))
    });
    runtime.block_on(try_join_all(boots))
}

/// Waits until every member has the image.
///
/// # Errors
/// One has not within a minute.
pub async fn spread(collective: &Collective, image: &ImageView) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_mins(1);
    for at in 0..collective.urls().len() {
        let limit = usize::try_from(image.size)?;
        while let Err(error) = collective.admin(at).await?.image(image.digest, limit).await {
            ensure!(Instant::now() < end, "m{} has no image: {error}", at + 1);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Opens the image as the tether does, at all members that have it, and reads so many chunks here and there.
async fn read(site: &SiteBundle, offer: &ImageOffer, key: Dek, reads: u64) -> anyhow::Result<()> {
    let addresses = offer.urls.iter().map(|url| Address::resolve(url)).collect::<Result<Vec<_>, _>>()?;
    let tls = Arc::new(member_tls_config(site, None)?);
    let world = Arc::new(Real::new(tokio::runtime::Handle::current()));
    let options = OpenOptions { key: Some(key), ..OpenOptions::default() };
    let settings = Settings { cache: CACHE, ..Settings::default() };
    let reader = Reader::open(Https::all(addresses, &tls), world, &options, settings).await?;
    let (size, chunks) = (reader.header().chunk_size(), reader.header().chunks);
    for _ in 0..reads {
        let chunk = fastrand::u64(0..chunks);
        reader.read(chunk * size, 4096).await.context("reading the image")?;
    }
    reader.end(true);
    Ok(())
}
