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
        for (mode, word) in [(RootMode::Tethered, "mount"), (RootMode::Ram, "mount"), (RootMode::Untethered, "fetch")] {
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
    for (mode, calls) in [(RootMode::Untethered, "fetch\nunmount\nunmount\n"), (RootMode::Tethered, "unmount\nmount\n")]
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
