//! Bad input as an administrator meets it at `moor`: one line that says what, where and what to do, a status that is not 0, and nothing
//! left under a final name.

use crate::cli::{moor, program, said_no, shown};
use crate::machine::Machine;
use crate::support::{Member, UID, as_user, sealed};
use anyhow::{Context as _, ensure};
use moor_api::admin::{CreateProfile, TokenRequest};
use moor_api::trust::SiteBundle;
use moor_image::Dek;
use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Writes a file that only its owner can read.
fn secret(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    Ok(fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())?)
}

/// `moor node list` at this URL.
fn list(folder: &Path, url: &str, bundle: &SiteBundle, token: &str) -> anyhow::Result<Output> {
    let (site, file) = (folder.join("site.json"), folder.join("token"));
    fs::write(&site, serde_json::to_vec(bundle)?)?;
    secret(&file, token)?;
    let mut command = Command::new(program()?);
    command.args(["--server", url, "--site-file"]).arg(site).arg("--token-file").arg(file).args(["node", "list"]);
    Ok(command.stdin(Stdio::null()).output()?)
}

#[tokio::test]
async fn a_token_that_expired_or_was_never_made_is_told_apart() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut admin = member.admin().await?;
    let bundle = admin.site().await?.bundle;
    let folder = tempfile::tempdir()?;
    let old = admin.create_token(&TokenRequest { name: "ops".into(), lifetime: 1 }).await?;
    let good = admin.create_token(&TokenRequest { name: "ops".into(), lifetime: 600 }).await?;
    let (status, _, err) = shown(&list(folder.path(), &member.url(), &bundle, &good.token)?);
    ensure!(status == Some(0) && err.is_empty(), "the control: {err}");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let expired = list(folder.path(), &member.url(), &bundle, &old.token)?;
    said_no("expired", &expired, &["token 'ops' has expired", "`moor token create`"]);
    let unknown = list(folder.path(), &member.url(), &bundle, "moora_00")?;
    said_no("never made", &unknown, &["no valid administrator's token", "`moor token create`"]);
    Ok(())
}

#[tokio::test]
async fn a_member_of_another_authority_is_none() -> anyhow::Result<()> {
    let (member, other) = (Member::start()?, Member::start()?);
    let bundle = member.site().await?.bundle;
    let foreign = other.site().await?.bundle;
    let token = member.admin().await?.create_token(&TokenRequest { name: "ops".into(), lifetime: 600 }).await?.token;
    let folder = tempfile::tempdir()?;
    let (status, _, err) = shown(&list(folder.path(), &member.url(), &bundle, &token)?);
    ensure!(status == Some(0) && err.is_empty(), "the control: {err}");
    // A name costs nothing: the other authority may call its collective as this one is called.
    let disguised = SiteBundle { collective: bundle.collective, ..foreign.clone() };
    for (what, url, bundle) in [
        ("a server of another authority", other.url(), &bundle),
        ("a bundle of another collective", member.url(), &foreign),
        ("a bundle of another authority with this collective's name", member.url(), &disguised),
    ] {
        let output = list(folder.path(), &url, bundle, &token)?;
        said_no(what, &output, &[&url, "is of another authority", "`moor site --bundle`"]);
    }
    Ok(())
}

/// Files of an image as `imgutil pack` leaves them.
struct Packed {
    folder: tempfile::TempDir,
    dek: Dek,
}

impl Packed {
    fn new() -> anyhow::Result<Self> {
        let packed = Self { folder: tempfile::tempdir()?, dek: Dek::generate()? };
        fs::write(packed.path("good.moor"), sealed("root", [7; 16], 1, Some(&packed.dek))?)?;
        secret(&packed.path("good.key"), &format!("{}\n", *packed.dek.to_hex()))?;
        fs::create_dir(packed.path("boot"))?;
        for name in ["vmlinuz", "initrd.img"] {
            fs::write(packed.path("boot").join(name), name)?;
        }
        Ok(packed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A changed copy of the image.
    fn changed(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> anyhow::Result<()> {
        let mut bytes = fs::read(self.path("good.moor"))?;
        change(&mut bytes);
        Ok(fs::write(self.path(name), bytes)?)
    }

    fn import(&self, member: &Member, image: &str, key: Option<&str>) -> anyhow::Result<Output> {
        let mut command = moor(member, &["image", "import", "root"])?;
        command.arg(self.path(image)).arg("--boot-dir").arg(self.path("boot"));
        if let Some(key) = key {
            command.arg("--key-file").arg(self.path(key));
        }
        Ok(command.output()?)
    }
}

#[tokio::test]
async fn what_is_no_whole_image_with_its_key_is_not_imported() -> anyhow::Result<()> {
    let member = Member::start()?;
    let packed = Packed::new()?;
    packed.changed("short.moor", |bytes| bytes.truncate(bytes.len() - 1))?;
    packed.changed("half.moor", |bytes| bytes.truncate(bytes.len() / 2))?;
    packed.changed("stub.moor", |bytes| bytes.truncate(100))?;
    packed.changed("empty.moor", Vec::clear)?;
    packed.changed("longer.moor", |bytes| bytes.push(0))?;
    packed.changed("damaged.moor", |bytes| bytes[100] ^= 1)?;
    fs::write(packed.path("notes.txt"), "not an image\n".repeat(1000))?;
    secret(&packed.path("other.key"), &format!("{}\n", *Dek::generate()?.to_hex()))?;
    secret(&packed.path("text.key"), "a key\n")?;
    fs::write(packed.path("open.key"), "x")?;
    fs::set_permissions(packed.path("open.key"), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    let key = Some("good.key");
    for (image, key, says) in [
        ("short.moor", key, "it is truncated"),
        ("half.moor", key, "it is truncated"),
        ("stub.moor", key, "fewer than a sealed image"),
        ("empty.moor", key, "fewer than a sealed image"),
        ("longer.moor", key, "it is extended"),
        ("damaged.moor", key, "fetch it again"),
        ("notes.txt", key, "not a sealed image"),
        ("absent.moor", key, "No such file"),
        ("boot", key, "Is a directory"),
        ("good.moor", None, "--key-file"),
        ("good.moor", Some("other.key"), "wrong key"),
        ("good.moor", Some("text.key"), "64 hexadecimal digits"),
        ("good.moor", Some("open.key"), "chmod 600"),
    ] {
        let what = format!("{image} with {key:?}");
        let named = if says == "chmod 600" { "open.key" } else { image };
        said_no(&what, &packed.import(&member, image, key)?, &[named, says]);
        ensure!(member.admin().await?.images().await?.is_empty(), "{what}: it is in the catalogue");
    }
    // The control: nothing of all that stands in the way of the whole one.
    let (status, out, err) = shown(&packed.import(&member, "good.moor", key)?);
    ensure!(status == Some(0) && err.is_empty() && out.starts_with("root: @1 "), "{out}{err}");
    Ok(())
}

#[tokio::test]
async fn a_profile_that_names_a_missing_image_is_not_published() -> anyhow::Result<()> {
    let member = Member::start()?;
    let create = |name: &str, image: &str| {
        Ok::<_, anyhow::Error>(CreateProfile {
            name: name.parse()?,
            image: image.parse()?,
            template: "debian-diskless".into(),
        })
    };
    member.admin().await?.create_profile(&create("p", "gone")?).await?;
    let publish = || Ok::<_, anyhow::Error>(moor(&member, &["profile", "publish", "p"])?.output()?);
    said_no("a name", &publish()?, &["profile.yaml", "'gone'", "`moor image list`", "`moor image import`"]);
    let packed = Packed::new()?;
    ensure!(packed.import(&member, "good.moor", Some("good.key"))?.status.success());
    // Another generation of an image that is there, and a digest of none.
    let nothing = "0".repeat(64);
    for image in ["root@2", &nothing] {
        let text = fs::read_to_string(member.profile_dir("p").join("profile.yaml"))?;
        let text: Vec<String> = text
            .lines()
            .map(|line| if line.starts_with("image:") { format!("image: \"{image}\"") } else { line.to_owned() })
            .collect();
        member.write_profile("p", "profile.yaml", &format!("{}\n", text.join("\n")))?;
        said_no(image, &publish()?, &["profile.yaml", &format!("'{image}'"), "`moor image import`"]);
    }
    let profiles = member.admin().await?.profiles().await?;
    ensure!(profiles.len() == 1 && profiles[0].generation.is_none(), "{profiles:?}");
    let public =
        Command::new("find").arg(member.path("state/profiles")).args(["-name", ".*", "-type", "f"]).output()?;
    ensure!(public.stdout.is_empty(), "left over: {}", String::from_utf8_lossy(&public.stdout));
    // The control.
    member.admin().await?.create_profile(&create("q", "root")?).await?;
    ensure!(moor(&member, &["profile", "publish", "q"])?.output()?.status.success());
    Ok(())
}

#[tokio::test]
async fn a_machine_that_is_refused_shows_with_the_reason_and_the_command() -> anyhow::Result<()> {
    let member = Member::start()?;
    let machine = Machine::new(&member).await?;
    let uuid = machine.uuid.to_string();
    let why = |subject: &str| {
        let (status, out, err) = shown(&moor(&member, &["why", subject])?.output()?);
        ensure!(status == Some(0) && err.is_empty(), "{out}{err}");
        Ok::<_, anyhow::Error>(out)
    };
    machine.connect().await?.hello(&machine.hello()).await?;
    let said = why(&uuid)?;
    ensure!(said.contains("no node is this machine") && said.contains("`moor node define NAME id.uuid="), "{said}");
    member.define("n1", machine.uuid).await?;
    machine.connect().await?.hello(&machine.hello()).await?;
    let said = why("n1")?;
    ensure!(said.contains("POST hello") && said.contains("not armed") && said.contains("`moor arm n1`"), "{said}");
    Ok(())
}

/// A command as words for a shell.
fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| format!("'{}'", word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// A member whose state is on a disk of this size that nobody else sees.
fn on_small_disk(size: &str) -> anyhow::Result<Member> {
    let mut member = Member::prepare()?;
    let config = member.config();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--", "sh", "-c"]).arg(format!(
        "mount -t tmpfs -o size={size},uid={UID},gid={UID},mode=0755 small '{}' && {} && exec {}",
        member.path("state").display(),
        words(&as_user(&["init", "--config", &config, "--address", "127.0.0.1"])),
        words(&as_user(&["run", "--config", &config]))
    ));
    member.run_by(command)?;
    Ok(member)
}

#[tokio::test]
async fn an_upload_to_a_member_whose_disk_is_full_leaves_nothing_and_the_member_goes_on() -> anyhow::Result<()> {
    let member = on_small_disk("64m")?;
    let packed = Packed::new()?;
    // Larger than the disk: it is refused when a part of it stands there already.
    fs::File::create(packed.path("large.moor"))?.set_len(80 << 20)?;
    let output = packed.import(&member, "large.moor", None)?;
    let blobs = member.path("state/blobs").display().to_string();
    said_no("an upload", &output, &["large.moor", &blobs, "would be left on its disk", "make room"]);

    // Its namespace is its own; the way there is by its process.
    let pid = member.pid().context("it runs")?;
    let seen = PathBuf::from(format!("/proc/{pid}/root{blobs}"));
    let listed = Command::new("find").arg(&seen).args(["-type", "f", "-printf", "%f %s\n"]).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let whole = ["vmlinuz", "initrd.img"].map(|name| {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
        format!("{} {}", hex::encode(digest), name.len())
    });
    let mut lines: Vec<&str> = listed.lines().collect();
    lines.sort_unstable();
    let mut expected: Vec<&str> = whole.iter().map(String::as_str).collect();
    expected.sort_unstable();
    assert_eq!(lines, expected, "the two small files that came before are whole, and nothing else is there");
    ensure!(member.admin().await?.images().await?.is_empty(), "it is in the catalogue");

    // What fits goes in, and the store takes changes.
    let (status, out, err) = shown(&packed.import(&member, "good.moor", Some("good.key"))?);
    ensure!(status == Some(0) && err.is_empty(), "{out}{err}");
    member.define("n1", uuid::Uuid::new_v4()).await?;
    Ok(())
}
