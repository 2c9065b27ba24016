//! The root image: which one, its key, the tether, and the root made of both.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Options;
    use crate::boot::states::{Class, EndAction};
    use crate::handover::RunDir;
    use crate::members::Members;
    use moor_api::client::session::SessionKey;
    use moor_api::ids::{CollectiveId, Sha256Digest};
    use moor_api::trust::{Incarnation, SiteBundle};

    /// A certificate, for a bundle that reads.
    fn root() -> String {
        let output = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"])
            .args(["-keyout", "/dev/null"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn offer(root: RootMode) -> ImageOffer {
        ImageOffer {
            name: "root".parse().unwrap(),
            digest: Sha256Digest([1; 32]),
            size: 1,
            lineage: uuid::Uuid::nil(),
            minimum_serial: 0,
            signers: Vec::new(),
            signatures: None,
            // Nobody listens on port 1.
            urls: vec!["https://127.0.0.1:1".to_owned()],
            token_required: false,
            root,
            prefetch: vec![1],
        }
    }

    #[test]
    fn an_offer_that_no_tether_can_read_is_refused_with_what_to_do() {
        let good = offer(RootMode::Tethered);
        assert_eq!(check_offer(&good), Ok(()));
        let nowhere = ImageOffer { urls: Vec::new(), ..good.clone() };
        let plain = ImageOffer { token_required: true, ..good };
        for (offer, words) in [(nowhere, "give 'urls' in moord.toml"), (plain, "pack it without --plain")] {
            let reason = check_offer(&offer).unwrap_err();
            assert!(reason.contains("image 'root' is") && reason.contains(words), "{reason}");
        }
    }

    /// A boot that has come to its image, with a program in place of the tether, and nobody who listens.
    fn boot(dir: &std::path::Path, tether: &str, root: RootMode) -> Boot {
        let mut boot = Boot::new(Options {
            root: dir.join("root"),
            site: dir.join("site.json"),
            run: RunDir::new(dir),
            command_line: "/proc/cmdline".into(),
            tether: tether.into(),
        });
        let bundle = SiteBundle {
            version: 1,
            collective: CollectiveId::random(),
            name: "x".into(),
            roots: vec![self::root()],
            members: Vec::new(),
            ssh_host_authorities: Vec::new(),
            built: 0,
            incarnation: Incarnation::FIRST,
        };
        let offer = offer(root);
        boot.members = Some(Members::new(&bundle, &SessionKey::generate().unwrap(), offer.urls.clone()).unwrap());
        boot.bundle = Some(bundle);
        boot.key = Some(Dek::generate().unwrap());
        boot.offer = Some(offer);
        boot
    }

    #[tokio::test]
    async fn with_no_member_there_a_mount_that_fails_is_not_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let fault = boot(dir.path(), "/bin/false", RootMode::Tethered).tether().await.unwrap_err();
        assert_eq!(fault.class, Class::Restart);
        assert!(fault.reason.contains("/bin/false"), "{}", fault.reason);
    }

    #[tokio::test]
    async fn with_members_there_that_do_not_have_the_image_those_that_do_are_waited_for() {
        for (status, is_member_there, class) in
            [(5, true, Class::Away), (5, false, Class::Restart), (1, true, Class::Again), (1, false, Class::Restart)]
        {
            let mut program = Command::new("sh");
            program.arg("-c").arg(format!("exit {status}"));
            let error = child::run(program, b"", MOUNT_LIMIT).await.unwrap_err();
            assert_eq!(not_mounted(&error, is_member_there).class, class, "{status} {is_member_there}");
        }
    }

    #[tokio::test]
    async fn a_root_is_waited_for_while_no_member_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut boot = boot(dir.path(), "/bin/false", RootMode::Tethered);
        let look = Duration::from_millis(20);
        let mut slow = Command::new("sleep");
        slow.arg("0.5");
        let slow = Box::pin(child::run(slow, b"", WHOLE_LIMIT));
        boot.wait_for_root(slow, look).await.unwrap();
        let fault =
            boot.wait_for_root(Box::pin(child::run(Command::new("false"), b"", WHOLE_LIMIT)), look).await.unwrap_err();
        assert_eq!(fault.class, Class::Fatal);
    }

    /// What the tether's statuses mean for the boot; what it says reaches the console and the member as it is.
    #[tokio::test]
    async fn too_little_memory_ends_the_boot_and_an_image_that_may_not_be_used_is_waited_for() {
        use std::os::unix::fs::PermissionsExt as _;
        for (status, class) in [(3, Class::Fatal), (4, Class::Refused)] {
            let dir = tempfile::tempdir().unwrap();
            let program = dir.path().join("program");
            let text = format!("#!/bin/sh\necho \"why: $*\" >&2\nexit {status}\n");
            std::fs::write(&program, text).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            for (mode, word) in
                [(RootMode::Tethered, "mount"), (RootMode::Ram, "mount"), (RootMode::Untethered, "fetch")]
            {
                let fault = boot(dir.path(), program.to_str().unwrap(), mode).tether().await.unwrap_err();
                assert_eq!(fault.class, class);
                assert!(fault.reason.contains(&format!("why: {word} --key-file -")), "{}", fault.reason);
                // A whole image needs no order of its parts.
                assert_eq!(fault.reason.contains("--prefetch"), word == "mount", "{}", fault.reason);
            }
            // The kernel command line has the last word.
            let mut boot = boot(dir.path(), program.to_str().unwrap(), RootMode::Tethered);
            boot.arguments.root = Some(RootMode::Untethered);
            let fault = boot.tether().await.unwrap_err();
            assert!(fault.reason.contains("why: fetch"), "{}", fault.reason);
            // Also about the device. It is there.
            boot.arguments.root = Some(RootMode::Disk);
            boot.arguments.disk_cache = Some("/dev/null".into());
            let fault = boot.tether().await.unwrap_err();
            assert!(fault.reason.contains("--disk-cache /dev/null --site"), "{}", fault.reason);
        }
    }

    /// A program at `dir/program` that does this.
    fn script(dir: &std::path::Path, text: &str) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let program = dir.join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{text}")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn what_there_is_of_a_whole_image_is_left_to_the_next_try() {
        for (mode, calls) in [(RootMode::Untethered, "fetch\n"), (RootMode::Tethered, "unmount\nmount\n")] {
            let dir = tempfile::tempdir().unwrap();
            let program = script(dir.path(), &format!("echo $1 >> '{}/calls'\nexit 1\n", dir.path().display()));
            std::fs::create_dir(dir.path().join("tether")).unwrap();
            std::fs::write(dir.path().join("tether/image"), "a part").unwrap();
            boot(dir.path(), &program, mode).tether().await.unwrap_err();
            assert_eq!(std::fs::read_to_string(dir.path().join("calls")).unwrap(), calls);
        }
    }

    #[tokio::test]
    async fn a_boot_that_gives_up_leaves_nothing_of_a_whole_image_in_memory() {
        // What a tethered root is read from is in no memory, and somebody may want to look at it.
        for (mode, calls) in
            [(RootMode::Untethered, "fetch\nunmount\nunmount\n"), (RootMode::Tethered, "unmount\nmount\n")]
        {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("tether/image");
            // A fetch that was killed just now has it open still, and then not any more.
            let text = format!(
                "echo $1 >> '{0}/calls'\n[ $1 = unmount ] || exit 1\n[ -e '{0}/tried' ] && rm '{1}' || ! touch '{0}/tried'\n",
                dir.path().display(),
                image.display()
            );
            let program = script(dir.path(), &text);
            std::fs::create_dir(dir.path().join("tether")).unwrap();
            std::fs::write(&image, "a part").unwrap();
            let mut boot = boot(dir.path(), &program, mode);
            boot.tether().await.unwrap_err();
            assert!(image.exists(), "a try has taken away what the next one goes on with");
            // One that cannot close its stage does not stay, but reboots.
            boot.is_closed = true;
            boot.give_up(EndAction::Hold, "all tries are used up").await;
            assert_eq!(std::fs::read_to_string(dir.path().join("calls")).unwrap(), calls);
            assert_eq!(image.exists(), mode == RootMode::Tethered);
        }
    }

    #[tokio::test]
    async fn how_far_a_whole_image_is_reaches_the_member_as_figures() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "sleep 1; echo '{{\"digest\":\"{}\",\"members\":[],\"arrived\":{{\"bytes\":5242880,\"of\":9437184,\
             \"seconds_left\":7}}}}' > '{}/tether.json'\nsleep 6\n",
            "01".repeat(32),
            dir.path().display()
        );
        let mut boot = boot(dir.path(), &script(dir.path(), &text), RootMode::Untethered);
        // What an earlier try said is not how it is now.
        let earlier = text.replace("5242880", "7340032");
        let (_, earlier) = earlier.split_once("echo '").unwrap();
        std::fs::write(dir.path().join("tether.json"), earlier.split_once('\'').unwrap().0).unwrap();
        assert_eq!(boot.options.run.tether().unwrap().arrived.unwrap().bytes, 7 << 20);
        boot.tether().await.unwrap();
        let reports: Vec<_> = boot.reporter.reports().collect();
        // The second time nothing was new.
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].state, "mount");
        assert_eq!(reports[0].detail, "5 of 9 MiB of the image are in memory, about 7 s left");
        let figures = ["image.bytes_arrived", "image.bytes_total", "image.seconds_left"];
        assert_eq!(figures.map(|name| reports[0].figures[name]), [5 << 20, 9 << 20, 7]);
    }

    #[tokio::test]
    async fn a_profile_that_wants_a_failed_boot_to_begin_anew_waits_for_no_image() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::write(&program, "#!/bin/sh\necho 'wrong key' >&2\nexit 4\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        for (on_failure, class) in [("hold", Class::Refused), ("reboot", Class::Fatal)] {
            let mut boot = boot(dir.path(), program.to_str().unwrap(), RootMode::Tethered);
            let document = serde_json::json!({
                "schema": 1, "deployment": null, "interfaces": [], "dns": {}, "members": [], "trust_version": 1,
                "node": {"id": uuid::Uuid::nil(), "name": "n1", "machine_id": "00".repeat(16)},
                "profile": {"name": "p", "generation": "00".repeat(32), "root": "tethered", "on_failure": on_failure},
            });
            boot.document = Some(serde_json::from_value(document).unwrap());
            let fault = boot.tether().await.unwrap_err();
            assert!(fault.class == class && fault.reason.contains("wrong key"), "{on_failure}: {fault:?}");
            // Nor for one that nobody has signed.
            boot.offer.as_mut().unwrap().signers = vec!["somebody".to_owned()];
            let fault = boot.tether().await.unwrap_err();
            assert!(fault.class == class && fault.reason.contains("no signature"), "{on_failure}: {fault:?}");
        }
    }
}
