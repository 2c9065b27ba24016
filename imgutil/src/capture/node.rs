//! The way to a node: ssh, with what every node has (sh, lsblk, findmnt, tar). Nothing of ours runs there, nothing is written there, and
//! no key of an image ever goes there.

use anyhow::{Context as _, Result, bail};
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

/// How the node's tar writes. Holes and all attributes are kept, owners are numbers, and no other file system is entered.
pub(super) const TAR: [&str; 9] = [
    "--format=posix",
    "--numeric-owner",
    "--one-file-system",
    "--acls",
    "--xattrs",
    "--xattrs-include=*",
    "--sparse",
    "--sparse-version=0.1",
    "--ignore-failed-read",
];

/// Longest answer of a survey.
const MAX_ANSWER: u64 = 256 << 20;
/// Bytes of an error message that are kept.
const MAX_SAID: u64 = 64 << 10;

/// A node that answers ssh.
pub(super) struct Node {
    name: String,
    config: Option<PathBuf>,
    /// One connection for all commands, so that a passphrase is asked for once.
    control: tempfile::TempDir,
}

impl Node {
    /// `name` as ssh knows it; `config` in the place of the user's `ssh_config`.
    pub(super) fn new(name: &str, config: Option<&Path>) -> Result<Self> {
        if name.is_empty() || name.starts_with('-') {
            bail!("'{name}' is no name of a node");
        }
        let control = tempfile::tempdir().context("cannot make a folder for the connection")?;
        Ok(Self { name: name.to_owned(), config: config.map(Path::to_owned), control })
    }

    fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        let mut path = OsString::from("ControlPath=");
        path.push(self.control.path().join("ssh"));
        ssh.args(["-T", "-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o"]).arg(path);
        if !self.name.contains('@') {
            ssh.args(["-l", "root"]);
        }
        ssh.arg("--").arg(&self.name);
        ssh
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
            bail!("cannot look at '{}': {}", self.name, ended.reason());
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Starts to read the files of the file system at `path`.
    pub(super) fn read_files(&self, path: &str) -> Result<(ChildStdout, Running)> {
        let script = format!("cd \"$1\" && exec tar {} -cf - .", TAR.map(quoted).join(" "));
        self.start(&script, &[path])
    }

    fn start(&self, script: &str, arguments: &[&str]) -> Result<(ChildStdout, Running)> {
        let mut words = vec!["LC_ALL=C", "sh", "-c"].into_iter().map(str::to_owned).collect::<Vec<_>>();
        words.extend([quoted(script), "sh".to_owned()]);
        words.extend(arguments.iter().copied().map(quoted));
        let mut child = self
            .ssh()
            .arg(words.join(" "))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => anyhow::anyhow!("ssh is not installed: apt-get install openssh-client"),
                _ => anyhow::Error::new(error).context("cannot start ssh"),
            })?;
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
        // Without a connection there is nothing to end.
        let _ = self.ssh().args(["-O", "exit"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
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
    fn no_option_of_ssh_can_be_a_node() {
        assert!(Node::new("-oProxyCommand=x", None).is_err());
        assert!(Node::new("", None).is_err());
    }
}
