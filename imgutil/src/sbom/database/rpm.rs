//! RPM's database: where it is, and the header that it holds for each package (`lib/header.c` of RPM: an index of entries, then
//! their data; all big-endian).

use super::{DATABASE, Files, Installed, System, bdb, ndb, sqlite};
use crate::sbom::license;
use anyhow::{Context as _, Result};

/// Where the databases are: EL 10, Fedora and SUSE; EL 8 (Berkeley DB) and 9.
const PLACES: [&str; 2] = ["usr/lib/sysimage/rpm", "var/lib/rpm"];

/// The headers of all packages; none if the tree has no database.
pub(super) fn headers(files: &dyn Files) -> Result<Vec<Vec<u8>>> {
    for place in PLACES {
        let names = files.list(place)?;
        let read = |name: &str| -> Result<Option<Vec<u8>>> {
            if names.iter().any(|known| known == name) {
                files.read(&format!("{place}/{name}"), DATABASE)
            } else {
                Ok(None)
            }
        };
        let context = |name: &str| format!("cannot read the package database '/{place}/{name}'");
        if let Some(database) = read("rpmdb.sqlite")? {
            let log = read("rpmdb.sqlite-wal")?.unwrap_or_default();
            return sqlite::blobs(&database, &log, "Packages").with_context(|| context("rpmdb.sqlite"));
        }
        if let Some(database) = read("Packages.db")? {
            return ndb::blobs(&database).with_context(|| context("Packages.db"));
        }
        if let Some(database) = read("Packages")? {
            return bdb::blobs(&database).with_context(|| context("Packages"));
        }
    }
    Ok(Vec::new())
}

const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const VENDOR: u32 = 1011;
const LICENSE: u32 = 1014;
const PACKAGER: u32 = 1015;
const URL: u32 = 1020;
const ARCH: u32 = 1022;
const FILE_DIGESTS: u32 = 1035;
const SOURCE: u32 = 1044;
const DIRECTORY_INDEXES: u32 = 1116;
const BASE_NAMES: u32 = 1117;
const DIRECTORY_NAMES: u32 = 1118;
const DIGEST_ALGORITHM: u32 = 5011;

/// A package's header.
pub(super) struct Header<'a> {
    entries: &'a [u8],
    data: &'a [u8],
}

impl<'a> Header<'a> {
    /// `None` if the bytes are no header.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let count = usize::try_from(number(bytes, 0)?).ok()?;
        let length = usize::try_from(number(bytes, 4)?).ok()?;
        let entries = bytes.get(8..8_usize.checked_add(count.checked_mul(16)?)?)?;
        let data = bytes.get(8 + entries.len()..)?;
        Some(Self { entries, data: data.get(..length)? })
    }

    /// Type, data from its offset on, and count of a tag.
    fn entry(&self, tag: u32) -> Option<(u32, &'a [u8], usize)> {
        let entry = self.entries.chunks_exact(16).find(|entry| number(entry, 0) == Some(tag))?;
        let offset = usize::try_from(number(entry, 8)?).ok()?;
        Some((number(entry, 4)?, self.data.get(offset..)?, usize::try_from(number(entry, 12)?).ok()?))
    }

    /// The strings of a tag (types 6, 8 and 9).
    fn strings(&self, tag: u32) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (kind, data, count) = self.entry(tag).unwrap_or_default();
        let count = if matches!(kind, 6 | 8 | 9) { count } else { 0 };
        data.split(|byte| *byte == 0).take(count)
    }

    fn string(&self, tag: u32) -> Option<String> {
        let text = String::from_utf8_lossy(self.strings(tag).next()?).trim().to_owned();
        (!text.is_empty() && text != "(none)").then_some(text)
    }

    /// The 32-bit numbers of a tag.
    fn numbers(&self, tag: u32) -> impl Iterator<Item = u32> + use<'a> {
        let (kind, data, count) = self.entry(tag).unwrap_or_default();
        let count = if kind == 4 { count } else { 0 };
        data.chunks_exact(4).take(count).filter_map(|bytes| number(bytes, 0))
    }

    /// The package; `None` for what is none, such as imported keys.
    pub(super) fn package(&self) -> Option<Installed> {
        let name = self.string(NAME)?;
        if name == "gpg-pubkey" {
            return None;
        }
        let (version, release) = (self.string(VERSION)?, self.string(RELEASE)?);
        let epoch = self.numbers(EPOCH).next().map(|epoch| format!("{epoch}:")).unwrap_or_default();
        Some(Installed {
            name,
            version: format!("{epoch}{version}-{release}"),
            arch: self.string(ARCH).unwrap_or_else(|| "noarch".to_owned()),
            system: System::Rpm,
            source: self.string(SOURCE),
            supplier: self.string(VENDOR).or_else(|| self.string(PACKAGER)),
            license: self.string(LICENSE).and_then(|text| license::expression(&text)),
            homepage: self.string(URL),
        })
    }

    /// Calls with each file that has a SHA-256.
    pub(super) fn files(&self, take: &mut impl FnMut(&[u8], [u8; 32])) {
        const SHA256: u32 = 8; // RFC 4880, 9.4
        if self.numbers(DIGEST_ALGORITHM).next() != Some(SHA256) {
            return;
        }
        let directories: Vec<&[u8]> = self.strings(DIRECTORY_NAMES).collect();
        let names = self.strings(BASE_NAMES).zip(self.numbers(DIRECTORY_INDEXES)).zip(self.strings(FILE_DIGESTS));
        for ((name, directory), digest) in names {
            let mut sum = [0; 32];
            if let Some(directory) = usize::try_from(directory).ok().and_then(|index| directories.get(index))
                && hex::decode_to_slice(digest, &mut sum).is_ok()
            {
                take(&[directory, name].concat(), sum);
            }
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
