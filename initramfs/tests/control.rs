//! A running mount takes up other servers and other trust in them, and refuses what would leave it without a server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::authority::{Authority, Collective, Identity};
use common::namespace::in_namespace;
use common::server::{Conduct, Server};
use common::{Sample, noise, seal};
use moor_api::trust::SiteBundle;
use moor_tether::state::State;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_mins(1);

struct Place {
    dir: TempDir,
    sample: Sample,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            // More than the tether's cache holds.
            sample: seal(noise(20_000_000, 1), 16),
        };
        fs::write(place.path("key"), place.sample.key.to_hex().as_bytes()).unwrap();
        fs::create_dir(place.path("mnt")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn server(&self, identity: &Identity) -> Server {
        Server::new(&self.sample.file, identity)
    }

    fn tether(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moor-tether"));
        command.current_dir(self.dir.path()).args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    fn mount(&self, server: &Server, trust: [&str; 2]) {
        let [option, file] = trust;
        let url = server.url();
        let arguments =
            ["mount", "--key-file", "key", "--state", "run/tether.json", "--url", &url, option, file, "mnt"];
        good(&self.tether(&arguments));
    }

    fn bundle(&self, name: &str, bundle: &SiteBundle) {
        fs::write(self.path(name), serde_json::to_vec(bundle).unwrap()).unwrap();
    }

    fn set(&self, what: &str, arguments: &[&str]) -> Output {
        self.tether(&[&[what, "set", "--socket", "run/tether.sock"], arguments].concat())
    }

    fn urls(&self) -> Vec<String> {
        State::read(&self.path("run/tether.json")).unwrap().members.into_iter().map(|member| member.url).collect()
    }

    /// What the socket answers to these bytes.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path("run/tether.sock")).unwrap();
        // It may stop listening before the end of too much.
        let _ = stream.write_all(request);
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    }
}

fn good(output: &Output) {
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

fn refused(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with("moor-tether: error: ") && said.contains(words), "'{words}' is not in: {said}");
}

fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !ready() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program that reads the whole file again and again, past the page cache.
struct Program {
    rounds: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Program {
    fn start(place: &Place) -> Self {
        let (rounds, ends) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (file, plaintext) = (place.path("mnt/image"), place.sample.plaintext.clone());
        let (counted, told) = (rounds.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
                assert!(fs::read(&file).unwrap() == plaintext, "other bytes");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { rounds, ends, thread: Some(thread) }
    }

    /// Two more rounds: all of one of them was read after this call.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait("reading", || {
            let is_running = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
            assert!(is_running, "the program met an error");
            self.rounds.load(Ordering::Relaxed) >= before + 2
        });
    }

    fn end(mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A mount of the image from one server, and a program that reads it.
fn one_server() -> (Place, Authority, Server, Program) {
    let (place, authority) = (Place::new(), Authority::new());
    fs::write(place.path("ca.pem"), authority.pem()).unwrap();
    let server = place.server(&authority.identity());
    place.mount(&server, ["--ca", "ca.pem"]);
    let program = Program::start(&place);
    program.goes_on();
    (place, authority, server, program)
}

#[test]
fn reads_go_on_while_the_only_server_moves() {
    in_namespace("reads_go_on_while_the_only_server_moves", || {
        let (place, authority, mut old, program) = one_server();

        // In good order: the new one is there before the old one goes.
        let mut new = place.server(&authority.identity());
        good(&place.set("members", &["--url", &new.url()]));
        old.stop();
        let before = new.requests();
        program.goes_on();
        assert!(new.requests() > before);
        wait("the state", || place.urls() == [new.url()]);

        // In bad order: reads wait until somebody says where it is.
        new.stop();
        let third = place.server(&authority.identity());
        let fetched = State::read(&place.path("run/tether.json")).unwrap().bytes_fetched;
        good(&place.set("members", &["--url", &third.url(), "--url", &new.url()]));
        program.goes_on();
        wait("the state", || place.urls() == [third.url(), new.url()]);
        assert!(State::read(&place.path("run/tether.json")).unwrap().bytes_fetched > fetched);

        // And by name, which the client resolves.
        let named = third.url().replace("127.0.0.1", "localhost");
        refused(&place.set("members", &["--url", &named]), "not of the expected authority");
        program.goes_on();
        program.end();
        good(&place.tether(&["unmount", "mnt"]));
        wait("the end of the socket", || !place.path("run/tether.sock").exists());
    });
}

#[test]
fn reads_go_on_while_a_server_gets_another_address_under_its_name() {
    in_namespace("reads_go_on_while_a_server_gets_another_address_under_its_name", || {
        let (place, authority, mut old, program) = one_server();

        let new = place.server(&authority.identity());
        let request = format!(r#"{{"members":[{{"url":"{}","addresses":["{}"]}}]}}"#, old.url(), new.address());
        old.stop();
        for _ in 0..2 {
            assert_eq!(place.raw(format!("{request}\n").as_bytes()), "{}\n");
        }
        let before = new.requests();
        program.goes_on();
        assert!(new.requests() > before);
        assert_eq!(place.urls(), [old.url()]);
        program.end();
        good(&place.tether(&["unmount", "mnt"]));
    });
}

#[test]
fn reads_go_on_while_the_authority_is_replaced() {
    in_namespace("reads_go_on_while_the_authority_is_replaced", || {
        let (place, old) = (Place::new(), Collective::new());
        let new = old.with_new_root();
        let bundle = |version, roots: &[&Collective]| SiteBundle {
            version,
            roots: roots.iter().flat_map(|root| root.bundle().roots).collect(),
            ..old.bundle()
        };
        place.bundle("one.json", &bundle(1, &[&old]));
        place.bundle("two.json", &bundle(2, &[&old, &new]));
        place.bundle("three.json", &bundle(3, &[&new]));
        place.bundle("back.json", &bundle(4, &[&old]));
        place.bundle("none.json", &bundle(5, &[]));
        place.bundle("theirs.json", &SiteBundle { version: 6, ..Collective::new().bundle() });
        let mut server = place.server(&old.identity("member"));
        place.mount(&server, ["--site", "one.json"]);
        let program = Program::start(&place);
        program.goes_on();

        // Too early: no server shows a certificate under the new root yet.
        refused(&place.set("trust", &["--site", "three.json"]), "no server of the new list serves this image");
        program.goes_on();
        good(&place.set("trust", &["--site", "two.json"]));
        program.goes_on();
        server.present(&new.identity("member"));
        program.goes_on();
        good(&place.set("trust", &["--site", "three.json"]));
        program.goes_on();

        for (file, words) in [
            ("two.json", "which is older than 3, the one in use"),
            ("back.json", "not of the expected authority"),
            ("none.json", "no root certificate"),
            ("theirs.json", "the new trust bundle is of collective"),
            ("key", "is no site bundle"),
        ] {
            refused(&place.set("trust", &["--site", file]), words);
        }
        fs::write(place.path("ca.pem"), Authority::new().pem()).unwrap();
        refused(&place.set("trust", &["--ca", "ca.pem"]), "the servers are members of a site");
        program.goes_on();

        // The old certificate is worth nothing now.
        server.present(&old.identity("member"));
        wait("the refusal of the old certificate", || {
            let state = State::read(&place.path("run/tether.json")).unwrap();
            state.members[0].last_fault.as_ref().is_some_and(|fault| fault.contains("not of the expected authority"))
        });
        server.present(&new.identity("member"));
        program.goes_on();
        program.end();
        good(&place.tether(&["unmount", "mnt"]));
    });
}

#[test]
fn what_is_no_list_of_servers_changes_nothing() {
    in_namespace("what_is_no_list_of_servers_changes_nothing", || {
        let (place, authority) = (Place::new(), Authority::new());
        fs::write(place.path("ca.pem"), authority.pem()).unwrap();
        let server = place.server(&authority.identity());
        place.mount(&server, ["--ca", "ca.pem"]);
        let program = Program::start(&place);

        let other = place.server(&authority.identity());
        let other_image = seal(noise(6_000_000, 2), 16);
        other.behave(Conduct::Serves(other_image.file.clone()));
        let url = other.url();
        refused(
            &place.set("members", &["--url", &url]),
            &format!("no server of the new list serves this image, so the old one stays: {url}"),
        );
        refused(
            &place.set("members", &["--url", &server.url(), "--url", &server.url()]),
            "in the list of servers twice",
        );
        refused(&place.set("members", &["--url", "http://127.0.0.1/x"]), "is not a URL of the form https://");
        refused(&place.set("trust", &["--ca", "key"]), "it holds no certificate");
        refused(
            &place.tether(&["members", "set", "--url", &url, "--socket", "run/none"]),
            "no tether answers at 'run/none'",
        );
        for (request, words) in [
            (&br#"{"members":[]}"#[..], "the list of servers is empty"),
            (br#"{"members":[{"url":"https://h/x"}]}"#, "the host 'h' has no address"),
            (br#"{"members":[{"uri":"https://127.0.0.1/x"}]}"#, "it is no request"),
            (br#"{"restart":true}"#, "it is no request"),
            (b"\xff\xfe", "it is no request"),
            (b"", "it is no request"),
        ] {
            let answer = place.raw(&[request, b"\n"].concat());
            assert!(answer.contains(words), "'{words}' is not in: {answer}");
        }
        let long = place.raw(&vec![b'x'; 300 << 10]);
        assert!(long.is_empty() || long.contains("a request is one line of at most 256 KiB"), "{long}");
        let many: Vec<_> = (0..300).map(|port| format!(r#"{{"url":"https://127.0.0.1:{}/x"}}"#, port + 1)).collect();
        let many = place.raw(format!("{{\"members\":[{}]}}\n", many.join(",")).as_bytes());
        assert!(many.contains("at most 256 are taken"), "{many}");

        // The socket is root's alone, also where its directory and mode say otherwise.
        let socket = place.path("run/tether.sock");
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        for path in [place.dir.path(), &place.path("run"), &socket] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let somebody = Command::new("setpriv")
            .args(["--reuid", "61235", "--regid", "61235", "--clear-groups", "--", "socat", "-t", "10"])
            .args(["-".to_owned(), format!("UNIX-CONNECT:{}", socket.display())])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&somebody.stdout);
        assert!(said.contains("only root may change the servers of the root, not user 61235"), "{somebody:?}");

        program.goes_on();
        assert_eq!(place.urls(), [server.url()]);
        program.end();
        good(&place.tether(&["unmount", "mnt"]));
    });
}

#[test]
fn a_second_tether_takes_nothing_away_from_the_first() {
    in_namespace("a_second_tether_takes_nothing_away_from_the_first", || {
        let (place, _authority, server, program) = one_server();
        fs::create_dir(place.path("other")).unwrap();
        let url = server.url();
        let mount = |more: &[&str]| {
            let arguments = ["mount", "--key-file", "key", "--state", "run/tether.json", "--ca", "ca.pem"];
            place.tether(&[&arguments, more].concat())
        };
        refused(&mount(&["--url", &url, "other"]), "a tether that runs has it already; give another one with --state");
        assert_eq!(place.urls(), [url.as_str()]);
        assert_eq!(place.raw(b"{\"ends\":true}\n"), "{}\n");
        program.goes_on();
        program.end();
        // One that ends leaves its place to the next. That one does without a server whose name has no address.
        good(&place.tether(&["unmount", "mnt"]));
        let nowhere = "https://[fe80::1%nosuch0]/image.moor";
        good(&mount(&["--url", nowhere, "--url", &url, "mnt"]));
        assert_eq!(place.urls(), [url.as_str()]);
        assert!(fs::read(place.path("mnt/image")).unwrap() == place.sample.plaintext);
        good(&place.tether(&["unmount", "mnt"]));
        refused(&mount(&["--url", nowhere, "mnt"]), "has no address");
    });
}
