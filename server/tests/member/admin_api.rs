//! What administrators may do, over the socket and over HTTPS, and what anybody may fetch.

use crate::machine::Machine;
use crate::support::{Member, UID, import, refusal};
use anyhow::{Context as _, ensure};
use moor_api::admin::{
    CreateProfile, DefineNodes, DeployRequest, ImportImage, RangeRequest, SetAttributes, TokenRequest,
};
use moor_api::client::admin::AdminClient;
use moor_api::ids::Sha256Digest;
use moor_api::node::Stage;
use moor_api::problem::Code;
use moor_image::Dek;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::time::Duration;
use uuid::Uuid;

#[tokio::test]
async fn a_token_is_made_on_the_socket_and_used_over_https() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut socket = member.admin().await?;
    let bundle = socket.site().await?.bundle;
    let made = socket.create_token(&TokenRequest { name: "me".into(), lifetime: 2 }).await?;
    let mut remote = AdminClient::https(&member.url(), &bundle, &made.token).await?;
    remote.define(&DefineNodes { range: "n[1-3]".into(), attributes: [].into() }).await?;
    assert_eq!(remote.nodes(None).await?.len(), 3);
    let (code, _) = refusal(remote.create_token(&TokenRequest { name: "x".into(), lifetime: 60 }).await);
    assert_eq!(code, Code::Forbidden, "tokens beget no tokens");
    let mut nobody = AdminClient::https(&member.url(), &bundle, "moora_00").await?;
    assert_eq!(refusal(nobody.nodes(None).await).0, Code::TokenInvalid);
    for lifetime in [0, 8 * 86_400] {
        let request = TokenRequest { name: "x".into(), lifetime };
        assert_eq!(refusal(socket.create_token(&request).await).0, Code::BadRequest, "{lifetime}");
    }
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(refusal(remote.nodes(None).await).0, Code::TokenInvalid, "it expired");
    Ok(())
}

#[tokio::test]
async fn the_socket_is_for_root_and_the_member_alone() -> anyhow::Result<()> {
    let member = Member::start()?;
    let socket = member.path("api.sock");
    let ask = |uid: u32| {
        let script = r"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new($ARGV[0]) or die;
            print $s qq(GET /admin/v1/nodes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n); print while <$s>;";
        let id = uid.to_string();
        let output = std::process::Command::new("setpriv")
            .args(["--reuid", &id, "--regid", &id, "--clear-groups", "perl", "-e", script])
            .arg(&socket)
            .output()?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(ask(0)?.starts_with("HTTP/1.1 200"));
    assert!(ask(UID)?.starts_with("HTTP/1.1 200"));
    let answer = ask(7777)?;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("user id 7777"), "{answer}");
    // An unknown uid ends its own connection only.
    member.admin().await?.nodes(None).await?;
    Ok(())
}

#[tokio::test]
async fn mistakes_are_told_in_one_line() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut admin = member.admin().await?;
    let create = |name: &str, image: &str| CreateProfile {
        name: name.parse().unwrap(),
        image: image.parse().unwrap(),
        template: "debian-diskless".into(),
    };
    admin.create_profile(&create("p", "missing")).await?;
    let (code, detail) = refusal(admin.publish(&"p".parse()?).await);
    assert_eq!(code, Code::NotFound);
    assert!(detail.contains("'missing'") && detail.contains("moor image import"), "{detail}");
    assert_eq!(refusal(admin.publish(&"q".parse()?).await).0, Code::NotFound);
    assert_eq!(refusal(admin.create_profile(&create("p", "x")).await).0, Code::Conflict);
    let unpublished = DeployRequest { range: "n1".into(), profile: "p".parse()? };
    assert_eq!(refusal(admin.deploy(&unpublished).await).0, Code::NoProfile);
    member.write_profile("p", "scripts/sometime/x", "")?;
    let dek = Dek::generate()?;
    import(&mut admin, "missing", [1; 16], 1, Some(&dek)).await?;
    let (_, detail) = refusal(admin.publish(&"p".parse()?).await);
    assert!(detail.contains("scripts/sometime/x"), "{detail}");
    std::fs::remove_dir_all(member.profile_dir("p").join("scripts/sometime"))?;
    member.write_profile("p", "private/large", &"x".repeat(600 << 10))?;
    let (_, detail) = refusal(admin.publish(&"p".parse()?).await);
    assert!(detail.contains("private' has more than 512 KiB"), "{detail}");
    std::fs::remove_dir_all(member.profile_dir("p").join("private"))?;
    // Nodes would refuse it in the middle of their boot.
    member.write_profile("p", "scripts/pre/20-large", &"#".repeat((4 << 20) + 1))?;
    let (_, detail) = refusal(admin.publish(&"p".parse()?).await);
    assert!(detail.contains("scripts/pre/20-large' has more than 4 MiB"), "{detail}");
    member.write_profile("p", "scripts/pre/20-large", &"#".repeat(4 << 20))?;
    admin.publish(&"p".parse()?).await?;

    // Ranges and attributes.
    let define = |range: &str, attributes: &[(&str, &str)]| DefineNodes {
        range: range.into(),
        attributes: attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
    };
    admin.define(&define("n[1-2]", &[])).await?;
    let again = admin.define(&define("n[2-3]", &[])).await?;
    assert_eq!((again.nodes.len(), again.refused.len()), (1, 1));
    let uuid = Uuid::new_v4().to_string();
    for (range, attributes, says) in [
        ("n[4", &[][..], "bracket"),
        ("n4", &[("id.uid", "x")][..], "id.uuid"),
        ("n4", &[("crypted.rootpassword", "$6$aaaaaaaaaaaaaaaaaaaaaaa")][..], "secret"),
        ("n[4-5]", &[("id.uuid", uuid.as_str())][..], "2 nodes"),
    ] {
        let (code, detail) = refusal(admin.define(&define(range, attributes)).await);
        assert_eq!(code, Code::BadRequest, "{detail}");
        assert!(detail.contains(says), "{detail}");
    }
    assert_eq!(refusal(admin.nodes(Some("n9")).await).0, Code::BadRequest);
    let two = RangeRequest { range: "n1,n2".into() };
    assert_eq!(refusal(admin.rearm(&two).await).0, Code::BadRequest, "an identity is dropped for one node at a time");
    let set = SetAttributes { range: "n1".into(), set: [].into(), clear: vec!["no.such".into()] };
    assert_eq!(refusal(admin.set(&set).await).0, Code::BadRequest);
    assert_eq!(refusal(admin.why("n77").await).0, Code::NotFound);
    Ok(())
}

#[tokio::test]
async fn generations_of_an_image_grow_in_one_lineage() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut admin = member.admin().await?;
    let dek = Dek::generate()?;
    let first = import(&mut admin, "root", [1; 16], 2, Some(&dek)).await?;
    for (lineage, serial, says) in [([1; 16], 2, "larger"), ([1; 16], 1, "larger"), ([2; 16], 3, "lineage")] {
        let error = import(&mut admin, "root", lineage, serial, Some(&Dek::generate()?)).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    import(&mut admin, "root", [1; 16], 3, Some(&Dek::generate()?)).await?;
    assert_eq!(admin.images().await?.len(), 2);
    // An encrypted image without its key, with another's, and what is no image.
    let bytes = admin.image(first.digest, 1 << 20).await?;
    let blob = admin.add_blob(io::Cursor::new(bytes.to_vec()), |_| {}).await?.blob;
    let request = |key: Option<String>| ImportImage {
        name: "other".parse().unwrap(),
        image: blob,
        key,
        signatures: None,
        kernel: blob,
        initramfs: blob,
        boot_loaders: BTreeMap::new(),
    };
    let (_, detail) = refusal(admin.import_image(&request(None)).await);
    assert!(detail.contains("encrypted"), "{detail}");
    // One boot loader without the other starts nothing, and no other file is one.
    for names in
        [&["shimx64.efi"][..], &["shimx64.efi", "grubaa64.efi"], &["a", "b"], &["grubx64.efi", "kernel", "shimx64.efi"]]
    {
        let boot_loaders = names.iter().map(|name| ((*name).to_owned(), blob)).collect();
        let request = ImportImage { boot_loaders, ..request(Some(dek.to_hex().to_string())) };
        let (code, detail) = refusal(admin.import_image(&request).await);
        assert!(
            code == Code::BadRequest && detail.contains("shimx64.efi and grubx64.efi, or shimaa64.efi"),
            "{detail}"
        );
    }
    let (_, detail) = refusal(admin.import_image(&request(Some(Dek::generate()?.to_hex().to_string()))).await);
    assert!(detail.contains("wrong key"), "{detail}");
    let (code, detail) = refusal(admin.import_image(&request(Some(dek.to_hex().to_string()))).await);
    assert!(code == Code::Conflict && detail.contains("root @2"), "the same image under another name: {detail}");
    let mut missing = request(None);
    missing.image = Sha256Digest([9; 32]);
    assert_eq!(refusal(admin.import_image(&missing).await).0, Code::NotFound);
    assert_eq!(admin.images().await?.len(), 2);
    Ok(())
}

/// Gives some bytes, then fails: a client whose disk or network breaks.
struct Breaks(usize);

impl Read for Breaks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::Error::other("broken"));
        }
        let count = buffer.len().min(self.0);
        buffer[..count].fill(7);
        self.0 -= count;
        Ok(count)
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() -> anyhow::Result<()> {
    let mut member = Member::start()?;
    let files = || {
        let found = std::process::Command::new("find").arg(member.path("state/blobs")).args(["-type", "f"]).output()?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&found.stdout).lines().count())
    };
    assert!(member.admin().await?.add_blob(Breaks(3 << 20), |_| {}).await.is_err());
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while files()? > 0 {
        ensure!(std::time::Instant::now() < end, "a broken upload was kept");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What a kill leaves is swept at the next start.
    let left = member.path("state/blobs/.incoming-x");
    std::fs::write(&left, b"half")?;
    member.kill();
    member.run()?;
    assert!(!left.exists());
    Ok(())
}

#[tokio::test]
async fn images_are_public_by_range_and_plain_ones_are_not() -> anyhow::Result<()> {
    let member = Member::start()?;
    let mut admin = member.admin().await?;
    let sealed = import(&mut admin, "sealed", [1; 16], 1, Some(&Dek::generate()?)).await?;
    let plain = import(&mut admin, "plain", [2; 16], 1, None).await?;
    let whole = admin.image(sealed.digest, 1 << 20).await?;
    assert_eq!(whole.len() as u64, sealed.size);
    assert_eq!(refusal(admin.image(plain.digest, 1 << 20).await).0, Code::NotFound);

    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.arm("n1", "once").await?;
    admin
        .create_profile(&CreateProfile {
            name: "p".parse()?,
            image: "plain".parse()?,
            template: "debian-diskless".into(),
        })
        .await?;
    admin.publish(&"p".parse()?).await?;
    member.deploy("n1").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let offer = connection.image().await?;
    assert!(offer.token_required);
    assert!(offer.urls[0].ends_with(&format!("/node/v1/images/{}", plain.digest)), "{:?}", offer.urls);
    let key = moor_api::node::KeyRequest { digest: offer.digest };
    assert_eq!(refusal(connection.image_key(&key).await).0, Code::Conflict, "a plain image has no key");
    Ok(())
}

#[tokio::test]
async fn it_stops_in_good_order_and_one_state_has_one_member() -> anyhow::Result<()> {
    let mut member = Member::start()?;
    let second = member.moord("run", &[])?;
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success());
    assert!(
        error.contains("moord: error:") && error.lines().filter(|line| line.contains("error")).count() == 1,
        "{error}"
    );
    let again = member.moord("init", &[])?;
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("holds a member already"));

    // A core dump would hold every key: not even its own user may read its memory.
    let pid = member.pid().context("running")?;
    let id = UID.to_string();
    let read = std::process::Command::new("setpriv")
        .args([
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
            "cat",
            &format!("/proc/{pid}/maps"),
        ])
        .output()?;
    assert!(!read.status.success(), "its memory map is readable");

    // A watcher does not keep it.
    let mut watcher = member.admin().await?;
    let mut events = watcher.status(None, false, true).await?;
    assert!(member.terminate()?, "{}", member.log());
    assert!(!member.path("api.sock").exists());
    let _ = events.next().await;
    member.run()?;
    Ok(())
}

#[tokio::test]
async fn watchers_see_each_change_once_and_large_ranges_are_one_request() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.arm("n1", "once").await?;
    let mut watcher = member.admin().await?;
    let mut events = watcher.status(Some("n1"), false, true).await?;
    member.deploy("n1").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    for (sequence, state) in [(1, "image"), (1, "image"), (2, "mount")] {
        let report = moor_api::node::StatusReport {
            boot: machine.boot,
            sequence,
            state: state.into(),
            detail: String::new(),
            uptime_ms: 0,
            figures: [].into(),
        };
        connection.status(&report).await?;
    }
    for expected in ["pending", "image", "mount"] {
        let event = tokio::time::timeout(Duration::from_secs(10), events.next()).await??;
        assert_eq!(event.map(|event| event.state).as_deref(), Some(expected));
    }
    let mut admin = member.admin().await?;
    let many = DefineNodes { range: "m[1-6000]".into(), attributes: [].into() };
    assert_eq!(admin.define(&many).await?.nodes.len(), 6000);
    let armed = admin.arm(&moor_api::admin::ArmRequest { range: "m[1-6000]".into(), until: "once".into() }).await?;
    assert_eq!((armed.nodes.len(), armed.refused.len()), (6000, 0));
    Ok(())
}
