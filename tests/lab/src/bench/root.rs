//! Table *root*: a root file system over the network, beside `rclone mount`, `httpdirfs` and the local file. The same squashfs everywhere,
//! ours sealed, theirs plain; the same HTTPS server; the same loop device and squashfs above it.

use super::mounts::{Kind, Remote, Source, Tree, drop_caches};
use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, PAIRS, Paired, Row, Table, measure, pairs, reads};
use crate::Namespace;
use crate::delay::{Delay, FAR, NEAR};
use crate::process::{cpu, resident, run, text, tied};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Files of the tree, of sizes as in /usr.
const FILES: usize = 4000;
/// Links: name, and the delay of one way.
const LINKS: [(&str, Duration); 3] =
    [("loopback", Duration::ZERO), ("1 ms", Duration::from_micros(500)), ("5 ms", Duration::from_micros(2500))];
/// Readers side by side.
const READERS: [usize; 3] = [1, 8, 32];
/// Seconds of one measurement of random reads.
const SECONDS: u64 = 3;
/// A link that costs more than this share of a core distorts what is measured over it.
const CARRIER_LIMIT: f64 = 0.5;
const PEERS: [Kind; 3] = [Kind::Rclone, Kind::RcloneCache, Kind::Httpdirfs];

struct Input {
    /// Holds `image.moor` and `plain.squashfs`.
    web: PathBuf,
    key: PathBuf,
    size: f64,
}

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("root");
    let input = input(lab)?;
    let authority = Authority::new(lab.dir)?;
    table.facts.push(format!("squashfs of {FILES} files, {:.0} MB; ours is sealed", input.size / 1e6));
    let version = |program: &str| {
        text(tied(program).arg("--version")).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
    };
    table.facts.push(format!("peers: {}, httpdirfs of the distribution, both from the plain file", version("rclone")));
    for (name, one_way) in LINKS {
        link(lab, &mut table, &input, &authority, name, one_way)?;
    }
    Ok(table)
}

/// The tree is taken from this machine, packed once, and read back for its squashfs.
fn input(lab: &Lab<'_>) -> anyhow::Result<Input> {
    let web = lab.cache.join("root-web");
    let key = lab.cache.join("root.key");
    let plain = web.join("plain.squashfs");
    if !plain.exists() {
        lab.say("root: packing a tree of this machine's files");
        let (tree, made) = (lab.dir.join("root-tree"), lab.dir.join("web"));
        std::fs::create_dir_all(&tree)?;
        std::fs::create_dir_all(&made)?;
        // Shuffled by a fixed key, so that large and small files come as in a system.
        let choose = format!(
            "find /usr/lib /usr/share /usr/bin -xdev -type f -size -4096k | LC_ALL=C sort | \
             shuf --random-source=/usr/bin/find -n {FILES} | cpio -pdm --quiet '{}'",
            tree.display()
        );
        run(tied("sh").args(["-c", &choose])).context("choosing files")?;
        // An interrupted run leaves a key that no image has.
        let _ = std::fs::remove_file(&key);
        run(tied(lab.bins.path("imgutil"))
            .arg("pack")
            .arg(&tree)
            .arg("-o")
            .arg(made.join("image.moor"))
            .arg("--key-file")
            .arg(&key))?;
        let authority = Authority::new(lab.dir)?;
        let server = Web::start((lab.dir, "packing"), ("127.0.0.1", 8470), None, Conduct::Good(&made))?;
        let remote =
            Source { lab, authority: &authority, namespace: None, key: &key }.mount(Kind::Ours, &[server.url("")])?;
        std::fs::copy(remote.file(), made.join("plain.squashfs")).context("reading the squashfs")?;
        drop(remote);
        run(tied("mv").arg(&made).arg(&web))?;
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let size = plain.metadata()?.len() as f64;
    Ok(Input { web, key, size })
}

fn link(
    lab: &Lab<'_>,
    table: &mut Table,
    input: &Input,
    authority: &Authority,
    name: &str,
    one_way: Duration,
) -> anyhow::Result<()> {
    lab.say(&format!("root: {name}"));
    let (near, far) = (Namespace::new()?, Namespace::new()?);
    let is_far = !one_way.is_zero();
    let mut delay = if is_far { Some(Delay::between(&near, &far, one_way)?) } else { None };
    let (server_place, address) = if is_far { (Some(&far), FAR) } else { (Some(&near), "127.0.0.1") };
    let server = Web::start(
        (lab.dir, &format!("web-{}", one_way.as_micros())),
        (address, 8471),
        server_place,
        Conduct::Good(&input.web),
    )?;
    let urls = [server.url("")];
    let source = Source { lab, authority, namespace: Some(&near), key: &input.key };
    let carried = delay.as_mut().map(Delay::cpu).transpose()?;
    let begun = Instant::now();

    if is_far {
        let ping = text(&mut near.enter(tied("ping").args(["-q", "-c", "20", "-i", "0.05", FAR])))?;
        table.facts.push(format!("{name}: {} (from {NEAR})", ping.lines().last().unwrap_or_default().trim()));
    }
    let curl = || -> anyhow::Result<f64> {
        let mut command = near.enter(
            tied("curl")
                .args(["-sS", "-o", "/dev/null", "--cacert"])
                .arg(authority.file())
                .arg(server.url("plain.squashfs")),
        );
        let begun = Instant::now();
        run(&mut command)?;
        Ok(input.size / 1e6 / begun.elapsed().as_secs_f64())
    };
    let ours = source.mount(Kind::Ours, &urls)?;
    let both = pairs(PAIRS, || sequential(input, &ours), curl)?;
    let bar = if is_far { Bar::None } else { Bar::AtLeast(0.7) };
    table.rows.push(Row::paired(&format!("{name}: sequential"), "MB/s", "curl", &Paired::of(&both, |rate| *rate), bar));
    let before = cpu(ours.pid()?)?;
    let _ = sequential(input, &ours)?;
    let seconds = (cpu(ours.pid()?)? - before) * 1e9 / input.size;
    table.rows.push(Row::alone(&format!("{name}: CPU per GB, sequential"), "s", seconds, Bar::None));

    let mut peers = Vec::new();
    for kind in PEERS {
        match source.mount(kind, &urls).and_then(|remote| Ok((Tree::mount(lab, remote.file())?, remote))) {
            Ok((tree, remote)) => peers.push((kind, tree, remote)),
            Err(error) => {
                let row = format!("{name}: {}", kind.name());
                table.rows.push(Row::without_peer(&row, "", kind.name(), None, Bar::None, &format!("{error:#}")));
            }
        }
    }
    let tree = Tree::mount(lab, ours.file())?;
    let local = Tree::mount(lab, &input.web.join("plain.squashfs"))?;
    random(table, name, &tree, &peers, &local, is_far && one_way == LINKS[2].1)?;
    all_files(table, name, &tree, &peers, &local)?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let memory = resident(ours.pid()?)? as f64 / 1e6;
    table.rows.push(Row::alone(
        &format!("{name}: resident memory (cache 8.4 MB)"),
        "MB",
        memory,
        Bar::AtMost(40.0 + 8.4),
    ));
    if let (Some(delay), Some(before)) = (&mut delay, carried) {
        let share = (delay.cpu()? - before) / begun.elapsed().as_secs_f64();
        table.rows.push(Row::alone(
            &format!("{name}: the delayer's share of a core"),
            "",
            share,
            Bar::AtMost(CARRIER_LIMIT),
        ));
    }
    // Trees before what they stand on.
    drop(tree);
    for (_, tree, remote) in peers {
        drop(tree);
        drop(remote);
    }
    Ok(())
}

/// MB/s of one reader of the whole file.
fn sequential(input: &Input, remote: &Remote) -> anyhow::Result<f64> {
    drop_caches()?;
    let begun = Instant::now();
    let mut command = tied("dd");
    command.arg(format!("if={}", remote.file().display())).args(["of=/dev/null", "bs=1M", "status=none"]);
    run(&mut command)?;
    Ok(input.size / 1e6 / begun.elapsed().as_secs_f64())
}

type Peer = (Kind, Tree, Remote);

fn random(
    table: &mut Table,
    name: &str,
    tree: &Tree,
    peers: &[Peer],
    local: &Tree,
    is_judged: bool,
) -> anyhow::Result<()> {
    for readers in READERS {
        // Other places each time.
        let seed = std::cell::Cell::new(0);
        let rate = |tree: &Path| -> anyhow::Result<f64> {
            seed.set(seed.get() + 1);
            drop_caches()?;
            Ok(reads::random(tree, readers, SECONDS, seed.get())?.per_second())
        };
        let row = format!("{name}: random 4 KiB reads, {readers} readers");
        // In turn with the quickest of the peers, which one look tells.
        let mut best: Option<(&Peer, f64)> = None;
        for peer in peers {
            if let Ok(found) = rate(peer.1.path())
                && best.as_ref().is_none_or(|(_, best)| found > *best)
            {
                best = Some((peer, found));
            }
        }
        let bar = if is_judged && readers == 8 { Bar::AtLeast(8.0) } else { Bar::None };
        let count = if is_judged && readers == 8 { PAIRS } else { 3 };
        match best {
            Some((peer, _)) => {
                let both = pairs(count, || rate(tree.path()), || rate(peer.1.path()))?;
                table.rows.push(Row::paired(&row, "1/s", peer.0.name(), &Paired::of(&both, |rate| *rate), bar));
            }
            None => table.rows.push(Row::without_peer(
                &row,
                "1/s",
                "every peer",
                Some(rate(tree.path())?),
                bar,
                "none could be read",
            )),
        }
        if name == LINKS[0].0 {
            let both = pairs(3, || rate(tree.path()), || rate(local.path()))?;
            table.rows.push(Row::paired(&row, "1/s", "the local file", &Paired::of(&both, |rate| *rate), Bar::None));
        }
    }
    Ok(())
}

/// `find | xargs cat` of everything: cold beside the peers, warm beside the local file.
fn all_files(table: &mut Table, name: &str, tree: &Tree, peers: &[Peer], local: &Tree) -> anyhow::Result<()> {
    let cat = |tree: &Tree, is_cold: bool| -> anyhow::Result<f64> {
        if is_cold {
            drop_caches()?;
        }
        let mut command = Command::new("sh");
        command.args(["-c", "find . -type f -print0 | xargs -0 cat"]).current_dir(tree.path());
        Ok(measure(&command)?.wall)
    };
    let row = format!("{name}: find | xargs cat of {FILES} files");
    for (kind, peer, _) in peers {
        let found = match pairs(1, || cat(tree, true), || cat(peer, true)) {
            Ok(both) => Row::paired(&row, "s", kind.name(), &Paired::of(&both, |wall| *wall), Bar::None),
            Err(error) => Row::without_peer(&row, "s", kind.name(), None, Bar::None, &format!("{error:#}")),
        };
        table.rows.push(found);
    }
    cat(tree, false)?;
    cat(local, false)?;
    let both = pairs(PAIRS, || cat(tree, false), || cat(local, false))?;
    // Time, not rate: 0.9 of the rate is 1 / 0.9 of the time.
    table.rows.push(Row::paired(
        &format!("{row}, warm"),
        "s",
        "the local file",
        &Paired::of(&both, |wall| *wall),
        Bar::AtMost(1.0 / 0.9),
    ));
    Ok(())
}
