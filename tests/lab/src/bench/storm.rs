//! Table *storm*: nodes that boot at once against one member, beside nginx with the same ranges. The nodes are the reader that nodes run, all
//! in one process, each with connections of its own; what that process takes of the machine is left out, what the server takes is counted.
//! The node API (hello, session, key) has no part in it.

use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, PAIRS, Paired, Row, Table, pairs};
use crate::process::{cpu, peak, text, tied};
use crate::{Member, Namespace};
use anyhow::Context as _;
use moor_image::{Dek, OpenOptions};
use moor_tether::reader::{Address, Https, Reader, Real, Settings};
use moor_tether::tls;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First argument of this program when it is to be the nodes.
pub const NODES: &str = "--nodes";
/// How many boot at once.
const CROWDS: [usize; 3] = [100, 500, 2000];
/// The crowd that reads on, and is compared by what the server takes for it.
const COMPARED: usize = 100;
/// Chunks that each of them reads, in runs as boots have them.
const READS: u64 = 160;
const RUN: u64 = 4;
/// A root is mounted when so many chunks were read: the superblock, the tables at the end, the first directories.
const MOUNTED: u64 = 6;
/// Pairs where no bar is.
const FEW: usize = 3;
/// Cache of one of the nodes: what this machine can hold of two thousand.
const CACHE: u64 = 1 << 20;
/// Time for all nodes of a crowd.
const LIMIT: Duration = Duration::from_mins(2);
const PORT: u16 = 8475;

/// What a crowd has seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Seen {
    /// Seconds until the root was mounted, of each node, the shortest first.
    mounted: Vec<f64>,
    /// Gigabytes that came.
    gigabytes: f64,
}

/// The same, with what the server took.
struct Cost {
    seen: Seen,
    /// Seconds of processor time.
    cpu: f64,
}

impl Cost {
    fn per_second(&self) -> f64 {
        self.seen.gigabytes / self.cpu
    }
}

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("storm");
    // For nginx, which inherits it; the member and the nodes see to it themselves.
    many_files()?;
    // The member runs as nobody in particular.
    std::fs::set_permissions(lab.dir, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let authority = Authority::new(lab.dir)?;
    let input = super::root::input(lab, &authority)?;
    let (image, key) = (input.dir().join("large/image.moor"), input.dir().join("large/key"));
    let place = Namespace::new()?;
    let (member, url, site) = member(lab, &place, &image, &key)?;
    let pid = member.id().context("the member is gone")?;
    let ours = |nodes, reads| crowd(&place, &[pid], (&url, "--site", &site, &key), nodes, reads);
    table.facts.push(format!(
        "nodes: readers in one process, {} KiB of cache each; a node opens the image and reads {MOUNTED} chunks (root mounted); \
         {COMPARED} of them read {READS} chunks in runs of {RUN}; server and nodes share two cores",
        CACHE >> 10
    ));
    for nodes in CROWDS {
        lab.say(&format!("storm: {nodes} nodes"));
        let cost = ours(nodes, MOUNTED)?;
        let mounted = &cost.seen.mounted;
        let last = mounted.last().copied().unwrap_or(f64::NAN);
        let row = |what: &str| format!("{nodes} nodes at once, root mounted: {what}");
        let share = |per_cent: usize| mounted[(mounted.len() * per_cent / 100).min(mounted.len() - 1)];
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let rate = nodes as f64 / last;
        table.rows.push(Row::alone(&row("nodes in a second"), "1/s", rate, Bar::None));
        table.rows.push(Row::alone(&row("median"), "s", share(50), Bar::None));
        table.rows.push(Row::alone(&row("99th percentile"), "s", share(99), Bar::None));
        table.rows.push(Row::alone(&row("processor time of the member"), "s", cost.cpu, Bar::None));
        table.rows.push(Row::alone(&row("largest memory of the member until then"), "MB", megabytes(pid)?, Bar::None));
    }
    lab.say("storm: beside nginx");
    let start = |name| Web::start((lab.dir, name), ("127.0.0.1", PORT + 1), Some(&place), Conduct::Crowd(input.dir()));
    let nginx = [start("nginx-1")?, start("nginx-2")?];
    let (theirs, trust) = (nginx[0].url("large/image.moor"), authority.file());
    let pids = [nginx[0].pid()?, nginx[1].pid()?];
    let peer = |nodes, reads| crowd(&place, &pids, (&theirs, "--ca", &trust, &key), nodes, reads);
    let row = |what: &str| format!("{COMPARED} nodes read {READS} chunks each: {what}");
    let both = pairs(PAIRS, || ours(COMPARED, READS), || peer(COMPARED, READS))?;
    let rate = Paired::of(&both, Cost::per_second);
    let name = "nginx, a worker per core";
    table.rows.push(Row::paired(&row("bytes for the server's CPU time"), "GB/s", name, &rate, Bar::AtLeast(0.8)));
    let opened = pairs(FEW, || ours(COMPARED, MOUNTED), || peer(COMPARED, MOUNTED))?;
    let cpu = Paired::of(&opened, |cost| cost.cpu * 1e3 / f64::from(u32::try_from(COMPARED).unwrap_or(u32::MAX)));
    table.rows.push(Row::paired("server's CPU time for a node's root to be mounted", "ms", name, &cpu, Bar::None));
    table.rows.push(Row::alone("largest memory of the member", "MB", megabytes(pid)?, Bar::None));
    Ok(table)
}

/// The largest memory of a process so far.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
fn megabytes(pid: u32) -> anyhow::Result<f64> {
    Ok(peak(pid)? as f64 / 1e6)
}

fn many_files() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("opening many files")
}

/// A member that serves the image; its URL there, and the file that says whom to trust.
fn member(lab: &Lab<'_>, place: &Namespace, image: &Path, key: &Path) -> anyhow::Result<(Member, String, PathBuf)> {
    let mut member = Member::init(&lab.bins, &lab.dir.join("member"), PORT)?;
    // All nodes have one address here.
    let mut config = std::fs::OpenOptions::new().append(true).open(lab.dir.join("member/moord.toml"))?;
    config.write_all(b"connections_per_address = 16384\n")?;
    member.start(place)?;
    let boot = lab.dir.join("boot");
    std::fs::create_dir(&boot)?;
    // Nobody boots them.
    for name in ["vmlinuz", "initrd.img"] {
        std::fs::write(boot.join(name), name)?;
    }
    let path = |path: &Path| path.display().to_string();
    member.moor_ok(&[
        "image",
        "import",
        "storm",
        &path(image),
        "--key-file",
        &path(key),
        "--boot-dir",
        &path(&boot),
    ])?;
    let inspected = text(tied(lab.bins.path("imgutil")).args(["inspect", "--json"]).arg(image))?;
    let inspected: serde_json::Value = serde_json::from_str(&inspected).context("reading what the image is")?;
    let digest = inspected["digest"].as_str().context("an image without a digest")?;
    let site = lab.dir.join("site.json");
    std::fs::write(&site, member.moor_ok(&["site", "--bundle"])?)?;
    let url = format!("{}/public/images/{digest}", member.url());
    Ok((member, url, site))
}

/// Lets so many nodes boot at once, and adds up what the server's processes took.
fn crowd(
    place: &Namespace,
    pids: &[u32],
    (url, kind, trust, key): (&str, &str, &Path, &Path),
    nodes: usize,
    reads: u64,
) -> anyhow::Result<Cost> {
    let spent = || pids.iter().map(|pid| cpu(*pid)).sum::<anyhow::Result<f64>>();
    let before = spent()?;
    let mut command = tied(std::env::current_exe().context("finding this program")?);
    command.arg(NODES).args([url, kind]).arg(trust).arg(key).args([nodes.to_string(), reads.to_string()]);
    let seen = serde_json::from_str(&text(&mut place.enter(&command))?).context("reading what the nodes saw")?;
    Ok(Cost { seen, cpu: spent()? - before })
}

/// The nodes' side: URL --site|--ca FILE KEY NODES READS; prints what they saw as JSON.
///
/// # Errors
/// A node fails.
pub fn nodes(arguments: &[OsString]) -> anyhow::Result<()> {
    let words: Vec<_> = arguments.iter().map(|word| word.to_str().context("a word")).collect::<Result<_, _>>()?;
    let [url, kind, trust, key, nodes, reads] = words[..] else {
        anyhow::bail!("{NODES} URL --site|--ca FILE KEY NODES READS");
    };
    let (nodes, reads): (usize, u64) = (nodes.parse()?, reads.parse()?);
    many_files()?;
    let trust = Path::new(trust);
    let trust = if kind == "--site" { tls::Trust::site(trust)? } else { tls::Trust::authority(trust)? };
    let tls = trust.config().clone();
    let address = Address::resolve(url)?;
    let key = Dek::from_hex(&std::fs::read(key)?)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let world = Arc::new(Real::new(runtime.handle().clone()));
    let boot = |number: u64| {
        let (address, tls, world) = (address.clone(), tls.clone(), world.clone());
        let options = OpenOptions { key: Some(key.clone()), ..OpenOptions::default() };
        async move {
            let begun = Instant::now();
            let settings = Settings { cache: CACHE, ..Settings::default() };
            let reader = Reader::open(Https::all(vec![address], &tls), world, &options, settings).await?;
            let (size, chunks) = (reader.header().chunk_size(), reader.header().chunks);
            let mut mounted = None;
            for read in 0..reads {
                // The first, the last, then runs here and there, for each node elsewhere.
                let chunk = match read {
                    0 => 0,
                    1 => chunks - 1,
                    read => ((read / RUN + number * 7) * 7919 % (chunks / RUN)) * RUN + read % RUN,
                };
                reader.read(chunk * size, 4096).await?;
                if read + 1 == MOUNTED {
                    mounted = Some(begun.elapsed().as_secs_f64());
                }
            }
            anyhow::Ok((mounted.unwrap_or(f64::NAN), reader.figures().bytes_fetched))
        }
    };
    let all = async {
        let running: Vec<_> = (0..nodes as u64).map(|number| tokio::spawn(boot(number))).collect();
        let (mut mounted, mut bytes) = (Vec::with_capacity(nodes), 0);
        for node in running {
            let (seconds, fetched) = node.await.context("a node panicked")??;
            mounted.push(seconds);
            bytes += fetched;
        }
        anyhow::Ok((mounted, bytes))
    };
    let (mut mounted, bytes) = runtime
        .block_on(async { tokio::time::timeout(LIMIT, all).await })
        .context("the nodes are not through in time")??;
    mounted.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let seen = Seen { mounted, gigabytes: bytes as f64 / 1e9 };
    println!("{}", serde_json::to_string(&seen)?);
    Ok(())
}
