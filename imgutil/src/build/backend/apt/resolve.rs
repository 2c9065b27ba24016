//! Which packages a tree will have: the signed lists of the archives are fetched into a directory of their own, and apt works
//! out what the wanted packages make necessary. Then the lists are narrowed to that, so that whatever installs them later can
//! choose nothing else.

use super::super::{Context, Package, Resolved, Snapshot};
use super::index::Index;
use super::output::{Counter, explain};
use super::sources;
use crate::build::BuildError;
use crate::build::workdir::WorkDir;
use crate::exec::{Options, Outcome};
use aws_lc_rs::digest::{SHA256, digest};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub(super) const TOOL: &str = "/usr/bin/apt-get";
/// The package that says that /bin is a link to /usr/bin: where an archive has it, its releases are made so.
const MERGED: &str = "usr-is-merged";

/// MiB that are free before the lists are fetched; Debian's take some 70. Where the disk becomes full while apt 2.6 unpacks one, it waits for ever
/// now and then: it and all that it has started wait for each other.
const ROOM: u64 = 128;

/// The lists as fetched.
fn lists(work: &WorkDir) -> PathBuf {
    work.indexes().join("lists")
}

/// The lists with only the packages that are to be installed.
pub(super) fn narrowed_lists(work: &WorkDir) -> PathBuf {
    work.indexes().join("narrowed")
}

/// Whether the packages to be installed want /bin to be a link from the start.
pub(super) fn is_merged(context: &Context<'_, '_>) -> Result<bool, BuildError> {
    Ok(!Index::read(&narrowed_lists(context.work))?.versions(MERGED).is_empty())
}

/// Fetches the lists and checks their signatures, unless that is done already.
pub(super) fn update(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let directory = context.work.indexes();
    let failed = |error| BuildError::io("prepare", &directory, error);
    if lists(context.work).exists() {
        return Ok(());
    }
    let room = rustix::fs::statvfs(&directory).map_err(|error| failed(error.into()))?;
    let free = room.f_bavail.saturating_mul(room.f_frsize) >> 20;
    if free < ROOM {
        return Err(BuildError::NoRoom { place: directory, free, least: ROOM });
    }
    for name in ["lists/partial", "cache/archives/partial"] {
        std::fs::create_dir_all(directory.join(name)).map_err(failed)?;
    }
    let own_files = [
        ("sources.list", sources(context.plan)?.join("\n") + "\n"),
        ("status", String::new()),
        // Read first: the host's own configuration is none of the image's.
        ("apt.conf", "Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"/dev/null\";\n".to_owned()),
    ];
    for (name, text) in own_files {
        std::fs::write(directory.join(name), text).map_err(failed)?;
    }
    context.tools.stage("fetching the lists of packages")?;
    apt(context, "fetching the lists of packages", &["update".into(), "--error-on=any".into()], None, None)
}

/// Works out every package that is to be installed.
pub(super) fn resolve(context: &mut Context<'_, '_>) -> Result<Resolved, BuildError> {
    context.tools.stage("working out the packages")?;
    let index = Index::read(&lists(context.work))?;
    let plan = context.plan;
    // What mmdebstrap calls "minbase", in its own words.
    let release = format!("?or(?archive(^{0}$),?codename(^{0}$)),?architecture({1})", plan.os.release, plan.arch.name);
    let mut arguments: Vec<OsString> = ["--yes", "--print-uris", "install"].map(OsString::from).to_vec();
    arguments.push(format!("?narrow({release},?essential)").into());
    arguments.push(format!("?narrow({release},?priority(required))").into());
    arguments.extend(plan.packages.iter().map(OsString::from));
    // apt's own word for "not this one".
    arguments.extend(plan.remove.iter().map(|name| OsString::from(format!("{name}-"))));
    if !index.versions(MERGED).is_empty() {
        arguments.push(MERGED.into());
    }
    let path = context.work.indexes().join("chosen");
    let file = File::create(&path).map_err(|error| BuildError::io("make", &path, error))?;
    apt(context, "working out the packages", &arguments, Some(file.into()), Some(&index))?;
    let text = std::fs::read_to_string(&path).map_err(|error| BuildError::io("read", &path, error))?;
    let mut packages = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('\'')) {
        packages
            .push(chosen(line, &index).ok_or_else(|| BuildError::Answer { tool: "apt-get", answer: line.to_owned() })?);
    }
    packages.sort_unstable();
    Ok(Resolved { packages, snapshots: snapshots(context.work)? })
}

/// Leaves nothing in the lists but `packages`.
pub(super) fn narrow(context: &mut Context<'_, '_>, packages: &[Package]) -> Result<(), BuildError> {
    let lists = lists(context.work);
    let index = Index::read(&lists)?;
    let mut gone = packages.iter().filter(|package| {
        !index.versions(&package.name).iter().any(|there| there.number == package.version && there.arch == package.arch)
    });
    if let Some(package) = gone.next() {
        let there = index.versions(&package.name).iter().map(|there| there.number.clone()).collect();
        let (name, version) = (package.name.clone(), package.version.clone());
        return Err(BuildError::VersionGone { name, version, there, others: gone.count() });
    }
    let wanted = |name: &str, version: &super::index::Version| {
        packages.binary_search_by(|package| {
            (package.name.as_str(), &package.version, &package.arch).cmp(&(name, &version.number, &version.arch))
        })
    };
    // The version may be the same and the file another one, where an archive is not Debian's.
    let changed = packages.iter().find(|package| {
        !index.versions(&package.name).iter().any(|there| {
            there.number == package.version && there.arch == package.arch && there.sha256 == package.sha256
        })
    });
    if let Some(package) = changed {
        return Err(BuildError::OtherFile { name: package.name.clone(), version: package.version.clone() });
    }

    let narrowed = narrowed_lists(context.work);
    std::fs::create_dir(&narrowed).map_err(|error| BuildError::io("make", &narrowed, error))?;
    for path in releases(&lists)? {
        std::fs::copy(&path, narrowed.join(path.file_name().unwrap_or_default()))
            .map_err(|error| BuildError::io("copy", &path, error))?;
    }
    index.write_narrowed(&narrowed, |name, version| {
        wanted(name, version).is_ok_and(|at| packages[at].sha256 == version.sha256)
    })
}

/// Runs apt on the host with the fetched lists and nothing of the host's; its answers go to `output`, if that is given.
fn apt(
    context: &mut Context<'_, '_>,
    doing: &str,
    arguments: &[OsString],
    output: Option<OwnedFd>,
    index: Option<&Index>,
) -> Result<(), BuildError> {
    let directory = context.work.indexes();
    let mut command: Vec<OsString> = vec![TOOL.into()];
    let mut set = |name: &str, value: &Path| {
        let mut option = OsString::from(format!("-o{name}="));
        option.push(value);
        command.push(option);
    };
    for (name, file) in [
        ("Dir::State", "."),
        ("Dir::State::lists", "lists"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
        ("Dir::Etc::sourcelist", "sources.list"),
    ] {
        set(name, &directory.join(file));
    }
    for (name, value) in [
        ("Dir::Etc::sourceparts", "/dev/null"),
        ("Dir::Etc::preferences", "/dev/null"),
        ("Dir::Etc::preferencesparts", "/dev/null"),
        ("APT::Architecture", &context.plan.arch.name),
        ("APT::Architectures", &context.plan.arch.name),
        ("APT::Install-Recommends", "false"),
        // It cannot write into a directory of root's.
        ("APT::Sandbox::User", "root"),
        ("Acquire::Languages", "none"),
        ("Acquire::PDiffs", "false"),
        ("Acquire::GzipIndexes", "false"),
    ] {
        set(name, Path::new(value));
    }
    command.extend_from_slice(arguments);
    let configuration = directory.join("apt.conf").display().to_string();
    let (finished, tail) = context.tools.run(&mut Counter::default(), |[input, usual, errors]| {
        let mut options = Options::on_host(command, [input, output.unwrap_or(usual), errors]);
        options.environment = vec![("APT_CONFIG".to_owned(), configuration)];
        Ok(options)
    })?;
    match finished?.outcome {
        Outcome::Exited(0) => Ok(()),
        _ => Err(explain(doing, tail, index, &directory)),
    }
}

/// A line of `--print-uris`: `'ADDRESS' NAME_VERSION_ARCH.deb SIZE …`.
fn chosen(line: &str, index: &Index) -> Option<Package> {
    let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let file = rest.split(' ').next()?.strip_suffix(".deb")?;
    let mut parts = file.splitn(3, '_');
    let (name, version, arch) = (parts.next()?, parts.next()?.replace("%3a", ":"), parts.next()?);
    let known = index.versions(name).iter().find(|known| known.number == version && known.arch == arch)?;
    Some(Package {
        name: name.to_owned(),
        version,
        arch: arch.to_owned(),
        sha256: known.sha256.clone(),
        uri: uri.to_owned(),
    })
}

/// The signed indexes among the lists.
fn releases(lists: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let failed = |error| BuildError::io("read", lists, error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(lists).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.as_os_str().as_encoded_bytes();
        if name.ends_with(b"Release") || name.ends_with(b"_Release.gpg") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn snapshots(work: &WorkDir) -> Result<Vec<Snapshot>, BuildError> {
    let mut all = Vec::new();
    for path in releases(&lists(work))? {
        let text = std::fs::read(&path).map_err(|error| BuildError::io("read", &path, error))?;
        let shown = String::from_utf8_lossy(&text);
        let date = shown.lines().find_map(|line| line.strip_prefix("Date: ")).unwrap_or_default();
        all.push(Snapshot {
            index: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            date: date.to_owned(),
            sha256: hex::encode(digest(&SHA256, &text)),
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_package_is_found_in_the_lists() {
        let lists = tempfile::tempdir().unwrap();
        let text = "Package: g++\nVersion: 4:12.2-3~x\nArchitecture: amd64\nSHA256: aa\n";
        std::fs::write(lists.path().join("x_Packages"), text).unwrap();
        let index = Index::read(lists.path()).unwrap();
        let package =
            chosen("'http://h/pool/g%2b%2b_12.2-3%7ex_amd64.deb' g++_4%3a12.2-3~x_amd64.deb 1356 ", &index).unwrap();
        assert_eq!((package.version.as_str(), package.sha256.as_str()), ("4:12.2-3~x", "aa"));
        assert_eq!(package.uri, "http://h/pool/g%2b%2b_12.2-3%7ex_amd64.deb");
        for line in ["'http://h/x.deb' g++_1_amd64.deb 1", "'http://h/x' x", "'", ""] {
            assert_eq!(chosen(line, &index), None, "{line}");
        }
    }
}
