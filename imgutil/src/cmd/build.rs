//! `imgutil build`.

use crate::build::cache::DEFAULT_CACHE;
use crate::build::{self, BuildError, Built, Event, FromImage, LockMode, NODE_FILES, Options};
use crate::exec::{ASK_FOR_THE_END, SignalWatch};
use crate::oci::Source;
use crate::recipe::{Base, Item, PackageWord, Recipe, Uri};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fs::Mode;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// In a log, a stage with many steps says so often how far it is.
const EVERY: Duration = Duration::from_secs(10);

/// What a build without a tree to make says.
const EXPLANATION: &str = "\
imgutil build makes a root tree from a distribution's packages. Name the tree to make:

    imgutil build TREE                       a diskless node of Debian 12
    imgutil build --os debian-13 TREE        another system (imgutil build --list-os)
    imgutil build -p vim,htop TREE           with more packages
    imgutil build --minimal TREE             only essential packages, no kernel
    imgutil build --from oci:DIR:TAG TREE    a container image instead; with -f or -p, and more
    imgutil build -f recipe.toml TREE        everything said in a file (docs/recipes.md)

Then: imgutil exec TREE to change it, imgutil pack TREE to make an image of it. All options: imgutil build --help
";

/// Build a root tree from a distribution's packages (as root)
///
/// The tree boots as a diskless node: kernel, systemd, sshd, the agent, and an initramfs that every later kernel update
/// makes again. Signatures of the archives are always checked. TREE appears when it is complete; a failed or interrupted
/// build leaves nothing.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "imgutil build [-f RECIPE] [--os OS] [--arch ARCH] [-p PACKAGES…] [OPTIONS] TREE",
    after_help = "Examples:\n  imgutil build ./tree\n  imgutil build --os debian-13 -p htop,strace ./tree\n  imgutil build --arch arm64 --minimal ./arm-tree\n  imgutil build --from oci:./layout:latest -p openssh-server ./tree\n  imgutil build -f recipe.toml --locked ./tree"
)]
pub struct Args {
    /// Recipe in TOML: packages, repositories, files, users, services and commands (docs/recipes.md)
    #[arg(short = 'f', long, value_name = "RECIPE")]
    file: Option<PathBuf>,
    /// Operating system, as --list-os shows them, or the path of a description like theirs [default: debian-12]
    #[arg(long)]
    os: Option<String>,
    /// Architecture, as amd64 or arm64 [default: the host's]
    #[arg(long)]
    arch: Option<String>,
    /// More packages to install; -NAME leaves one out
    #[arg(short = 'p', long, value_delimiter = ',', allow_hyphen_values = true, value_name = "PACKAGES…")]
    packages: Vec<String>,
    /// Main archive instead of the distribution's own
    #[arg(long, value_name = "URL")]
    mirror: Option<Uri>,
    /// Archive of security updates instead of the distribution's own; empty for none
    #[arg(long, value_name = "URL")]
    security_mirror: Option<Uri>,
    /// Lock file with every package's exact version [default: RECIPE with the ending .lock]
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Build exactly what the lock says, or nothing
    #[arg(long)]
    locked: bool,
    /// Take the newest packages and write the lock anew
    #[arg(long, conflicts_with = "locked")]
    update_lock: bool,
    /// Directory of base trees that were built before
    #[arg(long, value_name = "DIR", default_value = DEFAULT_CACHE)]
    cache: PathBuf,
    /// Neither use nor keep base trees
    #[arg(long, conflicts_with = "cache")]
    no_cache: bool,
    /// Only essential packages and apt: no kernel, no agent
    #[arg(long)]
    minimal: bool,
    /// Begin with a container image: oci:DIR[:TAG], or an archive of podman save or docker save. With a recipe or packages, its own
    /// package manager installs what makes a node of it (not with --minimal) and what they say; else it stays as it is
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["locked", "update_lock", "lock", "cache", "no_cache"])]
    from: Option<Source>,
    /// Directory with the node's files in the layout of the target's root
    #[arg(long, value_name = "DIR", default_value = NODE_FILES)]
    node_files: PathBuf,
    /// Show the operating systems that can be built, and end
    #[arg(long)]
    list_os: bool,
    /// Show them in JSON
    #[arg(long, requires = "list_os")]
    json: bool,
    /// The tree to make
    // `-p A B TREE`: what follows the first package cannot be told from TREE but by its place.
    #[arg(value_name = "TREE")]
    rest: Vec<PathBuf>,
}

/// TREE is the last word; words before it are packages, if `-p` began a list of them.
fn split_rest(mut rest: Vec<PathBuf>, packages: &mut Vec<String>) -> anyhow::Result<PathBuf> {
    let tree = rest.pop().context("give the tree to make")?;
    if let Some(first) = rest.first()
        && packages.is_empty()
    {
        anyhow::bail!("one tree at a time: '{}' and '{}' were given", first.display(), tree.display());
    }
    packages.extend(rest.iter().map(|word| word.display().to_string()));
    Ok(tree)
}

/// `SOURCE_DATE_EPOCH`, as reproducible-builds.org defines it.
fn source_date_epoch() -> anyhow::Result<Option<i64>> {
    let Some(value) = std::env::var_os("SOURCE_DATE_EPOCH").filter(|value| !value.is_empty()) else { return Ok(None) };
    let seconds = value.to_str().and_then(|text| text.parse().ok()).filter(|seconds| *seconds >= 0);
    seconds.map(Some).context("SOURCE_DATE_EPOCH is no number of seconds since 1970")
}

/// Runs it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.list_os {
        return list_os(args.json);
    }
    if args.rest.is_empty() {
        eprint!("{EXPLANATION}");
        return Ok(ExitCode::from(2));
    }
    // What is made for an image has the same modes whoever builds it.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let options = options(args)?;
    let signals = SignalWatch::start(&ASK_FOR_THE_END)?;
    let display = Display::new();
    let result = build::build(&options, &mut |event| display.show(event), Some(&signals));
    display.clear();
    match result {
        Ok(built) => {
            say(&built);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            if let BuildError::Tool { tail, .. } = &error {
                eprintln!("imgutil: the last lines of the log:");
                for line in tail.lines() {
                    eprintln!("    {line}");
                }
            }
            let code = match &error {
                BuildError::Interrupted { signal, .. } => u8::try_from(*signal as i32 + 128).unwrap_or(1),
                _ => 1,
            };
            let from = options.from.map(|from| format!(" from '{}'", from.source)).unwrap_or_default();
            let error = anyhow::Error::new(error).context(format!("build '{}'{from}", options.tree.display()));
            eprintln!("imgutil: error: {}", super::error_line(&error));
            Ok(ExitCode::from(code))
        }
    }
}

/// What the command line and its recipe ask for.
fn options(mut args: Args) -> anyhow::Result<Options> {
    let tree = split_rest(args.rest, &mut args.packages)?;
    let as_it_is = args.file.is_none()
        && args.packages.is_empty()
        && (args.os.is_none() && args.mirror.is_none() && args.security_mirror.is_none());
    let mut recipe = args.file.as_deref().map(Recipe::read).transpose()?.unwrap_or_default();
    // A path on the command line starts from here, not from the recipe.
    let os = args.os.map(|os| if build::is_os_file(&os) { absolute(&os) } else { Ok(os) }).transpose()?;
    recipe.os = os.or(recipe.os);
    recipe.arch = args.arch.or(recipe.arch);
    recipe.mirror = args.mirror.or(recipe.mirror);
    recipe.security_mirror = args.security_mirror.or(recipe.security_mirror);
    for word in args.packages {
        recipe.packages.push(Item::always(word.parse::<PackageWord>().map_err(anyhow::Error::msg)?));
    }
    if args.minimal {
        recipe.base = Some(Base::Minimal);
    }
    let from = args.from.map(|source| FromImage { source, as_it_is });
    let lock = args.lock.or_else(|| args.file.as_deref().map(|file| file.with_extension("lock")));
    let lock_mode = match (args.locked, args.update_lock) {
        (false, false) => LockMode::Use,
        (_, _) if lock.is_none() => anyhow::bail!("without a recipe there is no lock: name it with --lock"),
        (true, _) => LockMode::Exact,
        (false, true) => LockMode::Update,
    };
    Ok(Options {
        tree,
        node_files: (recipe.base.unwrap_or_default() == Base::Node).then_some(args.node_files),
        recipe,
        // What an image's own package manager installs is in no lock, and its tree in no cache.
        lock: lock.filter(|_| from.is_none()),
        lock_mode,
        cache: (!args.no_cache && from.is_none()).then_some(args.cache),
        from,
        epoch: source_date_epoch()?,
    })
}

fn say(built: &Built) {
    let kernels = match (&built.image, built.kernels.is_empty()) {
        (None, true) => ", kernel none".to_owned(),
        (Some(_), true) => String::new(),
        (_, false) => format!(", kernel {}", built.kernels.join(", ")),
    };
    let locked = built.locked.as_ref().map(|day| format!(", packages as locked on {day}")).unwrap_or_default();
    let from = built.image.as_ref().map(|digest| format!(", from {}", digest.as_str())).unwrap_or_default();
    let (tree, seconds) = (built.tree.display(), built.took.as_secs());
    println!("built '{tree}': {} {}{kernels}{locked}{from}, in {seconds} s", built.os, built.arch);
    let taken_out = built.taken_out.summary();
    if built.image.is_some() && !taken_out.is_empty() {
        println!("taken out of it: {taken_out}");
    }
}

fn absolute(path: &str) -> anyhow::Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("cannot use '{path}'"))?;
    Ok(path.display().to_string())
}

fn list_os(json: bool) -> anyhow::Result<ExitCode> {
    let known = build::known_os();
    if json {
        println!("{}", serde_json::to_string_pretty(&known)?);
    } else {
        for os in known {
            let note = if os.tested { "" } else { " (untested)" };
            println!("{:<16} {}{note}", os.name, os.architectures.join(", "));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line that changes on a terminal, plain lines in a log.
enum Display {
    Bar(ProgressBar),
    Lines(std::sync::Mutex<Instant>),
}

impl Display {
    fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(std::sync::Mutex::new(Instant::now()));
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {prefix} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::Bar(bar)
    }

    fn show(&self, event: Event<'_>) {
        match (self, event) {
            (Self::Bar(bar), Event::Stage(stage)) => {
                bar.set_prefix(stage.to_owned());
                bar.set_message("");
            }
            (Self::Bar(bar), Event::Item { what, name, done, total }) => {
                bar.set_message(format!("{what} {name} ({done} of {total})"));
            }
            (Self::Lines(last), event) => {
                let Ok(mut last) = last.lock() else { return };
                match event {
                    Event::Stage(stage) => eprintln!("imgutil: {stage}"),
                    Event::Item { what, name, done, total } if last.elapsed() >= EVERY => {
                        eprintln!("imgutil: {what} {name} ({done} of {total})");
                    }
                    Event::Item { .. } => return,
                }
                *last = Instant::now();
            }
        }
    }

    fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_the_tree() {
        type Words = &'static [&'static str];
        struct Case(Words, Words, Option<(&'static str, Words)>);
        let cases = [
            Case(&[], &["tree"], Some(("tree", &[]))),
            Case(&["vim"], &["tree"], Some(("tree", &["vim"]))),
            Case(&["vim"], &["hello", "less", "tree"], Some(("tree", &["vim", "hello", "less"]))),
            Case(&[], &["one", "two"], None),
        ];
        for Case(packages, rest, expected) in cases {
            let mut names: Vec<String> = packages.iter().map(ToString::to_string).collect();
            let tree = split_rest(rest.iter().map(PathBuf::from).collect(), &mut names);
            match expected {
                Some((path, all)) => {
                    assert_eq!(tree.unwrap(), PathBuf::from(path));
                    assert_eq!(names, all);
                }
                None => assert!(tree.is_err()),
            }
        }
    }
}
