//! What the node is made from: the deploy document, host keys, scripts, and the files rendered from them.

use super::engine::Fault;
use super::states::{Class, State};
use super::{Boot, call_fault, missing};
use crate::network::Origin;
use crate::render::{self, BootInterface, Facts};
use crate::scripts::{Phase, ScriptError};
use crate::ssh;
use crate::tree::Tree;
use moor_api::deploy::{PhaseName, SCHEMA};
use moor_api::node::{HostCertificateRequest, Stage};
use std::path::Path;

impl Boot {
    pub(super) async fn config(&mut self) -> Result<State, Fault> {
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        let document = members.call(async |member| member.config().await).await.map_err(|error| call_fault(&error))?;
        if document.schema > SCHEMA {
            return Err(Fault::fatal(format!(
                "the configuration has schema {}, this agent knows {SCHEMA}: the image needs a newer agent",
                document.schema
            )));
        }
        if self.known.as_ref().map(|known| known.id) != Some(document.node.id) {
            return Err(Fault::restart("the member sent another node's configuration"));
        }
        members.prefer(&document.members);
        let profile = &document.profile;
        self.reporter.note("config", &format!("profile '{}', generation {}", profile.name, profile.generation));
        self.document = Some(document);
        Ok(if self.own_addresses().is_some() { State::Network } else { State::HostKeys })
    }

    pub(super) async fn make_host_keys(&mut self) -> Result<State, Fault> {
        if self.host_keys.is_empty() {
            let name = self.known.as_ref().map(|known| known.name.to_string()).unwrap_or_default();
            let made = tokio::task::spawn_blocking(move || ssh::make(&name)).await;
            self.host_keys = made.map_err(Fault::fatal)?.map_err(Fault::fatal)?;
        }
        let publics: Vec<&str> = self.host_keys.iter().map(|key| key.public.as_str()).collect();
        let request = HostCertificateRequest { public_keys: publics.iter().map(|&key| key.to_owned()).collect() };
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        let certificates = members.call(async |member| member.host_certificates(&request).await).await;
        let certificates = certificates.map_err(|error| call_fault(&error))?;
        ssh::check_certificates(&publics, &certificates.certificates).map_err(Fault::again)?;
        self.trust = members.call(async |member| member.ssh_trust().await).await.map_err(|error| call_fault(&error))?;
        self.certificates = Some(certificates);
        Ok(if self.has_scripts(PhaseName::Pre) { State::Pre } else { State::Image })
    }

    pub(super) async fn phase(&mut self, name: PhaseName, root: Option<&Path>, next: State) -> Result<State, Fault> {
        self.ensure_token().await?;
        let (mut done, mut renewed_at) = (0, None);
        loop {
            let Self { members: Some(members), document: Some(document), .. } = self else {
                return Err(missing("configuration"));
            };
            let phase = Phase { name, document, root };
            let result = phase.run(members, &mut self.reporter, &mut done).await;
            match result {
                Ok(()) => {
                    self.reporter.note(name.as_str(), &format!("{done} scripts done"));
                    return Ok(next);
                }
                // The collective's keys were rotated, or the script before took long: once for each script.
                Err(ScriptError::Fetch { cause, .. })
                    if renewed_at != Some(done) && call_fault(&cause).class == Class::Restart =>
                {
                    renewed_at = Some(done);
                    self.renew_session(Stage::Boot).await?;
                }
                Err(ScriptError::Fetch { cause, .. }) if cause.is_transient() => return Err(Fault::again(cause)),
                Err(error) => return Err(Fault::fatal(error)),
            }
        }
    }

    fn has_scripts(&self, name: PhaseName) -> bool {
        let phases = self.document.iter().flat_map(|document| &document.phases);
        phases.into_iter().any(|phase| phase.phase == name && !phase.scripts.is_empty())
    }

    pub(super) fn render(&mut self) -> Result<State, Fault> {
        let interface = self.boot_interface().ok_or_else(|| missing("network"))?;
        let Self { document: Some(document), certificates: Some(certificates), .. } = &*self else {
            return Err(missing("configuration"));
        };
        let facts = Facts {
            interface: &interface,
            host_keys: &self.host_keys,
            certificates,
            trust: &self.trust,
            shadow: None,
            authorized_keys: None,
        };
        // The root is read over the network: this may take its time, and the tasks for leases go on.
        let count = tokio::task::block_in_place(|| {
            let tree = Tree::open(&self.options.root)?;
            render::install(&tree, document, facts)
        })
        .map_err(Fault::fatal)?;
        self.reporter.note("render", &format!("{count} files written"));
        Ok(if self.has_scripts(PhaseName::Post) { State::Post } else { State::Close })
    }

    fn boot_interface(&self) -> Option<BootInterface> {
        let way = self.way.as_ref()?;
        let gateways =
            way.routes.iter().filter(|route| route.destination.prefix == 0).filter_map(|route| route.gateway);
        Some(BootInterface {
            name: way.link.name.clone(),
            hwaddr: way.link.hwaddr.clone(),
            address: way.address,
            gateways: gateways.collect(),
            is_static: way.origin == Origin::Argument,
            dns: way.dns.clone(),
            domain: way.domain.clone(),
        })
    }
}
