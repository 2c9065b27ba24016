//! `moor-tether members` and `moor-tether trust`.

use anyhow::{Context as _, Result};
use clap::Subcommand;
use moor_api::tether::{self, Request, SOCKET, Server, Trust};
use moor_tether::reader::Address;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Change the servers that a running tether reads its image from
#[derive(clap::Args)]
pub(crate) struct MembersArgs {
    #[command(subcommand)]
    change: MembersChange,
}

#[derive(Subcommand)]
enum MembersChange {
    /// Read from these servers from now on, and from no other
    Set {
        /// Where the image is, as for `mount`
        #[arg(long = "url", value_name = "URL", required = true)]
        urls: Vec<String>,
        /// The tether's control socket
        #[arg(long, value_name = "FILE", default_value = SOCKET)]
        socket: PathBuf,
    },
}

/// Change whom a running tether believes to be a server
#[derive(clap::Args)]
pub(crate) struct TrustArgs {
    #[command(subcommand)]
    change: TrustChange,
}

#[derive(Subcommand)]
enum TrustChange {
    /// Believe these from now on, and nobody else
    #[command(group = clap::ArgGroup::new("authority").required(true))]
    Set {
        /// Authorities (PEM), for a tether that was started with --ca
        #[arg(long, value_name = "FILE", group = "authority")]
        ca: Option<PathBuf>,
        /// A site bundle, for a tether that was started with --site
        #[arg(long, value_name = "FILE", group = "authority")]
        site: Option<PathBuf>,
        /// The tether's control socket
        #[arg(long, value_name = "FILE", default_value = SOCKET)]
        socket: PathBuf,
    },
}

pub(super) fn members(args: MembersArgs) -> Result<ExitCode> {
    let MembersChange::Set { urls, socket } = args.change;
    let resolve = |url: &String| -> Result<Server> {
        let address = Address::resolve(url)?;
        Ok(Server { url: url.clone(), addresses: address.sockets().to_vec() })
    };
    let servers = urls.iter().map(resolve).collect::<Result<_>>()?;
    tether::ask(&socket, &Request::Members(servers))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn trust(args: TrustArgs) -> Result<ExitCode> {
    let TrustChange::Set { ca, site, socket } = args.change;
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("cannot read '{}'", path.display()));
    let trust = match (site, ca) {
        (Some(site), _) => {
            let bundle = serde_json::from_str(&read(&site)?);
            Trust::Site(bundle.with_context(|| format!("'{}' is no site bundle", site.display()))?)
        }
        (None, ca) => Trust::Authority(read(&ca.unwrap_or_default())?),
    };
    tether::ask(&socket, &Request::Trust(trust))?;
    Ok(ExitCode::SUCCESS)
}
