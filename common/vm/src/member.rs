//! A member as a real process: `moord` under an unprivileged numeric uid, its state in a folder of its own.

use crate::namespace::Namespace;
use crate::process::{Guard, run, spawn, tail, tied_as, wait_for};
use crate::{VmError, vm::HOST_FROM_GUEST};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The user it runs as: any number that is nobody's.
pub const UID: u32 = 61_234;

/// What a member is made of.
#[derive(Debug, Clone)]
pub struct MemberOptions {
    /// The program.
    pub moord: PathBuf,
    /// Shipped profiles.
    pub templates: PathBuf,
    /// Everything of it; user [`UID`] must be able to reach it.
    pub dir: PathBuf,
    /// Where it listens on the namespace's loopback.
    pub port: u16,
    /// Ports of all servers that nodes are sent to, this one's first.
    pub ports: Vec<u16>,
}

/// A member of a collective.
pub struct Member {
    guard: Option<Guard>,
    options: MemberOptions,
}

impl Member {
    /// Makes a new collective (`moord init`); it listens once it is [`Self::start`]ed.
    ///
    /// # Errors
    /// `moord init` failed; with what it printed.
    pub fn init(options: MemberOptions) -> Result<Self, VmError> {
        let member = Self { guard: None, options };
        member.write_config()?;
        let command = &mut tied_as(UID, &member.options.moord);
        run(command.args(["init", "--config"]).arg(member.config()).args(["--address", "127.0.0.1"]))?;
        Ok(member)
    }

    /// A further member of a collective that runs in `namespace`; it was invited there, and listens once it is [`Self::start`]ed.
    ///
    /// # Errors
    /// `moord join` failed; with what it printed.
    pub fn join(options: MemberOptions, namespace: &Namespace, invitation: &str) -> Result<Self, VmError> {
        let member = Self { guard: None, options };
        member.write_config()?;
        let file = member.options.dir.join("invitation");
        std::fs::write(&file, invitation).map_err(VmError::io("write", &file))?;
        chown(&file, Some(UID), Some(UID)).map_err(VmError::io("give to the member's user", &file))?;
        let mut command = tied_as(UID, &member.options.moord);
        command.args(["join", "--config"]).arg(member.config()).args(["--address", "127.0.0.1", "--invitation"]);
        run(&mut namespace.enter(command.arg(&file)))?;
        Ok(member)
    }

    /// The same member once more, at another port, from its state at rest: a second server of all that the first one holds. What
    /// either of them learns later, the other does not. The first must not run meanwhile.
    ///
    /// # Errors
    /// The state cannot be copied.
    pub fn twin(&self, dir: &Path, port: u16) -> Result<Self, VmError> {
        let twin = Self { guard: None, options: MemberOptions { dir: dir.to_owned(), port, ..self.options.clone() } };
        twin.write_config()?;
        // Blobs are never changed, so both may have the same.
        let (from, to) = (self.options.dir.join("state/."), dir.join("state"));
        let blobs = to.join("blobs");
        run(std::process::Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(&to))?;
        run(std::process::Command::new("rm").arg("-rf").arg(&blobs))?;
        run(std::process::Command::new("cp").arg("-al").arg(self.options.dir.join("state/blobs")).arg(&blobs))?;
        Ok(twin)
    }

    fn write_config(&self) -> Result<(), VmError> {
        let MemberOptions { templates, dir, port, ports, .. } = &self.options;
        let state = dir.join("state");
        std::fs::create_dir_all(&state).map_err(VmError::io("make", &state))?;
        let urls: Vec<String> = ports.iter().map(|port| format!("\"https://{HOST_FROM_GUEST}:{port}\"")).collect();
        let config = self.config();
        std::fs::write(
            &config,
            format!(
                "name = \"lab\"\nstate_dir = \"{0}/state\"\nsocket = \"{0}/api.sock\"\nlisten = [\"127.0.0.1:{port}\"]\n\
                 urls = [{1}]\ntemplates = \"{2}\"\n",
                dir.display(),
                urls.join(", "),
                templates.display()
            ),
        )
        .map_err(VmError::io("write", &config))?;
        for path in [dir, &state] {
            chown(path, Some(UID), Some(UID)).map_err(VmError::io("give to the member's user", path))?;
        }
        Ok(())
    }

    fn config(&self) -> PathBuf {
        self.options.dir.join("moord.toml")
    }

    /// The unix socket of the admin API.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.options.dir.join("api.sock")
    }

    /// The folder with working directories of profiles.
    #[must_use]
    pub fn profiles(&self) -> PathBuf {
        self.options.dir.join("state/profiles")
    }

    /// URL on the namespace's loopback.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.options.port)
    }

    /// URL for a VM in the namespace.
    #[must_use]
    pub fn url_for_guests(&self) -> String {
        format!("https://{HOST_FROM_GUEST}:{}", self.options.port)
    }

    /// Starts it and waits until its socket answers.
    ///
    /// # Errors
    /// It does not; with its log.
    pub fn start(&mut self, namespace: &Namespace) -> Result<(), VmError> {
        let _ = std::fs::remove_file(self.socket());
        let path = self.log();
        let log =
            || std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(VmError::io("write", &path));
        let mut command = tied_as(UID, &self.options.moord);
        command.args(["run", "--config"]).arg(self.config());
        let mut guard = Guard::new(spawn(namespace.enter(&command).stdout(log()?).stderr(log()?))?);
        let socket = self.socket();
        wait_for("the member's socket", Duration::from_secs(20), || {
            if !guard.is_running() {
                return Err(VmError::Ended { what: "moord".into(), said: self.log_tail() });
            }
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })?;
        self.guard = Some(guard);
        Ok(())
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.guard.as_ref().and_then(Guard::id)
    }

    /// Pulls the plug: SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            guard.kill();
        }
    }

    /// Stops it in good order.
    pub fn stop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            guard.terminate(Duration::from_secs(10));
        }
    }

    /// What it logs to.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.options.dir.join("moord.log")
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        format!("moord's log ends with:\n{}", tail(&text, 20))
    }
}
