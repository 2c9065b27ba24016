//! Table *prefetch*: what a list of the chunks that earlier boots read saves. A boot that was recorded in a VM is read once more by the
//! reader on this machine, over the delayed link, with and without the list. Each read begins when the one before it is done: so programs
//! start each other. What they do in between is left out at first (they take no time), then a tenth of what was recorded: the VM was
//! emulated.

use super::web::{Authority, Conduct, Web};
use super::{Bar, Lab, PAIRS, Paired, Row, Table, pairs};
use crate::delay::{Delay, FAR};
use crate::process::{text, tied, wait_for};
use crate::scenario::{NODE, Scenario};
use crate::{Namespace, Swtpm};
use anyhow::Context as _;
use moor_image::{Dek, OpenOptions};
use moor_tether::reader::{Address, Https, Reader, Real, Settings, Trace};
use moor_tether::tls;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First argument of this program when it is only to read as a boot did.
pub const REPLAY: &str = "--replay";
/// First argument of this program when it is to record a boot.
pub const RECORD: &str = "--record";
/// The recorded boot, beside this crate.
const RECORDED: &str = "tests/lab/traces/debian-12.json";
/// Links: name, and the delay of one way.
const LINKS: [(&str, Duration); 2] = [("1 ms", Duration::from_micros(500)), ("5 ms", Duration::from_micros(2500))];
/// How much of the recorded time between reads programs take here, in per cent.
const PACES: [(&str, u32); 2] = [("programs take no time", 0), ("programs take a tenth of the emulated time", 10)];
/// Time for the trace to be whole, and written.
const WHOLE: Duration = Duration::from_secs(150);

/// What one boot took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Boot {
    /// Seconds for all reads.
    seconds: f64,
    /// Megabytes that were fetched.
    megabytes: f64,
}

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("prefetch");
    let trace = lab.bins.workspace.join(RECORDED);
    let recorded = load(&trace)?;
    let last = recorded.reads.last().map_or(0, |(_, at)| *at);
    table.facts.push(format!(
        "a boot of Debian 12 in an emulated VM: {} chunks of {} KiB in {:.0} s; the list is of the same boot",
        recorded.reads.len(),
        recorded.chunk_size >> 10,
        f64::from(last) / 1e3
    ));
    let authority = Authority::new(lab.dir)?;
    let input = super::root::input(lab, &authority)?;
    for (name, one_way) in LINKS {
        lab.say(&format!("prefetch: {name}"));
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        let _delay = Delay::between(&near, &far, one_way)?;
        let home = format!("web-{}", one_way.as_micros());
        let server = Web::start((lab.dir, &home), (FAR, 8472), Some(&far), Conduct::Good(input.dir()))?;
        let boot = |pace: u32, with_list: bool| -> anyhow::Result<Boot> {
            let mut command = tied(std::env::current_exe().context("finding this program")?);
            command
                .arg(REPLAY)
                .arg(server.url("large/image.moor"))
                .arg(authority.file())
                .arg(input.dir().join("large/key"));
            command.arg(&trace).arg(pace.to_string()).arg(u8::from(with_list).to_string());
            serde_json::from_str(&text(&mut near.enter(&command))?).context("reading what a boot took")
        };
        for (what, pace) in PACES {
            let both = pairs(PAIRS, || boot(pace, true), || boot(pace, false))?;
            let row = format!("{name}: reads of a boot, {what}");
            let seconds = Paired::of(&both, |boot| boot.seconds);
            table.rows.push(Row::paired(&row, "s", "without a list", &seconds, Bar::None));
            let fetched = Paired::of(&both, |boot| boot.megabytes);
            table.rows.push(Row::paired(&format!("{row}: fetched"), "MB", "without a list", &fetched, Bar::None));
        }
    }
    Ok(table)
}

fn load(path: &Path) -> anyhow::Result<Trace> {
    let context = || format!("reading the trace '{}'", path.display());
    serde_json::from_slice(&std::fs::read(path).with_context(context)?).with_context(context)
}

/// The boot's side: URL CA KEY TRACE PER-CENT LIST; prints what it took as JSON.
///
/// # Errors
/// The image cannot be opened.
pub fn replay(arguments: &[OsString]) -> anyhow::Result<()> {
    let words: Vec<_> = arguments.iter().map(|word| word.to_str().context("a word")).collect::<Result<_, _>>()?;
    let [url, ca, key, trace, pace, list] = words[..] else {
        anyhow::bail!("{REPLAY} URL CA KEY TRACE PER-CENT LIST");
    };
    let trace = load(Path::new(trace))?;
    let pace: u32 = pace.parse().context("a share in per cent")?;
    let prefetch = if list == "1" { trace.reads.iter().map(|(chunk, _)| *chunk).collect() } else { Vec::new() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let world = Arc::new(Real::new(runtime.handle().clone()));
    let options = OpenOptions { key: Some(Dek::from_hex(&std::fs::read(key)?)?), ..OpenOptions::default() };
    let paths = Https::all(vec![Address::resolve(url)?], tls::Trust::authority(Path::new(ca))?.config());
    let settings = Settings { prefetch, ..Settings::default() };
    let boot = runtime.block_on(async {
        let begun = Instant::now();
        let reader = Reader::open(paths, world, &options, settings).await?;
        let mut before = 0;
        for &(chunk, at) in &trace.reads {
            let thinks = Duration::from_millis(u64::from(at.saturating_sub(before))) * pace / 100;
            before = at;
            if !thinks.is_zero() {
                tokio::time::sleep(thinks).await;
            }
            reader.read(chunk * trace.chunk_size, 4096).await?;
        }
        let seconds = begun.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
        let megabytes = reader.figures().bytes_fetched as f64 / 1e6;
        anyhow::Ok(Boot { seconds, megabytes })
    })?;
    println!("{}", serde_json::to_string(&boot)?);
    Ok(())
}

/// Records a boot: builds what is needed, boots a VM, and writes what its tether noted to FILE. Then boots it again with the list that the
/// member made of it, and says what each of the two has fetched when it was up.
///
/// # Errors
/// A step failed.
pub fn record(arguments: &[OsString]) -> anyhow::Result<()> {
    let [file] = arguments else { anyhow::bail!("{RECORD} FILE") };
    let dir = tempfile::Builder::new().prefix("moor-record-").tempdir()?;
    // The member runs as nobody in particular.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let scenario = Scenario::prepare(dir.path(), &mut |what| eprintln!("bench: {what}"))?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let mut vm = scenario.power_on("vm", &tpm, 2203)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    let first = scenario.booted_boots()?;
    let state = |what: &str| scenario.on_node(&vm, &format!("cat /run/mooring/{what}"));
    eprintln!("bench: booted: {}", state("tether.json")?.trim());
    let end = Instant::now() + WHOLE;
    let text = loop {
        let text = state("tether-trace.json")?;
        let trace: Trace = serde_json::from_str(&text).context("reading the node's trace")?;
        if trace.is_whole {
            eprintln!("bench: {} chunks; {}", trace.reads.len(), state("tether.json")?.trim());
            break text;
        }
        anyhow::ensure!(Instant::now() < end, "the trace is not whole after {} s", WHOLE.as_secs());
        std::thread::sleep(Duration::from_secs(5));
    };
    let file = PathBuf::from(file);
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).context("making the trace's folder")?;
    }
    std::fs::write(file, text).context("writing the trace")?;
    let lists = dir.path().join("member/state/traces");
    wait_for("the member to have the boot's list", WHOLE, || {
        Ok(lists.read_dir().is_ok_and(|mut lists| lists.next().is_some()))
    })?;
    // The connection may end before the answer.
    let _ = scenario.on_node(&vm, "systemctl reboot");
    scenario.wait_booted(&mut vm, &first)?;
    let states = scenario.states()?;
    let booted = states.iter().filter(|state| state.state == "booted");
    let fetched: Vec<_> = booted.filter_map(|state| state.figures.get("image.bytes_fetched")).collect();
    eprintln!("bench: bytes fetched when it was up, without and with a list: {fetched:?} of {}", scenario.image_size);
    Ok(())
}
