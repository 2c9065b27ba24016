//! Makes container images for tests: layers entry by entry (hostile ones too, which no tool would make), and layouts.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Value, json};
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One entry of a layer.
pub struct Entry {
    path: String,
    kind: u8,
    target: String,
    content: Vec<u8>,
    xattrs: Vec<(String, String)>,
}

fn entry(path: &str, kind: u8, target: &str, content: &str) -> Entry {
    Entry {
        path: path.to_owned(),
        kind,
        target: target.to_owned(),
        content: content.as_bytes().to_vec(),
        xattrs: Vec::new(),
    }
}

pub fn file(path: &str, content: &str) -> Entry {
    entry(path, b'0', "", content)
}

pub fn directory(path: &str) -> Entry {
    entry(path, b'5', "", "")
}

pub fn link(path: &str, target: &str) -> Entry {
    entry(path, b'2', target, "")
}

pub fn hard_link(path: &str, target: &str) -> Entry {
    entry(path, b'1', target, "")
}

impl Entry {
    pub fn xattr(mut self, key: &str, value: &str) -> Self {
        self.xattrs.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// The archive of some entries.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut records = vec![record("path", &entry.path)];
        if !entry.target.is_empty() {
            records.push(record("linkpath", &entry.target));
        }
        records.extend(entry.xattrs.iter().map(|(key, value)| record(&format!("SCHILY.xattr.{key}"), value)));
        block(&mut out, "pax", b'x', records.concat().as_bytes());
        block(&mut out, "name", entry.kind, &entry.content);
    }
    out.extend([0; 1024]);
    out
}

/// A record counts its own length too.
fn record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while format!("{length}{rest}").len() != length {
        length = format!("{length}{rest}").len();
    }
    format!("{length}{rest}")
}

fn block(out: &mut Vec<u8>, name: &str, kind: u8, content: &[u8]) {
    let start = out.len();
    out.resize(start + 512, 0);
    let header = &mut out[start..];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(if kind == b'5' { b"0000755\0" } else { b"0000644\0" });
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"07346545000\0");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    set_field(header, 0..0, b"");
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// Changes a field of the first header of an archive and makes its sum right.
pub fn set_field(archive: &mut [u8], field: Range<usize>, value: &[u8]) {
    archive[field].copy_from_slice(value);
    archive[148..156].fill(b' ');
    let sum: u32 = archive[..512].iter().map(|byte| u32::from(*byte)).sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn compress(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::None => bytes.to_vec(),
            Self::Gzip => run("gzip", bytes),
            Self::Zstd => run("zstd", bytes),
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// What a filter makes of some bytes.
fn run(program: &str, bytes: &[u8]) -> Vec<u8> {
    use std::process::{Command, Stdio};
    let mut child = Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes).unwrap());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        output.stdout
    })
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest(&SHA256, bytes)))
}

fn configuration(arch: &str, archives: &[String]) -> Value {
    json!({ "architecture": arch, "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": archives } })
}

/// An OCI layout.
pub struct Layout {
    directory: tempfile::TempDir,
    manifests: Vec<Value>,
    blobs: Vec<PathBuf>,
}

impl Layout {
    pub fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        std::fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { directory, manifests: Vec::new(), blobs: Vec::new() }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The files of all parts, without index.json.
    pub fn blobs(&self) -> &[PathBuf] {
        &self.blobs
    }

    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = sha256(bytes);
        let path = self.path().join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
        std::fs::write(&path, bytes).unwrap();
        self.blobs.push(path);
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn image(&mut self, arch: &str, layers: &[(&'static str, Vec<u8>)], archives: &[String]) -> Value {
        let layers: Vec<Value> = layers.iter().map(|(media_type, bytes)| self.blob(media_type, bytes)).collect();
        let text = configuration(arch, archives).to_string();
        let config = self.blob("application/vnd.oci.image.config.v1+json", text.as_bytes());
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string();
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes())
    }

    fn tag(&mut self, mut descriptor: Value, tag: &str) {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.manifests.push(descriptor);
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests }).to_string();
        std::fs::write(self.path().join("index.json"), index).unwrap();
    }

    pub fn add(&mut self, tag: &str, arch: &str, archives: &[Vec<u8>], compression: Compression) {
        let layers: Vec<_> =
            archives.iter().map(|bytes| (compression.media_type(), compression.compress(bytes))).collect();
        let digests: Vec<String> = archives.iter().map(|bytes| sha256(bytes)).collect();
        let image = self.image(arch, &layers, &digests);
        self.tag(image, tag);
    }

    /// The layer is one archive, the configuration says it is another.
    pub fn add_lying(&mut self, tag: &str, layer: &[u8], said: &[u8]) {
        let layers = [(Compression::Gzip.media_type(), Compression::Gzip.compress(layer))];
        let image = self.image("amd64", &layers, &[sha256(said)]);
        self.tag(image, tag);
    }

    /// The compressed layer was cut before its digest was taken.
    pub fn add_truncated(&mut self, tag: &str, archive: &[u8], compression: Compression) {
        let mut bytes = compression.compress(archive);
        bytes.truncate(bytes.len() - 12);
        let image = self.image("amd64", &[(compression.media_type(), bytes)], &[sha256(archive)]);
        self.tag(image, tag);
    }

    /// A tag that leads to an index that names another one so often as `width` says, and so on, `depth` of them; none has an image.
    pub fn add_nested(&mut self, tag: &str, width: usize, depth: usize) {
        const INDEX: &str = "application/vnd.oci.image.index.v1+json";
        let mut below = self.blob(INDEX, json!({ "schemaVersion": 2, "manifests": [] }).to_string().as_bytes());
        for _ in 1..depth {
            let index = json!({ "schemaVersion": 2, "manifests": vec![below; width] }).to_string();
            below = self.blob(INDEX, index.as_bytes());
        }
        self.tag(below, tag);
    }

    /// One tag that leads to an index of images for several machines, with an attestation beside them.
    pub fn add_index(&mut self, tag: &str, images: &[(&str, Vec<u8>)]) {
        let mut manifests = vec![json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": sha256(b"none"), "size": 1,
            "platform": { "architecture": "unknown", "os": "unknown" },
        })];
        for (arch, archive) in images {
            let layers = [(Compression::None.media_type(), archive.clone())];
            let mut image = self.image(arch, &layers, &[sha256(archive)]);
            image["platform"] = json!({ "architecture": arch, "os": "linux" });
            manifests.push(image);
        }
        let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        let descriptor = self.blob("application/vnd.oci.image.index.v1+json", index.as_bytes());
        self.tag(descriptor, tag);
    }
}

/// An archive as `podman save` writes it.
pub fn saved(tag: &str, arch: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    saved_with(layers, tag, arch, layers)
}

/// The same, with other layers than the configuration was made for.
pub fn saved_with(layers: &[Vec<u8>], tag: &str, arch: &str, said: &[Vec<u8>]) -> Vec<u8> {
    let digests: Vec<String> = said.iter().map(|bytes| sha256(bytes)).collect();
    let config = configuration(arch, &digests).to_string();
    let config_name = format!("{}.json", sha256(config.as_bytes()).trim_start_matches("sha256:"));
    let names: Vec<String> = (0..layers.len()).map(|index| format!("{index}/layer.tar")).collect();
    let list = json!([{ "Config": config_name, "RepoTags": [tag], "Layers": names }]).to_string();
    let mut entries = vec![file("manifest.json", &list), file(&config_name, &config)];
    for (name, bytes) in names.iter().zip(layers) {
        entries.push(Entry { content: bytes.clone(), ..file(name, "") });
    }
    tar(&entries)
}
