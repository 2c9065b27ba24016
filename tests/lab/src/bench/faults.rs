//! Table *faults*: two servers, of which the one in use begins to fail while programs read: the longest read, and reads in error; and both
//! gone for a minute. The same faults on the simulated network, in thousands of orders, are in `make test`.

use super::mounts::{Kind, Remote, Source, drop_caches};
use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, Row, Table, reads};
use crate::Namespace;
use crate::process::{run, tied};
use anyhow::Context as _;
use moor_tether::reader::MemberStatus;
use std::path::Path;
use std::time::Duration;

/// Readers, and the seconds that they read while one server fails.
const READERS: usize = 4;
const SECONDS: u64 = 6;
/// Seconds that they read before.
const BEFORE: u64 = 1;

/// How long all servers are gone.
const OUTAGE: Duration = Duration::from_mins(1);
/// Seconds in which reads have to go on once they are back: the longest rest of a server while none answers, with its jitter.
const BACK: f64 = 8.0;
/// Ports of the two servers.
const PORTS: [u16; 2] = [8473, 8474];

/// The tether writes its state so often.
const STATE: Duration = Duration::from_millis(1200);
/// Mounts until one begins at the server that is not there: each of two is as likely.
const TRIES: usize = 20;

/// What the server in use does.
#[derive(Clone, Copy)]
enum Fault {
    Is(fn(&Files) -> Conduct<'_>),
    /// It stops in the middle of whatever it does, as a machine that hangs.
    Freezes,
    /// Packets to it vanish.
    Blackholed,
    /// It is not there from the beginning.
    Absent,
    /// It goes on.
    None,
}

struct Files {
    good: std::path::PathBuf,
    corrupt: std::path::PathBuf,
    other: std::path::PathBuf,
}

const FAULTS: [(&str, Fault); 10] = [
    ("killed in the middle of answers, then refused", Fault::Is(|_| Conduct::Refused)),
    ("refused from the beginning", Fault::Absent),
    ("stalled in the middle of answers, then no answer to connections", Fault::Freezes),
    ("blackholed: packets vanish", Fault::Blackholed),
    ("slow (10 KB/s)", Fault::Is(|files| Conduct::Slow(&files.good))),
    ("corrupted bytes", Fault::Is(|files| Conduct::Good(&files.corrupt))),
    ("another image", Fault::Is(|files| Conduct::Good(&files.other))),
    ("without range support", Fault::Is(|files| Conduct::NoRanges(&files.good))),
    ("expired certificate", Fault::Is(|files| Conduct::Expired(&files.good))),
    ("none", Fault::None),
];

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("faults");
    let (files, key) = files(lab)?;
    let authority = Authority::new(lab.dir)?;
    table.facts.push(format!(
        "two servers, {READERS} readers of 4 KiB at random places of the image, {SECONDS} s after the fault begins"
    ));
    for (name, fault) in FAULTS {
        lab.say(&format!("faults: {name}"));
        let place = Namespace::new()?;
        let mut site = Site::new(lab, &files, &place)?;
        let (remote, bad) = match fault {
            Fault::Absent => {
                site.servers[0].become_(lab.dir, Some(&place), Conduct::Refused)?;
                (site.mount_at_the_first(&authority, &key)?, 0)
            }
            _ => site.mount_in_use(&authority, &key)?,
        };
        drop_caches()?;
        // In the middle of answers.
        let found = std::thread::scope(|scope| -> anyhow::Result<reads::Reads> {
            let reader = scope.spawn(|| reads::random((remote.file(), Some(&remote)), READERS, BEFORE + SECONDS, 2));
            std::thread::sleep(Duration::from_secs(BEFORE));
            match fault {
                Fault::Is(conduct) => site.servers[bad].become_(lab.dir, Some(&place), conduct(&files))?,
                Fault::Freezes => site.servers[bad].freeze()?,
                Fault::Blackholed => blackhole(&place, PORTS[bad])?,
                Fault::Absent | Fault::None => {}
            }
            reader.join().unwrap_or_else(|_| anyhow::bail!("the readers panicked"))
        })?;
        std::thread::sleep(STATE);
        let faults = f64::from(u32::try_from(site.standing(&remote, bad)?.faults).unwrap_or(u32::MAX));
        if !matches!(fault, Fault::None) {
            // Else it was not in use, and the rows below say nothing.
            table.rows.push(Row::alone(&format!("{name}: faults found"), "", faults, Bar::AtLeast(1.0)));
        }
        let errors = format!("{name}: reads in error, of {}", found.good + found.errors);
        table.rows.push(Row::alone(&errors, "", f64::from(found.errors), Bar::AtMost(0.0)));
        table.rows.push(Row::alone(&format!("{name}: longest read"), "s", found.longest, Bar::AtMost(1.0)));
        std::thread::sleep(Duration::from_millis(100));
    }
    outage(lab, &mut table, &files, &authority, &key)?;
    Ok(table)
}

/// Two servers, good at first.
struct Site<'a> {
    lab: &'a Lab<'a>,
    place: &'a Namespace,
    servers: [Web; 2],
}

impl<'a> Site<'a> {
    fn new(lab: &'a Lab<'a>, files: &Files, place: &'a Namespace) -> anyhow::Result<Self> {
        let start = |name: &str, port| {
            Web::start((lab.dir, name), ("127.0.0.1", port), Some(place), Conduct::Good(&files.good))
        };
        Ok(Self { lab, place, servers: [start("first", PORTS[0])?, start("second", PORTS[1])?] })
    }

    fn mount(&self, authority: &Authority, key: &Path) -> anyhow::Result<Remote> {
        let source = Source { lab: self.lab, authority, namespace: Some(self.place), key };
        source.mount(Kind::Ours, &self.servers.each_ref().map(|server| server.url("")))
    }

    /// The image is mounted, and the server from which it is read just now: which of the two it is, is chance.
    fn mount_in_use(&self, authority: &Authority, key: &Path) -> anyhow::Result<(Remote, usize)> {
        let remote = self.mount(authority, key)?;
        let read = |seconds, seed| -> anyhow::Result<[u64; 2]> {
            reads::random((remote.file(), Some(&remote)), READERS, seconds, seed)?;
            std::thread::sleep(STATE);
            Ok([self.standing(&remote, 0)?.bytes, self.standing(&remote, 1)?.bytes])
        };
        // The one that was not asked first is tried meanwhile.
        let (before, after) = (read(2, 1)?, read(1, 4)?);
        let [first, second] = [0, 1].map(|at| after[at] - before[at]);
        Ok((remote, usize::from(second > first)))
    }

    /// The same, mounted so that the first server was asked first, which is not there.
    fn mount_at_the_first(&self, authority: &Authority, key: &Path) -> anyhow::Result<Remote> {
        for _ in 0..TRIES {
            let remote = self.mount(authority, key)?;
            std::thread::sleep(STATE);
            if self.standing(&remote, 0)?.faults > 0 {
                return Ok(remote);
            }
        }
        anyhow::bail!("of {TRIES} mounts none began at the first server");
    }

    /// What the tether says of a server.
    fn standing(&self, remote: &Remote, at: usize) -> anyhow::Result<MemberStatus> {
        let url = self.servers[at].url("");
        let members = remote.state()?.members;
        members.into_iter().find(|member| member.url.starts_with(&url)).context("the tether does not know a server")
    }
}

fn blackhole(place: &Namespace, port: u16) -> anyhow::Result<()> {
    let rules = format!(
        "add table inet bench; add chain inet bench in {{ type filter hook input priority 0; }}; \
         add rule inet bench in tcp dport {port} drop"
    );
    run(&mut place.enter(tied("nft").arg(rules))).context("dropping packets")?;
    Ok(())
}

/// All servers are gone for a minute, and come back, while programs read.
fn outage(lab: &Lab<'_>, table: &mut Table, files: &Files, authority: &Authority, key: &Path) -> anyhow::Result<()> {
    let name = format!("all servers gone for {} s", OUTAGE.as_secs());
    lab.say(&format!("faults: {name}"));
    let place = Namespace::new()?;
    let mut site = Site::new(lab, files, &place)?;
    let remote = site.mount(authority, key)?;
    let whole = OUTAGE.as_secs() + 14;
    let found = std::thread::scope(|scope| -> anyhow::Result<reads::Reads> {
        let reader = scope.spawn(|| reads::random((remote.file(), Some(&remote)), READERS, whole, 3));
        std::thread::sleep(Duration::from_secs(2));
        for server in &mut site.servers {
            server.become_(lab.dir, Some(&place), Conduct::Refused)?;
        }
        std::thread::sleep(OUTAGE);
        for server in &mut site.servers {
            server.become_(lab.dir, Some(&place), Conduct::Good(&files.good))?;
        }
        reader.join().unwrap_or_else(|_| anyhow::bail!("the readers panicked"))
    })?;
    table.rows.push(Row::alone(&format!("{name}: reads in error"), "", f64::from(found.errors), Bar::AtMost(0.0)));
    let late = found.longest - OUTAGE.as_secs_f64();
    table.rows.push(Row::alone(&format!("{name}: reads go on after"), "s", late, Bar::AtMost(BACK)));
    let lines = remote.log()?.lines().filter(|line| line.contains("ERROR")).count();
    let lines = f64::from(u32::try_from(lines).unwrap_or(u32::MAX));
    table.rows.push(Row::alone(&format!("{name}: lines on the console"), "", lines, Bar::AtMost(1.0)));
    Ok(())
}

/// The good image, the same with one wrong bit in each chunk, and another one of the same length.
fn files(lab: &Lab<'_>) -> anyhow::Result<(Files, std::path::PathBuf)> {
    let make = |name: &str| -> anyhow::Result<std::path::PathBuf> {
        let dir = lab.dir.join(name);
        std::fs::create_dir(&dir)?;
        Ok(dir)
    };
    let files = Files { good: make("good")?, corrupt: make("corrupt")?, other: make("other")? };
    let key = lab.dir.join("faults.key");
    pack(lab, &files.good, &key)?;
    pack(lab, &files.other, &lab.dir.join("other.key"))?;
    let mut bytes = std::fs::read(files.good.join("image.moor"))?;
    for chunk in bytes.chunks_mut(50_000).skip(1) {
        chunk[0] ^= 0x10;
    }
    std::fs::write(files.corrupt.join("image.moor"), bytes)?;
    Ok((files, key))
}

/// Noise, sealed: nothing of it is in a cache for long.
fn pack(lab: &Lab<'_>, dir: &Path, key: &Path) -> anyhow::Result<()> {
    let tree = tempfile::tempdir_in(lab.dir)?;
    let mut noise = vec![0; 96 << 20];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut noise).context("reading noise")?;
    std::fs::write(tree.path().join("noise"), noise)?;
    let mut command = tied(lab.bins.path("imgutil"));
    command
        .arg("pack")
        .arg(tree.path())
        .arg("-o")
        .arg(dir.join("image.moor"))
        .arg("--key-file")
        .arg(key)
        .args(["--level", "1"]);
    run(&mut command)?;
    Ok(())
}
