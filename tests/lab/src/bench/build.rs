//! Table *build*: `imgutil build` of a diskless Debian 12 beside plain mmdebstrap with the same packages, both from the archive; and
//! the same build again with another command in its recipe, and with another file, beside its first time. Ours also works out and writes the lock, checks
//! what was installed against it, keeps the base tree in its cache, and syncs the tree.

use super::{Bar, Lab, PAIRS, Paired, Row, Table, Usage, measure, pairs};
use crate::process::{run, text, tied};
use anyhow::Context as _;
use std::cell::RefCell;
use std::path::Path;
use std::process::Command;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The archives that `imgutil build` uses for Debian 12.
const ARCHIVES: [&str; 3] = [
    "http://deb.debian.org/debian bookworm",
    "http://deb.debian.org/debian bookworm-updates",
    "http://deb.debian.org/debian-security bookworm-security",
];
/// A usual file system has its links from the start, as ours has them.
const MERGED_USR: &str = "--hook-directory=/usr/share/mmdebstrap/hooks/merged-usr";

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    // The lock says which packages the peer is to install, so one build goes before all others; nothing of it is measured.
    lab.say("build: choosing the packages");
    std::fs::create_dir(lab.dir.join("node-files")).context("making a folder")?;
    ours(lab, ("true", "first"), &["--no-cache", "--update-lock"])?;
    let packages = locked(&lab.dir.join("recipe.lock"))?;

    let (commands, files) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    lab.say(&format!("build: {PAIRS} pairs of builds"));
    let first = || {
        let cache = lab.dir.join("cache");
        if cache.exists() {
            std::fs::remove_dir_all(&cache).context("removing the cache")?;
        }
        let usage = ours(lab, ("true", "first"), &["--cache", "cache", "--update-lock"])?;
        commands.borrow_mut().push(ours(lab, ("echo again > /etc/motd", "first"), &["--cache", "cache"])?);
        files.borrow_mut().push(ours(lab, ("true", "again"), &["--cache", "cache"])?);
        Ok(usage)
    };
    let both = pairs(PAIRS, first, || peer(lab, &packages))?;

    let mut table = Table::new("build");
    let version = text(tied("mmdebstrap").arg("--version")).unwrap_or_default();
    table.facts.push(format!("{} packages of Debian 12, fetched from the archive each time", packages.len()));
    table.facts.push(format!("peer: {}, --variant=minbase, the same packages by name", version.trim()));
    table.facts.push("neither avoids syncs more than mmdebstrap does by itself; ours has no node files".to_owned());
    let wall: fn(&Usage) -> f64 = |usage| usage.wall;
    let cpu: fn(&Usage) -> f64 = |usage| usage.cpu;
    table.rows.push(Row::paired("first build: wall", "s", "mmdebstrap", &Paired::of(&both, wall), Bar::AtMost(1.1)));
    table.rows.push(Row::paired("first build: CPU", "s", "mmdebstrap", &Paired::of(&both, cpu), Bar::None));
    let mut first = both.0;
    for (what, again) in [("another command", commands), ("another file", files)] {
        let both = (again.into_inner(), first);
        let row = |figure: &str| format!("{what}: {figure}");
        let walls = Paired::of(&both, wall);
        table.rows.push(Row::paired(&row("wall"), "s", "first build", &walls, Bar::AtMost(0.5)));
        table.rows.push(Row::paired(&row("CPU"), "s", "first build", &Paired::of(&both, cpu), Bar::None));
        first = both.1;
    }
    Ok(table)
}

fn ours(lab: &Lab<'_>, (command, text): (&str, &str), more: &[&str]) -> anyhow::Result<Usage> {
    let recipe =
        format!("os = \"debian-12\"\nrun = [\"{command}\"]\n[[file]]\npath = \"/etc/banner\"\nsource = \"banner\"\n");
    std::fs::write(lab.dir.join("recipe.toml"), recipe).context("writing the recipe")?;
    std::fs::write(lab.dir.join("banner"), text).context("writing a file of the recipe")?;
    let mut build = Command::new(lab.bins.path("imgutil"));
    build.args(["build", "-f", "recipe.toml", "--node-files", "node-files"]).args(more).arg("tree");
    let usage = measure(build.current_dir(lab.dir))?;
    remove(&lab.dir.join("tree"))?;
    Ok(usage)
}

fn peer(lab: &Lab<'_>, packages: &[String]) -> anyhow::Result<Usage> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--format=directory", "--variant=minbase", MERGED_USR]);
    command.arg(format!("--include={}", packages.join(","))).args(["bookworm", "tree"]);
    for archive in ARCHIVES {
        command.arg(format!("deb [signed-by={KEYRING}] {archive} main non-free-firmware"));
    }
    let usage = measure(command.current_dir(lab.dir))?;
    remove(&lab.dir.join("tree"))?;
    Ok(usage)
}

fn remove(tree: &Path) -> anyhow::Result<()> {
    run(tied("rm").args(["-rf", "--one-file-system"]).arg(tree)).context("removing a tree").map(drop)
}

/// Names of the packages in a lock, which is TOML.
fn locked(lock: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(lock).with_context(|| format!("reading '{}'", lock.display()))?;
    let name = |line: &str| Some(line.strip_prefix("name = \"")?.strip_suffix('"')?.to_owned());
    let names: Vec<String> = text.lines().filter_map(name).collect();
    anyhow::ensure!(names.len() > 100, "the lock of a node has {} packages", names.len());
    Ok(names)
}
