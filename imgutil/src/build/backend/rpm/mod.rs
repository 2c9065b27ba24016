//! What dnf and zypper have in common: RPM's database and keys, the root they install into, which files were fetched, and the
//! last steps that make a tree of RPM packages an image.
//!
//! Signatures are checked three times: of the metadata where the repository signs it, of each package by the tool, and by RPM
//! itself, which is told to install nothing unsigned (`_pkgverify_level`). Keys come into the tree's own database from the files
//! that recipe or data name, before anything is fetched; no tool may take one from anywhere else.

mod fetched;
pub(super) mod inside;
mod root;

pub(super) use fetched::{Fetched, sha256_of};
pub(super) use root::{make_places, run};

use super::{Context, Installed, Package, Snapshot};
use crate::build::BuildError;
use crate::build::inside::{Inside, in_tree};
use crate::build::lay::{copy_file, plant};
use crate::build::output::{Meaning, NoMeaning, Tail};
use crate::build::plan::{Plan, Repository};
use crate::build::sources::of_path;
use crate::build::tree::Tree;
use crate::build::workdir::WorkDir;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where RPM of all releases keeps the keys that it is given (the file system hierarchy of RPM distributions).
const KEYS: &str = "/etc/pki/rpm-gpg";
/// One line for each package, in the order of `Installed`.
const QUERY: &str = "%{NAME}\\t%{EPOCHNUM}:%{VERSION}-%{RELEASE}\\t%{ARCH}\\n";
/// A key in RPM's database looks like a package.
const KEY_PACKAGE: &str = "gpg-pubkey";

/// Directories of a build that are no part of its image.
pub(super) struct Places {
    base: PathBuf,
}

impl Places {
    pub(super) fn of(work: &WorkDir) -> Self {
        Self { base: work.indexes() }
    }

    /// Configuration of the tool.
    pub(super) fn config(&self) -> PathBuf {
        self.base.join("config")
    }

    /// What the tool fetches.
    pub(super) fn cache(&self) -> PathBuf {
        self.base.join("cache")
    }

    /// Logs of the tool's own.
    pub(super) fn logs(&self) -> PathBuf {
        self.base.join("logs")
    }

    /// A root in which packages are chosen before they are installed.
    pub(super) fn scratch(&self) -> PathBuf {
        self.base.join("scratch")
    }

    /// The home directory of the tools: RPM reads `.rpmmacros` there.
    fn home(&self) -> PathBuf {
        self.base.join("home")
    }

    /// A file for what a tool answers.
    pub(super) fn answer(&self) -> PathBuf {
        self.base.join("answer")
    }
}

/// Makes the places, and tells RPM where the database of this release is. Again: nothing.
pub(super) fn prepare(context: &Context<'_, '_>) -> Result<Places, BuildError> {
    let places = Places::of(context.work);
    for directory in [places.config(), places.cache(), places.logs(), places.home()] {
        std::fs::create_dir_all(&directory).map_err(|error| BuildError::io("make", &directory, error))?;
    }
    // RPM of Debian has its database in the home directory of whoever calls it; each release in a place of its own.
    let macros = format!("%_dbpath {}\n%_pkgverify_level all\n", context.plan.os.rpm.database);
    let path = places.home().join(".rpmmacros");
    std::fs::write(&path, macros).map_err(|error| BuildError::io("write", &path, error))?;
    Ok(places)
}

/// Checks that a tool of the host's is there.
pub(super) fn check_tool(tool: &'static str, path: &str, package: &'static str) -> Result<(), BuildError> {
    if Path::new(path).exists() { Ok(()) } else { Err(BuildError::NoTool { tool, package }) }
}

/// The tool and RPM themselves decide what a tree becomes: their programs' digests, and the versions of the host's packages that their
/// libraries are in.
pub(super) fn maker(name: &str, tool: &str) -> Result<String, BuildError> {
    let (tool, rpm) = (of_path(Path::new(tool))?, of_path(Path::new("/usr/bin/rpm"))?);
    Ok(format!("{name} {tool} rpm {rpm}{}", host_packages()))
}

/// What of the host takes part in an installation, with its versions. Nothing on a host whose packages nobody knows.
fn host_packages() -> String {
    // dnf 4 is Python on libdnf, both tools solve with libsolv and install with librpm, which keeps its database by SQLite.
    const PARTS: [&str; 12] = [
        "rpm*",
        "librpm*",
        "dnf*",
        "libdnf*",
        "python3-dnf*",
        "python3-libdnf*",
        "python3-rpm",
        "python3",
        "libsolv*",
        "zypper*",
        "libzypp*",
        "libsqlite3*",
    ];
    let mut query = if Path::new("/usr/bin/dpkg-query").exists() {
        let mut query = Command::new("/usr/bin/dpkg-query");
        query.args(["-W", "-f", "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"]);
        query
    } else {
        let mut query = Command::new("/usr/bin/rpm");
        query.args(["-qa", "--qf", "installed %{NAME} %{VERSION}-%{RELEASE} %{ARCH}\n", "sqlite-libs"]);
        query
    };
    // Its status says no more than that there is nothing of one of these names.
    let answer = query.args(PARTS).stdin(Stdio::null()).stderr(Stdio::null()).output().map(|output| output.stdout);
    let answer = answer.unwrap_or_default();
    let text = String::from_utf8_lossy(&answer);
    let mut lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    lines.sort_unstable();
    lines.insert(0, "");
    lines.join("\n")
}

/// RPM is told to install nothing unsigned, whatever its repository: one without a key cannot be used.
pub(super) fn refuse_unsigned(plan: &Plan) -> Result<(), BuildError> {
    match plan.repositories.iter().find(|repository| repository.unsigned) {
        Some(repository) => Err(BuildError::Repository {
            uri: repository.uri.clone(),
            problem: "packages of RPM are installed only if they are signed: sign them (rpmsign) and give the key"
                .to_owned(),
        }),
        None => Ok(()),
    }
}

/// Makes an empty root in which packages can be chosen or installed: its mount points, and a database with the keys.
pub(super) fn open_root(context: &mut Context<'_, '_>, root: &Path) -> Result<(), BuildError> {
    make_places(root, context.plan)?;
    let mut keys: Vec<PathBuf> = Vec::new();
    for repository in &context.plan.repositories {
        if !keys.contains(&repository.key) {
            keys.push(repository.key.clone());
        }
    }
    let mut command: Vec<OsString> = ["rpmkeys", "--root"].map(OsString::from).to_vec();
    command.push(root.into());
    command.push("--import".into());
    command.extend(keys.into_iter().map(OsString::from));
    let (succeeded, tail) = run(context, root, &mut NoMeaning, command, None)?;
    if succeeded {
        return Ok(());
    }
    Err(failed(context.work, "taking the keys of the repositories", tail))
}

/// The packages in a root, sorted, as RPM of the host reads them.
pub(super) fn query(context: &mut Context<'_, '_>, root: &Path) -> Result<Vec<Installed>, BuildError> {
    let mut command: Vec<OsString> = ["rpm", "--root"].map(OsString::from).to_vec();
    command.push(root.into());
    command.extend(["-qa", "--qf", QUERY].map(OsString::from));
    match ask(context, root, &mut NoMeaning, command)? {
        Ok(text) => parse_query(&text),
        Err(tail) => Err(failed(context.work, "listing the packages", tail)),
    }
}

/// Runs a tool of the host's on `root` and gives what it prints on its standard output. The inner error is its failure.
pub(super) fn ask(
    context: &mut Context<'_, '_>,
    root: &Path,
    meaning: &mut dyn Meaning,
    command: Vec<OsString>,
) -> Result<Result<String, Tail>, BuildError> {
    let path = Places::of(context.work).answer();
    let file = File::create(&path).map_err(|error| BuildError::io("make", &path, error))?;
    let (succeeded, tail) = run(context, root, meaning, command, Some(file))?;
    if !succeeded {
        return Ok(Err(tail));
    }
    std::fs::read_to_string(&path).map(Ok).map_err(|error| BuildError::io("read", &path, error))
}

/// The failure of a tool that nothing more is known of, but that the disk may be full.
pub(super) fn failed(work: &WorkDir, doing: &str, tail: Tail) -> BuildError {
    let reason = tail.reason();
    BuildError::tool(doing, &reason, tail, work.tree())
}

/// Lines of [`QUERY`].
pub(super) fn parse_query(text: &str) -> Result<Vec<Installed>, BuildError> {
    let mut all = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let mut parts = line.split('\t').map(str::to_owned);
        let (Some(name), Some(version), Some(arch), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(BuildError::Answer { tool: "rpm", answer: line.to_owned() });
        };
        if name != KEY_PACKAGE {
            all.push(Installed { name, version, arch });
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The packages in the tree, by the tree's own RPM where it has one: its database may be in a format that the host's RPM does not
/// read.
pub(super) fn installed(context: &mut Context<'_, '_>) -> Result<Vec<Installed>, BuildError> {
    prepare(context)?;
    let root = context.work.root();
    if !has_rpm(&Tree::open(&root)?) {
        return query(context, &root);
    }
    let path = Places::of(context.work).answer();
    let file = File::create(&path).map_err(|error| BuildError::io("make", &path, error))?;
    let command = ["rpm", "-qa", "--qf", QUERY].map(OsString::from);
    let inside = Inside { output: Some(file), ..Inside::default() };
    inside.succeed(context, "listing the packages", &command)?;
    parse_query(&std::fs::read_to_string(&path).map_err(|error| BuildError::io("read", &path, error))?)
}

/// Fails unless exactly `packages` are installed in the tree: nothing that the lock does not know may slip in.
pub(super) fn check_installed(
    context: &mut Context<'_, '_>,
    tool: &'static str,
    packages: &[Package],
) -> Result<(), BuildError> {
    let root = context.work.root();
    let there: BTreeSet<Installed> = query(context, &root)?.into_iter().collect();
    let wanted: BTreeSet<Installed> = packages.iter().map(Package::installed).collect();
    let shown = |odd: &Installed| format!("{} {}", odd.name, odd.version);
    let answer = if let Some(odd) = there.difference(&wanted).next() {
        format!("it installed {}, which was not chosen", shown(odd))
    } else if let Some(odd) = wanted.difference(&there).next() {
        format!("it did not install {}, which was chosen", shown(odd))
    } else {
        return Ok(());
    };
    Err(BuildError::Answer { tool, answer })
}

/// Fails if a package has another digest than the one asked for.
pub(super) fn check_digests(wanted: &[Package], there: &[Package]) -> Result<(), BuildError> {
    for package in wanted {
        let other =
            there.iter().find(|other| other.installed() == package.installed() && other.sha256 != package.sha256);
        if other.is_some() {
            return Err(BuildError::OtherFile { name: package.name.clone(), version: package.version.clone() });
        }
    }
    Ok(())
}

/// Fails if a package is not among `there`, which has all versions that the repositories have.
pub(super) fn check_versions(wanted: &[Package], there: &[Installed]) -> Result<(), BuildError> {
    let mut gone = wanted.iter().filter(|package| !there.contains(&package.installed()));
    let Some(package) = gone.next() else { return Ok(()) };
    let versions: BTreeSet<String> =
        there.iter().filter(|other| other.name == package.name).map(|other| other.version.clone()).collect();
    Err(BuildError::VersionGone {
        name: package.name.clone(),
        version: package.version.clone(),
        there: versions.into_iter().collect(),
        others: gone.count(),
    })
}

/// The state of the repositories: their indexes as the tool has kept them.
pub(super) fn snapshots(
    plan: &Plan,
    index: impl Fn(&Repository) -> Option<PathBuf>,
) -> Result<Vec<Snapshot>, BuildError> {
    let mut all = Vec::new();
    for repository in &plan.repositories {
        let missing = || BuildError::Repository {
            uri: repository.uri.clone(),
            problem: "its index was not kept by the package manager".to_owned(),
        };
        let path = index(repository).ok_or_else(missing)?;
        let text = std::fs::read_to_string(&path).map_err(|error| BuildError::io("read", &path, error))?;
        let date = text.split_once("<revision>").and_then(|(_, rest)| rest.split_once("</revision>"));
        all.push(Snapshot {
            index: format!("{}/repodata/repomd.xml", repository.uri.trim_end_matches('/')),
            date: date.map_or_else(String::new, |(revision, _)| revision.trim().to_owned()),
            sha256: sha256_of(&path)?,
        });
    }
    Ok(all)
}

/// What comes after the packages: the database in the words of the image's own RPM, the kernel in `/boot`, the node's files.
pub(super) fn settle(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let tree = Tree::open(&context.work.root())?;
    own_database(context, &tree)?;
    kernels_to_boot(&tree)?;
    if context.plan.node_files.is_some() {
        plant(&tree, &context.work.stage())?;
    }
    Ok(())
}

fn has_rpm(tree: &Tree) -> bool {
    tree.exists("/usr/bin/rpm") && tree.exists("/usr/bin/rpmdb")
}

/// Gives the image a database that its own RPM has made. The host's may write another format (Debian 12 knows sqlite alone, SUSE
/// wants ndb, EL 8 Berkeley DB), and looks in other places. Without an RPM in the image the host's stays.
fn own_database(context: &mut Context<'_, '_>, tree: &Tree) -> Result<(), BuildError> {
    if !has_rpm(tree) {
        return Ok(());
    }
    context.tools.stage("giving the image a package database of its own")?;
    let root = context.work.root();
    let mut command: Vec<OsString> = ["rpmdb", "--root"].map(OsString::from).to_vec();
    command.push(root.clone().into());
    command.push("--exportdb".into());
    let headers = Places::of(context.work).answer();
    let file = File::create(&headers).map_err(|error| BuildError::io("make", &headers, error))?;
    let (succeeded, tail) = run(context, &root, &mut NoMeaning, command, Some(file))?;
    if !succeeded {
        return Err(failed(context.work, "reading the package database", tail));
    }
    let directory = context.plan.os.rpm.database.clone();
    for name in tree.list(&directory)? {
        tree.remove(Path::new(&directory).join(name))?;
    }
    in_tree(context, "making the package database", &["rpmdb", "--initdb"].map(OsString::from))?;
    let file = File::open(&headers).map_err(|error| BuildError::io("read", &headers, error))?;
    let command = ["rpmdb", "--importdb"].map(OsString::from);
    let inside = Inside { input: Some(file), ..Inside::default() };
    inside.succeed(context, "filling the package database", &command)
}

/// Copies kernels from beside their modules to `/boot`, where they are looked for: in a running system a script of the kernel's
/// does it, together with an initramfs for that machine and boot loader entries, and so it was told to stay out.
fn kernels_to_boot(tree: &Tree) -> Result<(), BuildError> {
    for version in tree.list("/usr/lib/modules")? {
        let (kernel, place) = (format!("/usr/lib/modules/{version}/vmlinuz"), format!("/boot/vmlinuz-{version}"));
        if tree.exists(&kernel) && !tree.exists(&place) {
            tree.copy(&kernel, &place, 0o755)?;
        }
    }
    Ok(())
}

/// The repository's key in the image: where a package of the image has it, or laid in. Its path.
pub(super) fn key_in_image(tree: &Tree, repository: &Repository) -> Result<String, BuildError> {
    if let Some(path) = &repository.key_in_image
        && tree.exists(path)
    {
        return Ok(path.clone());
    }
    let place = format!("{KEYS}/RPM-GPG-KEY-{}", repository.name);
    copy_file(tree, Path::new(&place), &repository.key, 0o644, (0, 0))?;
    Ok(place)
}

/// A path as a `file:` URL: what is no plain character is escaped (RFC 3986 §2.1).
pub(super) fn file_url(path: &Path) -> String {
    let mut url = "file://".to_owned();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(byte) {
            url.push(char::from(*byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(url, "%{byte:02X}");
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, sha256: &str) -> Package {
        let [name, version, sha256] = [name, version, sha256].map(str::to_owned);
        Package { name, version, arch: "noarch".to_owned(), sha256, uri: String::new() }
    }

    #[test]
    fn a_new_library_is_another_maker() {
        let made = maker("dnf", "/usr/bin/env").unwrap();
        let rpm =
            std::process::Command::new("dpkg-query").args(["-W", "-f", "\n${Package} ${Version} "]).arg("rpm").output();
        let rpm = String::from_utf8(rpm.unwrap().stdout).unwrap();
        assert!(rpm.starts_with("\nrpm ") && made.contains(&rpm) && made.contains("\nlibrpm"), "{made}");
        assert_eq!(maker("dnf", "/usr/bin/env").unwrap(), made);
    }

    #[test]
    fn keys_are_no_packages() {
        let text = "gpg-pubkey\t0:1-2\t(none)\nb\t1:2-3\tx86_64\na\t0:1-1.el9\tnoarch\n";
        let names: Vec<String> =
            parse_query(text).unwrap().into_iter().map(|one| format!("{} {}", one.name, one.version)).collect();
        assert_eq!(names, ["a 0:1-1.el9", "b 1:2-3"]);
        assert!(parse_query("a\tb\n").is_err());
    }

    #[test]
    fn versions_and_files_are_held_to_the_lock() {
        let there = [package("a", "0:1-1", "aa"), package("a", "0:2-1", "bb"), package("b", "0:1-1", "cc")];
        let versions: Vec<Installed> = there.iter().map(Package::installed).collect();
        assert!(check_versions(&there[1..], &versions).is_ok());
        let gone = check_versions(&[package("a", "0:0-1", ""), package("c", "0:1-1", "")], &versions).unwrap_err();
        assert!(
            gone.to_string().contains("a 0:0-1 is gone from the repositories: they have 0:1-1 and 0:2-1 (and 1 more"),
            "{gone}"
        );
        assert!(check_digests(&there, &there).is_ok());
        assert!(matches!(check_digests(&[package("b", "0:1-1", "dd")], &there), Err(BuildError::OtherFile { .. })));
    }

    #[test]
    fn a_path_is_escaped_in_a_url() {
        assert_eq!(file_url(Path::new("/w x/k%1.asc")), "file:///w%20x/k%251.asc");
    }
}
