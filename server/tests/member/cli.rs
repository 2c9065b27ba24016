//! `moor` as an administrator types it, against a running member.

use crate::machine::Machine;
use crate::support::Member;
use anyhow::ensure;
use moor_api::node::{Stage, StatusReport};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// `moor` lies beside the folder of the tests: cargo builds the workspace's programs with them.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.parent().unwrap().with_file_name("moor");
    ensure!(program.exists(), "'{}' is not built: run `make build`", program.display());
    Ok(program)
}

/// `moor` on the member's socket.
pub(crate) fn moor(member: &Member, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("--socket").arg(member.path("api.sock")).args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// It says no: in one line on standard error that has all of these in it, with status 1, and without an answer.
pub(crate) fn said_no(what: &str, output: &Output, says: &[&str]) {
    let (status, out, err) = shown(output);
    assert!(
        status == Some(1) && out.is_empty() && err.lines().count() == 1 && says.iter().all(|word| err.contains(word)),
        "{what}: status {status:?}, wanted {says:?}: {out}{err}"
    );
}

/// Status, answer and complaint.
pub(crate) fn shown(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn answers_go_out_by_line_and_errors_are_one_line() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let good = |arguments: &[&str]| {
        let (status, out, err) = shown(&moor(&member, arguments)?.output()?);
        ensure!(status == Some(0) && err.is_empty(), "{arguments:?}: {status:?} {out}{err}");
        Ok::<_, anyhow::Error>(out)
    };
    assert_eq!(good(&["node", "define", "n[1-2]", "net.ipv4_method=dhcp"])?, "n1: defined\nn2: defined\n");
    assert_eq!(good(&["node", "list", "n1", "net.ipv4_method"])?, "n1: net.ipv4_method: dhcp\n");
    assert_eq!(good(&["node", "set", "n1", "info.note=x y"])?, "n1: set\n");
    assert_eq!(good(&["arm", "n1"])?, "n1: armed once\n");
    assert_eq!(good(&["deploy", "n1", "-n", "p"])?, "n1: pending p\n");
    assert_eq!(good(&["status", "n1"])?, "n1: pending: p\n");
    assert!(good(&["why", "n2"])?.contains("advice: it has no profile: `moor deploy n2 -n PROFILE`"));
    assert!(good(&["image", "list"])?.starts_with("root: @1 "));
    assert!(good(&["site", "--known-hosts"])?.starts_with("@cert-authority * ssh-ed25519 "));
    for read in
        [&["node", "list"][..], &["status"], &["why", "n1"], &["image", "list"], &["profile", "list"], &["site"]]
    {
        let out = good(&[&["--json"], read].concat())?;
        serde_json::from_str::<serde_json::Value>(&out)?;
    }
    for (arguments, says) in [
        (&["node", "define", "n1"][..], "exists already"),
        (&["node", "list", "n9"], "no node or group 'n9'"),
        (&["profile", "publish", "nothing"], "moor profile create nothing"),
        (&["deploy", "n1", "-n", "nothing"], "never published"),
        (&["why", "n9"], "not been heard of"),
        (&["arm", "n1", "--until", "soon"], "soon"),
        (&["arm", "n9"], "no node or group 'n9'"),
        (&["deploy", "n9", "-n", "p"], "no node or group 'n9'"),
    ] {
        said_no(&format!("{arguments:?}"), &moor(&member, arguments)?.output()?, &[says]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_when_nodes_are_booted_or_one_failed() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.publish().await?;
    let mut machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;
    for (last, status) in [("booted", 0), ("failed", 1)] {
        machine.reboot()?;
        let mut connection = machine.connect().await?;
        machine.log_in(&mut connection, Stage::Boot).await?;
        member.deploy("n1").await?;
        let watch = moor(&member, &["status", "n1", "--watch", "--until-booted"])?.stdout(Stdio::piped()).spawn()?;
        for (sequence, state) in [(1, "image"), (2, last)] {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            let (detail, figures) = ("told".to_owned(), [("image.size".to_owned(), 3 << 20)].into());
            let report =
                StatusReport { boot: machine.boot, sequence, state: state.into(), detail, uptime_ms: 1500, figures };
            connection.status(&report).await?;
        }
        let (code, out, _) = shown(&tokio::task::spawn_blocking(move || watch.wait_with_output()).await??);
        assert_eq!(code, Some(status), "{out}");
        assert!(out.ends_with(&format!("n1: {last}: told [1.500 s] image.size=3.0 MiB\n")), "{out}");
    }
    Ok(())
}
