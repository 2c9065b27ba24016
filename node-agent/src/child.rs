//! Other programs: one way to run them, with what they said on standard error as the reason when they fail.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Most bytes of a child's output that are kept, its last ones.
const KEEP: usize = 16 << 10;

/// A program did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It is not there or cannot be executed.
    #[error("cannot start '{program}': {cause}")]
    Start {
        /// Its path.
        program: String,
        /// Why.
        cause: std::io::Error,
    },
    /// It ended with another status than 0.
    #[error("'{program}' {ended}{}", said(.stderr))]
    Failed {
        /// Its path.
        program: String,
        /// "failed with status 1", "was killed by signal 9".
        ended: String,
        /// The status, where it had one.
        code: Option<i32>,
        /// What it said last.
        stderr: String,
    },
    /// It did not end in time; it was killed.
    #[error("'{program}' did not end within {} s{}", .limit.as_secs(), said(.stderr))]
    TooLong {
        /// Its path.
        program: String,
        /// The limit.
        limit: Duration,
        /// What it said last.
        stderr: String,
    },
    /// Its pipes broke.
    #[error("cannot talk to '{program}': {cause}")]
    Pipe {
        /// Its path.
        program: String,
        /// Why.
        cause: std::io::Error,
    },
}

impl ChildError {
    /// The status that the program ended with.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Failed { code, .. } => *code,
            _ => None,
        }
    }
}

fn said(stderr: &str) -> String {
    let text = crate::console::one_line(stderr.trim());
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// How a program ended, in words.
#[must_use]
pub fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended without a status".to_owned(),
    }
}

/// Runs a program to its end, gives it `input`, and returns what it printed (at most 16 KiB, the last). It is killed when it takes
/// longer than `limit`. A grandchild that keeps standard error open (a program that went to the background) is not waited for.
///
/// # Errors
/// It cannot be started, fails, or takes too long; the error carries its standard error.
pub async fn run(mut command: Command, input: &[u8], limit: Duration) -> Result<String, ChildError> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let pipe = |cause| ChildError::Pipe { program: program.clone(), cause };
    command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|cause| ChildError::Start { program: program.clone(), cause })?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input).await {
            // It ended without reading: its status says why.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => (),
            other => other.map_err(pipe)?,
        }
    }
    let mut output = Tail::new(child.stdout.take());
    let mut errors = Tail::new(child.stderr.take());
    let status = tokio::time::timeout(limit, async {
        loop {
            tokio::select! {
                status = child.wait() => break status,
                () = output.read() => (),
                () = errors.read() => (),
            }
        }
    })
    .await;
    let Ok(status) = status else {
        let _ = child.kill().await;
        return Err(ChildError::TooLong { program, limit, stderr: errors.text() });
    };
    let status = status.map_err(pipe)?;
    // What is still in the pipes; whoever else holds them open gets no say.
    let drain = async {
        while output.open() || errors.open() {
            tokio::select! {
                () = output.read() => (),
                () = errors.read() => (),
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(200), drain).await;
    if status.success() {
        return Ok(output.text());
    }
    Err(ChildError::Failed { program, ended: ended(status), code: status.code(), stderr: errors.text() })
}

/// The last bytes of a pipe.
pub(crate) struct Tail<R> {
    pipe: Option<R>,
    kept: Vec<u8>,
    keep: usize,
    /// Bytes that were dropped at the front.
    pub(crate) dropped: u64,
}

impl<R: AsyncRead + Unpin> Tail<R> {
    pub(crate) fn new(pipe: Option<R>) -> Self {
        Self::keeping(pipe, KEEP)
    }

    pub(crate) fn keeping(pipe: Option<R>, keep: usize) -> Self {
        Self { pipe, kept: Vec::new(), keep, dropped: 0 }
    }

    pub(crate) fn open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Reads once; waits for ever when the pipe is at its end. Nothing is lost when this is cancelled.
    pub(crate) async fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return std::future::pending().await };
        let mut buffer = [0; 4096];
        match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => self.pipe = None,
            Ok(count) => {
                self.kept.extend_from_slice(&buffer[..count]);
                let excess = self.kept.len().saturating_sub(self.keep);
                self.kept.drain(..excess);
                self.dropped += u64::try_from(excess).unwrap_or(u64::MAX);
            }
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.kept).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    async fn error(script: &str, limit: Duration) -> String {
        run(sh(script), b"", limit).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn output_input_and_reasons_pass_through() {
        let second = Duration::from_secs(20);
        assert_eq!(run(sh("cat; echo end"), b"secret\n", second).await.unwrap(), "secret\nend\n");
        assert_eq!(
            error("echo no such image >&2; exit 3", second).await,
            "'/bin/sh' failed with status 3: no such image"
        );
        assert_eq!(error("kill -9 $$", second).await, "'/bin/sh' was killed by signal 9");
        let late = error("echo waiting >&2; sleep 60", Duration::from_millis(300)).await;
        assert_eq!(late, "'/bin/sh' did not end within 0 s: waiting");
        // The program does not read what it is given.
        assert_eq!(run(sh("exit 0"), &vec![b'x'; 1 << 17], second).await.unwrap(), "");
        assert!(
            run(Command::new("/nonexistent"), b"", second).await.unwrap_err().to_string().starts_with("cannot start")
        );
    }

    #[tokio::test]
    async fn a_child_in_the_background_holds_nobody_up() {
        let begin = std::time::Instant::now();
        assert_eq!(run(sh("sleep 30 & echo up"), b"", Duration::from_secs(20)).await.unwrap(), "up\n");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn only_the_end_of_much_output_is_kept() {
        let text =
            run(sh("i=0; while [ $i -lt 9000 ]; do echo line $i; i=$((i+1)); done"), b"", Duration::from_mins(1));
        let text = text.await.unwrap();
        assert!(text.ends_with("line 8999\n") && text.len() == KEEP);
    }
}
