//! What a user may get wrong with `mount`: one line on standard error that says what, where and what to do, and the status that
//! tells a program whether it helps to try again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::authority::{Authority, Collective};
use common::server::{Conduct, Server};
use common::{Sample, noise, seal};
use nix::mount::{MntFlags, umount2};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use tempfile::TempDir;

/// Anything else, which may be over or not. The image is not one that may be used. A server is away.
const ELSE: i32 = 1;
const NOT_ACCEPTED: i32 = 4;
const AWAY: i32 = 5;

struct Place {
    dir: TempDir,
    authority: Authority,
    sample: Sample,
}

/// A mount that was refused as it should be is not there. Should one be, its process ends with it.
impl Drop for Place {
    fn drop(&mut self) {
        let _ = umount2(&self.path("mnt"), MntFlags::MNT_DETACH);
    }
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            authority: Authority::new(),
            sample: seal(noise(300_000, 1), 16),
        };
        std::fs::write(place.path("ca.pem"), place.authority.pem()).unwrap();
        std::fs::write(place.path("key"), place.sample.key.to_hex().as_bytes()).unwrap();
        std::fs::create_dir(place.path("mnt")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn server(&self) -> Server {
        Server::new(&self.sample.file, &self.authority.identity())
    }

    /// `mount` with the good authority and key, unless `arguments` bring others.
    fn mount(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-tether"));
        command.arg("mount").arg("--state").arg(self.path("state.json")).args(arguments);
        if !arguments.iter().any(|argument| ["--ca", "--site"].contains(argument)) {
            command.arg("--ca").arg(self.path("ca.pem"));
        }
        if !arguments.contains(&"--key-file") {
            command.arg("--key-file").arg(self.path("key"));
        }
        command.arg(self.path("mnt")).output().unwrap()
    }

    fn refused(&self, status: i32, arguments: &[&str], words: &[&str]) {
        let output = self.mount(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert!(said.starts_with("moor-tether: error: "), "{said}");
        let twice = said.split(": ").zip(said.split(": ").skip(1)).find(|(one, next)| one.trim() == next.trim());
        assert!(twice.is_none(), "said twice: {said}");
        for word in words {
            assert!(said.contains(word), "'{word}' is not in: {said}");
        }
        assert!(!self.path("state.json").exists());
        assert!(!is_mounted(&self.path("mnt")));
    }

    /// What `mount` says when this machine's clock is at the first day of 2001.
    fn mount_in_2001(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-tether"));
        // `faketime` itself would wait for the background process as well.
        let library = Command::new("faketime").args(["2001-01-01", "printenv", "LD_PRELOAD"]).output().unwrap();
        let library = String::from_utf8(library.stdout).unwrap();
        command.env("LD_PRELOAD", library.trim()).env("FAKETIME", "@2001-01-01 00:00:00");
        command.arg("mount").args(arguments);
        command.arg("--state").arg(self.path("state.json")).arg("--key-file").arg(self.path("key"));
        command.arg(self.path("mnt")).output().unwrap()
    }
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(4) == dir.to_str())
}

#[test]
fn a_key_that_is_none_or_another() {
    let place = Place::new();
    let server = place.server();
    let url = server.url();
    std::fs::write(place.path("other"), format!("{}\n", "ab".repeat(32))).unwrap();
    let other = place.path("other").display().to_string();
    place.refused(NOT_ACCEPTED, &["--url", &url, "--key-file", &other], &[&url, "wrong key", "the image wants key id"]);
    std::fs::write(place.path("text"), "hello\n").unwrap();
    let text = place.path("text").display().to_string();
    place.refused(ELSE, &["--url", &url, "--key-file", &text], &[&text, "holds no key", "64 hexadecimal digits"]);
    place.refused(ELSE, &["--url", &url, "--key-file", "/no/such"], &["cannot read the key file '/no/such'"]);
    place.refused(ELSE, &["--url", &url, "--key-file", "-"], &["standard input holds no key"]);
}

#[test]
fn an_image_that_is_not_the_expected_one() {
    let place = Place::new();
    let server = place.server();
    let url = server.url();
    let wrong = "00".repeat(32);
    place.refused(
        NOT_ACCEPTED,
        &["--url", &url, "--digest", &wrong],
        &[&url, &wrong, &hex::encode(place.sample.sealed.digest)],
    );
    place.refused(ELSE, &["--url", &url, "--digest", "12"], &["--digest has 64 hexadecimal digits"]);
    place.refused(
        NOT_ACCEPTED,
        &["--url", &url, "--lineage", "5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c01"],
        &[&url, "of another lineage"],
    );
    place.refused(NOT_ACCEPTED, &["--url", &url, "--minimum-serial", "4"], &[&url, "older than the 4"]);

    let mut changed_salt = place.sample.file.to_vec();
    changed_salt[170] ^= 1;
    for (conduct, status, words) in [
        (Conduct::Serves(Arc::new(place.sample.file[..200_000].to_vec())), ELSE, "it is truncated"),
        (Conduct::Serves(Arc::new(place.sample.file[..100].to_vec())), ELSE, "it is truncated"),
        (Conduct::Serves(Arc::new(noise(300_000, 9))), NOT_ACCEPTED, "not a sealed image"),
        (Conduct::Serves(Arc::new(changed_salt)), NOT_ACCEPTED, "header hash does not match"),
        (Conduct::NoRanges, ELSE, "does not serve ranges"),
        (Conduct::Status(404), ELSE, "no image at this URL"),
        (Conduct::Status(503), AWAY, "HTTP status 503"),
    ] {
        server.behave(conduct);
        place.refused(status, &["--url", &url], &[&url, words]);
    }
}

#[test]
fn every_server_has_another_image() {
    let place = Place::new();
    let (first, second) = (place.server(), place.server());
    let other = seal(noise(300_000, 2), 16);
    for server in [&first, &second] {
        server.behave(Conduct::Serves(other.file.clone()));
    }
    let (one, two, digest) = (first.url(), second.url(), hex::encode(place.sample.sealed.digest));
    let is = hex::encode(other.sealed.digest);
    place.refused(NOT_ACCEPTED, &["--url", &one, "--url", &two, "--digest", &digest], &[&one, &two, &digest, &is]);
    // Without a digest the key tells them apart.
    place.refused(NOT_ACCEPTED, &["--url", &one, "--url", &two], &[&one, &two, "wrong key"]);
}

/// A member that does not have an image says so by status 503 (it may be on its way there): those that have it may be away for a while.
#[test]
fn who_has_the_image_is_away_and_others_are_there() {
    let place = Place::new();
    let (mut holder, other) = (place.server(), place.server());
    let digest = hex::encode(place.sample.sealed.digest);
    let (one, two) = (holder.url(), other.url());
    let arguments = ["--url", &one, "--url", &two, "--digest", &digest];
    holder.stop();
    other.behave(Conduct::Status(503));
    place.refused(AWAY, &arguments, &[&one, "no connection", &two, "HTTP status 503"]);
    // What is wrong with the others may be so for ever.
    for conduct in [Conduct::Status(404), Conduct::Serves(seal(noise(300_000, 2), 16).file)] {
        other.behave(conduct);
        place.refused(AWAY, &arguments, &[&one, "no connection", &two]);
    }
    holder.start();
    holder.behave(Conduct::Status(404));
    other.behave(Conduct::Status(404));
    place.refused(ELSE, &arguments, &[&one, &two, "no image at this URL"]);
}

#[test]
fn a_clock_that_is_far_off() {
    let place = Place::new();
    // The machine's clock is right, and the server's certificate is for another time.
    for (identity, words) in [
        (place.authority.early(), "its certificate is not valid yet, and this machine's clock says 2"),
        (place.authority.expired(), "its certificate is not valid any more, and this machine's clock says 2"),
    ] {
        let server = Server::new(&place.sample.file, &identity);
        place.refused(ELSE, &["--url", &server.url()], &[&server.url(), words, "set the clock"]);
    }

    // The machine's clock is 20 years behind: it says so, and does not turn checking off.
    let server = Server::new(&place.sample.file, &place.authority.identity_between(2015, 2999));
    let ca = place.path("ca.pem").display().to_string();
    let output = place.mount_in_2001(&["--url", &server.url(), "--ca", &ca]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("not valid yet, and this machine's clock says 2001-01-01T"), "{said}");

    // A site bundle was built later than that, so it is later than that.
    let site = Collective::new();
    let server = Server::new(&place.sample.file, &site.identity_since("member", 2015));
    let bundle = place.path("site.json").display().to_string();
    std::fs::write(&bundle, serde_json::to_vec(&site.bundle()).unwrap()).unwrap();
    let output = place.mount_in_2001(&["--url", &server.url(), "--site", &bundle]);
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read(place.path("mnt/image")).unwrap() == place.sample.plaintext);
    umount2(&place.path("mnt"), MntFlags::MNT_DETACH).unwrap();
    let early = Server::new(&place.sample.file, &site.identity_since("member", 2990));
    let early_url = early.url();
    place.refused(ELSE, &["--url", &early_url, "--site", &bundle], &[&early_url, "not valid yet"]);
}

#[test]
fn signatures_by_nobody_who_is_trusted() {
    let place = Place::new();
    let server = place.server();
    let key = place.path("signer");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap();
    assert!(made.success());
    let trust = place.path("signer.pub").display().to_string();
    std::fs::write(place.path("sig"), moor_image::SignatureFile::default().to_bytes().unwrap()).unwrap();
    let signatures = place.path("sig").display().to_string();
    let url = server.url();
    let arguments = ["--url", &url, "--trust", &trust, "--signatures", &signatures];
    // By this the agent knows that somebody may mend it, and waits for that.
    place.refused(NOT_ACCEPTED, &arguments, &["is not signed by any of the 1 trusted keys"]);
}

#[test]
fn a_server_that_is_not_there_or_of_another_authority() {
    let place = Place::new();
    let mut server = place.server();
    let url = server.url();
    let other = Authority::new();
    std::fs::write(place.path("other.pem"), other.pem()).unwrap();
    let ca = place.path("other.pem").display().to_string();
    place.refused(ELSE, &["--url", &url, "--ca", &ca], &[&url, "not of the expected authority", "give the authority"]);
    server.stop();
    place.refused(AWAY, &["--url", &url], &[&url, "no connection", "is the server running"]);
    place.refused(ELSE, &["--url", "http://127.0.0.1/x"], &["'http://127.0.0.1/x' is not a URL of the form https://"]);
    std::fs::write(place.path("empty.pem"), "").unwrap();
    let empty = place.path("empty.pem").display().to_string();
    place.refused(ELSE, &["--url", &url, "--ca", &empty], &[&empty, "holds no certificate"]);
    place.refused(ELSE, &["--url", &url, "--site", &empty], &[&empty, "no site bundle"]);
}

#[test]
fn no_server_at_all() {
    Place::new().refused(ELSE, &[], &["no server is given", "--url"]);
}

#[test]
fn only_members_of_the_collective_are_servers_of_a_site() {
    let place = Place::new();
    let (ours, theirs) = (Collective::new(), Collective::new());
    let site = place.path("site.json");
    std::fs::write(&site, serde_json::to_vec(&ours.bundle()).unwrap()).unwrap();
    let site = site.display().to_string();
    for (identity, words) in [
        (ours.identity("node"), "it was not issued by the member authority"),
        (theirs.identity("member"), "not of the expected authority"),
        (place.authority.identity(), "not of the expected authority"),
    ] {
        let server = Server::new(&place.sample.file, &identity);
        place.refused(ELSE, &["--url", &server.url(), "--site", &site], &[&server.url(), words]);
    }
}

#[test]
fn a_place_to_mount_that_is_none() {
    let place = Place::new();
    let server = place.server();
    std::fs::remove_dir(place.path("mnt")).unwrap();
    place.refused(ELSE, &["--url", &server.url()], &["cannot mount on", "make the directory first"]);
}

#[test]
fn status_where_nothing_is_mounted_and_unmount_of_nothing() {
    let place = Place::new();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_moor-tether")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let state = place.path("none.json").display().to_string();
    assert!(run(&["status", "--json", "--state", &state]).contains("no image is mounted here"));
    let dir = place.path("mnt").display().to_string();
    assert!(run(&["unmount", &dir]).contains("nothing is mounted there"));
}
