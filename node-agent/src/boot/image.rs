//! The root image: which one, its key, the tether, and the root made of both.

#[cfg(test)]
mod tests;

use super::engine::Fault;
use super::states::{Class, State};
use super::{Boot, call_fault, missing};
use crate::child::{self, ChildError};
use moor_api::deploy::{DeployDocument, OnFailure, RootMode};
use moor_api::node::{EnvelopeKind, ImageOffer, KeyEnvelope, KeyRequest, Stage};
use moor_image::Dek;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;
use zeroize::{Zeroize as _, Zeroizing};

/// Limit of a call of the tether; the states have longer ones.
pub(super) const MOUNT_LIMIT: Duration = Duration::from_secs(150);
/// Making a root may take twice as long while a member is there. It reads the image, and with no member there it waits.
const ROOT_LOOK: Duration = Duration::from_secs(75);
/// The same where a whole image is fetched or unpacked. A slow network takes its time, and the tether waits out an outage.
pub(super) const WHOLE_LIMIT: Duration = Duration::from_secs(3500);
/// The partition that keeps chunks, by its name in the partition table: whoever gave it that name meant it. The kernel command line may name another
/// device.
const CACHE: &str = "/dev/disk/by-partlabel/mooring-cache";
/// How long a disk may take to appear.
const DISK_LIMIT: Duration = Duration::from_secs(10);
/// Exit statuses of the tether: this machine cannot do it; the image is not one that may be used; a server of it is away or busy.
const CANNOT: i32 = 3;
const NOT_ACCEPTED: i32 = 4;
const AWAY: i32 = 5;

impl Boot {
    pub(super) async fn image(&mut self) -> Result<State, Fault> {
        let mut asked = self.ask_image().await;
        if asked.as_ref().is_err_and(|fault| fault.class == Class::Restart) {
            // The token is void. The way by hello would run the scripts of phase `pre` a second time.
            self.renew_session(Stage::Boot).await?;
            asked = self.ask_image().await;
        }
        let (offer, envelope) = asked?;
        self.key = Some(self.open_envelope(envelope)?);
        let mib = offer.size.div_ceil(1 << 20);
        let mode = self.root_mode(&offer).as_str();
        self.reporter.note("image", &format!("'{}', {mib} MiB, digest {}, root {mode}", offer.name, offer.digest));
        self.offer = Some(offer);
        Ok(State::Tether)
    }

    /// Which image it is to boot, and the key to it.
    async fn ask_image(&mut self) -> Result<(ImageOffer, KeyEnvelope), Fault> {
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        let offer = members.call(async |member| member.image().await).await.map_err(|error| call_fault(&error))?;
        check_offer(&offer).map_err(|reason| not_usable(self.document.as_ref(), reason))?;
        let request = KeyRequest { digest: offer.digest };
        let envelope = members.call(async |member| member.image_key(&request).await).await;
        Ok((offer, envelope.map_err(|error| call_fault(&error))?))
    }

    /// The key in an envelope of type `plain`. Its bytes are wiped whatever comes of it.
    fn open_envelope(&self, mut envelope: KeyEnvelope) -> Result<Dek, Fault> {
        let check = || {
            if self.known.as_ref().map(|known| known.id) != Some(envelope.recipient) {
                return Err("the image key is for another node");
            }
            if envelope.kind != EnvelopeKind::Plain {
                return Err(
                    "the image key is wrapped in a way that this agent does not know: the image needs a newer agent",
                );
            }
            let mut bytes: [u8; 32] = envelope
                .wrapped
                .0
                .as_slice()
                .try_into()
                .map_err(|_| "the image key has another length than 32 bytes")?;
            let key = Dek::from_bytes(bytes);
            bytes.zeroize();
            if key.key_id().as_slice() != envelope.key_id.0.as_slice() {
                return Err("the image key does not match its key id");
            }
            Ok(key)
        };
        let key = check();
        envelope.wrapped.0.zeroize();
        key.map_err(Fault::again)
    }

    pub(super) async fn tether(&mut self) -> Result<State, Fault> {
        let (Some(offer), Some(key)) = (&self.offer, &self.key) else { return Err(missing("image")) };
        let run = &self.options.run;
        let bundle = self.bundle.as_ref().ok_or_else(|| missing("site bundle"))?;
        let site = run.write_site(bundle).map_err(Fault::fatal)?;
        let directory = run.path("tether");
        let mode = self.root_mode(offer);
        // Left by a try that got no further. With what there is of a whole image the next one goes on.
        if mode != RootMode::Untethered {
            let _ = self.unmount_image().await;
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|error| Fault::fatal(format!("cannot make '{}': {error}", directory.display())))?;
        let mut mount = mount_command(&self.options.tether, offer, mode);
        if let Some(document) = &self.document
            && mode == RootMode::Untethered
        {
            mount.arg("--overlay-percent").arg(document.profile.overlay.size_percent.to_string());
        }
        if mode == RootMode::Disk {
            let device = self.arguments.disk_cache.as_deref().unwrap_or(Path::new(CACHE));
            mount.arg("--disk-cache").arg(wait_for(device, DISK_LIMIT).await);
        }
        mount.arg("--site").arg(site);
        if !offer.signers.is_empty() {
            let trust = run.write("image.trust", format!("{}\n", offer.signers.join("\n")).as_bytes());
            mount.arg("--trust").arg(trust.map_err(Fault::fatal)?);
            let signatures = offer.signatures.as_ref().ok_or_else(|| {
                let reason =
                    format!("image '{}' has no signature, and the profile wants one of its signers'", offer.name);
                not_usable(self.document.as_ref(), reason)
            })?;
            mount.arg("--signatures").arg(run.write("image.sig", &signatures.0).map_err(Fault::fatal)?);
        }
        // A whole image needs no order of its parts.
        if !offer.prefetch.is_empty() && mode != RootMode::Untethered {
            let list = serde_json::to_vec(&offer.prefetch).map_err(|error| Fault::fatal(error.to_string()))?;
            mount.arg("--prefetch").arg(run.write("image.prefetch", &list).map_err(Fault::fatal)?);
        }
        mount.arg(&directory);
        let text: Zeroizing<String> = key.to_hex();
        let ended = if mode == RootMode::Untethered {
            self.fetch(mount, text.as_bytes()).await
        } else {
            child::run(mount, text.as_bytes(), MOUNT_LIMIT).await
        };
        if let Err(error) = ended {
            match error.code() {
                Some(CANNOT) => return Err(Fault::fatal(error)),
                Some(NOT_ACCEPTED) => return Err(not_usable(self.document.as_ref(), error)),
                _ => {}
            }
            let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
            members.disconnect();
            return Err(not_mounted(&error, members.connection().await.is_ok()));
        }
        if let Some(why) = self.options.run.tether().and_then(|tether| tether.disk?.error) {
            self.reporter.note("mount", &format!("the root is read without a cache on the disk: {why}"));
        }
        Ok(State::Root)
    }

    pub(super) async fn root(&mut self) -> Result<State, Fault> {
        // The tether has it; nobody else needs it any more.
        self.key = None;
        let (Some(document), Some(offer)) = (&self.document, &self.offer) else { return Err(missing("configuration")) };
        let mode = self.root_mode(offer);
        let overlay = &document.profile.overlay;
        let mut root = Command::new(&self.options.tether);
        root.arg("root").arg("--image").arg(self.options.run.path("tether/image"));
        root.arg("--overlay-percent").arg(overlay.size_percent.to_string());
        if let Some(algorithm) = &overlay.algorithm {
            root.arg("--overlay-algorithm").arg(algorithm);
        }
        if let Some(limit) = overlay.limit_percent {
            root.arg("--overlay-limit-percent").arg(limit.to_string());
        }
        if mode == RootMode::Ram {
            root.arg("--unpack");
        }
        root.arg(&self.options.root);
        let made = Box::pin(child::run(root, b"", WHOLE_LIMIT));
        if mode == RootMode::Ram {
            made.await.map_err(Fault::fatal)?;
        } else {
            self.wait_for_root(made, ROOT_LOOK).await?;
        }
        // From now on the image is in use.
        self.schedule = None;
        Ok(State::Render)
    }

    /// Waits for a root that is being made: for as long as no member is there, and otherwise until it was looked for one twice in a row.
    async fn wait_for_root(
        &mut self,
        mut made: impl Future<Output = Result<String, ChildError>> + Unpin,
        look: Duration,
    ) -> Result<(), Fault> {
        let mut was_there = false;
        loop {
            if let Ok(ended) = tokio::time::timeout(look, &mut made).await {
                return ended.map(drop).map_err(Fault::fatal);
            }
            let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
            members.disconnect();
            let is_there = members.connection().await.is_ok();
            if is_there && was_there {
                let seconds = 2 * look.as_secs();
                return Err(Fault::fatal(format!("the root was not made within {seconds} s, with a member there")));
            }
            if !is_there {
                crate::console::say("root", "no member answers: the root is made once there is one");
            }
            was_there = is_there;
        }
    }

    /// What the kernel command line says, or else the profile.
    pub(super) fn root_mode(&self, offer: &ImageOffer) -> RootMode {
        self.arguments.root.unwrap_or(offer.root)
    }
}

/// A mount that failed although it may succeed later.
fn not_mounted(error: &ChildError, is_member_there: bool) -> Fault {
    match error.code() {
        // It is no fault of the image's: the boot goes back to where members are waited for.
        _ if !is_member_there => Fault::restart(error),
        // Members that are there may be others than those that have the image.
        Some(AWAY) => Fault::away(error),
        _ => Fault::again(error),
    }
}

/// An image that may not be used until somebody has mended that. The node waits for it, and goes on by itself then; where the profile wants a
/// boot that has failed to begin anew, it ends.
fn not_usable(document: Option<&DeployDocument>, reason: impl ToString) -> Fault {
    match document.map(|document| document.profile.on_failure) {
        Some(OnFailure::Reboot) => Fault::fatal(reason),
        Some(OnFailure::Hold) | None => Fault::refused(reason),
    }
}

/// Whether the tether can do something with an offer; if not, who has to mend what.
fn check_offer(offer: &ImageOffer) -> Result<(), String> {
    if offer.token_required {
        return Err(format!(
            "image '{}' is not encrypted, and the tether reads sealed images only: pack it without --plain",
            offer.name
        ));
    }
    if offer.urls.is_empty() {
        return Err(format!(
            "no member says where image '{}' is: give 'urls' in moord.toml, and start the member again",
            offer.name
        ));
    }
    Ok(())
}

/// Waits until a device is there, and no longer than `limit`. Whoever uses it says that it is missing.
async fn wait_for(path: &Path, limit: Duration) -> &Path {
    let there = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let _ = tokio::time::timeout(limit, there).await;
    path
}

/// The part of the command that comes from the offer. Nothing of it is secret: arguments are world-readable.
fn mount_command(program: &Path, offer: &ImageOffer, mode: RootMode) -> Command {
    let mut mount = Command::new(program);
    mount.args([if mode == RootMode::Untethered { "fetch" } else { "mount" }, "--key-file", "-"]);
    for url in &offer.urls {
        mount.arg("--url").arg(url);
    }
    mount.arg("--digest").arg(offer.digest.to_string()).arg("--lineage").arg(offer.lineage.to_string());
    mount.arg("--minimum-serial").arg(offer.minimum_serial.to_string());
    mount
}
