//! The way to a node: ssh, with what every node has (sh, lsblk, findmnt, tar). Nothing of ours runs there, nothing is written there, and
//! no key of an image ever goes there.

use crate::scrub::Owned;
use anyhow::{Context as _, Result, bail};
use std::cell::RefCell;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Asks for the sums of the files that packages brought.
const SUMS: &str = include_str!("sums.sh");

/// How the node's tar writes. Holes and all attributes are kept, owners are numbers, and no other file system is entered. A file that it
/// cannot read makes it fail in the end.
pub(super) const TAR: [&str; 8] = [
    "--format=posix",
    "--numeric-owner",
    "--one-file-system",
    "--acls",
    "--xattrs",
    "--xattrs-include=*",
    "--sparse",
    "--sparse-version=0.1",
];

/// Longest answer of a survey.
const MAX_ANSWER: u64 = 256 << 20;
/// Bytes of an error message that are kept.
const MAX_SAID: u64 = 64 << 10;
/// The line that the node says once it is reached; a profile of root's may print others before.
const READY: &str = "imgutil capture is connected";
/// So long a connection may take to end in order.
const FAREWELL: Duration = Duration::from_secs(2);
/// A node that says nothing for four times this is gone, unless the user's `ssh_config` has a time of its own.
const ALIVE: [&str; 4] = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"];

/// A node that answers ssh.
pub(super) struct Node {
    name: String,
    config: Option<PathBuf>,
    /// The socket of the one connection that all commands go through, so that a passphrase is asked for once. ssh keeps it from other
    /// users, and removes it when the connection ends.
    control: PathBuf,
    connection: RefCell<Option<Running>>,
}

impl Node {
    /// Connects to `name` as ssh knows it; `config` in the place of the user's `ssh_config`.
    pub(super) fn connect(name: &str, config: Option<&Path>) -> Result<Self> {
        if name.is_empty() || name.starts_with('-') {
            bail!("'{name}' is no name of a node");
        }
        let control = control_path(std::env::temp_dir());
        let (name, config) = (name.to_owned(), config.map(Path::to_owned));
        let node = Self { name, config, control, connection: RefCell::new(None) };
        let mut ssh = node.ssh();
        ssh.args(["-o", "ControlMaster=yes"]).args(node.keep_alive()?);
        // It waits for the end of what we never write: whatever becomes of this process, the connection ends with it.
        let script = format!("echo '{READY}'; exec cat > /dev/null");
        let (out, running) = node.spawn(ssh, &script, &[], Stdio::piped())?;
        for line in BufReader::new(out.take(MAX_SAID)).split(b'\n') {
            if line.is_ok_and(|line| line == READY.as_bytes()) {
                node.connection.replace(Some(running));
                return Ok(node);
            }
        }
        bail!("{}", running.wait()?.reason());
    }

    fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        let path = format!("ControlPath={}", self.control.display());
        ssh.args(["-T", "-o", "ControlPersist=no", "-o", &path]);
        if !self.name.contains('@') {
            ssh.args(["-l", "root"]);
        }
        ssh
    }

    /// What ssh needs to notice that the node is gone: nothing if the user has said so already.
    fn keep_alive(&self) -> Result<&'static [&'static str]> {
        let output =
            self.ssh().args(["-G", "--"]).arg(&self.name).stdin(Stdio::null()).output().map_err(cannot_start)?;
        let is_set = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.strip_prefix("serveraliveinterval "))
            .any(|seconds| seconds != "0");
        Ok(if is_set { &[] } else { &ALIVE })
    }

    /// Runs a shell script on the node with arguments, and gives what it prints.
    pub(super) fn ask(&self, script: &str, arguments: &[&str]) -> Result<String> {
        let (mut reader, running) = self.start(script, arguments)?;
        let mut answer = Vec::new();
        let read = (&mut reader).take(MAX_ANSWER).read_to_end(&mut answer);
        drop(reader);
        let ended = running.wait()?;
        read.with_context(|| format!("cannot read the answer of '{}'", self.name))?;
        if ended.status != Some(0) {
            bail!("cannot look at '{}': {}", self.name, self.reason(&ended));
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Starts to read the files of the file system at `path`.
    pub(super) fn read_files(&self, path: &str) -> Result<(ChildStdout, Running)> {
        let script = format!("cd \"$1\" && exec tar {} -cf - .", TAR.map(quoted).join(" "));
        self.start(&script, &[path])
    }

    /// The sums of the files that the node's packages brought, by its package managers.
    pub(super) fn package_sums(&self, root: &str) -> Result<Owned> {
        Ok(Owned::from_lines(&self.ask(SUMS, &[root])?))
    }

    /// Why a program on the node has not done what it should. If the connection broke under it, only that one's ssh has said why.
    pub(super) fn reason(&self, ended: &Ended) -> String {
        let is_silent = ended.status == Some(255) && ended.said.trim().is_empty();
        let connection = if is_silent { self.connection.take() } else { None };
        let broken =
            connection.and_then(|connection| connection.end().ok()).filter(|broken| broken.status == Some(255));
        broken.as_ref().unwrap_or(ended).reason()
    }

    /// Starts a shell script on the node, over the connection.
    fn start(&self, script: &str, arguments: &[&str]) -> Result<(ChildStdout, Running)> {
        let mut ssh = self.ssh();
        ssh.args(["-o", "ControlMaster=no"]);
        self.spawn(ssh, script, arguments, Stdio::null())
    }

    fn spawn(
        &self,
        mut ssh: Command,
        script: &str,
        arguments: &[&str],
        input: Stdio,
    ) -> Result<(ChildStdout, Running)> {
        let mut words: Vec<String> = ["env", "LC_ALL=C", "sh", "-c"].map(str::to_owned).to_vec();
        words.extend([quoted(script), "sh".to_owned()]);
        words.extend(arguments.iter().copied().map(quoted));
        let mut child = ssh
            .arg("--")
            .arg(&self.name)
            .arg(words.join(" "))
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(cannot_start)?;
        let out = child.stdout.take().context("ssh has no output")?;
        let errors = child.stderr.take().context("ssh has no error output")?;
        let said = std::thread::spawn(move || {
            let mut errors = errors;
            let mut said = Vec::new();
            // What is beyond the limit is read, so that the node's program is not held up.
            let _ = (&mut errors).take(MAX_SAID).read_to_end(&mut said);
            let _ = io::copy(&mut errors, &mut io::sink());
            String::from_utf8_lossy(&said).into_owned()
        });
        Ok((out, Running { child, said: Some(said) }))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Whatever it says, there is nothing to be done about it any more.
            let _ = connection.end();
        }
        // ssh has removed it, unless it was killed.
        let _ = std::fs::remove_file(&self.control);
    }
}

/// Where the socket of a connection goes: to the directory for temporary files, unless that has a path that ssh cannot take.
fn control_path(directory: PathBuf) -> PathBuf {
    // A socket's path has 107 bytes at most (unix(7)); our name and what ssh appends for a moment take 66 of them.
    let is_taken = |path: &str| {
        path.len() <= 40 && path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte))
    };
    let directory = if directory.to_str().is_some_and(is_taken) { directory } else { PathBuf::from("/tmp") };
    directory.join(format!("imgutil-capture-{}", Uuid::new_v4().simple()))
}

fn cannot_start(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::NotFound => anyhow::anyhow!("ssh is not installed: apt-get install openssh-client"),
        _ => anyhow::Error::new(error).context("cannot start ssh"),
    }
}

/// A word of sh.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A program on the node; ended when this is dropped.
pub(super) struct Running {
    child: Child,
    said: Option<JoinHandle<String>>,
}

/// How it ended.
pub(super) struct Ended {
    /// Its status; none: a signal.
    pub(super) status: Option<i32>,
    /// What it said on standard error.
    pub(super) said: String,
}

impl Ended {
    /// In words.
    pub(super) fn reason(&self) -> String {
        let last = self.said.trim().lines().last().unwrap_or("it said nothing");
        match self.status {
            Some(255) => format!("ssh failed: {last}"),
            Some(status) => format!("the command ended with status {status}: {last}"),
            None => format!("ssh was killed: {last}"),
        }
    }
}

impl Running {
    /// Waits for its end.
    pub(super) fn wait(mut self) -> Result<Ended> {
        let status = self.child.wait().context("cannot wait for ssh")?;
        let said = self.said.take().map(|said| said.join().unwrap_or_default()).unwrap_or_default();
        Ok(Ended { status: status.code(), said })
    }

    /// Ends one that waits for the end of its input: in order if it goes at once, else by killing it.
    fn end(mut self) -> Result<Ended> {
        drop(self.child.stdin.take());
        let late = Instant::now() + FAREWELL;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < late {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Of one that has ended nothing comes of it.
        let _ = self.child.kill();
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After `wait` both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_nodes_shell_as_they_are() {
        let words = ["a b", "it's", "$HOME", "\"", "\\", "", "a\nb"];
        let script = words.map(quoted).join(" ");
        let output = Command::new("sh").args(["-c", &format!("printf '%s|' {script}")]).output().expect("sh runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), words.map(|word| format!("{word}|")).concat());
    }

    #[test]
    fn a_connections_socket_has_a_path_that_ssh_takes() {
        for (directory, expected) in
            [("/var/tmp", "/var/tmp"), ("/a b", "/tmp"), ("/100%", "/tmp"), (&*"/x".repeat(21), "/tmp")]
        {
            assert_eq!(control_path(directory.into()).parent(), Some(Path::new(expected)), "{directory}");
        }
    }

    #[test]
    fn no_option_of_ssh_can_be_a_node() {
        for name in ["-oProxyCommand=x", ""] {
            let error = Node::connect(name, None).err().expect("is refused").to_string();
            assert!(error.contains("is no name of a node"), "{error}");
        }
    }
}
