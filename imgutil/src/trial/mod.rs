//! `test`: boots an image in a virtual machine behind two throw-away servers, and judges what came up.
//!
//! [`cage`] keeps everything in namespaces of its own that end with it; [`collective`] makes the servers, [`boot`] switches the machine
//! on and kills one server on the way, [`checks`] looks at what is up, [`verdict`] says it.
//!
//! **The two servers.** The first is a `moord` of a new collective: it answers the node API and serves the image's ranges. The second is
//! the same member once more, from a copy of the first one's state at rest, at another port. Both stand in the list of URLs that a node is
//! given for its image, so the tether reads from both and knows no difference: it trusts the collective's authority, not an address. Only
//! the first one is named to the agent (`moor.server=`), because what it learns of the node (enrolment, session), the copy does not; the
//! copy is the one that is killed, once it has served a part of the root. That tests what an image has to do with: tether, loop device,
//! overlay and services under the loss of a server. A replicated store is the server's affair and tested there.

mod boot;
mod cage;
mod checks;
mod collective;
mod standstill;
mod verdict;

pub use cage::{Caged, enclosed};
pub use verdict::{Check, Verdict};

use crate::boot_files::BootFiles;
use crate::key_file;
use crate::system::System;
use crate::unpack::{self, SquashfsIn};
use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, PublicKey};
use moor_vm::Namespace;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to test, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The image.
    pub image: PathBuf,
    /// Its key; `-` is standard input.
    pub key_file: Option<PathBuf>,
    /// Signers (ssh-ed25519 lines), one of which the node must find among the image's signatures.
    pub trust: Vec<String>,
    /// Memory of the machine in MiB.
    pub memory: u32,
    /// From power on to `booted`.
    pub limit: Duration,
}

/// An image that can be tested.
struct Subject {
    path: PathBuf,
    key: Dek,
    digest: String,
    size: u64,
    signers: Vec<String>,
    signatures: Option<Vec<u8>>,
    boot_files: BootFiles,
}

/// Tests the image; files go to `dir`, what is worth keeping to `dir/logs`. Must run in a cage.
///
/// # Errors
/// It could not be tested. What is wrong with the image is no error but the verdict.
pub fn run(options: &Options, dir: &Path) -> Result<Verdict> {
    let begin = Instant::now();
    let say = |what: &str| eprintln!("[{:5.1} s] {what}", begin.elapsed().as_secs_f64());
    say(&format!("opening '{}'", options.image.display()));
    let subject = Subject::open(options)?;
    let logs = dir.join("logs");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&logs)
        .with_context(|| format!("cannot make '{}'", logs.display()))?;

    say("making a collective, and its member twice (moord)");
    let namespace = Namespace::new()?;
    let mut site = collective::Site::prepare(dir, &namespace, &subject)?;
    let kvm = moor_vm::vm::kvm_works(&namespace, dir, &site.kernel);
    let how = if kvm { "KVM" } else { "software emulation, which is slow" };
    say(&format!("switching a machine on: {} MiB, a TPM 2.0, {how}", options.memory));
    let machine = boot::Machine { namespace: &namespace, dir, memory: options.memory, kvm, limit: options.limit };
    let result = boot::boot(&machine, &mut site, &say).map(|(mut vm, outcome)| {
        let mut verdict = Verdict::new(&subject.path, &subject.digest, kvm);
        verdict.boot(&outcome, |lines| vm.console_tail(lines));
        if outcome.is_booted() {
            say("booted; looking at it by ssh");
            let login = checks::Login { namespace: &namespace, vm: &vm, site: &site };
            checks::run(&login, &subject, outcome.killed_after.as_deref(), &mut verdict);
        }
        vm.power_off();
        verdict.seconds = begin.elapsed().as_secs();
        verdict
    });
    site.keep_logs(&logs);
    let verdict = result?;
    let path = logs.join("verdict.json");
    let text = serde_json::to_vec_pretty(&verdict).context("cannot write the verdict")?;
    std::fs::write(&path, text).with_context(|| format!("cannot write '{}'", path.display()))?;
    Ok(verdict)
}

impl Subject {
    fn open(options: &Options) -> Result<Self> {
        let key = options.key_file.as_deref().map(key_file::read).transpose()?;
        let image = unpack::open_with(&options.image, key.clone())?;
        if !image.header().encrypted {
            bail!("'{}' is plain, and nodes boot sealed images only: pack it without --plain", options.image.display());
        }
        let Some(key) = key else { bail!("'{}' is sealed: give its key with --key-file", options.image.display()) };
        let metadata = image.metadata().with_context(|| format!("cannot read '{}'", options.image.display()))?;
        if !metadata.arch.is_empty() && metadata.arch != std::env::consts::ARCH {
            bail!(
                "'{}' is for {}, and this machine tests images for {} only",
                options.image.display(),
                metadata.arch,
                std::env::consts::ARCH
            );
        }
        let digest = hex::encode(image.header().digest);
        let size = std::fs::metadata(&options.image).map_or(0, |metadata| metadata.len());
        let root = (PathBuf::from("/"), SquashfsIn::new(image, &options.image)?);
        let boot_files = System::open(vec![root])
            .and_then(|mut system| system.boot_files())
            .with_context(|| format!("cannot take kernel and initramfs out of '{}'", options.image.display()))?;
        let mut signers = Vec::new();
        for text in &options.trust {
            signers.extend(signer_lines(text)?);
        }
        let signatures = if signers.is_empty() {
            None
        } else {
            let path = crate::pack::signature_path(&options.image);
            Some(std::fs::read(&path).with_context(|| format!("cannot read the signatures '{}'", path.display()))?)
        };
        Ok(Self { path: options.image.clone(), key, digest, size, signers, signatures, boot_files })
    }
}

/// The lines of a file of trusted keys, or the one line that is given itself.
fn signer_lines(text: &str) -> Result<Vec<String>> {
    let lines = if text.starts_with("ssh-ed25519 ") {
        text.to_owned()
    } else {
        std::fs::read_to_string(text).with_context(|| format!("cannot read the trusted keys '{text}'"))?
    };
    let lines: Vec<String> =
        lines.lines().map(str::trim).filter(|line| line.starts_with("ssh-ed25519 ")).map(str::to_owned).collect();
    for line in &lines {
        PublicKey::from_openssh(line).with_context(|| format!("in '{text}'"))?;
    }
    if lines.is_empty() {
        bail!("'{text}' holds no line 'ssh-ed25519 KEY'");
    }
    Ok(lines)
}
