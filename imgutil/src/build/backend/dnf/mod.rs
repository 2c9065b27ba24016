//! EL and its relatives: dnf, the fourth and the fifth, with a configuration of its own. Nothing of the host's `/etc/dnf` and
//! `/etc/yum.repos.d` is read, and nothing of the tool's cache and logs comes into the tree.

mod history;

use super::rpm::{self, Fetched, Places};
use super::{Backend, Context, Installed, Package, Resolved, check_keys_and_machine};
use crate::build::near::near;
use crate::build::output::{Meaning, NoMeaning, Tail};
use crate::build::plan::{Plan, Repository};
use crate::build::tree::Tree;
use crate::build::{BuildError, Event};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The name on the host: the fourth on most releases, a link to the fifth where that has taken its place.
const TOOL: &str = "/usr/bin/dnf";
/// Beside the fourth, or alone.
const TOOL_5: &str = "/usr/bin/dnf5";
/// In an image: the first that it has. Small images of EL have the third alone.
const TOOLS_INSIDE: [&str; 4] = ["dnf", "dnf5", "microdnf", "yum"];
/// Where nothing is.
const NOWHERE: &str = "/nonexistent";

/// The back end.
pub(super) struct Dnf;

impl Backend for Dnf {
    fn check_host(&self, plan: &Plan) -> Result<(), BuildError> {
        if tool().is_none() {
            return Err(BuildError::NoTool { tool: "dnf", package: "dnf" });
        }
        rpm::check_tool("rpmkeys", "/usr/bin/rpmkeys", "rpm")?;
        rpm::refuse_unsigned(plan)?;
        check_keys_and_machine(plan)
    }

    fn resolve(&self, context: &mut Context<'_, '_>) -> Result<Resolved, BuildError> {
        let places = rpm::prepare(context)?;
        let packages = choose(context, &places, None)?;
        let snapshots = rpm::snapshots(context.plan, |repository| {
            Some(cache_of(&places, repository)?.join("repodata/repomd.xml"))
        })?;
        Ok(Resolved { packages, snapshots })
    }

    fn install(&self, context: &mut Context<'_, '_>, packages: &[Package]) -> Result<(), BuildError> {
        let places = rpm::prepare(context)?;
        if !places.scratch().exists() {
            // From a lock: nothing has been fetched yet.
            let versions = versions(context, &places, packages)?;
            rpm::check_versions(packages, &versions)?;
            let there = choose(context, &places, Some(packages))?;
            rpm::check_digests(packages, &there)?;
        }
        let root = context.work.root();
        configure(context, &places, Some(packages))?;
        rpm::open_root(context, &root)?;
        context.tools.stage("installing the packages")?;
        let mut arguments: Vec<OsString> = ["--cacheonly", "install"].map(OsString::from).to_vec();
        arguments.extend(context.plan.packages.iter().map(OsString::from));
        let tail = dnf(context, &places, &root, &mut Counter::installing(), arguments)?;
        if let Err(tail) = tail {
            return Err(explain(context, &places, "installing the packages", tail));
        }
        rpm::check_installed(context, "dnf", packages)?;
        history::tidy(context)?;
        rpm::settle(context)
    }

    fn maker(&self) -> Result<String, BuildError> {
        rpm::maker("dnf", tool().map_or(TOOL, |(program, _)| program))
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
        let program = TOOLS_INSIDE.into_iter().find(|name| tree.exists(format!("/usr/bin/{name}")));
        let program = program.ok_or_else(|| BuildError::NoManager { os: plan.os.name.clone(), manager: "dnf" })?;
        rpm::inside::take_keys(context)?;
        let unwanted = rpm::inside::unwanted(context)?;
        if !unwanted.is_empty() {
            context.tools.stage("removing packages")?;
            let command: Vec<&str> =
                [program, "-y", "remove"].into_iter().chain(unwanted.iter().map(String::as_str)).collect();
            if let Err(tail) = rpm::inside::manage_quietly(context, &command)? {
                return Err(reason(context, "removing packages", tail));
            }
        }
        context.tools.stage("installing the packages")?;
        let weak = format!("--setopt=install_weak_deps={}", u8::from(plan.os.rpm.weak_dependencies));
        let never = format!("--exclude={}", plan.remove.join(","));
        // A repository that cannot be read or checked is an error, and not passed over.
        let mut command = vec![program, "-y", "--setopt=skip_if_unavailable=0", weak.as_str()];
        command.extend((!plan.remove.is_empty()).then_some(never.as_str()));
        command.push("install");
        command.extend(plan.packages.iter().map(String::as_str));
        if let Err(tail) = rpm::inside::manage(context, &mut Counter::installing(), &command)? {
            let error = reason(context, "installing the packages", tail);
            let BuildError::UnknownPackage { name, others, .. } = error else { return Err(error) };
            let known = rpm::inside::names(context, &[program, "repoquery", "--quiet", "--qf", "%{name}\\n"]);
            let near = near(&name, known.lines());
            return Err(BuildError::UnknownPackage { name, near, others });
        }
        rpm::inside::settle(context)
    }

    fn write_repositories(&self, plan: &Plan, tree: &Tree) -> Result<(), BuildError> {
        const DIRECTORY: &str = "/etc/yum.repos.d";
        if plan.keeps_repositories {
            if plan.repositories.is_empty() {
                return Ok(());
            }
        } else {
            for name in tree.list(DIRECTORY)? {
                tree.remove(Path::new(DIRECTORY).join(name))?;
            }
        }
        let mut text = String::new();
        for repository in &plan.repositories {
            let key = format!("file://{}", rpm::key_in_image(tree, repository)?);
            text.push_str(&section(repository, &key));
        }
        let name = if plan.keeps_repositories { "recipe" } else { "image" };
        tree.write_text(format!("{DIRECTORY}/{name}.repo"), text.trim_start_matches('\n'))
    }
}

/// The program, and whether it is the fifth.
fn tool() -> Option<(&'static str, bool)> {
    let is_5 = |path: &Path| path.file_name().is_some_and(|name| name == "dnf5");
    match Path::new(TOOL).canonicalize() {
        Ok(program) => Some((TOOL, is_5(&program))),
        Err(_) => Path::new(TOOL_5).exists().then_some((TOOL_5, true)),
    }
}

/// Works out what the wanted packages make necessary, and fetches it: the packages are entered into the database of a root that is
/// thrown away, and unpacked nowhere. What that database then has is the answer, for either dnf, and without reading its tables.
/// `only` leaves nothing else to choose.
fn choose(
    context: &mut Context<'_, '_>,
    places: &Places,
    only: Option<&[Package]>,
) -> Result<Vec<Package>, BuildError> {
    let scratch = places.scratch();
    configure(context, places, only)?;
    rpm::open_root(context, &scratch)?;
    context.tools.stage("fetching the lists of packages")?;
    let mut arguments: Vec<OsString> = ["--setopt=tsflags=justdb", "install"].map(OsString::from).to_vec();
    arguments.extend(context.plan.packages.iter().map(OsString::from));
    if let Err(tail) = dnf(context, places, &scratch, &mut Counter::default(), arguments)? {
        return Err(explain(context, places, "working out the packages", tail));
    }
    let mut fetched = Fetched::default();
    for repository in &context.plan.repositories {
        match repository.uri.strip_prefix("file://") {
            // Used where they lie.
            Some(directory) => fetched.add(Path::new(directory), &repository.uri)?,
            None => {
                if let Some(cache) = cache_of(places, repository) {
                    fetched.add(&cache.join("packages"), &repository.uri)?;
                }
            }
        }
    }
    rpm::query(context, &scratch)?.iter().map(|chosen| fetched.package(chosen)).collect()
}

/// All versions that the repositories have of the packages.
fn versions(
    context: &mut Context<'_, '_>,
    places: &Places,
    packages: &[Package],
) -> Result<Vec<Installed>, BuildError> {
    configure(context, places, None)?;
    context.tools.stage("fetching the lists of packages")?;
    let mut names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    names.dedup();
    let format = "%{name}\\t%{epoch}:%{version}-%{release}\\t%{arch}\\n";
    repoquery(context, places, format, &names).and_then(|text| rpm::parse_query(&text))
}

/// What `dnf repoquery` says of packages, or of all if none is named.
fn repoquery(
    context: &mut Context<'_, '_>,
    places: &Places,
    format: &str,
    names: &[&str],
) -> Result<String, BuildError> {
    // Not in the tree's root: the pages of a database that is there already would be in another order after the installation.
    let root = places.scratch();
    rpm::make_places(&root, context.plan)?;
    let arguments = ["repoquery", "--quiet", "--qf", format].iter().chain(names).map(OsString::from).collect();
    let command = command(context.plan, places, &root, arguments);
    match rpm::ask(context, &root, &mut NoMeaning, command)? {
        Ok(text) => Ok(text),
        Err(tail) => Err(reason(context, "listing the packages", tail)),
    }
}

/// Runs dnf on `root`. The inner error is its failure.
fn dnf(
    context: &mut Context<'_, '_>,
    places: &Places,
    root: &Path,
    meaning: &mut dyn Meaning,
    arguments: Vec<OsString>,
) -> Result<Result<(), Tail>, BuildError> {
    let command = command(context.plan, places, root, arguments);
    let (succeeded, tail) = rpm::run(context, root, meaning, command, None)?;
    Ok(if succeeded { Ok(()) } else { Err(tail) })
}

fn command(plan: &Plan, places: &Places, root: &Path, arguments: Vec<OsString>) -> Vec<OsString> {
    let (program, is_5) = tool().unwrap_or((TOOL, false));
    let option = |name: &str, value: &Path| {
        let mut option = OsString::from(format!("{name}="));
        option.push(value);
        option
    };
    let mut command = vec![
        program.into(),
        "--assumeyes".into(),
        option("--config", &configuration(places)),
        option("--installroot", root),
        format!("--releasever={}", plan.os.release).into(),
        format!("--forcearch={}", plan.arch.machine).into(),
        option("--setopt=cachedir", &outside(root, &places.cache().join("dnf"))),
        option("--setopt=logdir", &outside(root, &places.logs())),
    ];
    if is_5 {
        // Otherwise it looks for its configuration inside the root.
        command.push("--use-host-config".into());
    }
    command.extend(arguments);
    command
}

/// A path that means the same inside `root` to a tool that puts `root` before it (the fourth dnf does, also for its cache), and to
/// one that does not: it goes up to `/` first.
fn outside(root: &Path, path: &Path) -> PathBuf {
    let mut outside = PathBuf::from("/");
    outside.extend(root.components().map(|_| ".."));
    outside.extend(path.components().skip(1));
    outside
}

fn configuration(places: &Places) -> PathBuf {
    places.config().join("dnf.conf")
}

/// Where dnf keeps what it fetched of a repository: a directory of its name and a digest.
fn cache_of(places: &Places, repository: &Repository) -> Option<PathBuf> {
    let entries = std::fs::read_dir(places.cache().join("dnf")).ok()?;
    entries.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let digest = name.strip_prefix(repository.name.as_str()).and_then(|rest| rest.strip_prefix('-'));
        digest.is_some_and(|digest| digest.len() == 16 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
    })
}

/// Writes dnf's configuration. With `only`, no package but those can be chosen.
fn configure(context: &Context<'_, '_>, places: &Places, only: Option<&[Package]>) -> Result<(), BuildError> {
    let rpm = &context.plan.os.rpm;
    let mut text = format!(
        "[main]\ngpgcheck=1\nlocalpkg_gpgcheck=1\nplugins=0\nreposdir={NOWHERE}\nvarsdir={NOWHERE}\nkeepcache=1\nbest=1\n\
         skip_if_unavailable=0\ncheck_config_file_age=0\nmetadata_expire=-1\ninstall_weak_deps={}\n",
        u8::from(rpm.weak_dependencies)
    );
    // Writing to a String cannot fail.
    if let Some(platform) = &rpm.platform {
        let _ = writeln!(text, "module_platform_id={platform}");
    }
    let excluded: Vec<&str> = rpm.exclude.iter().chain(&context.plan.remove).map(String::as_str).collect();
    if !excluded.is_empty() {
        let _ = writeln!(text, "exclude={}", excluded.join(","));
    }
    if let Some(packages) = only {
        let exact: Vec<String> =
            packages.iter().map(|one| format!("{}-{}.{}", one.name, one.version, one.arch)).collect();
        let _ = writeln!(text, "includepkgs={}", exact.join(","));
    }
    for repository in &context.plan.repositories {
        text.push_str(&section(repository, &rpm::file_url(&repository.key)));
    }
    let path = configuration(places);
    std::fs::write(&path, text).map_err(|error| BuildError::io("write", &path, error))
}

/// A repository as dnf reads it.
fn section(repository: &Repository, key: &str) -> String {
    format!(
        "\n[{0}]\nname={0}\nbaseurl={1}\nenabled=1\ngpgcheck=1\nrepo_gpgcheck={2}\ngpgkey={key}\n",
        repository.name,
        repository.uri,
        u8::from(repository.signed_metadata)
    )
}

/// Counts what dnf prints.
#[derive(Default)]
struct Counter {
    /// Whether packages are installed, and not merely entered into a database.
    installing: bool,
}

impl Counter {
    fn installing() -> Self {
        Self { installing: true }
    }
}

impl Meaning for Counter {
    fn of<'a>(&mut self, line: &'a str) -> Option<Event<'a>> {
        if line == "Dependencies resolved." && !self.installing {
            return Some(Event::Stage("fetching the packages"));
        }
        if let Some(rest) = line.strip_prefix('(') {
            // "(7/170): bash-5.2.15-2.x86_64.rpm                12 MB/s | 1.5 MB     00:00"
            let (count, rest) = rest.split_once("): ")?;
            let (done, total) = counted(count)?;
            return Some(Event::Item { what: "fetching", name: rest.split(' ').next()?, done, total });
        }
        // "  Installing       : bash-5.2.15-2+b13.x86_64                     61/170"
        let rest = line.trim_start().strip_prefix("Installing ")?.trim_start().strip_prefix(": ")?;
        let mut words = rest.split_whitespace();
        let (name, count) = (words.next()?, words.next_back()?);
        let (done, total) = counted(count)?;
        self.installing.then_some(Event::Item { what: "installing", name, done, total })
    }
}

/// "61/170".
fn counted(text: &str) -> Option<(usize, usize)> {
    let (done, total) = text.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// Why dnf failed; for an unknown package, with names like it.
fn explain(context: &mut Context<'_, '_>, places: &Places, doing: &str, tail: Tail) -> BuildError {
    let error = reason(context, doing, tail);
    let BuildError::UnknownPackage { name, others, .. } = error else { return error };
    // Only helps the error along: without the names it is the same.
    let known = repoquery(context, places, "%{name}\\n", &[]).unwrap_or_default();
    let near = near(&name, known.lines());
    BuildError::UnknownPackage { name, near, others }
}

/// Why dnf failed, by what it printed last.
fn reason(context: &Context<'_, '_>, doing: &str, tail: Tail) -> BuildError {
    let plan = context.plan;
    let mut unknown: Vec<String> = Vec::new();
    for name in tail.after("No match for argument: ") {
        if !unknown.iter().any(|known| known == name) {
            unknown.push(name.to_owned());
        }
    }
    if let Some((name, others)) = unknown.split_first() {
        return BuildError::UnknownPackage { name: name.clone(), near: Vec::new(), others: others.to_vec() };
    }
    if let Some(what) = untrusted(plan, &tail) {
        return BuildError::Untrusted(what);
    }
    if let Some((address, reason)) = unreachable(plan, &tail) {
        return BuildError::Unreachable { address, reason };
    }
    // "  - nothing provides X needed by Y" stands below "Problem: conflicting requests", and "  - conflicting requests" below
    // "Problem: package Y requires X, but none of the providers can be installed".
    let said = |line: &str| -> Option<String> {
        let line = line.trim_start();
        let what = line.strip_prefix("- ").or_else(|| Some(line.strip_prefix("Problem")?.split_once(": ")?.1))?;
        (what != "conflicting requests").then(|| what.to_owned())
    };
    let conflict = tail.lines().find_map(said);
    let reason = conflict.unwrap_or_else(|| tail.reason());
    BuildError::tool(doing, &reason, tail, context.work.tree())
}

/// What is not signed as it must be: the metadata of a repository, or a package.
fn untrusted(plan: &Plan, tail: &Tail) -> Option<String> {
    for line in tail.lines() {
        if let Some((repository, what)) = failed_metadata(plan, line)
            && (what.contains("GPG signature") || what.contains("GPG verification"))
        {
            let what =
                if what.contains("not available") { "it is not signed" } else { "the signature is not of its key" };
            return Some(format!("the index of {}: {what}", repository.uri));
        }
        let package = line.strip_prefix("Package ").and_then(|rest| rest.strip_suffix(" is not signed"));
        if let Some(package) = package {
            return Some(format!("package {package} is not signed"));
        }
        if let Some((_, package)) = line.split_once("Failing package is: ") {
            return Some(format!("package {package} is signed by another key"));
        }
        // "Package "NAME" from local repository "R" has incorrect checksum", "[MIRROR] FILE: Downloading successful, but checksum
        // doesn't match. …"
        let local = line.strip_prefix("Package \"").filter(|_| line.ends_with("has incorrect checksum"));
        let fetched = line.strip_prefix("[MIRROR] ").filter(|_| line.contains("checksum doesn't match"));
        if let Some(package) = local.or(fetched).and_then(|rest| rest.split(['"', ' ']).next()) {
            return Some(format!("package {} is not the file that the index names", package.trim_end_matches(':')));
        }
        if let Some(package) = line.strip_prefix("Problem opening package ") {
            return Some(format!("package {package} is damaged, or its signature is bad"));
        }
    }
    None
}

/// A repository that cannot be reached, and why.
fn unreachable(plan: &Plan, tail: &Tail) -> Option<(String, String)> {
    // "  - Curl error (7): Couldn't connect to server for http://m/repodata/repomd.xml [Failed to connect …]" stands before.
    let detail = tail.lines().find_map(|line| {
        let line = line.trim_start().strip_prefix("- ")?;
        Some(line.strip_prefix("Curl error ").and_then(|rest| rest.split_once("): ")).map_or(line, |(_, rest)| rest))
    });
    let (repository, what) = tail.lines().find_map(|line| failed_metadata(plan, line))?;
    Some((repository.uri.clone(), detail.unwrap_or(what).to_owned()))
}

/// "Error: Failed to download metadata for repo 'NAME': WHY".
fn failed_metadata<'a>(plan: &'a Plan, line: &'a str) -> Option<(&'a Repository, &'a str)> {
    let (name, what) = line.strip_prefix("Error: Failed to download metadata for repo '")?.split_once("': ")?;
    Some((plan.repositories.iter().find(|repository| repository.name == name)?, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::output::follow;

    #[test]
    fn progress_counts_packages() {
        let lines = "main                       1.4 kB/s | 488  B     00:00\nDependencies resolved.\n\
            (1/2): bash-5.2-1.x86_64.rpm        12 MB/s | 1.5 MB     00:00\n\
              Installing       : bash-5.2-1.x86_64                  2/2 \n";
        let mut seen = Vec::new();
        for mut counter in [Counter::default(), Counter::installing()] {
            let mut hear = |event: Event<'_>| match event {
                Event::Stage(stage) => seen.push(stage.to_owned()),
                Event::Item { what, name, done, total } => seen.push(format!("{what} {name} {done}/{total}")),
            };
            follow(lines.as_bytes(), std::io::sink(), &mut counter, &mut hear).unwrap();
        }
        // Packages that are merely entered into the database of a root that is thrown away are not called installed.
        let fetched = "fetching bash-5.2-1.x86_64.rpm 1/2";
        assert_eq!(seen, ["fetching the packages", fetched, fetched, "installing bash-5.2-1.x86_64 2/2"]);
    }

    #[test]
    fn a_path_outside_means_the_same_with_and_without_the_root() {
        let outside = outside(Path::new("/a/b/root"), Path::new("/a/b/cache"));
        assert_eq!(outside, Path::new("/../../../../a/b/cache"));
        let scratch = tempfile::tempdir().unwrap();
        let (root, cache) = (scratch.path().join("root"), scratch.path().join("cache"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&cache).unwrap();
        let outside = super::outside(&root, &cache);
        assert_eq!(outside.canonicalize().unwrap(), cache.canonicalize().unwrap());
        let inside = root.join(outside.strip_prefix("/").unwrap());
        assert_eq!(inside.canonicalize().unwrap(), cache.canonicalize().unwrap());
    }
}
