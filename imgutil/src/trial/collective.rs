//! The servers of a test: a new collective with the image, one node, and its member twice.

use super::Subject;
use crate::upload::WithKey;
use anyhow::{Context as _, Result, bail};
use moor_api::admin::{ArmRequest, DefineNodes, DeployRequest, ImportImage};
use moor_api::client::admin::AdminClient;
use moor_api::ids::{ImageName, ProfileName, Sha256Digest};
use moor_api::node::Base64;
use moor_vm::process::{run, tied};
use moor_vm::{Member, MemberOptions, Namespace, member::UID};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Cursor, Read};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

/// The node of the test.
pub(super) const NODE: &str = "test-node";
/// Its SMBIOS UUID and MAC address.
pub(super) const UUID: &str = "5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c02";
pub(super) const MAC: &str = "52:54:00:6d:6f:02";
/// Image and profile.
const NAME: &str = "test";
/// Where the two listen: nobody else is in their namespace.
const PORTS: [u16; 2] = [8443, 8444];
/// The port of the server that is killed.
pub(super) const SECOND_PORT: u16 = PORTS[1];
/// Most bytes of the site's cpio.
const MAX_SITE: usize = 16 << 20;

/// Everything a node of this test needs. Both members run.
pub(super) struct Site {
    pub(super) first: Member,
    pub(super) second: Member,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) command_line: String,
    /// For ssh.
    pub(super) known_hosts: PathBuf,
    pub(super) login: PathBuf,
    pub(super) runtime: Runtime,
    dir: PathBuf,
}

impl Site {
    /// From nothing to a node that may be switched on.
    pub(super) fn prepare(dir: &Path, namespace: &Namespace, subject: &Subject) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the network runtime")?;
        let mut first = Member::init(MemberOptions {
            moord: moord()?,
            // The profile is written below.
            templates: dir.join("templates"),
            dir: dir.join("server-1"),
            port: PORTS[0],
            ports: PORTS.to_vec(),
        })?;
        write_profile(&first.profiles(), subject)?;
        let login = dir.join("login");
        run(tied("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "imgutil-test", "-f"]).arg(&login))?;
        let public = std::fs::read_to_string(login.with_extension("pub")).context("cannot read the login key")?;

        first.start(namespace)?;
        let known_hosts = dir.join("known_hosts");
        let catalogued = runtime.block_on(catalogue(&first, subject, public.trim()))?;
        std::fs::write(&known_hosts, catalogued.known_hosts).context("cannot write the known hosts")?;
        first.stop();
        let mut second = first.twin(&dir.join("server-2"), PORTS[1])?;
        first.start(namespace)?;
        second.start(namespace)?;

        let boot = |name: &str, parts: &[&[u8]]| {
            let path = dir.join(name);
            std::fs::write(&path, parts.concat()).with_context(|| format!("cannot write '{}'", path.display()))?;
            Ok::<_, anyhow::Error>(path)
        };
        let (kernel, initramfs) = (&subject.boot_files.kernel, &subject.boot_files.initramfs);
        let padding = [0; 4];
        // A cpio behind a compressed one begins at a multiple of four bytes (kernel, early-userspace/buffer-format.rst).
        let padding = &padding[..(4 - initramfs.len() % 4) % 4];
        Ok(Self {
            kernel: boot("vmlinuz", &[kernel])?,
            initramfs: boot("initrd.img", &[initramfs, padding, &catalogued.site])?,
            command_line: command_line(&catalogued.command_line, &first.url_for_guests()),
            first,
            second,
            known_hosts,
            login,
            runtime,
            dir: dir.to_owned(),
        })
    }

    /// Copies what the servers and the machine said.
    pub(super) fn keep_logs(&self, logs: &Path) {
        for (from, name) in [
            (self.first.log(), "server-1.log"),
            (self.second.log(), "server-2.log"),
            (self.dir.join("vm/console.log"), "console.log"),
            (self.dir.join("vm/qemu.log"), "qemu.log"),
        ] {
            // A test that came to its end without one of them is none the worse.
            if let Err(error) = std::fs::copy(&from, logs.join(name)) {
                tracing::debug!("cannot keep '{}': {error}", from.display());
            }
        }
    }
}

/// The server program: beside this one, or where a shell would find it.
fn moord() -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join("moord")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        beside.into_iter().chain(std::env::split_paths(&path).map(|dir| dir.join("moord"))).find(|p| p.is_file());
    found.context("moord, the server that a test needs, is neither beside imgutil nor in PATH: install the package mooring-server")
}

fn write_profile(profiles: &Path, subject: &Subject) -> Result<()> {
    let mut text = format!("image: {NAME}\nroot: tethered\nsigners:\n");
    for signer in &subject.signers {
        // A JSON string is a YAML string.
        let _ = writeln!(text, "  - {}", serde_json::to_string(signer)?);
    }
    if subject.signers.is_empty() {
        text = text.replace("signers:\n", "");
    }
    let (dir, file) = (profiles.join(NAME), profiles.join(NAME).join("profile.yaml"));
    std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::write(&file, text))
        .context("cannot write the test's profile")?;
    for path in [profiles, &dir, &file] {
        chown(path, Some(UID), Some(UID)).context("cannot give the test's profile to the server")?;
    }
    Ok(())
}

struct Catalogued {
    known_hosts: String,
    command_line: String,
    site: Vec<u8>,
}

async fn catalogue(member: &Member, subject: &Subject, login: &str) -> Result<Catalogued> {
    let mut client = AdminClient::unix(&member.socket()).await?;
    let image =
        std::fs::File::open(&subject.path).with_context(|| format!("cannot open '{}'", subject.path.display()))?;
    let name: ImageName = NAME.parse()?;
    let profile: ProfileName = NAME.parse()?;
    let request = ImportImage {
        name,
        image: send(&mut client, image).await?,
        key: None,
        signatures: subject.signatures.clone().map(Base64),
        kernel: send(&mut client, Cursor::new(subject.boot_files.kernel.clone())).await?,
        initramfs: send(&mut client, Cursor::new(subject.boot_files.initramfs.clone())).await?,
        boot_loaders: BTreeMap::new(),
    };
    let request = WithKey::new(request, Some(&subject.key));
    let imported = client.import_image(request.get()).await;
    drop(request);
    let view = imported.context("the server refuses the image")?;
    if view.digest.to_string() != subject.digest {
        bail!("'{}' changed while it was sent: try again", subject.path.display());
    }
    client.publish(&profile).await.context("cannot publish the test's profile")?;
    let attributes = BTreeMap::from([
        ("id.uuid".to_owned(), UUID.to_owned()),
        ("net.hwaddr".to_owned(), MAC.to_owned()),
        ("net.ipv4_method".to_owned(), "dhcp".to_owned()),
        ("pubkeys.ssh".to_owned(), login.to_owned()),
    ]);
    client.define(&DefineNodes { range: NODE.to_owned(), attributes }).await?;
    client.deploy(&DeployRequest { range: NODE.to_owned(), profile: profile.clone() }).await?;
    client.arm(&ArmRequest { range: NODE.to_owned(), until: "once".to_owned() }).await?;
    Ok(Catalogued {
        known_hosts: client.site().await?.known_hosts.join("\n") + "\n",
        command_line: client.boot_files(&profile).await?.command_line,
        site: client.boot_file(&profile, "site.cpio", MAX_SITE).await?.to_vec(),
    })
}

async fn send(client: &mut AdminClient, reader: impl Read + Send + 'static) -> Result<Sha256Digest> {
    Ok(client.add_blob(reader, |_| {}).await.context("cannot send a file to the test's server")?.blob)
}

/// The server's command line with one member named to the agent, and a console that is kept.
fn command_line(servers: &str, member: &str) -> String {
    let words: Vec<String> = servers
        .split_whitespace()
        .map(|word| if word.starts_with("moor.server=") { format!("moor.server={member}") } else { word.to_owned() })
        .collect();
    format!("{} console=ttyS0 panic=-1", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_told_of_one_server() {
        assert_eq!(
            command_line("boot=moor root=moor moor.server=https://a,https://b quiet", "https://a"),
            "boot=moor root=moor moor.server=https://a quiet console=ttyS0 panic=-1"
        );
    }
}
