//! A member whose disk is full: what it refuses, how it ends, and that it is back once there is room.

use crate::collective::{define, names};
use crate::support::{Member, UID, as_user, refusal};
use anyhow::{Context as _, ensure};
use moord::files::free_space;
use std::io::{BufRead as _, BufReader, Cursor, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A file system in memory where a member has its state, which other processes do not see. It goes with this.
struct Disk {
    holder: Child,
    state: PathBuf,
}

impl Disk {
    fn new(member: &Member, mebibytes: u32) -> anyhow::Result<Self> {
        let state = member.path("state");
        let mount = "mount -t tmpfs -o \"$2\" tmpfs \"$1\" && echo it is there && exec sleep infinity";
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--"]);
        command.args(["sh", "-c", mount, "sh"]).arg(&state);
        command.arg(format!("size={mebibytes}m,mode=755,uid={UID},gid={UID}"));
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        BufReader::new(holder.stdout.take().context("no pipe")?).read_line(&mut said)?;
        ensure!(said.contains("it is there"), "no file system: {said}");
        let seen = format!("/proc/{}/root{}", holder.id(), state.display());
        Ok(Self { holder, state: seen.into() })
    }

    /// `moord` with its state on it.
    fn moord(&self, member: &Member, verb: &str, more: &[&str]) -> Command {
        let config = member.config();
        let moord = as_user(&[&[verb, "--config", &config], more].concat());
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.holder.id().to_string(), "--"]);
        command.arg(moord.get_program()).args(moord.get_args()).stdin(Stdio::null());
        command
    }

    /// Fills it, except for so many bytes.
    fn fill(&self, left: u64) -> anyhow::Result<()> {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.filler())?;
        let piece = vec![1; 1 << 16];
        while free_space(&self.state)? > left + piece.len() as u64 {
            file.write_all(&piece)?;
        }
        Ok(())
    }

    fn filler(&self) -> PathBuf {
        self.state.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_disk_fills_refuses_content_first_then_ends_and_is_back_once_there_is_room() -> anyhow::Result<()>
{
    let mut member = Member::prepare()?;
    let disk = Disk::new(&member, 96)?;
    let output = disk.moord(&member, "init", &["--address", "127.0.0.1"]).output()?;
    ensure!(output.status.success(), "moord init: {}", String::from_utf8_lossy(&output.stderr));
    member.run_by(disk.moord(&member, "run", &[]))?;
    let upload = async || {
        let mut admin = member.admin().await?;
        anyhow::Ok(admin.add_blob(Cursor::new(vec![7; 1 << 20]), |_| {}).await.map(drop))
    };
    upload().await??;
    // The store has to go on: content leaves it room.
    disk.fill(24 << 20)?;
    let (_, detail) = refusal(upload().await?);
    ensure!(detail.contains("make room there, and send it again"), "{detail}");
    define(&member, "a").await?;
    disk.fill(4 << 20)?;
    ensure!(define(&member, "b").await.is_err(), "it takes a change that it cannot keep");
    ensure!(!member.wait()?.success(), "it ends as if all was well");
    ensure!(member.log().contains("the disk of the member's store is full"), "{}", member.log());
    std::fs::remove_file(disk.filler())?;
    member.run_by(disk.moord(&member, "run", &[]))?;
    define(&member, "c").await?;
    let known = names(&member).await?;
    ensure!(known.contains(&"a".to_owned()) && known.contains(&"c".to_owned()), "{known:?}");
    member.admin().await?.add_blob(Cursor::new(vec![8; 1 << 20]), |_| {}).await?;
    Ok(())
}
