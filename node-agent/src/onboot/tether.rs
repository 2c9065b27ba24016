//! What a heartbeat says of the members reaches the process that serves the root: it has no way of its own to learn of it.

use super::Duty;
use crate::handover::RunDir;
use crate::members::Members;
use moor_api::client::node::parse_https;
use moor_api::node::{HeartbeatReply, MemberEndpoint, image_url};
use moor_api::tether::{self, Request, Server, TetherError, Trust};
use moor_api::trust::SiteBundle;
use std::collections::BTreeSet;
use std::net::ToSocketAddrs as _;

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
        self.members.learn_endpoints(&reply.members);
        match tell_members(&self.run, &reply.members) {
            Ok(false) => {}
            Ok(true) => crate::console::say("onboot", "the root is read from other members from now on"),
            Err(reason) => self.complain(format!("the root goes on with the members it has: {reason}")),
        }
    }

    /// It comes with every heartbeat until the cause is mended, and stands on the console once.
    fn complain(&mut self, reason: String) {
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
        if self.run.tether().is_some() {
            ask(&self.run, &Request::Trust(Trust::Site(bundle.clone()))).map_err(|error| error.to_string())?;
        }
        self.run.write_site(bundle).map_err(|error| error.to_string())?;
        self.bundle = bundle.clone();
        // A session is bound to its connection's trust: the next call opens another one.
        self.members.trust(bundle, &self.session).map_err(|error| error.to_string())
    }
}

/// Returns whether the tether had another list.
fn tell_members(run: &RunDir, members: &[MemberEndpoint]) -> Result<bool, String> {
    // A root that is in memory needs no member.
    let Some(tether) = run.tether() else { return Ok(false) };
    let bases = members.iter().flat_map(|member| &member.urls);
    let wanted: BTreeSet<String> = bases.map(|base| image_url(base, tether.digest)).collect();
    if wanted == tether.members.into_iter().map(|member| member.url).collect() {
        return Ok(false);
    }
    let resolve = |url: String| {
        let (host, port) = parse_https(&url).map_err(|error| error.to_string())?;
        let addresses = tokio::task::block_in_place(|| (host.as_str(), port).to_socket_addrs());
        let addresses = addresses.map_err(|error| format!("'{host}': {error}"))?;
        Ok(Server { addresses: addresses.collect(), url })
    };
    let servers = wanted.into_iter().map(resolve).collect::<Result<_, String>>()?;
    ask(run, &Request::Members(servers)).map_err(|error| error.to_string())?;
    Ok(true)
}

/// The tether tries new servers before it answers: that may take a while.
fn ask(run: &RunDir, request: &Request) -> Result<(), TetherError> {
    tokio::task::block_in_place(|| tether::ask(&run.path(SOCKET), request))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::MemberId;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    #[tokio::test(flavor = "multi_thread")]
    async fn the_tether_is_told_of_a_list_that_it_does_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let digest = "ab".repeat(32);
        let members = |urls: &[&str]| {
            let urls = urls.iter().map(|url| (*url).to_owned()).collect();
            vec![MemberEndpoint { id: MemberId::random(), urls }]
        };
        let has = |url: &str, whole: bool| {
            let text = format!(
                r#"{{"digest":"{digest}","is_whole":{whole},"members":[{{"url":"{url}/public/images/{digest}"}}]}}"#
            );
            run.write("tether.json", text.as_bytes()).unwrap();
        };
        // No tether, one that has the list, one that needs none: nobody is asked, for nobody listens.
        let moved = members(&["https://127.0.0.1:2/", "https://127.0.0.1:3"]);
        assert_eq!(tell_members(&run, &moved), Ok(false));
        has("https://127.0.0.1:1", false);
        assert_eq!(tell_members(&run, &members(&["https://127.0.0.1:1/"])), Ok(false));
        has("https://127.0.0.1:1", true);
        assert_eq!(tell_members(&run, &moved), Ok(false));
        has("https://127.0.0.1:1", false);
        assert!(tell_members(&run, &moved).unwrap_err().contains("no tether answers"));

        let listener = UnixListener::bind(run.path(SOCKET)).unwrap();
        let tether = std::thread::spawn(move || {
            ["{}", r#"{"error":"none of them serves it"}"#].map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                writeln!(stream, "{answer}").unwrap();
                serde_json::from_str::<Request>(&line).unwrap()
            })
        });
        assert_eq!(tell_members(&run, &moved), Ok(true));
        let refused = tell_members(&run, &moved).unwrap_err();
        assert_eq!(refused, "the tether refuses: none of them serves it");
        for request in tether.join().unwrap() {
            let Request::Members(servers) = request else { panic!("{request:?}") };
            let told: Vec<_> =
                servers.iter().map(|server| (server.url.as_str(), server.addresses[0].to_string())).collect();
            let url = |port: u16| format!("https://127.0.0.1:{port}/public/images/{digest}");
            assert_eq!(
                told,
                [(url(2).as_str(), "127.0.0.1:2".to_owned()), (url(3).as_str(), "127.0.0.1:3".to_owned())]
            );
        }
    }
}
