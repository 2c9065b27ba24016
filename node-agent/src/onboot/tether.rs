//! What a heartbeat says of the members reaches the process that serves the root: it has no way of its own to learn of it.

use super::{Duty, system};
use crate::handover::{RunDir, TetherMember};
use crate::members::Members;
use moor_api::client::node::parse_https;
use moor_api::node::{HeartbeatReply, MemberEndpoint, image_url};
use moor_api::tether::{self, Request, Server, TetherError, Trust};
use moor_api::trust::SiteBundle;
use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};

/// The tether's control socket in `/run/mooring`.
const SOCKET: &str = "tether.sock";

impl Duty {
    /// Takes up what a member says of the collective: first whom to trust, over the old trust, then where members are.
    pub(super) async fn follow(&mut self, reply: &HeartbeatReply) {
        if let Some(bundle) = &reply.bundle {
            match self.take_up_bundle(bundle).await {
                Ok(()) => {
                    crate::console::say("onboot", &format!("trust bundle {} was taken up", bundle.version));
                }
                Err(reason) => self.complain(format!("trust bundle {} was not taken up: {reason}", bundle.version)),
            }
        }
        if reply.members.is_empty() {
            return;
        }
        self.members.prefer(&reply.members);
        match tell_members(&self.run, &reply.members) {
            Ok(false) => {}
            Ok(true) => crate::console::say("onboot", "the root is read from other members from now on"),
            Err(reason) => self.complain(format!("the root goes on with the members it has: {reason}")),
        }
    }

    /// A server that serves wrong bytes stands on the console of one node; whoever runs the servers learns of it here, each time it is found.
    pub(super) async fn tell_excluded(&mut self) {
        let found = newly_excluded(&self.run, &mut self.excluded);
        if !found.is_empty() {
            self.reporter.log(None, &found.join("\n"));
            self.deliver().await;
        }
    }

    /// It comes with every heartbeat until the cause is mended, and stands on the console once.
    pub(super) fn complain(&mut self, reason: String) {
        if self.complaint.as_ref() != Some(&reason) {
            crate::console::say("onboot", &reason);
            self.complaint = Some(reason);
        }
    }

    async fn take_up_bundle(&mut self, bundle: &SiteBundle) -> Result<(), String> {
        if bundle.collective != self.bundle.collective || bundle.version <= self.bundle.version {
            return Err("it is of another collective, or not newer than the one in use".to_owned());
        }
        let mut members = Members::new(bundle, &self.session, self.members.urls().to_vec());
        let members = members.as_mut().map_err(|error| error.to_string())?;
        members.connection().await.map_err(|error| error.to_string())?;
        hand_on_bundle(&self.run, bundle)?;
        self.bundle = bundle.clone();
        // A session is bound to its connection's trust: the next call opens another one.
        self.members.trust(bundle, &self.session).map_err(|error| error.to_string())
    }
}

/// Where the machine shuts down, an outage of all servers may end reads of the root after a while. The tether learns of it here alone: process 1
/// asks all processes to end but those that it spares (systemd: killall.c). Where systemd does not answer, the root stands still already.
pub(super) fn tell_of_shutdown(run: &RunDir) {
    if run.tether().is_some()
        && system::is_stopping() != Some(false)
        && let Err(error) = ask(run, &Request::Ends(true))
    {
        crate::console::say("onboot", &format!("the tether does not know of the shutdown: {error}"));
    }
}

/// An agent that ended before this one may have said otherwise.
pub(super) fn tell_that_it_goes_on(run: &RunDir) {
    if run.tether().is_some() {
        // One that does not answer has heard nothing before either.
        let _ = ask(run, &Request::Ends(false));
    }
}

/// First the tether: what it refuses must not be what an agent that is started again begins with.
fn hand_on_bundle(run: &RunDir, bundle: &SiteBundle) -> Result<(), String> {
    if run.tether().is_some() {
        ask(run, &Request::Trust(Trust::Site(bundle.clone()))).map_err(|error| error.to_string())?;
    }
    run.write_site(bundle).map_err(|error| error.to_string())?;
    Ok(())
}

/// What is to be told of the tether's servers that are excluded and not in `told`, which holds all of them then.
fn newly_excluded(run: &RunDir, told: &mut BTreeSet<String>) -> Vec<String> {
    let members = run.tether().map(|tether| tether.members).unwrap_or_default();
    let excluded: Vec<_> = members.into_iter().filter(TetherMember::is_excluded).collect();
    let before = std::mem::replace(told, excluded.iter().map(|member| member.url.clone()).collect());
    let new = excluded.into_iter().filter(|member| !before.contains(&member.url));
    new.map(|member| {
        let fault = member.last_fault.unwrap_or_default();
        format!("{} served wrong bytes of the root twice and is not asked any more: {fault}", member.url)
    })
    .collect()
}

/// Returns whether the tether had another list.
fn tell_members(run: &RunDir, members: &[MemberEndpoint]) -> Result<bool, String> {
    // A root that is in memory needs no member.
    let Some(tether) = run.tether() else { return Ok(false) };
    let bases = members.iter().flat_map(|member| &member.urls);
    let wanted: BTreeSet<String> = bases.map(|base| image_url(base, tether.digest)).collect();
    let is_good = tether.members.iter().all(TetherMember::is_good);
    let known: BTreeSet<String> = tether.members.into_iter().map(|member| member.url).collect();
    // One that does not serve may have moved and kept its name: only here somebody can look that up.
    if is_good && wanted == known {
        return Ok(false);
    }
    let (mut servers, mut unknown) = (Vec::new(), None);
    for (url, host, addresses) in tokio::task::block_in_place(|| look_up(wanted))? {
        match addresses {
            Ok(addresses) => servers.push(Server { addresses, url }),
            // The tether knows where it was. One that it never knew is no reason not to tell it of the others.
            Err(_) if known.contains(&url) => servers.push(Server { addresses: Vec::new(), url }),
            Err(error) => unknown = Some(format!("'{host}': {error}")),
        }
    }
    let is_other = servers.iter().map(|server| &server.url).ne(&known);
    if let Some(unknown) = unknown.filter(|_| servers.is_empty() || is_good && !is_other) {
        return Err(unknown);
    }
    ask(run, &Request::Members(servers)).map_err(|error| error.to_string())?;
    Ok(is_other)
}

/// A server's URL, its host, and what that resolves to.
type LookedUp = (String, String, io::Result<Vec<SocketAddr>>);

/// Side by side: each name without an answer takes as long as the resolver has patience.
fn look_up(urls: BTreeSet<String>) -> Result<Vec<LookedUp>, String> {
    let parts =
        |url: String| parse_https(&url).map(|(host, port)| (url, host, port)).map_err(|error| error.to_string());
    let urls = urls.into_iter().map(parts).collect::<Result<Vec<_>, _>>()?;
    let one = |(url, host, port): (String, String, u16)| {
        let addresses = (host.as_str(), port).to_socket_addrs().map(Iterator::collect);
        (url, host, addresses)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = urls.into_iter().map(|parts| scope.spawn(move || one(parts))).collect();
        let panicked = |_| "looking up a server's name panicked".to_owned();
        threads.into_iter().map(|thread| thread.join().map_err(panicked)).collect()
    })
}

/// The tether tries new servers before it answers: that may take a while.
fn ask(run: &RunDir, request: &Request) -> Result<(), TetherError> {
    tokio::task::block_in_place(|| tether::ask(&run.path(SOCKET), request))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::{CollectiveId, MemberId};
    use moor_api::trust::Incarnation;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    const GRANTED: &str = "{}";
    const REFUSED: &str = r#"{"error":"none of them serves it"}"#;

    /// A tether that gives these answers; what it was asked, and what then was in `site.json`.
    fn tether<const N: usize>(run: &RunDir, answers: [&'static str; N]) -> JoinHandle<[(Request, Option<u64>); N]> {
        let listener = UnixListener::bind(run.path(SOCKET)).unwrap();
        let run = run.clone();
        std::thread::spawn(move || {
            answers.map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                let site = run.site().ok().map(|bundle| bundle.version);
                writeln!(stream, "{answer}").unwrap();
                (serde_json::from_str(&line).unwrap(), site)
            })
        })
    }

    fn digest() -> String {
        "ab".repeat(32)
    }

    /// The state of a tether that reads from one server.
    fn has(run: &RunDir, url: &str, is_whole: bool, standing: &str) {
        let digest = digest();
        let member = format!(r#"{{"url":"{url}/public/images/{digest}","state":"{standing}"}}"#);
        let text = format!(r#"{{"digest":"{digest}","is_whole":{is_whole},"members":[{member}]}}"#);
        run.write("tether.json", text.as_bytes()).unwrap();
    }

    fn members(urls: &[&str]) -> Vec<MemberEndpoint> {
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        vec![MemberEndpoint { id: MemberId::random(), urls }]
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_tether_is_told_of_a_list_that_it_does_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        // No tether, one that has the list, one that needs none: nobody is asked, for nobody listens.
        let moved = members(&["https://127.0.0.1:2/", "https://127.0.0.1:3"]);
        assert_eq!(tell_members(&run, &moved), Ok(false));
        has(&run, "https://127.0.0.1:1", false, "good");
        assert_eq!(tell_members(&run, &members(&["https://127.0.0.1:1/"])), Ok(false));
        has(&run, "https://127.0.0.1:1", true, "good");
        assert_eq!(tell_members(&run, &moved), Ok(false));
        has(&run, "https://127.0.0.1:1", false, "good");
        assert!(tell_members(&run, &moved).unwrap_err().contains("no tether answers"));

        let tether = tether(&run, [GRANTED, REFUSED]);
        assert_eq!(tell_members(&run, &moved), Ok(true));
        let refused = tell_members(&run, &moved).unwrap_err();
        assert_eq!(refused, "the tether refuses: none of them serves it");
        for (request, _) in tether.join().unwrap() {
            let Request::Members(servers) = request else { panic!("{request:?}") };
            let told: Vec<_> =
                servers.iter().map(|server| (server.url.as_str(), server.addresses[0].to_string())).collect();
            let url = |port: u16| format!("https://127.0.0.1:{port}/public/images/{}", digest());
            assert_eq!(
                told,
                [(url(2).as_str(), "127.0.0.1:2".to_owned()), (url(3).as_str(), "127.0.0.1:3".to_owned())]
            );
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_member_that_does_not_serve_is_looked_up_again_under_its_old_name() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let named = members(&["https://localhost:2"]);
        // One that serves is where it was: nobody is asked, for nobody listens.
        has(&run, "https://localhost:2", false, "good");
        assert_eq!(tell_members(&run, &named), Ok(false));
        has(&run, "https://localhost:2", false, "backing-off");
        assert!(tell_members(&run, &named).unwrap_err().contains("no tether answers"));
        let tether = tether(&run, [GRANTED]);
        assert_eq!(tell_members(&run, &named), Ok(false), "the list is the same");
        let [(request, _)] = tether.join().unwrap();
        let Request::Members(servers) = request else { panic!("{request:?}") };
        assert_eq!(servers.len(), 1);
        assert_eq!(servers[0].url, format!("https://localhost:2/public/images/{}", digest()));
        let addresses = &servers[0].addresses;
        assert!(!addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback()), "{addresses:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_name_that_does_not_resolve_keeps_nobody_from_moving() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let (gone, there) = ("https://nosuch.invalid:2", "https://127.0.0.1:3");
        let told = |tether: JoinHandle<[(Request, Option<u64>); 1]>| {
            let [(request, _)] = tether.join().unwrap();
            let Request::Members(servers) = request else { panic!("{request:?}") };
            servers.into_iter().map(|server| (server.url, server.addresses.len())).collect::<Vec<_>>()
        };
        let url = |base: &str| format!("{base}/public/images/{}", digest());
        // One that the tether has stays where it was; the tether knows that.
        has(&run, gone, false, "backing-off");
        let asked = tether(&run, [GRANTED]);
        assert_eq!(tell_members(&run, &members(&[gone, there])), Ok(true));
        assert_eq!(told(asked), [(url(there), 1), (url(gone), 0)]);
        std::fs::remove_file(run.path(SOCKET)).unwrap();
        // One that it never had is left out.
        has(&run, "https://127.0.0.1:1", false, "good");
        let asked = tether(&run, [GRANTED]);
        assert_eq!(tell_members(&run, &members(&[gone, there])), Ok(true));
        assert_eq!(told(asked), [(url(there), 1)]);
        // That is said, and nobody is asked for nothing, for nobody listens.
        has(&run, there, false, "good");
        for list in [&[gone, there][..], &[gone]] {
            let said = tell_members(&run, &members(list)).unwrap_err();
            assert!(said.starts_with("'nosuch.invalid': "), "{said}");
        }
    }

    #[test]
    fn a_server_of_wrong_bytes_is_told_of_once_each_time_it_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut told = BTreeSet::new();
        assert!(newly_excluded(&run, &mut told).is_empty(), "there is no tether");
        for (standing, count) in [("good", 0), ("excluded", 1), ("excluded", 0), ("good", 0), ("excluded", 1)] {
            has(&run, "https://127.0.0.1:1", false, standing);
            let found = newly_excluded(&run, &mut told);
            assert_eq!(found.len(), count, "{standing}: {found:?}");
            assert!(found.iter().all(|line| line.starts_with("https://127.0.0.1:1/public/images/")), "{found:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_trust_bundle_is_the_agent_s_own_only_once_the_tether_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let bundle = |version| SiteBundle {
            version,
            collective: CollectiveId::from_bytes([1; 16]),
            name: "x".into(),
            roots: Vec::new(),
            members: Vec::new(),
            ssh_host_authorities: Vec::new(),
            built: 0,
            incarnation: Incarnation::FIRST,
        };
        let version = || run.site().unwrap().version;
        // A root in memory has no tether that would have to know.
        has(&run, "https://127.0.0.1:1", true, "good");
        assert_eq!(hand_on_bundle(&run, &bundle(1)), Ok(()));
        assert_eq!(version(), 1);

        has(&run, "https://127.0.0.1:1", false, "good");
        assert!(hand_on_bundle(&run, &bundle(2)).unwrap_err().contains("no tether answers"));
        assert_eq!(version(), 1);
        let tether = tether(&run, [REFUSED, GRANTED]);
        assert_eq!(hand_on_bundle(&run, &bundle(2)).unwrap_err(), "the tether refuses: none of them serves it");
        assert_eq!(version(), 1);
        assert_eq!(hand_on_bundle(&run, &bundle(2)), Ok(()));
        assert_eq!(version(), 2);
        let asked = Request::Trust(Trust::Site(bundle(2)));
        assert_eq!(tether.join().unwrap(), [(asked.clone(), Some(1)), (asked, Some(1))]);
    }
}
