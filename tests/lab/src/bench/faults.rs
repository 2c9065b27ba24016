//! Table *faults*: two servers, of which one begins to fail while programs read: the longest read, and reads in error. The same faults on
//! the simulated network, in thousands of orders, are in `make test`.

use super::mounts::{Kind, Source, drop_caches};
use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, Row, Table, reads};
use anyhow::Context as _;
use std::path::Path;
use std::time::Duration;

/// Readers, and the seconds that they read while one server fails.
const READERS: usize = 4;
const SECONDS: u64 = 6;

/// What the first server does.
#[derive(Clone, Copy)]
enum Fault {
    Is(fn(&Files) -> Conduct<'_>),
    /// It stops in the middle of whatever it does, as a machine that hangs.
    Freezes,
}

struct Files {
    good: std::path::PathBuf,
    corrupt: std::path::PathBuf,
    other: std::path::PathBuf,
}

const FAULTS: [(&str, Fault); 8] = [
    ("killed, then refused", Fault::Is(|_| Conduct::Refused)),
    ("stalled in the middle of answers, then no answer to connections", Fault::Freezes),
    ("slow (10 KB/s)", Fault::Is(|files| Conduct::Slow(&files.good))),
    ("corrupted bytes", Fault::Is(|files| Conduct::Good(&files.corrupt))),
    ("another image", Fault::Is(|files| Conduct::Good(&files.other))),
    ("without range support", Fault::Is(|files| Conduct::NoRanges(&files.good))),
    ("expired certificate", Fault::Is(|files| Conduct::Expired(&files.good))),
    ("none", Fault::Is(|files| Conduct::Good(&files.good))),
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
        let start =
            |server: &str, port| Web::start((lab.dir, server), ("127.0.0.1", port), None, Conduct::Good(&files.good));
        let (mut first, second) = (start("first", 8473)?, start("second", 8474)?);
        let source = Source { lab, authority: &authority, namespace: None, key: &key };
        let remote = source.mount(Kind::Ours, &[first.url(""), second.url("")])?;
        reads::random(remote.file(), READERS, 2, 1)?;
        match fault {
            Fault::Is(conduct) => first.become_(lab.dir, None, conduct(&files))?,
            Fault::Freezes => first.freeze()?,
        }
        drop_caches()?;
        let found = reads::random(remote.file(), READERS, SECONDS, 2)?;
        let errors = format!("{name}: reads in error, of {}", found.good + found.errors);
        table.rows.push(Row::alone(&errors, "", f64::from(found.errors), Bar::AtMost(0.0)));
        table.rows.push(Row::alone(&format!("{name}: longest read"), "s", found.longest, Bar::AtMost(1.0)));
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(table)
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
    let mut command = crate::process::tied(lab.bins.path("imgutil"));
    command
        .arg("pack")
        .arg(tree.path())
        .arg("-o")
        .arg(dir.join("image.moor"))
        .arg("--key-file")
        .arg(key)
        .args(["--level", "1"]);
    crate::process::run(&mut command)?;
    Ok(())
}
