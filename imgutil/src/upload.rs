//! The way of an image to a server: image, kernel, initramfs, boot loaders and key go to a member, which imports them and has the profile made. Only a
//! nameless sealed file is made here.

use crate::progress::Progress;
use anyhow::{Context as _, Result, bail};
use moor_api::admin::{CreateProfile, ImageView, ImportImage, ProfileView};
use moor_api::client::admin::AdminClient;
use moor_api::ids::{ImageName, ProfileName, Sha256Digest};
use moor_api::trust::SiteBundle;
use moor_image::Dek;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use zeroize::{Zeroize as _, Zeroizing};

/// Where the server is, and who asks.
#[derive(Debug, Clone, clap::Args)]
pub struct Server {
    /// Unix socket of the local member, for packing to a profile.
    #[arg(long, default_value = "/run/mooring/api.sock", env = "MOOR_SOCKET")]
    pub socket: PathBuf,
    /// A member's URL, instead of the socket.
    #[arg(long, env = "MOOR_SERVER", requires = "token_file", requires = "site_file")]
    pub server: Option<String>,
    /// File with the administrator's token, readable by its owner only.
    #[arg(long, env = "MOOR_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The site bundle, which says who is a member.
    #[arg(long, env = "MOOR_SITE_FILE")]
    pub site_file: Option<PathBuf>,
}

/// What becomes of the profile that has the image's name.
#[derive(Debug, Clone, Default)]
pub struct ProfileOptions {
    /// Make it, from this one with its scripts, and publish it.
    pub base: Option<String>,
    /// Publish it, so that nodes get the image.
    pub publish: bool,
}

/// The way of an image to a server, asked before the long work: whether it answers, and where its generations and profiles stand.
pub(crate) struct Upload<'a> {
    runtime: tokio::runtime::Runtime,
    server: &'a Server,
    name: &'a ImageName,
    profile: &'a ProfileOptions,
    /// Of the image's generations.
    pub(crate) lineage: Uuid,
    /// Greater than that of the last one.
    pub(crate) serial: u64,
}

/// What goes to a server: a sealed image, with the kernel, the initramfs and the boot loaders that are in it.
pub(crate) struct Parcel<R> {
    pub(crate) sealed: File,
    pub(crate) key: Option<Dek>,
    /// With its length.
    pub(crate) kernel: (R, u64),
    pub(crate) initramfs: (R, u64),
    /// Shim and GRUB by the names that they look for each other by, or none.
    pub(crate) boot_loaders: Vec<(String, (R, u64))>,
}

impl<'a> Upload<'a> {
    /// Asks the server for the image `name` and the profile of that name.
    pub(crate) fn begin(server: &'a Server, name: &'a ImageName, profile: &'a ProfileOptions) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the network runtime")?;
        let (images, profiles) = runtime.block_on(async {
            let mut client = connect(server).await?;
            Ok::<_, anyhow::Error>((client.images().await?, client.profiles().await?))
        })?;
        let is_there = profiles.iter().any(|known| known.name.as_str() == name.as_str());
        match &profile.base {
            Some(base) if is_there => bail!(
                "the profile '{name}' exists already, so it cannot be made from '{base}': leave out -b, and its next generation has this image"
            ),
            None if profile.publish && !is_there => {
                bail!("there is no profile '{name}' to publish: make it with -b BASE, for example -b debian-diskless")
            }
            _ => {}
        }
        let last = images.iter().filter(|image| image.name == *name).max_by_key(|image| image.serial);
        let lineage = last.map_or_else(Uuid::new_v4, |image| image.lineage);
        let serial = last.map_or(1, |image| image.serial + 1);
        Ok(Self { runtime, server, name, profile, lineage, serial })
    }

    /// A nameless file for the sealed image.
    pub(crate) fn staging() -> Result<File> {
        tempfile::tempfile().context("cannot make a temporary file for the sealed image")
    }

    /// Sends it, has it imported, and makes and publishes the profile as far as that is wanted.
    pub(crate) fn send<R>(self, parcel: Parcel<R>) -> Result<(ImageView, Option<ProfileView>)>
    where
        R: Read + Send + 'static,
    {
        let Self { runtime, server, name, profile, .. } = self;
        let Parcel { mut sealed, key, kernel, initramfs, boot_loaders } = parcel;
        sealed.rewind().context("cannot read the sealed image again")?;
        let length = sealed.metadata().context("cannot read the sealed image again")?.len();
        runtime.block_on(async {
            let mut client = connect(server).await?;
            let kernel = send(&mut client, "the kernel", kernel).await?;
            let initramfs = send(&mut client, "the initramfs", initramfs).await?;
            let mut loaders = BTreeMap::new();
            for (name, file) in boot_loaders {
                let blob = send(&mut client, &name, file).await?;
                loaders.insert(name, blob);
            }
            let image = send(&mut client, "the image", (sealed, length)).await?;
            let request = ImportImage {
                name: name.clone(),
                image,
                key: None,
                signatures: None,
                kernel,
                initramfs,
                boot_loaders: loaders,
            };
            let request = WithKey::new(request, key.as_ref());
            let view = client.import_image(request.get()).await;
            drop(request);
            let view = view.with_context(|| format!("cannot import the image '{name}'"))?;
            let published = publish(&mut client, name, profile).await.with_context(|| {
                format!("the image is there ({}), but not its profile; see `moor profile`", view.digest)
            })?;
            Ok((view, published))
        })
    }
}

/// A request with an image's key, which is wiped when it is dropped, however the request ended.
pub(crate) struct WithKey(ImportImage);

impl WithKey {
    pub(crate) fn new(mut request: ImportImage, key: Option<&Dek>) -> Self {
        request.key = key.map(|key| key.to_hex().trim_end().to_owned());
        Self(request)
    }

    pub(crate) fn get(&self) -> &ImportImage {
        &self.0
    }
}

impl Drop for WithKey {
    fn drop(&mut self) {
        self.0.key.zeroize();
    }
}

/// Makes the profile if it has to be made, and publishes it if that is wanted.
async fn publish(client: &mut AdminClient, name: &ImageName, options: &ProfileOptions) -> Result<Option<ProfileView>> {
    if options.base.is_none() && !options.publish {
        return Ok(None);
    }
    let profile: ProfileName = name.as_str().parse().with_context(|| format!("'{name}' is no name of a profile"))?;
    if let Some(base) = &options.base {
        let request = CreateProfile { name: profile.clone(), image: name.clone(), template: base.clone() };
        client.create_profile(&request).await.with_context(|| format!("cannot make the profile from '{base}'"))?;
    }
    let view = client.publish(&profile).await.with_context(|| format!("cannot publish the profile '{profile}'"))?;
    Ok(Some(view))
}

/// Connects as the options say.
async fn connect(server: &Server) -> Result<AdminClient> {
    let Some(url) = &server.server else {
        return AdminClient::unix(&server.socket).await.context(
            "is moord running here? (another member: --server, --site-file and --token-file; a file: -o and --key-file)",
        );
    };
    let site = server.site_file.as_deref().context("--server needs --site-file")?;
    let text = std::fs::read_to_string(site).with_context(|| format!("cannot read '{}'", site.display()))?;
    let bundle: SiteBundle =
        serde_json::from_str(&text).with_context(|| format!("'{}' is no site bundle", site.display()))?;
    let token = read_token(server.token_file.as_deref().context("--server needs --token-file")?)?;
    Ok(AdminClient::https(url, &bundle, token.trim()).await?)
}

fn read_token(path: &Path) -> Result<Zeroizing<String>> {
    const LIMIT: u64 = 64 << 10;
    let context = || format!("cannot read the token '{}'", path.display());
    let file = File::open(path).with_context(context)?;
    if file.metadata().with_context(context)?.mode() & 0o077 != 0 {
        bail!("'{0}' can be read by others than its owner: `chmod 600 '{0}'`", path.display());
    }
    let mut text = Zeroizing::new(String::with_capacity(4096));
    file.take(LIMIT).read_to_string(&mut text).with_context(context)?;
    Ok(text)
}

/// Sends all that comes from `reader`, which is as long as it is said to be.
async fn send<R: Read + Send + 'static>(
    client: &mut AdminClient,
    what: &str,
    (reader, length): (R, u64),
) -> Result<Sha256Digest> {
    let progress = Arc::new(Progress::new("sending"));
    progress.total(length);
    let shown = Arc::clone(&progress);
    let mut before = 0;
    let added = client
        .add_blob(reader, move |sent| {
            shown.advance(sent - before);
            before = sent;
        })
        .await
        .with_context(|| format!("cannot send {what}"))?;
    progress.finish(&format!("sent {what}"));
    if added.size != length {
        bail!("{what} changed while it was sent: try again");
    }
    Ok(added.blob)
}
