//! `config` and `attributes`: the deploy document, made from attributes and the profile's generation.

use super::Caller;
use crate::http::Failure;
use crate::model::attributes;
use crate::secrets::Place;
use crate::state::Member;
use crate::store::Command;
use crate::store::records::{NodeRecord, ProfileRecord};
use axum::Json;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, header};
use moor_api::deploy::{
    Cidr, DeployDocument, DeploySecrets, DnsSection, Interface, IpMethod, LocaleSection, NodeSection, Phase,
    ProfileSection, SCHEMA,
};
use moor_api::ids::CollectiveId;
use moor_api::node::Stage;
use moor_api::problem::{Code, Problem};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;

type Attributes = BTreeMap<String, String>;

pub(super) async fn config(
    State(member): State<Arc<Member>>,
    Extension(mut caller): Extension<Caller>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    // The boot may have begun before the administrator said what to boot.
    if caller.claims.stage == Stage::Boot
        && caller.boot().is_some_and(|boot| boot.plan.is_none())
        && caller.node.deployment.is_some()
    {
        member.propose_for_node(Command::Boot { id: caller.node.id, boot: caller.claims.boot, evidence: None }).await?;
        if let Some(node) = member.node(&member.view()?, caller.node.id)? {
            caller.node = node;
        }
    }
    let profile = caller.generation(&member.view()?)?;
    let document = document(&member, &caller, &profile)?;
    if document.secrets.as_ref().is_some_and(|secrets| secrets.root_password_hash.is_some()) {
        caller.released(&member, "node-secrets", "crypted.rootpassword").await?;
    }
    let wants_yaml =
        headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).is_some_and(|accept| accept.contains("yaml"));
    let mut response = if wants_yaml {
        let text = serde_saphyr::to_string(&document)
            .map_err(|error| anyhow::anyhow!("writing the document of {} as YAML: {error}", caller.node.name))?;
        let mut response = text.into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/yaml"));
        response
    } else {
        Json(document).into_response()
    };
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A secret attribute in the clear.
fn secret(member: &Member, node: &NodeRecord, name: &str) -> Result<Option<String>, Failure> {
    let Some(sealed) = node.secrets.get(name) else { return Ok(None) };
    let id = node.id.to_string();
    let bytes = member.open_secret(Place { table: "nodes", id: &id, field: name }, sealed)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| anyhow::anyhow!("'{name}' of {} is not UTF-8", node.name))?;
    // Blank masks an inherited value.
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

fn document(member: &Member, caller: &Caller, profile: &ProfileRecord) -> Result<DeployDocument, Failure> {
    let node = &caller.node;
    let attributes = &node.attributes;
    let secrets = if caller.claims.stage == Stage::Boot && caller.is_trusted(profile) {
        Some(DeploySecrets { root_password_hash: secret(member, node, "crypted.rootpassword")? })
    } else {
        None
    };
    let manifest = &profile.manifest;
    let phases = manifest
        .scripts
        .iter()
        .map(|(phase, scripts)| Phase {
            phase: *phase,
            scripts: scripts.iter().map(|(name, _)| name.clone()).collect(),
        })
        .collect();
    Ok(DeployDocument {
        schema: SCHEMA,
        deployment: caller.boot().and_then(|boot| boot.plan.as_ref()).map(|plan| plan.deployment),
        node: NodeSection {
            id: node.id,
            name: node.name.clone(),
            machine_id: machine_id(member.site.collective, node),
        },
        profile: ProfileSection {
            name: profile.name.clone(),
            generation: profile.generation,
            root: manifest.root,
            overlay: manifest.overlay.clone(),
            on_failure: manifest.on_failure,
        },
        interfaces: interfaces(node)?,
        dns: DnsSection { servers: list(attributes, "dns.servers"), domain: text(attributes, "dns.domain") },
        ntp: list(attributes, "ntp.servers"),
        time_zone: text(attributes, "time.zone"),
        locale: LocaleSection { lang: text(attributes, "locale.lang"), keymap: text(attributes, "locale.keymap") },
        members: caller.endpoints(member)?,
        phases,
        trust_version: member.trust.version(),
        secrets,
    })
}

/// `machine-id`(5) of a node: a UUID of version 4 by its form (systemd asks for that), derived, so that it is the same at every boot.
fn machine_id(collective: CollectiveId, node: &NodeRecord) -> String {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(b"moor/v1 machine-id");
    context.update(collective.as_bytes());
    context.update(node.id.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&context.finish().as_ref()[..16]);
    bytes[6] = bytes[6] & 0x0F | 0x40;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    hex::encode(bytes)
}

/// A value that is set and not blank.
fn text(attributes: &Attributes, name: &str) -> Option<String> {
    attributes.get(name).filter(|value| !value.is_empty()).cloned()
}

/// A comma-separated list; values were checked when they were set.
fn list<T: FromStr>(attributes: &Attributes, name: &str) -> Vec<T> {
    text(attributes, name)
        .iter()
        .flat_map(|value| value.split(','))
        .filter_map(|part| part.trim().parse().ok())
        .collect()
}

fn value<T: FromStr>(attributes: &Attributes, name: &str) -> Option<T> {
    text(attributes, name)?.parse().ok()
}

/// The labels of `net.LABEL.*`, in order; plain `net.*` has the empty one, which comes first.
fn labels(attributes: &Attributes) -> BTreeSet<&str> {
    attributes
        .keys()
        .filter_map(|name| name.strip_prefix("net."))
        .map(|rest| rest.split_once('.').map_or("", |(label, _)| label))
        .collect()
}

fn interfaces(node: &NodeRecord) -> Result<Vec<Interface>, Problem> {
    let mut labels = labels(&node.attributes);
    if labels.is_empty() {
        // The interface that it booted over, by DHCP.
        labels.insert("");
    }
    labels.into_iter().map(|label| interface(node, label)).collect()
}

fn interface(node: &NodeRecord, label: &str) -> Result<Interface, Problem> {
    let attributes = &node.attributes;
    let name = |leaf: &str| if label.is_empty() { format!("net.{leaf}") } else { format!("net.{label}.{leaf}") };
    let mut addresses = Vec::new();
    let mut method = |family: &str| {
        let address: Option<Cidr> = value(attributes, &name(&format!("{family}_address")));
        let wanted = text(attributes, &name(&format!("{family}_method")));
        let method = match (wanted.as_deref(), address) {
            // `firmwaredhcp` is DHCP for the firmware; the system has the address that is set, or none.
            (Some("none"), _) | (Some("firmwaredhcp"), None) => IpMethod::None,
            (Some("dhcp"), _) | (None, None) => IpMethod::Dhcp,
            (_, Some(_)) => IpMethod::Static,
            (Some(_), None) => {
                let detail = format!(
                    "{}: {} is static, and {} is not set",
                    node.name,
                    name(&format!("{family}_method")),
                    name(&format!("{family}_address"))
                );
                return Err(Problem::new(Code::Conflict, detail));
            }
        };
        if method == IpMethod::Static {
            addresses.extend(address);
        }
        Ok(method)
    };
    let (ipv4, ipv6) = (method("ipv4")?, method("ipv6")?);
    let gateways = [(ipv4, "ipv4_gateway"), (ipv6, "ipv6_gateway")];
    Ok(Interface {
        label: label.to_owned(),
        hwaddr: value(attributes, &name("hwaddr")),
        names: list(attributes, &name("interface_names")),
        ipv4,
        ipv6,
        addresses,
        gateways: gateways
            .iter()
            .filter(|(method, _)| *method == IpMethod::Static)
            .filter_map(|(_, leaf)| value(attributes, &name(leaf)))
            .collect(),
        mtu: value(attributes, &name("mtu")),
    })
}

/// The node's own attributes; secrets of the site's own (`custom.nodesecret.*`) in the boot stage.
pub(super) async fn attributes(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Attributes>, Failure> {
    let node = &caller.node;
    let mut out: Attributes = node
        .attributes
        .iter()
        .filter(|(name, _)| !attributes::is_secret(name))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let trusted = match caller.generation(&member.view()?) {
        Ok(profile) => caller.is_trusted(&profile),
        Err(_) => node.identity.as_ref().is_some_and(|identity| !identity.is_unproven()),
    };
    if caller.claims.stage == Stage::Boot && trusted {
        let mut released = Vec::new();
        for name in node.secrets.keys().filter(|name| name.starts_with("custom.nodesecret.")) {
            if let Some(value) = secret(&member, node, name)? {
                out.insert(name.clone(), value);
                released.push(name.as_str());
            }
        }
        if !released.is_empty() {
            caller.released(&member, "node-secrets", &released.join(" ")).await?;
        }
    }
    Ok(Json(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::Armed;
    use moor_api::ids::NodeId;

    fn node(attributes: &[(&str, &str)]) -> NodeRecord {
        NodeRecord {
            id: NodeId::from_bytes([7; 16]),
            name: "n1".parse().unwrap(),
            attributes: attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            secrets: BTreeMap::new(),
            identity: None,
            epoch: 0,
            armed: Armed::No,
            deployment: None,
            pin: None,
            boots: Vec::new(),
            trust: None,
        }
    }

    fn shown(interfaces: &[Interface]) -> Vec<String> {
        let show = |i: &Interface| {
            let addresses: Vec<String> = i.addresses.iter().map(ToString::to_string).collect();
            let gateways: Vec<String> = i.gateways.iter().map(ToString::to_string).collect();
            format!("'{}' {:?} {:?} [{}] [{}]", i.label, i.ipv4, i.ipv6, addresses.join(" "), gateways.join(" "))
        };
        interfaces.iter().map(show).collect()
    }

    #[test]
    fn interfaces_follow_from_attributes() {
        for (attributes, expected) in [
            (&[][..], &["'' Dhcp Dhcp [] []"][..]),
            (&[("net.hwaddr", "52:54:00:00:00:01"), ("net.ipv4_method", "dhcp")], &["'' Dhcp Dhcp [] []"]),
            (
                &[("net.ipv4_address", "10.0.0.5/24"), ("net.ipv4_gateway", "10.0.0.1"), ("net.ipv6_method", "none")],
                &["'' Static None [10.0.0.5/24] [10.0.0.1]"],
            ),
            (
                &[("net.ipv4_method", "firmwaredhcp"), ("net.ipv4_address", "10.0.0.5/24")],
                &["'' Static Dhcp [10.0.0.5/24] []"],
            ),
            (&[("net.ipv4_method", "firmwaredhcp")], &["'' None Dhcp [] []"]),
            (&[("net.ipv4_method", "none"), ("net.ipv4_address", "10.0.0.5/24")], &["'' None Dhcp [] []"]),
            (&[("net.ipv4_method", "dhcp"), ("net.ipv4_gateway", "10.0.0.1")], &["'' Dhcp Dhcp [] []"]),
            (
                &[("net.ib0.ipv4_address", "10.1.0.5/16"), ("net.mtu", "9000"), ("net.ib0.ipv6_method", "none")],
                &["'' Dhcp Dhcp [] []", "'ib0' Static None [10.1.0.5/16] []"],
            ),
        ] {
            assert_eq!(shown(&interfaces(&node(attributes)).unwrap()), expected, "{attributes:?}");
        }
        let error = interfaces(&node(&[("net.ib0.ipv4_method", "static")])).unwrap_err().detail;
        assert!(error.contains("net.ib0.ipv4_address is not set"), "{error}");
    }

    #[test]
    fn a_machine_id_is_the_nodes_own_and_stays() {
        let collective = CollectiveId::from_bytes([1; 16]);
        let id = machine_id(collective, &node(&[]));
        assert_eq!(id, machine_id(collective, &node(&[("info.note", "x")])));
        assert_eq!((id.len(), &id[12..13]), (32, "4"));
        let other = NodeRecord { id: NodeId::from_bytes([8; 16]), ..node(&[]) };
        assert_ne!(id, machine_id(collective, &other));
        assert_ne!(id, machine_id(CollectiveId::from_bytes([2; 16]), &node(&[])));
    }
}
