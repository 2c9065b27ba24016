//! What the kernel command line says to the agent.

use crate::network::StaticAddress;
use moor_api::deploy::RootMode;
use std::path::PathBuf;

/// Where the kernel shows it.
pub const COMMAND_LINE: &str = "/proc/cmdline";

/// The agent's arguments; those of others are none of its business.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelArguments {
    /// `moor.server=URL[,URL]…`: members, nearest first.
    pub servers: Vec<String>,
    /// `moor.ip=ADDRESS/PREFIX[,GATEWAY[,INTERFACE]]`, once for each address.
    pub addresses: Vec<StaticAddress>,
    /// `moor.root=MODE`: instead of what the profile says.
    pub root: Option<RootMode>,
    /// `moor.disk_cache=PATH`: the device that keeps chunks in the mode `disk`, instead of the partition of that name.
    pub disk_cache: Option<PathBuf>,
}

/// An argument is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel argument '{argument}': {reason}")]
pub struct ArgumentError {
    /// As it was given, cut to 120 characters.
    pub argument: String,
    /// What is wrong.
    pub reason: String,
}

impl KernelArguments {
    /// Parses a command line.
    ///
    /// # Errors
    /// A malformed `moor.` argument: booting on with half of what was asked would hide the mistake.
    pub fn parse(line: &str) -> Result<Self, ArgumentError> {
        let mut arguments = Self::default();
        for argument in line.split_whitespace() {
            let error = |reason: String| ArgumentError { argument: argument.chars().take(120).collect(), reason };
            if let Some(urls) = argument.strip_prefix("moor.server=") {
                for url in urls.split(',').filter(|url| !url.is_empty()) {
                    moor_api::client::node::parse_https(url).map_err(|cause| error(cause.to_string()))?;
                    arguments.servers.push(url.to_owned());
                }
            } else if let Some(text) = argument.strip_prefix("moor.ip=") {
                arguments.addresses.push(static_address(text).map_err(error)?);
            } else if let Some(mode) = argument.strip_prefix("moor.root=") {
                arguments.root = Some(mode.parse().map_err(error)?);
            } else if let Some(path) = argument.strip_prefix("moor.disk_cache=") {
                if !path.starts_with("/dev/") || path.split('/').any(|part| part == "..") {
                    return Err(error(
                        "it names a device below /dev: nothing else is there when a node boots".to_owned(),
                    ));
                }
                arguments.disk_cache = Some(PathBuf::from(path));
            }
        }
        Ok(arguments)
    }
}

fn static_address(text: &str) -> Result<StaticAddress, String> {
    let mut parts = text.split(',');
    let address: moor_api::deploy::Cidr =
        parts.next().unwrap_or_default().parse().map_err(|error: moor_api::deploy::InvalidCidr| error.to_string())?;
    let gateway = match parts.next().filter(|part| !part.is_empty()) {
        Some(part) => Some(part.parse().map_err(|_| format!("the gateway '{part}' is not an address"))?),
        None => None,
    };
    let gateway: Option<std::net::IpAddr> = gateway;
    if gateway.is_some_and(|gateway| gateway.is_ipv4() != address.address.is_ipv4()) {
        return Err("address and gateway are of different families".to_owned());
    }
    let interface = parts.next().filter(|part| !part.is_empty()).map(str::to_owned);
    if parts.next().is_some() {
        return Err("it has the form ADDRESS/PREFIX[,GATEWAY[,INTERFACE]]".to_owned());
    }
    Ok(StaticAddress { address, gateway, interface })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_arguments_are_picked_out() {
        let line = "BOOT_IMAGE=/x boot=moor moor.server=https://10.0.2.2:8443,https://[fd00::2]:8443 quiet \
                    moor.ip=10.0.2.15/24,10.0.2.2,eth1 moor.ip=fd00::5/64 moor.server=https://h panic=-1 moor.root=untethered \
                    moor.disk_cache=/dev/disk/by-id/nvme-x-part3";
        let arguments = KernelArguments::parse(line).unwrap();
        assert_eq!(arguments.servers, ["https://10.0.2.2:8443", "https://[fd00::2]:8443", "https://h"]);
        assert_eq!(arguments.root, Some(RootMode::Untethered));
        assert_eq!(arguments.disk_cache.as_deref(), Some("/dev/disk/by-id/nvme-x-part3".as_ref()));
        let [first, second] = &arguments.addresses[..] else { panic!("{arguments:?}") };
        assert_eq!(first.address.to_string(), "10.0.2.15/24");
        assert_eq!(first.gateway, Some("10.0.2.2".parse().unwrap()));
        assert_eq!(first.interface.as_deref(), Some("eth1"));
        assert_eq!(
            (second.address.to_string().as_str(), second.gateway, &second.interface),
            ("fd00::5/64", None, &None)
        );
        assert_eq!(KernelArguments::parse("quiet ro").unwrap(), KernelArguments::default());
    }

    #[test]
    fn malformed_arguments_are_refused_by_name() {
        for bad in [
            "moor.server=http://10.0.2.2",
            "moor.root=nfs",
            "moor.root=",
            "moor.disk_cache=",
            "moor.disk_cache=sda3",
            "moor.disk_cache=/var/cache",
            "moor.ip=10.0.2.15",
            "moor.ip=",
            "moor.ip=10.0.2.15/24,nowhere",
            "moor.ip=10.0.2.15/24,fd00::1",
            "moor.ip=10.0.2.15/24,10.0.2.2,eth0,more",
        ] {
            let error = KernelArguments::parse(bad).unwrap_err();
            assert!(error.to_string().starts_with(&format!("kernel argument '{bad}'")), "{error}");
        }
    }
}
