//! From nothing to a member that answers: identity, links, addresses, members.

use super::engine::Fault;
use super::kernel_arguments::{COMMAND_LINE, KernelArguments};
use super::states::State;
use super::{Boot, missing};
use crate::clock;
use crate::handover::read_json;
use crate::identity::Identity;
use crate::members::Members;
use crate::network::links::Links;
use crate::network::{Candidate, Netlink, Search};
use crate::render;
use moor_api::client::session::SessionKey;
use moor_api::deploy::{Cidr, IpMethod};
use moor_api::trust::SiteBundle;
use std::fmt::Write as _;
use std::time::Duration;

/// How long a TPM's driver is waited for.
const TPM_WAIT: Duration = Duration::from_secs(10);

/// How long a second address is waited for when the known ones reached nobody.
const NEXT_ADDRESS: Duration = Duration::from_secs(5);

/// Members given by name are looked up as in any system. A resolver that cannot be set costs those alone, and says so then.
fn name_servers(candidate: &Candidate) {
    let mut text = String::new();
    for server in &candidate.dns {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !text.is_empty() {
        let _ = std::fs::write("/etc/resolv.conf", text);
    }
}

impl Boot {
    pub(super) async fn start(&mut self) -> Result<State, Fault> {
        self.options.run.create().map_err(Fault::fatal)?;
        if self.identity.is_none() {
            // First of all: without it the stage cannot be closed, and then nobody may get a shell.
            let soft_key = self.options.run.soft_key();
            let opened = tokio::task::spawn_blocking(move || Identity::open(&soft_key, TPM_WAIT)).await;
            self.identity = Some(opened.map_err(Fault::fatal)?.map_err(Fault::again)?);
        }
        let identity = self.identity.as_mut().ok_or_else(|| missing("identity"))?;
        if tokio::task::block_in_place(|| identity.is_closed()).map_err(Fault::again)? {
            // In one bank at least. Whoever gets the shell must not find another that is open, so `give_up` closes them all.
            return Ok(State::Closed);
        }
        let line = std::fs::read_to_string(&self.options.command_line)
            .map_err(|error| Fault::fatal(format!("cannot read '{COMMAND_LINE}': {error}")))?;
        self.arguments = KernelArguments::parse(&line).map_err(Fault::fatal)?;
        let bundle: SiteBundle = read_json(&self.options.site).map_err(|error| {
            Fault::fatal(format!(
                "{error}: the site's cpio has to stand behind the initramfs (moor profile boot-files)"
            ))
        })?;
        if let Some(time) = clock::correction(clock::now(), clock::now().max(bundle.built), bundle.built) {
            self.set_clock(time, "it was before the boot files were made");
        }
        let session = SessionKey::generate().map_err(Fault::fatal)?;
        let mut urls = self.arguments.servers.clone();
        urls.extend(bundle.members.iter().cloned());
        let mut members = Members::new(&bundle, &session, urls).map_err(Fault::fatal)?.of_a_boot();
        members.set_boot(self.id);
        self.members = Some(members);
        self.session = Some(session);
        self.bundle = Some(bundle);
        Ok(State::Links)
    }

    /// Sets the clock; a kernel that refuses costs a certificate check at most, which then says so.
    pub(super) fn set_clock(&mut self, time: u64, why: &str) {
        match clock::set(time) {
            Ok(()) => self.reporter.note("clock", &format!("set to {time} seconds since 1970: {why}")),
            Err(error) => self.reporter.note("clock", &format!("cannot be set: {error}")),
        }
    }

    pub(super) async fn links(&mut self) -> Result<State, Fault> {
        if self.search.is_none() {
            let netlink = Netlink::open().map_err(Fault::fatal)?;
            self.netlink = Some(netlink.clone());
            self.search = Some(Search::new(netlink, Links::default(), self.arguments.addresses.clone()));
        }
        let search = self.search.as_mut().ok_or_else(|| missing("network"))?;
        let names = search.take_links().await.map_err(Fault::again)?;
        if names.is_empty() {
            return Err(Fault::again(
                "there is no network interface: its driver may be missing in the initramfs, or it appears late",
            ));
        }
        self.reporter.note("links", &format!("using {}", names.join(", ")));
        Ok(State::Address)
    }

    pub(super) async fn address(&mut self) -> Result<State, Fault> {
        let Some(search) = self.search.as_mut() else {
            // It has its own address, and nothing else is searched for.
            return if self.candidates.is_empty() { Err(missing("network")) } else { Ok(State::Member) };
        };
        // Links whose driver comes late.
        search.take_links().await.map_err(Fault::again)?;
        if !self.candidates.is_empty() {
            // Those known so far reached nobody: a new one gets a moment, then they are tried again.
            if let Ok(candidate) = tokio::time::timeout(NEXT_ADDRESS, search.next()).await {
                self.found(candidate);
            }
            return Ok(State::Member);
        }
        let candidate = search.next().await;
        self.found(candidate);
        Ok(State::Member)
    }

    /// Takes an address into the list, in place of an older one of the same link and origin.
    fn found(&mut self, candidate: Candidate) {
        let sentence = format!("'{}' has {}", candidate.link.name, candidate.address);
        self.reporter.note("address", &sentence);
        self.candidates.retain(|other| other.link != candidate.link || other.origin != candidate.origin);
        self.candidates.insert(0, candidate);
    }

    /// The document's static address for the interface the node booted over, in the family it booted over, unless it has it already.
    pub(super) fn own_addresses(&self) -> Option<Candidate> {
        let way = self.way.as_ref()?;
        let is_ipv4 = way.address.address.is_ipv4();
        let interfaces = &self.document.as_ref()?.interfaces;
        let interface = interfaces.iter().find(|one| render::is_boot(one, &way.link.hwaddr, &way.link.name))?;
        if (if is_ipv4 { interface.ipv4 } else { interface.ipv6 }) != IpMethod::Static {
            return None;
        }
        let own: Vec<&Cidr> = interface.addresses.iter().filter(|cidr| cidr.address.is_ipv4() == is_ipv4).collect();
        if own.contains(&&way.address) {
            return None;
        }
        let gateway = interface.gateways.iter().find(|gateway| gateway.is_ipv4() == is_ipv4).copied();
        own.first().map(|address| Candidate::from_document(&way.link, **address, gateway))
    }

    /// The document's address in place of the one it came by, before connections are made that are to last: the running system's
    /// network service finds it there and leaves it.
    pub(super) async fn take_addresses(&mut self) -> Result<State, Fault> {
        let (Some(own), Some(netlink)) = (self.own_addresses(), self.netlink.clone()) else {
            return Ok(State::HostKeys);
        };
        let old = self.way.clone().ok_or_else(|| missing("network"))?;
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        members.disconnect();
        old.withdraw(&netlink).await;
        let result = match own.apply(&netlink).await {
            Ok(()) => members.connection().await.map(drop).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match result {
            Ok(()) => {
                self.reporter.note("network", &format!("'{}' has its own address {}", own.link.name, own.address));
                self.settle(own);
                Ok(State::HostKeys)
            }
            Err(reason) => {
                own.withdraw(&netlink).await;
                let back = old.apply(&netlink).await;
                let back = back.map_or_else(|error| format!("; and going back failed: {error}"), |()| String::new());
                Err(Fault::again(format!(
                    "the node's own address {} on '{}' reaches no member (net.* attributes right?): {reason}{back}",
                    own.address, own.link.name
                )))
            }
        }
    }

    /// Stays with the node's own address: the lease is not needed any more, and members that go away are looked for from here.
    fn settle(&mut self, own: Candidate) {
        self.search = None;
        self.candidates = vec![own.clone()];
        self.way = Some(own);
    }

    pub(super) async fn member(&mut self) -> Result<State, Fault> {
        while let Some(candidate) = self.search.as_mut().and_then(Search::try_next) {
            self.found(candidate);
        }
        let netlink = self.netlink.clone().ok_or_else(|| missing("network"))?;
        let (mut reasons, mut has_expired) = (Vec::new(), false);
        for candidate in self.candidates.clone() {
            if let Some(old) = self.way.take_if(|way| *way != candidate) {
                old.withdraw(&netlink).await;
            }
            if let Err(error) = candidate.apply(&netlink).await {
                reasons.push(error.to_string());
                candidate.withdraw(&netlink).await;
                continue;
            }
            self.way = Some(candidate.clone());
            name_servers(&candidate);
            let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
            members.disconnect();
            match members.connection().await {
                Ok(connection) => {
                    let (url, link) = (connection.url().to_owned(), candidate.link.name.clone());
                    if let Some(search) = &mut self.search {
                        search.keep_only(&link);
                    }
                    self.reporter.note("member", &format!("{url} answers over '{link}'"));
                    return Ok(State::Hello);
                }
                Err(error) => {
                    has_expired |= error.has_expired();
                    reasons.push(format!("over '{}': {error}", candidate.link.name));
                }
            }
        }
        let reason = reasons.join("; ");
        // A hardware clock in the future makes every certificate look expired: the build time is one at which they were good. Nobody but a member can say
        // so, or who has the key of one.
        if has_expired && !self.clock_was_reset {
            self.clock_was_reset = true;
            let built = self.bundle.as_ref().map_or(0, |bundle| bundle.built);
            self.set_clock(built, "the members' certificates had expired by it");
        }
        Err(Fault::again(format!("no member answers: {reason}")))
    }

    /// Takes over what the network says meanwhile (a renewed lease with other values).
    pub(super) async fn refresh_address(&mut self) {
        let Some(netlink) = self.netlink.clone() else { return };
        while let Some(candidate) = self.search.as_mut().and_then(Search::try_next) {
            let ours =
                self.way.as_ref().is_some_and(|way| way.link == candidate.link && way.origin == candidate.origin);
            self.found(candidate.clone());
            if !ours {
                continue;
            }
            if candidate.apply(&netlink).await.is_ok()
                && let Some(old) = self.way.replace(candidate.clone())
                && old.address != candidate.address
            {
                // The new address is in use before the old one goes; its routes are the same or were replaced.
                let _ = netlink.remove_address(&old.link, old.address).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Options;
    use crate::handover::RunDir;
    use crate::network::links::Link;

    #[tokio::test]
    async fn a_node_with_its_own_address_looks_for_members_that_went_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut boot = Boot::new(Options {
            root: dir.path().join("root"),
            site: dir.path().join("site.json"),
            run: RunDir::new(dir.path().join("run")),
            command_line: COMMAND_LINE.into(),
            tether: "moor-tether".into(),
        });
        assert!(boot.address().await.is_err(), "nothing is searched for, and there is no address");
        let link = Link { name: "eth0".into(), index: 2, hwaddr: "52:54:00:00:00:01".parse().unwrap() };
        let own = Candidate::from_document(&link, "10.0.0.5/24".parse().unwrap(), None);
        boot.settle(own.clone());
        assert_eq!(boot.address().await, Ok(State::Member));
        assert_eq!((boot.candidates, boot.way), (vec![own.clone()], Some(own)), "that is where they are tried from");
    }
}
