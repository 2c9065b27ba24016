//! SLES and openSUSE: zypper, with repositories and caches of its own. It takes no key from anywhere: those of the build are in
//! the root's database before it starts, and whatever it would ask is answered with its careful default.

use super::rpm::{self, Fetched, Places};
use super::{Backend, Context, Installed, Package, Resolved, check_keys_and_machine};
use crate::build::near::near;
use crate::build::output::{Meaning, NoMeaning, Tail};
use crate::build::plan::{Plan, Repository};
use crate::build::tree::Tree;
use crate::build::{BuildError, Event};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const TOOL: &str = "/usr/bin/zypper";
/// Where zypper keeps the names of packages that nobody asked for, so that they can go when nothing needs them.
const AUTO_INSTALLED: &str = "/var/lib/zypp/AutoInstalled";
/// Where it keeps what it must not touch.
const LOCKS: &str = "/etc/zypp/locks";

/// The back end.
pub(super) struct Zypper;

impl Backend for Zypper {
    fn check_host(&self, plan: &Plan) -> Result<(), BuildError> {
        rpm::check_tool("zypper", TOOL, "zypper")?;
        rpm::check_tool("rpmkeys", "/usr/bin/rpmkeys", "rpm")?;
        rpm::refuse_unsigned(plan)?;
        check_keys_and_machine(plan)
    }

    fn resolve(&self, context: &mut Context<'_, '_>) -> Result<Resolved, BuildError> {
        let places = refresh(context)?;
        let wanted = context.plan.packages.clone();
        let packages = choose(context, &places, wanted)?;
        let snapshots = rpm::snapshots(context.plan, |repository| {
            let index = places.cache().join("raw").join(&repository.name).join("repodata/repomd.xml");
            index.exists().then_some(index)
        })?;
        Ok(Resolved { packages, snapshots })
    }

    fn install(&self, context: &mut Context<'_, '_>, packages: &[Package]) -> Result<(), BuildError> {
        let places = Places::of(context.work);
        let exact = || packages.iter().map(|one| format!("{}.{}={}", one.name, one.arch, edition(&one.version)));
        if !places.scratch().exists() {
            // From a lock: nothing has been fetched yet.
            refresh(context)?;
            let versions = versions(context, &places, packages)?;
            rpm::check_versions(packages, &versions)?;
            let there = choose(context, &places, exact().collect())?;
            rpm::check_digests(packages, &there)?;
        }
        let root = context.work.root();
        rpm::open_root(context, &root)?;
        context.tools.stage("installing the packages")?;
        // What is recommended and wanted is among them.
        let arguments: Vec<String> =
            install_arguments().chain(["--no-recommends"]).map(str::to_owned).chain(exact()).collect();
        let command = command(&places, &root, &arguments);
        let (succeeded, tail) = rpm::run(context, &root, &mut Summary::default(), command, None)?;
        if !succeeded {
            return Err(reason(context, "installing the packages", tail));
        }
        remove_stub(context, &root)?;
        rpm::check_installed(context, "zypper", packages)?;
        mark(&Tree::open(&root)?, context.plan, packages)?;
        rpm::settle(context)
    }

    fn maker(&self) -> Result<String, BuildError> {
        rpm::maker("zypper", TOOL)
    }

    fn installed(&self, context: &mut Context<'_, '_>) -> Result<Vec<Installed>, BuildError> {
        rpm::installed(context)
    }

    fn add(&self, context: &mut Context<'_, '_>) -> Result<(), BuildError> {
        let plan = context.plan;
        if plan.packages.is_empty() && plan.remove.is_empty() {
            return Ok(());
        }
        rpm::refuse_unsigned(plan)?;
        let tree = Tree::open(&context.work.root())?;
        if !tree.exists(TOOL) {
            return Err(BuildError::NoManager { os: plan.os.name.clone(), manager: "zypper" });
        }
        rpm::inside::take_keys(context)?;
        let unwanted = rpm::inside::unwanted(context)?;
        if !unwanted.is_empty() {
            context.tools.stage("removing packages")?;
            let command: Vec<&str> = ["zypper", "--non-interactive", "remove"]
                .into_iter()
                .chain(unwanted.iter().map(String::as_str))
                .collect();
            if let Err(tail) = rpm::inside::manage_quietly(context, &command)? {
                return Err(reason(context, "removing packages", tail));
            }
        }
        if plan.packages.is_empty() {
            return Ok(());
        }
        context.tools.stage("fetching the lists of packages")?;
        if let Err(tail) = rpm::inside::manage_quietly(context, &["zypper", "--non-interactive", "refresh"])? {
            return Err(reason(context, "fetching the lists of packages", tail));
        }
        context.tools.stage("installing the packages")?;
        // For this installation only: what it has locked itself stays locked.
        let own_locks = tree.open_to_read(LOCKS)?.is_some().then(|| tree.read_text(LOCKS)).transpose()?;
        lock(&tree, own_locks.as_deref(), &plan.remove)?;
        let mut command = vec!["zypper", "--non-interactive"];
        for argument in install_arguments() {
            command.push(argument);
        }
        command.push(if plan.os.rpm.weak_dependencies { "--recommends" } else { "--no-recommends" });
        command.extend(plan.packages.iter().map(String::as_str));
        if let Err(tail) = rpm::inside::manage(context, &mut Summary::default(), &command)? {
            let error = reason(context, "installing the packages", tail);
            let BuildError::UnknownPackage { name, others, .. } = error else { return Err(error) };
            let mut search = vec!["zypper", "--non-interactive"];
            let arguments = search_arguments();
            search.extend(arguments.iter().map(String::as_str));
            let known = rpm::inside::names(context, &search);
            let near = near(
                &name,
                known.lines().filter_map(solvable).map(|one| one.name).collect::<Vec<_>>().iter().map(String::as_str),
            );
            return Err(BuildError::UnknownPackage { name, near, others });
        }
        match own_locks {
            Some(text) if !plan.remove.is_empty() => tree.rewrite(LOCKS, &text)?,
            Some(_) => {}
            None => tree.remove(LOCKS)?,
        }
        rpm::inside::settle(context)
    }

    fn write_repositories(&self, plan: &Plan, tree: &Tree) -> Result<(), BuildError> {
        const DIRECTORY: &str = "/etc/zypp/repos.d";
        if !plan.keeps_repositories {
            for name in tree.list(DIRECTORY)? {
                tree.remove(Path::new(DIRECTORY).join(name))?;
            }
        }
        for repository in &plan.repositories {
            let key = format!("file://{}", rpm::key_in_image(tree, repository)?);
            tree.write_text(format!("{DIRECTORY}/{}.repo", repository.name), &section(repository, &key))?;
        }
        Ok(())
    }
}

/// Tells zypper never to choose packages: no option of it does, a list in the root does (zypper(8), "Package Lock Management"). They come
/// behind those of `own`, which it has already.
fn lock(tree: &Tree, own: Option<&str>, names: &[String]) -> Result<(), BuildError> {
    let mut text = own.unwrap_or_default().to_owned();
    for name in names {
        // Writing to a String cannot fail. An entry ends with an empty line.
        let _ = write!(text, "\ntype: package\nmatch_type: exact\ncase_sensitive: on\nsolvable_name: {name}\n");
    }
    match own {
        _ if names.is_empty() => Ok(()),
        Some(_) => tree.rewrite(LOCKS, &text),
        None => tree.write_text(LOCKS, &text),
    }
}

/// The version as zypper writes it: without the epoch that everything has.
fn edition(version: &str) -> &str {
    version.strip_prefix("0:").unwrap_or(version)
}

/// The same in RPM's words, with an epoch always.
fn with_epoch(edition: &str) -> String {
    if edition.contains(':') { edition.to_owned() } else { format!("0:{edition}") }
}

fn install_arguments() -> impl Iterator<Item = &'static str> {
    ["--xmlout", "--no-refresh", "install", "--no-confirm", "--auto-agree-with-licenses"].into_iter()
}

/// Fetches the indexes of the repositories into the build's cache, which any root then uses.
fn refresh(context: &mut Context<'_, '_>) -> Result<Places, BuildError> {
    let places = rpm::prepare(context)?;
    configure(context.plan, &places)?;
    let scratch = places.scratch();
    rpm::open_root(context, &scratch)?;
    context.tools.stage("fetching the lists of packages")?;
    let command = command(&places, &scratch, &["refresh".to_owned()]);
    let (succeeded, tail) = rpm::run(context, &scratch, &mut NoMeaning, command, None)?;
    if succeeded { Ok(places) } else { Err(reason(context, "fetching the lists of packages", tail)) }
}

/// Works out what the wanted packages make necessary, and fetches it.
fn choose(context: &mut Context<'_, '_>, places: &Places, wanted: Vec<String>) -> Result<Vec<Package>, BuildError> {
    context.tools.stage("fetching the packages")?;
    let arguments: Vec<String> =
        install_arguments().chain(["--download-only"]).map(str::to_owned).chain(wanted).collect();
    let scratch = places.scratch();
    lock(&Tree::open(&scratch)?, None, &context.plan.remove)?;
    let (mut summary, command) = (Summary::default(), command(places, &scratch, &arguments));
    let (succeeded, tail) = rpm::run(context, &scratch, &mut summary, command, None)?;
    if !succeeded {
        return Err(explain(context, places, tail));
    }
    let mut fetched = Fetched::default();
    for repository in &context.plan.repositories {
        fetched.add(&places.cache().join("packages").join(&repository.name), &repository.uri)?;
    }
    let mut packages: Vec<Package> =
        summary.chosen.iter().map(|chosen| fetched.package(chosen)).collect::<Result<_, _>>()?;
    packages.sort_unstable();
    Ok(packages)
}

/// All versions that the repositories have of the packages.
fn versions(
    context: &mut Context<'_, '_>,
    places: &Places,
    packages: &[Package],
) -> Result<Vec<Installed>, BuildError> {
    let mut arguments = search_arguments();
    arguments.push("--match-exact".to_owned());
    arguments.extend(packages.iter().map(|package| package.name.clone()));
    search(context, places, &arguments)
}

fn search_arguments() -> Vec<String> {
    ["--xmlout", "--no-refresh", "search", "--details", "--type", "package"].map(str::to_owned).to_vec()
}

fn search(context: &mut Context<'_, '_>, places: &Places, arguments: &[String]) -> Result<Vec<Installed>, BuildError> {
    let scratch = places.scratch();
    let command = command(places, &scratch, arguments);
    match rpm::ask(context, &scratch, &mut NoMeaning, command)? {
        Ok(text) => Ok(text.lines().filter_map(solvable).collect()),
        Err(tail) => Err(rpm::failed(context.work, "listing the packages", tail)),
    }
}

/// A `<solvable …>` element that is a package.
fn solvable(line: &str) -> Option<Installed> {
    let element = line.trim_start().strip_prefix("<solvable ")?;
    let attribute = |name: &str| {
        let (_, rest) = element.split_once(&format!("{name}=\""))?;
        rest.split_once('"').map(|(value, _)| value)
    };
    let is_package = attribute("type").or(attribute("kind")) == Some("package");
    is_package.then_some(())?;
    Some(Installed {
        name: attribute("name")?.to_owned(),
        version: with_epoch(attribute("edition")?),
        arch: attribute("arch")?.to_owned(),
    })
}

fn command(places: &Places, root: &Path, arguments: &[String]) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec![TOOL.into(), "--non-interactive".into()];
    let mut set = |name: &str, value: PathBuf| command.extend([name.into(), value.into()]);
    set("--config", places.config().join("zypper.conf"));
    set("--root", root.to_path_buf());
    set("--reposd-dir", places.config().join("repos.d"));
    set("--raw-cache-dir", places.cache().join("raw"));
    set("--solv-cache-dir", places.cache().join("solv"));
    set("--pkg-cache-dir", places.cache().join("packages"));
    command.extend(arguments.iter().map(OsString::from));
    command
}

/// Writes zypper's configuration and one file for each repository.
fn configure(plan: &Plan, places: &Places) -> Result<(), BuildError> {
    let write =
        |path: PathBuf, text: &str| std::fs::write(&path, text).map_err(|error| BuildError::io("write", &path, error));
    let directory = places.config().join("repos.d");
    std::fs::create_dir_all(&directory).map_err(|error| BuildError::io("make", &directory, error))?;
    let main = format!(
        "[main]\narch = {}\nsolver.onlyRequires = {}\ncommit.downloadMode = DownloadInAdvance\n",
        plan.arch.machine, !plan.os.rpm.weak_dependencies
    );
    write(places.config().join("zypp.conf"), &main)?;
    write(places.config().join("zypper.conf"), "[main]\n")?;
    for repository in &plan.repositories {
        let text = section(repository, &rpm::file_url(&repository.key));
        write(directory.join(format!("{}.repo", repository.name)), &text)?;
    }
    Ok(())
}

/// A repository as zypper reads it. `gpgcheck` alone is content with signed metadata: `pkg_gpgcheck` is what refuses an unsigned
/// package in them.
fn section(repository: &Repository, key: &str) -> String {
    format!(
        "[{0}]\nname={0}\ntype=rpm-md\nbaseurl={1}\nenabled=1\nautorefresh=0\nkeeppackages=1\ngpgcheck=1\nrepo_gpgcheck={2}\n\
         pkg_gpgcheck=1\ngpgkey={key}\n",
        repository.name,
        repository.uri,
        u8::from(repository.signed_metadata)
    )
}

/// libzypp makes the directory of its cache inside the root as well. What of that path no package has is taken away. Packages have been
/// installed by now, and a link of theirs may be a part of the path: it must not lead onto the host.
fn remove_stub(context: &mut Context<'_, '_>, root: &Path) -> Result<(), BuildError> {
    let Some(own) = context.work.root().parent().map(Path::to_path_buf) else { return Ok(()) };
    let tree = Tree::open(root)?;
    if !tree.remove_all(&own)? {
        return Ok(());
    }
    for above in own.ancestors().skip(1).filter(|above| above.parent().is_some()) {
        let mut query: Vec<OsString> = ["rpm", "--root"].map(OsString::from).to_vec();
        query.extend([root.into(), "-qf".into(), above.into()]);
        let (owned, _) = rpm::run(context, root, &mut NoMeaning, query, None)?;
        // Not empty: something else is in it, so it has to stay.
        if owned || !tree.remove_empty(above) {
            break;
        }
    }
    Ok(())
}

/// Writes down which packages nobody asked for: each was named to zypper, so that it took exactly those.
fn mark(tree: &Tree, plan: &Plan, packages: &[Package]) -> Result<(), BuildError> {
    let names: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let mut text = "# Packages that nobody asked for\n".to_owned();
    for name in names.into_iter().filter(|name| !plan.packages.iter().any(|wanted| wanted == name)) {
        text.push_str(name);
        text.push('\n');
    }
    tree.write_text(AUTO_INSTALLED, &text)
}

/// What zypper prints in XML: progress, and the packages that it has chosen.
#[derive(Default)]
struct Summary {
    inside: bool,
    chosen: Vec<Installed>,
}

impl Meaning for Summary {
    fn of<'a>(&mut self, line: &'a str) -> Option<Event<'a>> {
        match line {
            "<to-install>" => self.inside = true,
            "</to-install>" => self.inside = false,
            _ if self.inside => self.chosen.extend(solvable(line)),
            _ => {}
        }
        // <message type="info">Retrieving package base-1-1.noarch (1/3),   5.4 KiB (    0   B unpacked)</message>
        // <progress id="install-resolvable" name="(1/3) Installing: base-1-1.noarch"/>
        let (what, name, count) = if let Some((_, rest)) = line.split_once(">Retrieving package ") {
            let (name, rest) = rest.split_once(" (")?;
            ("fetching", name, rest.split_once(')')?.0)
        } else {
            let (_, rest) = line.split_once("name=\"(")?;
            let (count, rest) = rest.split_once(") Installing: ")?;
            ("installing", rest.strip_suffix("\"/>")?, count)
        };
        let (done, total) = count.split_once('/')?;
        Some(Event::Item { what, name, done: done.parse().ok()?, total: total.parse().ok()? })
    }
}

/// Why zypper failed; for an unknown package, with names like it.
fn explain(context: &mut Context<'_, '_>, places: &Places, tail: Tail) -> BuildError {
    let error = reason(context, "working out the packages", tail);
    let BuildError::UnknownPackage { name, others, .. } = error else { return error };
    // Only helps the error along: without the names it is the same.
    let known = search(context, places, &search_arguments()).unwrap_or_default();
    let near = near(&name, known.iter().map(|package| package.name.as_str()));
    BuildError::UnknownPackage { name, near, others }
}

/// Why zypper failed, by what it printed last: as text, or as `<message type="error">` elements.
fn reason(context: &Context<'_, '_>, doing: &str, tail: Tail) -> BuildError {
    let mut unknown: Vec<String> = Vec::new();
    let mut untrusted = None;
    let mut unreachable = None;
    let lines: Vec<String> = tail.lines().map(plain).collect();
    for (index, line) in lines.iter().enumerate() {
        if let Some(name) = line.strip_prefix("No provider of '").and_then(|rest| rest.strip_suffix("' found."))
            && !unknown.iter().any(|known| known == name)
        {
            unknown.push(name.to_owned());
        }
        if let Some((package, why)) = line.split_once(": Signature verification failed [") {
            let package = package.split(' ').next().unwrap_or(package);
            let what = match why {
                why if why.contains("unsigned") => "is not signed",
                why if why.contains("not available") => "is signed by another key",
                _ => "is damaged, or its signature is bad",
            };
            untrusted.get_or_insert(format!("package {package} {what}"));
        }
        if let Some(rest) = line.strip_prefix("File 'repomd.xml' from repository '") {
            let (name, what) = rest.split_once("' ").unwrap_or((rest, ""));
            let what = what.split(['.', ',']).next().unwrap_or(what);
            untrusted.get_or_insert(format!("the index of {} {what}", uri(context.plan, name)));
        }
        if let Some(rest) = line.strip_prefix("Signature verification failed for file 'repomd.xml' from repository '") {
            let name = rest.split('\'').next().unwrap_or(rest);
            untrusted
                .get_or_insert(format!("the index of {} was changed after it was signed", uri(context.plan, name)));
        }
        // "Error message: …" follows two lines below.
        if let Some((_, address)) = line.split_once("Download (curl) error for '") {
            let why = lines[index..].iter().find_map(|line| line.strip_prefix("Error message: "));
            unreachable =
                Some((address.trim_end_matches(['\'', ':']).to_owned(), why.unwrap_or("no reason given").to_owned()));
        }
        if let Some((address, _)) = line.split_once("] Valid metadata not found at specified URL") {
            let address = address.split_once('|').map_or(address, |(_, address)| address);
            let why = lines.get(index + 2).map_or("it has no index", |line| line.trim_start_matches(" - "));
            unreachable.get_or_insert((address.to_owned(), why.to_owned()));
        }
    }
    // A repository that could not be used has no packages either: what came first is the reason.
    match (untrusted, unreachable, unknown.split_first()) {
        (Some(what), _, _) => BuildError::Untrusted(what),
        (None, Some((address, reason)), _) => BuildError::Unreachable { address, reason },
        (None, None, Some((name, others))) => {
            BuildError::UnknownPackage { name: name.clone(), near: Vec::new(), others: others.to_vec() }
        }
        (None, None, None) => {
            // "<description>Problem: nothing provides X needed by Y"
            let conflict =
                lines.iter().find_map(|line| line.split_once("Problem: ")).map(|(_, conflict)| conflict.to_owned());
            let reason = conflict.unwrap_or_else(|| tail.reason());
            BuildError::tool(doing, &reason, tail, context.work.tree())
        }
    }
}

fn uri<'a>(plan: &'a Plan, name: &'a str) -> &'a str {
    plan.repositories.iter().find(|repository| repository.name == name).map_or(name, |repository| &repository.uri)
}

/// A line without the marks of XML.
fn plain(line: &str) -> String {
    let text = line.split_once("<message type=\"error\">").map_or(line, |(_, text)| text);
    let text = text.split_once("</message>").map_or(text, |(text, _)| text);
    [("&apos;", "'"), ("&quot;", "\""), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")]
        .into_iter()
        .fold(text.to_owned(), |text, (mark, plain)| text.replace(mark, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::output::follow;

    #[test]
    fn the_summary_says_what_is_chosen_and_how_far_it_is() {
        let lines = "<install-summary download-size=\"17165\">\n<to-install>\n\
            <solvable type=\"package\" name=\"base\" edition=\"1:1-1\" arch=\"noarch\" summary=\"x\">\n\
            <description>x</description></solvable>\n\
            <solvable type=\"pattern\" name=\"all\" edition=\"1-1\" arch=\"noarch\">\n</to-install>\n\
            <solvable type=\"package\" name=\"other\" edition=\"1-1\" arch=\"noarch\">\n\
            <message type=\"info\">Retrieving package base-1-1.noarch (1/3),   5.4 KiB (    0   B unpacked)</message>\n\
            <progress id=\"install-resolvable\" name=\"(2/3) Installing: base-1-1.noarch\"/>\n";
        let (mut summary, mut seen) = (Summary::default(), Vec::new());
        let mut hear = |event: Event<'_>| {
            if let Event::Item { what, name, done, total } = event {
                seen.push(format!("{what} {name} {done}/{total}"));
            }
        };
        follow(lines.as_bytes(), std::io::sink(), &mut summary, &mut hear).unwrap();
        assert_eq!(seen, ["fetching base-1-1.noarch 1/3", "installing base-1-1.noarch 2/3"]);
        let [name, version, arch] = ["base", "1:1-1", "noarch"].map(str::to_owned);
        assert_eq!(summary.chosen, [Installed { name, version, arch }]);
    }

    #[test]
    fn an_epoch_is_written_where_it_is_not_nothing() {
        for (version, written) in [("0:1-1", "1-1"), ("2:1-1", "2:1-1")] {
            assert_eq!((edition(version), with_epoch(written).as_str()), (written, version));
        }
        assert_eq!(
            plain("<message type=\"error\">No provider of &apos;a&amp;b&apos; found.</message>"),
            "No provider of 'a&b' found."
        );
    }
}
