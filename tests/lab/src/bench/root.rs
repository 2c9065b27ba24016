//! Table *root*: a root file system over the network, beside `rclone mount`, `httpdirfs` and the local file. The same squashfs everywhere,
//! ours sealed, theirs plain; the same HTTPS server; the same loop device and squashfs above it. What is served lies in memory, so that
//! caches can be dropped and no disk is measured; each cold figure begins with new processes and a new mount.

mod whole;

use super::mounts::{Kind, Remote, Source, Tree, drop_caches};
use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, PAIRS, Paired, Row, Table, pairs, reads};
use crate::Namespace;
use crate::delay::{Delay, FAR, NEAR};
use crate::process::{cpu, peak, run, text, tied};
use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Files of the tree, of sizes as in /usr.
const FILES: u32 = 4000;
/// Bytes of the file in the large image: more than any cache here holds in the time of a measurement.
const LARGE: u64 = 3 << 30;
/// Bytes of its pages, and how many of them are noise: it compresses as a system does.
const PAGE: usize = 4096;
const NOISE: usize = 1600;
/// Links: name, and the delay of one way.
const LINKS: [(&str, Duration); 3] =
    [("loopback", Duration::ZERO), ("1 ms", Duration::from_micros(500)), ("5 ms", Duration::from_micros(2500))];
/// Readers side by side.
const READERS: [usize; 3] = [1, 8, 32];
/// Seconds of one measurement of random reads.
const SECONDS: u64 = 2;
/// Pairs where no bar is, and within one of a bar.
const FEW: usize = 3;
/// A link that costs more than this share of a core distorts what is measured over it.
const CARRIER_LIMIT: f64 = 0.5;
/// Bytes that the tether may take, and its cache.
const MEMORY: f64 = 40e6 + 8.4e6;
/// Bytes of the large file that are read in a row through squashfs, beside each peer.
const PART: u64 = 512 << 20;
const PEERS: [Kind; 4] = [Kind::Rclone, Kind::RcloneCache, Kind::RcloneSmall, Kind::Httpdirfs];
/// Names the links to make.
const CHOICE: &str = "MOOR_LINKS";

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let links = chosen(&std::env::var(CHOICE).unwrap_or_default())?;
    let mut table = Table::new("root");
    let authority = Authority::new(lab.dir)?;
    let input = input(lab, &authority)?;
    table.facts.push(format!(
        "squashfs of {FILES} files, {:.0} MB, and of one large file, {:.0} MB (read in a row and at random); ours are sealed; served \
         from memory by nginx",
        input.size("files/plain.squashfs")? / 1e6,
        input.size("large/plain.squashfs")? / 1e6
    ));
    let version = |program: &str| {
        text(tied(program).arg("--version")).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
    };
    table.facts.push(format!("peers: {}, httpdirfs of the distribution, both from the plain file", version("rclone")));
    let nginx = "nginx: two processes that share connections by their ports (SO_REUSEPORT), a worker per core; `ssl_buffer_size 64k`";
    table.facts.push(nginx.into());
    table
        .facts
        .push("cold: new processes, new mounts, caches dropped; random reads are of 4 KiB, through squashfs".into());
    for (name, one_way) in links {
        Link::new(lab, &input, &authority, name, one_way)?.measure(&mut table)?;
    }
    Ok(table)
}

/// The links of these names, by commas; all, where none is named.
fn chosen(names: &str) -> anyhow::Result<Vec<(&'static str, Duration)>> {
    if names.is_empty() {
        return Ok(LINKS.to_vec());
    }
    let link = |name: &str| {
        let known = || LINKS.map(|(known, _)| format!("'{known}'")).join(", ");
        let found = LINKS.into_iter().find(|(known, _)| *known == name);
        found.with_context(|| format!("{CHOICE}: there is no link '{name}': there are {}", known()))
    };
    names.split(',').map(link).collect()
}

/// What is served: `image.moor` and the same plain, `plain.squashfs`, in `files` and in `large`. In memory; gone on drop.
pub(super) struct Input {
    dir: PathBuf,
    cache: PathBuf,
}

impl Input {
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    fn size(&self, file: &str) -> anyhow::Result<f64> {
        Ok(self.dir.join(file).metadata().with_context(|| format!("looking at {file}"))?.len() as f64)
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

/// Trees are taken from this machine and from noise, packed once, and the first is read back for its squashfs.
pub(super) fn input(lab: &Lab<'_>, authority: &Authority) -> anyhow::Result<Input> {
    let cache = lab.cache.join("root");
    if !cache.exists() {
        lab.say("root: packing a tree of this machine's files, and noise");
        let (made, tree, noise) = (lab.dir.join("made"), lab.dir.join("tree"), lab.dir.join("noise"));
        for dir in ["files", "large"] {
            std::fs::create_dir_all(made.join(dir))?;
        }
        std::fs::create_dir_all(&tree)?;
        std::fs::create_dir_all(&noise)?;
        // Shuffled by a fixed key, so that large and small files come as in a system. Private keys (of somebody's tests) cannot be packed.
        let choose = format!(
            "find /usr/lib /usr/share /usr/bin -xdev -type f -size -4096k | LC_ALL=C sort | \
             shuf --random-source=/usr/bin/find | head -n {} | xargs -d '\\n' grep -L -a 'PRIVATE KEY' | \
             head -n {FILES} | cpio -pdm --quiet '{}'",
            FILES + FILES / 10,
            tree.display()
        );
        run(tied("sh").args(["-c", &choose])).context("choosing files")?;
        large_file(&noise.join("noise")).context("writing noise")?;
        for (tree, name, level) in [(&tree, "files", "9"), (&noise, "large", "1")] {
            let mut pack = tied(lab.bins.path("imgutil"));
            pack.arg("pack").arg(tree).args(["--level", level]).arg("-o").arg(made.join(name).join("image.moor"));
            run(pack.arg("--key-file").arg(made.join(name).join("key")))?;
        }
        let server = Web::start((lab.dir, "packing"), ("127.0.0.1", 8470), None, Conduct::Good(&made))?;
        for dir in ["files", "large"] {
            let key = made.join(dir).join("key");
            let source = Source { lab, authority, namespace: None, key: &key };
            let remote = source.mount(Kind::Ours, &[server.url(&format!("{dir}/"))])?;
            std::fs::copy(remote.file(), made.join(dir).join("plain.squashfs")).context("reading the squashfs")?;
        }
        run(tied("mv").arg(&made).arg(&cache))?;
    }
    let dir = lab.dir.join("web");
    std::fs::create_dir(&dir)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("bench"), &dir, Some("tmpfs"), flags, Some("mode=0755,size=6g"))
        .context("mounting a tmpfs")?;
    let input = Input { dir, cache };
    run(tied("cp").args(["-r", "--"]).arg(input.cache.join(".")).arg(&input.dir))?;
    Ok(input)
}

/// Pages that are part noise, part nothing.
fn large_file(path: &Path) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
    let (mut state, mut page) = (0x9E37_79B9_7F4A_7C15_u64, [0; PAGE]);
    for _ in 0..LARGE / PAGE as u64 {
        for word in page[..NOISE].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&page)?;
    }
    file.flush()
}

/// A mounted squashfs, and who serves it; the local file is served by nobody.
struct Mounted {
    tree: Tree,
    remote: Option<Remote>,
}

/// One link, and what is measured over it.
struct Link<'a> {
    lab: &'a Lab<'a>,
    input: &'a Input,
    authority: &'a Authority,
    name: &'static str,
    near: Namespace,
    _far: Namespace,
    delay: Option<RefCell<Delay>>,
    /// A worker per core.
    servers: [Web; 2],
    one_way: Duration,
    /// Largest memory of a tether so far, in bytes.
    memory: Cell<f64>,
    seed: Cell<u64>,
}

impl<'a> Link<'a> {
    fn new(
        lab: &'a Lab<'a>,
        input: &'a Input,
        authority: &'a Authority,
        name: &'static str,
        one_way: Duration,
    ) -> anyhow::Result<Self> {
        lab.say(&format!("root: {name}"));
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        let is_far = !one_way.is_zero();
        let delay = if is_far { Some(RefCell::new(Delay::between(&near, &far, one_way)?)) } else { None };
        let (place, address) = if is_far { (&far, FAR) } else { (&near, "127.0.0.1") };
        let start = |worker| {
            let home = format!("web-{}-{worker}", one_way.as_micros());
            Web::start((lab.dir, &home), (address, 8471), Some(place), Conduct::Crowd(&input.dir))
        };
        let servers = [start(1)?, start(2)?];
        let memory = Cell::new(0.0);
        Ok(Self { lab, input, authority, name, near, _far: far, delay, servers, one_way, memory, seed: Cell::new(1) })
    }

    fn row(&self, what: &str) -> String {
        format!("{}: {what}", self.name)
    }

    fn is_far(&self) -> bool {
        self.delay.is_some()
    }

    /// Whether it is the link of the bar against the peers.
    fn is_judged(&self) -> bool {
        self.one_way == LINKS[2].1
    }

    fn measure(&self, table: &mut Table) -> anyhow::Result<()> {
        if self.is_far() {
            let ping = text(&mut self.near.enter(tied("ping").args(["-q", "-c", "40", "-i", "0.02", FAR])))?;
            table.facts.push(format!(
                "{}: {} (from {NEAR})",
                self.name,
                ping.lines().last().unwrap_or_default().trim()
            ));
        }
        let bar = if self.is_far() { Bar::None } else { Bar::AtLeast(0.7) };
        self.sequential(table, &self.servers[0], "in a row", bar)?;
        if !self.is_far() {
            let at = ("127.0.0.1", 8472);
            let one = Web::start((self.lab.dir, "web-one"), at, Some(&self.near), Conduct::Good(&self.input.dir))?;
            // One download of curl has one connection, so that one process is enough for it; several of ours share it.
            self.sequential(table, &one, "in a row, nginx being one process", Bar::None)?;
        }
        self.beside(table)?;
        for readers in READERS {
            self.random(table, readers)?;
        }
        self.all_files(table)?;
        if !self.is_far() {
            // A node's tether is locked into memory, with all that it maps.
            let locked = self.locked()?;
            self.memory.set(self.memory.get().max(locked));
        }
        table.rows.push(Row::alone(
            &self.row("peak resident memory (cache 8.4 MB)"),
            "MB",
            self.memory.get() / 1e6,
            Bar::AtMost(MEMORY / 1e6),
        ));
        Ok(())
    }

    fn remote(&self, kind: Kind, dir: &str) -> anyhow::Result<Remote> {
        self.remote_from(&self.servers[0], kind, dir)
    }

    fn remote_from(&self, server: &Web, kind: Kind, dir: &str) -> anyhow::Result<Remote> {
        let key = self.input.cache.join(dir).join("key");
        let source = Source { lab: self.lab, authority: self.authority, namespace: Some(&self.near), key: &key };
        source.mount(kind, &[server.url(&format!("{dir}/"))])
    }

    /// The tree, served anew; `None`: the local file.
    fn fresh(&self, kind: Option<Kind>, dir: &str) -> anyhow::Result<Mounted> {
        let remote = kind.map(|kind| self.remote(kind, dir)).transpose()?;
        let local = self.input.dir.join(dir).join("plain.squashfs");
        let tree = Tree::mount(self.lab, remote.as_ref().map_or(local.as_path(), Remote::file))?;
        drop_caches()?;
        Ok(Mounted { tree, remote })
    }

    fn note_memory(&self, remote: &Remote) -> anyhow::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
        let memory = peak(remote.pid()?)? as f64;
        self.memory.set(self.memory.get().max(memory));
        Ok(())
    }

    /// One reader of the whole file, beside one download of the same bytes.
    fn sequential(&self, table: &mut Table, server: &Web, what: &str, bar: Bar) -> anyhow::Result<()> {
        let size = self.input.size("large/image.moor")?;
        let (seconds, carried) = (Cell::new(0.0), Cell::new(Vec::new()));
        let ours = || -> anyhow::Result<f64> {
            let remote = self.remote_from(server, Kind::Ours, "large")?;
            let before = cpu(remote.pid()?)?;
            let mut command = tied("dd");
            command.arg(format!("if={}", remote.file().display())).args(["of=/dev/null", "bs=1M", "status=none"]);
            let begun = Instant::now();
            run(&mut command)?;
            let took = begun.elapsed().as_secs_f64();
            seconds.set(cpu(remote.pid()?)? - before);
            self.note_memory(&remote)?;
            Ok(size / 1e6 / took)
        };
        let curl = || -> anyhow::Result<f64> {
            let before = self.carried()?;
            let mut command = tied("curl");
            command.args(["-sS", "-o", "/dev/null", "--cacert"]).arg(self.authority.file());
            let begun = Instant::now();
            run(&mut self.near.enter(command.arg(server.url("large/image.moor"))))?;
            let took = begun.elapsed().as_secs_f64();
            let mut shares = carried.take();
            shares.push((self.carried()? - before) / took);
            carried.set(shares);
            Ok(size / 1e6 / took)
        };
        let both = pairs(PAIRS, ours, curl)?;
        table.rows.push(Row::paired(
            &self.row(what),
            "MB/s",
            "curl, one connection",
            &Paired::of(&both, |rate| *rate),
            bar,
        ));
        let per_gigabyte = seconds.get() * 1e9 / size;
        table.rows.push(Row::alone(
            &self.row(&format!("CPU of the tether per GB, {what}")),
            "s",
            per_gigabyte,
            Bar::None,
        ));
        if self.is_far() {
            let share = super::pairs::median(&carried.take());
            let row = self.row("the delayer's share of a core while curl downloads");
            table.rows.push(Row::alone(&row, "", share, Bar::AtMost(CARRIER_LIMIT)));
        }
        Ok(())
    }

    /// One reader of the beginning of the large file, through squashfs: ours, each peer, and the local file.
    fn beside(&self, table: &mut Table) -> anyhow::Result<()> {
        let row = self.row(&format!("in a row through squashfs, {} MiB", PART >> 20));
        for kind in PEERS.map(Some).into_iter().chain([None]) {
            let name = kind.map_or("the local file", Kind::name);
            let ours = self.part(Some(Kind::Ours))?;
            let [rate, cpu, memory] = match self.part(kind) {
                Ok(figures) => figures,
                Err(error) => {
                    let why = format!("{error:#}");
                    table.rows.push(Row::without_peer(&row, "MB/s", name, Some(ours[0]), Bar::None, &why));
                    continue;
                }
            };
            let figures = Paired { ours: vec![ours[0]], peer: vec![rate] };
            let figures = Row::paired(&row, "MB/s", name, &figures, Bar::None);
            table.rows.push(if kind.is_some() {
                figures.noted(&format!(
                    "CPU per GB {:.2} s and {cpu:.2} s, memory {:.0} MB and {memory:.0} MB",
                    ours[1], ours[2]
                ))
            } else {
                figures
            });
        }
        Ok(())
    }

    /// MB/s, seconds of processor time per GB, and the largest memory in MB, of who serves the tree.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    fn part(&self, kind: Option<Kind>) -> anyhow::Result<[f64; 3]> {
        let mounted = self.fresh(kind, "large")?;
        let pid = mounted.remote.as_ref().map(Remote::pid).transpose()?;
        let spent = || pid.map_or(Ok(0.0), cpu);
        let file = std::fs::read_dir(mounted.tree.path())?.next().context("an empty tree")??.path();
        let mut command = tied("timeout");
        command.args(["30", "dd", "of=/dev/null", "bs=1M", "status=none"]);
        command.arg(format!("if={}", file.display())).arg(format!("count={}", PART >> 20));
        let (before, begun) = (spent()?, Instant::now());
        run(&mut command)?;
        let (took, size) = (begun.elapsed().as_secs_f64(), PART as f64);
        let memory = pid.map_or(Ok(0), peak)? as f64;
        Ok([size / 1e6 / took, (spent()? - before) * 1e9 / size, memory / 1e6])
    }

    /// The largest memory of a tether that runs as on a node, after it was read from.
    fn locked(&self) -> anyhow::Result<f64> {
        let key = self.input.cache.join("large/key");
        let source = Source { lab: self.lab, authority: self.authority, namespace: Some(&self.near), key: &key };
        source.locked_memory(&self.servers[0].url("large/"), PART)
    }

    /// Seconds of processor time of the delayer so far.
    fn carried(&self) -> anyhow::Result<f64> {
        self.delay.as_ref().map_or(Ok(0.0), |delay| delay.borrow_mut().cpu())
    }

    /// Random reads in a second, cold.
    fn rate(&self, kind: Option<Kind>, readers: usize) -> anyhow::Result<f64> {
        self.seed.set(self.seed.get() + 1);
        let mounted = self.fresh(kind, "large")?;
        let found = reads::random((mounted.tree.path(), mounted.remote.as_ref()), readers, SECONDS, self.seed.get())?;
        anyhow::ensure!(found.errors == 0, "{} of {} reads were in error", found.errors, found.errors + found.good);
        if let (Some(Kind::Ours), Some(remote)) = (kind, &mounted.remote) {
            self.note_memory(remote)?;
        }
        Ok(found.per_second())
    }

    fn random(&self, table: &mut Table, readers: usize) -> anyhow::Result<()> {
        let row = self.row(&format!("random reads, {readers} readers"));
        // In turn with the quickest of the peers, which one look tells.
        let looks: Vec<_> = PEERS.iter().map(|kind| (*kind, self.rate(Some(*kind), readers))).collect();
        let said: Vec<_> = looks
            .iter()
            .map(|(kind, found)| match found {
                Ok(rate) => format!("{} {rate:.0}/s", kind.name()),
                Err(error) => format!("{} failed: {error:#}", kind.name()),
            })
            .collect();
        let said = format!("one look: {}", said.join(", "));
        let mut best: Vec<_> = looks.iter().filter_map(|(kind, found)| Some((*kind, *found.as_ref().ok()?))).collect();
        best.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        let is_judged = self.is_judged() && readers == 8;
        let (bar, count) = if is_judged { (Bar::AtLeast(8.0), PAIRS) } else { (Bar::None, FEW) };
        let before = (self.carried()?, Instant::now());
        let mut said = said;
        let mut done = None;
        for (kind, _) in best {
            match pairs(count, || self.rate(Some(Kind::Ours), readers), || self.rate(Some(kind), readers)) {
                Ok(both) => {
                    done = Some(Row::paired(&row, "1/s", kind.name(), &Paired::of(&both, |rate| *rate), bar));
                    break;
                }
                // The bar holds against the next.
                Err(error) => said = format!("{said}; beside {}: {error:#}", kind.name()),
            }
        }
        let done = if let Some(row) = done {
            row.noted(&said)
        } else {
            let ours = self.rate(Some(Kind::Ours), readers).ok();
            Row::without_peer(&row, "1/s", "every peer", ours, bar, &said)
        };
        table.rows.push(done);
        if is_judged {
            let share = (self.carried()? - before.0) / before.1.elapsed().as_secs_f64();
            let row = self.row("the delayer's share of a core under 8 readers");
            table.rows.push(Row::alone(&row, "", share, Bar::AtMost(CARRIER_LIMIT)));
        }
        if !self.is_far() {
            let both = pairs(FEW, || self.rate(Some(Kind::Ours), readers), || self.rate(None, readers))?;
            table.rows.push(Row::paired(&row, "1/s", "the local file", &Paired::of(&both, |rate| *rate), Bar::None));
        }
        Ok(())
    }
}
