//! Profiles: a working directory that the admin edits, and generations that nodes get. Publishing reads the directory whole, or
//! refuses with the place at fault.

use crate::content;
use crate::http::clean;
use crate::secrets::Place;
use crate::state::{Member, now};
use crate::store::records::{ImageRecord, Manifest, ProfileRecord};
use crate::store::{Command, Snapshot};
use moor_api::admin::{CreateProfile, ProfileView};
use moor_api::deploy::{MAX_SCRIPT, OnFailure, Overlay, PhaseName, RootMode};
use moor_api::ids::{ImageName, ProfileName, Sha256Digest};
use moor_api::problem::{Code, Problem};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::SystemTime;
use zeroize::Zeroizing;

/// Largest file of a profile, in bytes.
const MAX_FILE: u64 = 64 << 20;
/// Most bytes of `private/`: it is in the record of the generation, which is read with each call of a node.
const MAX_PRIVATE: usize = 512 << 10;
/// Most files of a profile.
const MAX_FILES: usize = 10_000;

/// `profile.yaml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    image: String,
    #[serde(default = "tethered")]
    root: RootMode,
    #[serde(default)]
    overlay: Overlay,
    #[serde(default)]
    on_failure: OnFailure,
    #[serde(default)]
    kernel_arguments: String,
    #[serde(default)]
    signers: Vec<String>,
    #[serde(default)]
    allow_unproven: bool,
    #[serde(default)]
    authorized_keys: Vec<String>,
}

fn tethered() -> RootMode {
    RootMode::Tethered
}

/// What the kernel module zram may be asked for: the initramfs brings the modules of these.
const ALGORITHMS: [&str; 7] = ["zstd", "lzo", "lzo-rle", "lz4", "lz4hc", "deflate", "842"];

impl Settings {
    /// Refuses what every node of the profile would stumble over in the middle of its boot.
    fn check(&self) -> Result<(), Problem> {
        let wrong = |field: &str, why: String| Err(bad(format!("profile.yaml: {field}: {why}")));
        if !(1..=400).contains(&self.overlay.size_percent) {
            return wrong(
                "overlay.size_percent",
                format!("{} is not a number from 1 to 400", self.overlay.size_percent),
            );
        }
        if let Some(limit) = self.overlay.limit_percent
            && !(1..=100).contains(&limit)
        {
            return wrong("overlay.limit_percent", format!("{limit} is not a number from 1 to 100"));
        }
        if let Some(algorithm) = &self.overlay.algorithm
            && !ALGORITHMS.contains(&algorithm.as_str())
        {
            return wrong(
                "overlay.algorithm",
                format!("'{}' is none of {}", clean(algorithm, 40), ALGORITHMS.join(", ")),
            );
        }
        if self.kernel_arguments.chars().any(char::is_control) {
            return wrong("kernel_arguments", "they are one line".into());
        }
        for signer in &self.signers {
            if signer.trim().contains(char::is_control) || moor_image::PublicKey::from_openssh(signer).is_err() {
                return wrong("signers", format!("'{}' is not a line 'ssh-ed25519 KEY'", clean(signer, 80)));
            }
        }
        for key in &self.authorized_keys {
            if key.trim().is_empty() || key.trim().contains(char::is_control) {
                return wrong("authorized_keys", format!("'{}' is not one line with one key", clean(key, 80)));
            }
        }
        Ok(())
    }
}

fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(Code::BadRequest, detail)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Problem {
    let path = path.display().to_string();
    move |error| bad(format!("'{path}': {error}"))
}

/// Makes a working directory from a shipped profile, or from another one.
///
/// # Errors
/// It exists; there is no such template.
pub fn create(member: &Member, request: &CreateProfile) -> Result<ProfileView, Problem> {
    let template: ProfileName = request.template.parse().map_err(|error| bad(format!("{error}")))?;
    // A shipped profile, or another one of the administrator's own: its scripts and private files come along.
    let places = [member.config.templates.clone(), member.config.profiles()];
    let mut places = places.iter().map(|place| place.join(template.as_str()));
    let Some(from) = places.find(|place| place.join("profile.yaml").is_file()) else {
        return Err(Problem::new(
            Code::NotFound,
            format!(
                "no profile '{template}', neither a shipped one in '{}' nor one in '{}'",
                member.config.templates.display(),
                member.config.profiles().display()
            ),
        ));
    };
    let to = member.config.profiles().join(request.name.as_str());
    if to.exists() {
        return Err(Problem::new(
            Code::Conflict,
            format!("'{}' exists already: edit it, then `moor profile publish {}`", to.display(), request.name),
        ));
    }
    let beside = member.config.profiles().join(format!(".{}.new", request.name));
    let _ = std::fs::remove_dir_all(&beside);
    copy(&from, &beside)?;
    let settings = beside.join("profile.yaml");
    let text = std::fs::read_to_string(&settings).map_err(io(&settings))?;
    let edited: Vec<String> = text
        .lines()
        .map(|line| if line.starts_with("image:") { format!("image: {}", request.image) } else { line.to_owned() })
        .collect();
    std::fs::write(&settings, edited.join("\n") + "\n").map_err(io(&settings))?;
    std::fs::rename(&beside, &to).map_err(io(&to))?;
    Ok(ProfileView {
        name: request.name.clone(),
        generation: None,
        serial: 0,
        published: 0,
        image: None,
        modified: true,
    })
}

fn copy(from: &Path, to: &Path) -> Result<(), Problem> {
    std::fs::create_dir_all(to).map_err(io(to))?;
    for entry in std::fs::read_dir(from).map_err(io(from))? {
        let entry = entry.map_err(io(from))?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type().map_err(io(&entry.path()))?;
        if kind.is_dir() {
            copy(&entry.path(), &target)?;
        } else if kind.is_file() {
            std::fs::copy(entry.path(), &target).map_err(io(&target))?;
        }
    }
    Ok(())
}

/// The image that `NAME`, `NAME@SERIAL` or a digest names.
fn find_image(view: &Snapshot, text: &str) -> Result<ImageRecord, Problem> {
    let images = view.images()?;
    if let Ok(digest) = text.parse::<Sha256Digest>() {
        return images.into_iter().find(|image| image.digest == digest).ok_or_else(|| missing_image(text));
    }
    let (name, serial) = match text.split_once('@') {
        Some((name, serial)) => (
            name,
            Some(
                serial
                    .parse::<u64>()
                    .map_err(|_| bad(format!("profile.yaml: image '{text}': '{serial}' is not a serial")))?,
            ),
        ),
        None => (text, None),
    };
    let name: ImageName = name.parse().map_err(|error| bad(format!("profile.yaml: image: {error}")))?;
    images
        .into_iter()
        .filter(|image| image.name == name && serial.is_none_or(|serial| image.serial == serial))
        .max_by_key(|image| image.serial)
        .ok_or_else(|| missing_image(text))
}

fn missing_image(text: &str) -> Problem {
    Problem::new(
        Code::NotFound,
        format!(
            "profile.yaml names the image '{text}', which is not in the catalogue: `moor image list` shows what is, `moor image import` adds one"
        ),
    )
}

/// A file as it was found. Its bytes are read one file at a time: a profile may be larger than memory.
struct Source {
    path: String,
    modified: SystemTime,
}

impl Source {
    fn read(&self, dir: &Path) -> Result<Vec<u8>, Problem> {
        let path = dir.join(&self.path);
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path).map_err(io(&path))?;
        // It may have grown: then it is refused as changed.
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io(&path))?;
        Ok(bytes)
    }
}

/// Finds every file below `dir`, by path relative to it, in order. Names that begin with a dot, and editors' copies, are left out.
fn find_tree(dir: &Path, prefix: &str, out: &mut Vec<Source>) -> Result<(), Problem> {
    let mut names: Vec<_> = match std::fs::read_dir(dir) {
        Ok(entries) => entries.collect::<Result<_, _>>().map_err(io(dir))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(dir)(error)),
    };
    names.sort_by_key(std::fs::DirEntry::file_name);
    for entry in names {
        let name = entry
            .file_name()
            .into_string()
            .map_err(|name| bad(format!("'{}': the name '{}' is not UTF-8", dir.display(), name.display())))?;
        if name.starts_with('.') || name.ends_with('~') {
            continue;
        }
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let kind = entry.file_type().map_err(io(&entry.path()))?;
        if kind.is_dir() {
            find_tree(&entry.path(), &path, out)?;
        } else if kind.is_file() {
            let meta = entry.metadata().map_err(io(&entry.path()))?;
            if meta.len() > MAX_FILE || out.len() >= MAX_FILES {
                return Err(bad(format!(
                    "'{}': a profile has at most {MAX_FILES} files of at most {} MiB",
                    entry.path().display(),
                    MAX_FILE >> 20
                )));
            }
            let modified = meta.modified().map_err(io(&entry.path()))?;
            out.push(Source { path, modified });
        } else {
            return Err(bad(format!(
                "'{}' is neither a file nor a directory: profiles hold no links or devices",
                entry.path().display()
            )));
        }
    }
    Ok(())
}

fn phase_of(path: &str) -> Option<(PhaseName, &str)> {
    let rest = path.strip_prefix("scripts/")?;
    let (phase, name) = rest.split_once('/')?;
    let phase = match phase {
        "pre" => PhaseName::Pre,
        "post" => PhaseName::Post,
        "firstboot" => PhaseName::Firstboot,
        "onboot" => PhaseName::Onboot,
        _ => return None,
    };
    Some((phase, name))
}

/// Reads the working directory into a manifest; blobs are added.
fn manifest(member: &Member, view: &Snapshot, name: &ProfileName) -> Result<Manifest, Problem> {
    let dir = member.config.profiles().join(name.as_str());
    if !dir.is_dir() {
        return Err(Problem::new(
            Code::NotFound,
            format!(
                "no profile '{name}': '{}' is not there; `moor profile create {name} --image IMAGE` makes it",
                dir.display()
            ),
        ));
    }
    let mut sources = Vec::new();
    find_tree(&dir, "", &mut sources)?;
    let settings = sources
        .iter()
        .find(|source| source.path == "profile.yaml")
        .ok_or_else(|| bad(format!("'{}/profile.yaml' is missing", dir.display())))?;
    let text = String::from_utf8(settings.read(&dir)?).map_err(|_| bad("profile.yaml is not UTF-8"))?;
    let settings: Settings = serde_saphyr::from_str(&text).map_err(|error| {
        bad(format!(
            "'{}/profile.yaml': {}",
            dir.display(),
            error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ")
        ))
    })?;
    settings.check()?;
    let image = find_image(view, &settings.image)?;
    let (mut scripts, mut files, mut private) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::new(), BTreeMap::new());
    let blobs = member.config.blobs();
    let mut private_size = 0;
    for source in &sources {
        if let Some(path) = source.path.strip_prefix("private/") {
            let bytes = Zeroizing::new(source.read(&dir)?);
            private_size += bytes.len();
            if private_size > MAX_PRIVATE {
                return Err(bad(format!(
                    "'{}/private' has more than {} KiB: it is for keys; larger files belong into 'files', encrypted by one of them",
                    dir.display(),
                    MAX_PRIVATE >> 10
                )));
            }
            let place = Place { table: "profiles", id: name.as_str(), field: path };
            let sealed =
                member.seal(place, &bytes).map_err(|error| Problem::new(Code::Internal, format!("{error:#}")))?;
            private.insert(path.to_owned(), sealed);
        } else if let Some((phase, script)) = phase_of(&source.path) {
            let text = source.read(&dir)?;
            if text.len() > MAX_SCRIPT {
                return Err(bad(format!(
                    "'{}/{}' has more than {} MiB, and nodes take no longer script: what it brings along belongs into 'files', from where it is fetched",
                    dir.display(),
                    source.path,
                    MAX_SCRIPT >> 20
                )));
            }
            let blob = content::add(&blobs, &text).map_err(io(&blobs))?;
            scripts.entry(phase).or_default().push((script.to_owned(), blob));
        } else if let Some(path) = source.path.strip_prefix("files/") {
            files.insert(path.to_owned(), content::add(&blobs, &source.read(&dir)?).map_err(io(&blobs))?);
        } else if source.path.starts_with("scripts/") {
            return Err(bad(format!(
                "'{}/{}': phases are pre, post, firstboot and onboot",
                dir.display(),
                source.path
            )));
        }
    }
    unchanged(&dir, &sources)?;
    Ok(Manifest {
        image: image.digest,
        root: settings.root,
        overlay: settings.overlay,
        on_failure: settings.on_failure,
        kernel_arguments: settings.kernel_arguments,
        signers: settings.signers,
        allow_unproven: settings.allow_unproven,
        authorized_keys: settings.authorized_keys,
        scripts,
        files,
        private,
    })
}

/// Refuses what an editor was half way through: times are compared once more after everything was read.
fn unchanged(dir: &Path, sources: &[Source]) -> Result<(), Problem> {
    for source in sources {
        let path = dir.join(&source.path);
        let now = std::fs::metadata(&path).and_then(|meta| meta.modified());
        if now.is_ok_and(|now| now == source.modified) {
            continue;
        }
        return Err(Problem::new(
            Code::Conflict,
            format!("'{}' changed while it was read: publish again when you are done", path.display()),
        ));
    }
    Ok(())
}

fn digest_of(manifest: &Manifest) -> Result<Sha256Digest, Problem> {
    let bytes = serde_json::to_vec(manifest).map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    let mut out = [0; 32];
    out.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes).as_ref());
    Ok(Sha256Digest(out))
}

/// Makes the working directory the newest generation.
///
/// # Errors
/// What is wrong with it, in one line.
pub async fn publish(member: &std::sync::Arc<Member>, name: ProfileName) -> Result<ProfileView, Problem> {
    let reader = member.clone();
    let record = tokio::task::spawn_blocking(move || {
        let view = reader.view()?;
        let manifest = manifest(&reader, &view, &name)?;
        Ok::<_, Problem>(ProfileRecord {
            name,
            generation: digest_of(&manifest)?,
            serial: 0,
            published: now(),
            manifest,
        })
    })
    .await
    .map_err(|error| Problem::new(Code::Internal, error.to_string()))??;
    let name = record.name.clone();
    member.propose(Command::PutProfile { profile: record }).await?;
    let view = member.view()?;
    let record = view.profile(name.as_str())?.ok_or_else(|| Problem::new(Code::Internal, "the profile vanished"))?;
    Ok(view_of(&record, false))
}

/// All profiles: published ones, and working directories that never were.
///
/// # Errors
/// The store failed.
pub fn list(member: &Member) -> Result<Vec<ProfileView>, Problem> {
    let view = member.view()?;
    let mut out: BTreeMap<ProfileName, ProfileView> = BTreeMap::new();
    for record in view.profiles()? {
        out.insert(record.name.clone(), view_of(&record, is_modified(member, &record)));
    }
    for entry in std::fs::read_dir(member.config.profiles()).into_iter().flatten().flatten() {
        let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<ProfileName>().ok()) else { continue };
        out.entry(name.clone()).or_insert(ProfileView {
            name,
            generation: None,
            serial: 0,
            published: 0,
            image: None,
            modified: true,
        });
    }
    Ok(out.into_values().collect())
}

/// Whether a file of the working directory is newer than the generation.
fn is_modified(member: &Member, record: &ProfileRecord) -> bool {
    let published = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(record.published + 1);
    let mut sources = Vec::new();
    let found = find_tree(&member.config.profiles().join(record.name.as_str()), "", &mut sources);
    found.is_err() || sources.iter().any(|source| source.modified > published)
}

fn view_of(record: &ProfileRecord, modified: bool) -> ProfileView {
    ProfileView {
        name: record.name.clone(),
        generation: Some(record.generation),
        serial: record.serial,
        published: record.published,
        image: Some(record.manifest.image),
        modified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_no_node_could_boot_by_are_refused_by_name() {
        let check = |text: &str| {
            let settings: Settings = serde_saphyr::from_str(&format!("image: x\n{text}\n")).unwrap();
            settings.check().map_err(|problem| problem.detail)
        };
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKli6Qckokp4gadp/v2+2U/lNLo9WkZPulu71LyYKf8M builder";
        for good in [
            "overlay: {size_percent: 400, algorithm: lz4}".to_owned(),
            "overlay: {size_percent: 400, limit_percent: 40}\nroot: disk".to_owned(),
            format!("signers: ['{key}']"),
            format!("authorized_keys: ['from=\"10.0.0.0/8\" {key}']"),
            "kernel_arguments: quiet console=ttyS0".to_owned(),
            "on_failure: reboot".to_owned(),
        ] {
            assert_eq!(check(&good), Ok(()), "{good}");
        }
        for (text, says) in [
            ("overlay: {size_percent: 0}".to_owned(), "overlay.size_percent: 0"),
            ("overlay: {size_percent: 50, limit_percent: 101}".to_owned(), "overlay.limit_percent: 101"),
            ("overlay: {size_percent: 50, algorithm: zip}".to_owned(), "overlay.algorithm: 'zip'"),
            ("kernel_arguments: \"a\\nb\"".to_owned(), "kernel_arguments"),
            ("signers: ['ssh-ed25519 nonsense']".to_owned(), "signers: 'ssh-ed25519 nonsense'"),
            (format!("signers: [\"{key}\\n{key}\"]"), "signers"),
            ("authorized_keys: ['']".to_owned(), "authorized_keys"),
            (format!("authorized_keys: [\"{key}\\n{key}\"]"), "authorized_keys"),
        ] {
            let error = check(&text).unwrap_err();
            assert!(error.starts_with("profile.yaml: ") && error.contains(says) && !error.contains('\n'), "{error}");
        }
    }
}
