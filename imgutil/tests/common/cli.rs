//! Runs the program as a user does.

use super::tied::tied;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a run printed and how it ended.
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// `imgutil` with arguments, not started yet.
pub fn imgutil<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Command {
    let mut command = tied(env!("CARGO_BIN_EXE_imgutil"));
    command.args(args).env_remove("MOOR_SERVER").env_remove("MOOR_SOCKET");
    command
}

/// Runs it to its end.
pub fn run<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Ran {
    finish(&imgutil(args).output().unwrap())
}

pub fn finish(output: &Output) -> Ran {
    Ran {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Ran {
    /// Fails the test unless the run was good.
    pub fn good(self) -> Self {
        assert_eq!(self.status, 0, "{}{}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless the run ended with `status` and one line that contains `parts`.
    pub fn one_line_error(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, status, "{}{}", self.stdout, self.stderr);
        let lines: Vec<&str> = self.stderr.lines().filter(|line| !line.starts_with("packing: ")).collect();
        assert_eq!(lines.len(), 1, "one line: {}", self.stderr);
        assert!(lines[0].starts_with("imgutil: error: "), "{}", self.stderr);
        for part in parts {
            assert!(lines[0].contains(part), "'{part}' is missing in: {}", self.stderr);
        }
    }
}

/// An image and its key in a directory.
pub struct Files {
    pub image: PathBuf,
    pub key: PathBuf,
}

/// Packs a tree, and expects that to work.
pub fn pack(tree: &Path, directory: &Path, name: &str, more: &[&str]) -> Files {
    let files = Files { image: directory.join(format!("{name}.moor")), key: directory.join(format!("{name}.key")) };
    let mut command = imgutil([OsStr::new("pack"), tree.as_os_str(), "-o".as_ref(), files.image.as_os_str()]);
    command.args(["--level", "3"]).args(more);
    if !more.contains(&"--plain") {
        command.arg("--key-file").arg(&files.key);
    }
    finish(&command.output().unwrap()).good();
    files
}

/// The names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}
