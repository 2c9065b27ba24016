//! As whom a member runs, and whose its state is: `moor init`, and root.

use crate::cli::{moor, program, said_no, shown};
use crate::support::{Member, UID};
use anyhow::ensure;
use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Every file below: path, mode, owner, and the digest of what is in it.
fn listing(folder: &Path) -> anyhow::Result<String> {
    let script = "cd \"$1\" && find . -printf '%p %m %U %G\\n' | sort && find . -type f -exec sha256sum {} + | sort";
    let output = Command::new("sh").args(["-c", script, "sh"]).arg(folder).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Owner, mode and path of every file below.
fn owners(folder: &Path) -> anyhow::Result<Vec<(u32, u32, String)>> {
    let output = Command::new("find").arg(folder).args(["-printf", "%U %m %p\n"]).output()?;
    let mut out = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let fields: Vec<&str> = line.splitn(3, ' ').collect();
        out.push((fields[0].parse()?, u32::from_str_radix(fields[1], 8)?, fields[2].to_owned()));
    }
    Ok(out)
}

fn init(member: &Member, more: &[&str]) -> anyhow::Result<Output> {
    let config = member.config();
    Ok(moor(member, &[&["init", "--config", &config], more].concat())?.output()?)
}

/// `moord` as root, which ends at once; one that does not is stopped.
fn as_root(arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--signal", "KILL", "20", env!("CARGO_BIN_EXE_moord")]).args(arguments).stdin(Stdio::null());
    command
}

#[tokio::test]
async fn moor_init_by_root_makes_a_member_that_is_its_users_and_no_second_one() -> anyhow::Result<()> {
    let mut member = Member::prepare()?;
    let (status, out, err) = shown(&init(&member, &["--address", "127.0.0.1"])?);
    ensure!(status == Some(0), "{out}{err}");
    ensure!(out.starts_with("collective test (") && out.contains("`moord run --config "), "{out}");
    for (uid, mode, path) in owners(&member.path("state"))? {
        assert_eq!(uid, UID, "{path} is somebody else's");
        if path.contains("/store/") {
            assert_eq!(mode & 0o077, 0, "{path} may be read by others: {mode:o}");
        }
    }
    // It is a member that runs.
    member.run()?;
    assert_eq!(member.site().await?.name, "test");
    assert!(member.terminate()?);

    // There is one already: it stays as it is.
    let before = listing(&member.path("state"))?;
    let again = init(&member, &["--address", "127.0.0.1"])?;
    let state = member.path("state").display().to_string();
    said_no("a second time", &again, &[&state, "holds a member already: nothing was changed", "move it away"]);
    assert_eq!(listing(&member.path("state"))?, before);
    Ok(())
}

#[tokio::test]
async fn moor_init_that_cannot_be_done_is_one_line_and_makes_nothing() -> anyhow::Result<()> {
    let member = Member::prepare()?;
    let before = listing(member.dir.path())?;
    said_no("an address", &init(&member, &["--address", "10.0.0.1 10.0.0.2"])?, &["'10.0.0.1 10.0.0.2' is neither"]);
    fs::write(member.path("moord.toml"), "state_dir = \"/nowhere\"\nurls = [\"http://x\"]\n")?;
    said_no("no HTTPS", &init(&member, &[])?, &["moord.toml", "'urls'", "https"]);
    fs::write(member.path("moord.toml"), "urls = [\n")?;
    said_no("no TOML", &init(&member, &[])?, &["moord.toml"]);
    fs::remove_file(member.path("moord.toml"))?;
    said_no("neither configuration nor address", &init(&member, &[])?, &["moord.toml", "--address"]);
    let left: Vec<String> = listing(member.dir.path())?.lines().map(str::to_owned).collect();
    ensure!(left.iter().all(|line| before.contains(line.as_str())), "something was made: {left:?}");

    // The server's own program is what does it; without it `moor` says which package is missing.
    let folder = tempfile::tempdir()?;
    fs::copy(program()?, folder.path().join("moor"))?;
    let config = member.config();
    let mut command = Command::new(folder.path().join("moor"));
    command.args(["init", "--config", &config]).env("PATH", folder.path()).stdin(Stdio::null());
    said_no("no moord", &command.output()?, &["starting 'moord'", "is the package moord installed?"]);
    Ok(())
}

#[tokio::test]
async fn moord_does_not_run_as_root() -> anyhow::Result<()> {
    let mut member = Member::init()?;
    let before = listing(member.dir.path())?;
    let config = member.config();
    let output = as_root(&["run", "--config", &config]).output()?;
    said_no("root", &output, &["moord does not run as root", "`systemctl start moord`", "setpriv --reuid"]);
    assert_eq!(listing(member.dir.path())?, before, "it touched its state");
    assert!(!member.path("api.sock").exists());
    // The control: its own user may.
    member.run()?;
    let status = fs::read_to_string(format!("/proc/{}/status", member.pid().unwrap()))?;
    let ids = format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}");
    ensure!(status.contains(&ids), "it runs as another: {status}");
    ensure!(status.contains("CapEff:\t0000000000000000"), "it has capabilities: {status}");
    Ok(())
}

/// Runs `moord init` as root where these are the users of the machine.
fn init_among(users: &str, member: &Member) -> anyhow::Result<Output> {
    fs::write(member.path("passwd"), format!("root:x:0:0:root:/root:/bin/sh\n{users}"))?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--", "sh", "-c"]);
    command.arg("mount --bind \"$1\" /etc/passwd && shift && exec \"$@\"").arg("sh").arg(member.path("passwd"));
    command.arg(env!("CARGO_BIN_EXE_moord")).args(["init", "--config"]).arg(member.config());
    Ok(command.args(["--address", "127.0.0.1"]).stdin(Stdio::null()).output()?)
}

#[tokio::test]
async fn root_gives_a_new_state_to_the_packages_user_or_says_that_there_is_none() -> anyhow::Result<()> {
    let member = Member::prepare()?;
    let state = member.path("state");
    chown(&state, Some(0), Some(0))?;
    let output = init_among("", &member)?;
    said_no("no user", &output, &["does not run as root", "no user 'mooring'", &state.display().to_string()]);
    assert_eq!(fs::read_dir(&state)?.count(), 0, "something was made");
    let output = init_among(&format!("mooring:x:{UID}:{UID}::/nonexistent:/usr/sbin/nologin\n"), &member)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (uid, _, path) in owners(&state)? {
        assert_eq!(uid, UID, "{path}");
    }
    Ok(())
}
