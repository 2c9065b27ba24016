//! Power cuts of a whole machine: a member in a small virtual machine, on ext4 on a disk that loses what was not flushed. Clients write, and at any moment,
//! also while it boots, the disk stops with one of the next writes and QEMU is killed with SIGKILL; the disk then keeps what it likes of what it had not
//! been told to flush (`disk.rs`). The machine boots again, the store opens, and all that was acknowledged is there.
//!
//! A SIGKILL alone would cut nothing: what QEMU has written to a file is in the page cache of the host, which survives. So the disk is ours, over NBD.
//!
//! `MOOR_SEED=N` repeats moments and losses of a run (not what the machine was doing then), `MOOR_CUTS=N` cuts so often.

mod disk;
mod machine;
#[path = "../../../port.rs"]
mod port;
#[path = "../../../seed.rs"]
mod seed;

use anyhow::{Context as _, ensure};
use disk::{Cut, Disk};
use machine::{Machine, Model};
use moor_api::admin::{DefineNodes, SetAttributes, TokenRequest};
use moor_api::client::admin::AdminClient;
use moor_api::trust::SiteBundle;
use moor_lab::process::{run, tied};
use moor_lab::tree::{self, Initramfs};
use moor_lab::{Bins, Member, Namespace};
use seed::{first_seed, number};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often `make test` and `make test-full` cut the power.
const CUTS: u64 = 3;
const FULL_CUTS: u64 = 200;
/// The power goes with one of so many next writes.
const NEXT: u64 = 20;
/// In so many cuts something is lost.
const ENOUGH: u64 = 20;
/// Clients, each with a register of its own: a node.
const CLIENTS: usize = 3;
/// The value is in this attribute.
const ATTRIBUTE: &str = "info.note";
/// The disk's size.
const DISK: u64 = 128 << 20;
/// Writes go on for so long at most before the power goes, in milliseconds.
const WRITES: u64 = 2500;
/// A member that is up answers within this time, in emulation on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);
/// One call may take so long.
const CALL: Duration = Duration::from_secs(20);

/// What a client was told. It writes 1, 2, 3 and so on.
#[derive(Debug, Default)]
struct Told {
    sent: AtomicU64,
    acknowledged: AtomicU64,
}

/// Says what is wrong, if a register does not hold what was acknowledged, or what was sent after that.
fn judge(told: &[Arc<Told>], seen: &[u64]) -> Result<(), String> {
    for (register, (told, seen)) in told.iter().zip(seen).enumerate() {
        let (acknowledged, sent) = (told.acknowledged.load(Ordering::Relaxed), told.sent.load(Ordering::Relaxed));
        if !(acknowledged..=sent).contains(seen) {
            return Err(format!("register {register}: {acknowledged} was acknowledged, {sent} sent, {seen} is there"));
        }
        // It was read, so it has to stay; and what else was sent has died with the machine.
        told.acknowledged.store(*seen, Ordering::Relaxed);
        told.sent.store(*seen, Ordering::Relaxed);
    }
    Ok(())
}

fn name(register: usize) -> String {
    format!("n{register}")
}

/// How clients come in.
#[derive(Clone)]
struct Way {
    site: SiteBundle,
    token: String,
}

impl Way {
    /// What the registers hold, when the member says that it is the truth.
    async fn read(&self, url: &str) -> anyhow::Result<Vec<u64>> {
        let mut admin = AdminClient::https(url, &self.site, &self.token).await?;
        let is_stale = Arc::new(AtomicBool::new(false));
        let told = is_stale.clone();
        admin.when_stale(move |_| told.store(true, Ordering::Relaxed));
        let mut values = Vec::new();
        for register in 0..CLIENTS {
            let nodes = admin.nodes(Some(&name(register))).await?;
            let node = nodes.first().context("a node is gone")?;
            values.push(node.attributes.get(ATTRIBUTE).map_or(Ok(0), |value| value.parse())?);
        }
        ensure!(!is_stale.load(Ordering::Relaxed), "no majority yet");
        Ok(values)
    }

    /// Writes, one value after the other, until the member does not answer any more.
    async fn write(self, url: String, register: usize, told: Arc<Told>) -> anyhow::Result<()> {
        let mut admin = AdminClient::https(&url, &self.site, &self.token).await?;
        loop {
            let value = told.sent.fetch_add(1, Ordering::Relaxed) + 1;
            let set = [(ATTRIBUTE.to_owned(), value.to_string())].into();
            let change = SetAttributes { range: name(register), set, clear: Vec::new() };
            let changed = tokio::time::timeout(CALL, admin.set(&change)).await??;
            ensure!(changed.refused.is_empty(), "{changed:?}");
            told.acknowledged.store(value, Ordering::Relaxed);
        }
    }
}

/// A member with its registers, on a disk; and who may write to it.
async fn member(bins: &Bins, dir: &Path) -> anyhow::Result<(Vec<u8>, Way)> {
    let namespace = Namespace::new()?;
    let mut member = Member::start_in(dir, bins, &namespace)?;
    let mut admin = AdminClient::unix(&member.socket()).await?;
    let range = format!("n[0-{}]", CLIENTS - 1);
    admin.define(&DefineNodes { range, attributes: BTreeMap::new() }).await?;
    let token = admin.create_token(&TokenRequest { name: "power".into(), lifetime: 86_400 }).await?.token;
    let way = Way { site: admin.site().await?.bundle, token };
    drop(admin);
    member.stop();
    // Of what it has only its state.
    let (content, image) = (dir.join("content"), dir.join("disk"));
    std::fs::create_dir(&content)?;
    std::fs::rename(dir.join("member/state"), content.join("state")).context("taking the member's state")?;
    std::fs::File::create(&image)?.set_len(DISK)?;
    let mut mkfs = tied("mkfs.ext4");
    mkfs.args(["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
    run(mkfs.arg(&content).arg(&image)).context("making the disk")?;
    Ok((std::fs::read(&image).context("reading the disk")?, way))
}

/// A member in machines that are switched on and off.
struct Site {
    model: Model,
    disk: Arc<Disk>,
    way: Way,
    told: Vec<Arc<Told>>,
    _dir: tempfile::TempDir,
}

impl Site {
    async fn new(is_honest: bool) -> anyhow::Result<Self> {
        let bins = Bins::find()?;
        let tree = tree::debian(&bins, Initramfs::InitramfsTools, &mut |what| println!("{what}"))?;
        let dir = tempfile::Builder::new().prefix("moor-power-").tempdir()?;
        let (content, way) = member(&bins, dir.path()).await?;
        let model = Model::new(&bins, &tree, dir.path(), moor_vm::member::UID)?;
        let told = (0..CLIENTS).map(|_| Arc::default()).collect();
        Ok(Self { model, disk: Arc::new(Disk::new(content, is_honest)), way, told, _dir: dir })
    }

    fn start(&self) -> anyhow::Result<Machine> {
        self.model.start(self.disk.clone())
    }

    /// Waits until the member answers: what its registers hold.
    async fn read(&self, machine: &mut Machine) -> anyhow::Result<Vec<u64>> {
        machine.begins().await?;
        let end = Instant::now() + PATIENCE;
        loop {
            let read = tokio::time::timeout(CALL, self.way.read(&machine.url())).await;
            if let Ok(Ok(values)) = read {
                return Ok(values);
            }
            machine.is_on()?;
            ensure!(Instant::now() < end, "the member does not answer: {read:?}\n{}", machine.console());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Lets clients write for so long, then cuts the power.
    async fn write(&self, machine: Machine, random: &mut fastrand::Rng, time: Duration) -> anyhow::Result<Cut> {
        let write = |(register, told): (usize, &Arc<Told>)| {
            tokio::spawn(self.way.clone().write(machine.url(), register, told.clone()))
        };
        let writing: Vec<_> = self.told.iter().enumerate().map(write).collect();
        let cut = self.cut(machine, random, time).await?;
        for client in writing {
            // How it noticed does not matter.
            let _ = client.await?;
        }
        Ok(cut)
    }

    /// Cuts the power after so long, with one of the next writes if there is any: most of the time all is flushed, and nothing could be lost.
    async fn cut(&self, machine: Machine, random: &mut fastrand::Rng, time: Duration) -> anyhow::Result<Cut> {
        tokio::time::sleep(time).await;
        self.disk.arm(random.u64(1..=NEXT));
        let end = Instant::now() + Duration::from_millis(WRITES);
        while !self.disk.is_dark() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        machine.kill()?;
        Ok(self.disk.cut(random))
    }

    fn acknowledged(&self) -> u64 {
        self.told.iter().map(|told| told.acknowledged.load(Ordering::Relaxed)).sum()
    }
}

async fn cut_often(cuts: u64) -> anyhow::Result<()> {
    let (seed, cuts) = (first_seed(), number("MOOR_CUTS").unwrap_or(cuts));
    println!("seed {seed}, {cuts} cuts; MOOR_SEED={seed} MOOR_CUTS={cuts} repeats them");
    let mut random = fastrand::Rng::with_seed(seed);
    let site = Site::new(true).await?;
    let (mut lost, mut kept) = (0, 0);
    // How long it takes until a member answers: the boots that are cut are cut within this time.
    let mut boot = Duration::ZERO;
    for cut in 0..=cuts {
        let began = Instant::now();
        let mut machine = site.start()?;
        // The first boot and the last one are whole.
        let left = if (1..cuts).contains(&cut) && random.u8(0..4) == 0 {
            let time = boot.mul_f64(random.f64());
            println!("cut {cut}: {time:.1?} after it was switched on");
            site.cut(machine, &mut random, time).await?
        } else {
            let seen = site.read(&mut machine).await.with_context(|| format!("before cut {cut}"))?;
            let time = began.elapsed();
            boot = boot.max(time);
            judge(&site.told, &seen).map_err(anyhow::Error::msg).with_context(|| format!("before cut {cut}"))?;
            if cut == cuts {
                break;
            }
            let writes = Duration::from_millis(random.u64(0..WRITES));
            println!("cut {cut}: after {writes:.1?} of writes; it had answered after {time:.1?}");
            site.write(machine, &mut random, writes).await?
        };
        println!("    {} writes acknowledged so far, {left:?}", site.acknowledged());
        lost += left.lost;
        kept += left.kept;
    }
    println!("{cuts} cuts, {} writes acknowledged, {lost} blocks lost and {kept} kept", site.acknowledged());
    ensure!(site.acknowledged() >= cuts && lost + kept > 0, "there was little to lose");
    // A few times the disk may have kept all.
    ensure!(lost > 0 || cuts < ENOUGH, "the disk has lost nothing");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_in_a_machine_has_what_it_acknowledged_after_a_power_cut() -> anyhow::Result<()> {
    cut_often(CUTS).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "most of an hour: make test-full"]
async fn a_member_in_a_machine_has_what_it_acknowledged_after_200_power_cuts() -> anyhow::Result<()> {
    cut_often(FULL_CUTS).await
}

/// The judge is able to convict.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_says_that_it_has_flushed_and_has_not_is_found_out() -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(1);
    let site = Site::new(false).await?;
    let mut machine = site.start()?;
    let seen = site.read(&mut machine).await?;
    judge(&site.told, &seen).map_err(anyhow::Error::msg)?;
    let cut = site.write(machine, &mut random, Duration::from_secs(5)).await?;
    ensure!(site.acknowledged() > 0, "nothing was written, {cut:?}");
    let mut machine = site.start()?;
    let seen = site.read(&mut machine).await?;
    ensure!(judge(&site.told, &seen).is_err(), "{} acknowledged writes are there, and {cut:?}", site.acknowledged());
    Ok(())
}
