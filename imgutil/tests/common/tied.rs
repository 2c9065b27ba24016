//! Programs that end with the test that started them, also when it fails or is killed.

use std::ffi::OsStr;
use std::process::Command;

/// A command that the kernel kills when the thread that started it ends. `setpriv` keeps the process id: the child is the program.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
