//! Running a tool for a build: in namespaces that end with it, its output to the log and to the progress display, and an
//! orderly end when the build is interrupted.

use super::output::{Meaning, Tail, follow};
use super::{BuildError, Event};
use crate::exec::{self, ASK_FOR_THE_END, ExecError, Finished, Options, SignalWatch};
use nix::sys::signal::Signal;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// A build that is asked to end leaves nothing anyway: a tool that holds signals back, as RPM does in a transaction, is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What tools need to run.
pub(super) struct Tools<'a> {
    log: File,
    progress: &'a mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&'a SignalWatch>,
}

impl<'a> Tools<'a> {
    pub(super) fn new(
        log: &Path,
        progress: &'a mut (dyn FnMut(Event<'_>) + Send),
        signals: Option<&'a SignalWatch>,
    ) -> Result<Self, BuildError> {
        let log = File::create_new(log).map_err(|error| BuildError::io("make the log", log, error))?;
        Ok(Self { log, progress, signals })
    }

    /// Tells where the build has come to.
    pub(super) fn stage(&mut self, stage: &str) -> Result<(), BuildError> {
        (self.progress)(Event::Stage(stage));
        self.interrupted(&[])
    }

    /// Whether somebody asked the build to end.
    fn interrupted(&self, passed_on: &[Signal]) -> Result<(), BuildError> {
        let waiting = self.signals.map(SignalWatch::take).unwrap_or_default();
        match passed_on.iter().chain(&waiting).find(|signal| ASK_FOR_THE_END.contains(signal)) {
            Some(signal) => Err(BuildError::Interrupted { signal: *signal, base_kept: false }),
            None => Ok(()),
        }
    }

    /// Runs what `make` makes of three standard streams; `meaning` turns what is printed into progress. `Err` if it could not run or the build is to end; how it ended
    /// and what it printed last otherwise.
    pub(super) fn run(
        &mut self,
        meaning: &mut dyn Meaning,
        make: impl FnOnce([OwnedFd; 3]) -> Result<Options, ExecError>,
    ) -> Result<(Result<Finished, ExecError>, Tail), BuildError> {
        self.interrupted(&[])?;
        let pipe = || -> std::io::Result<(OwnedFd, [OwnedFd; 3])> {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            // Numbers above 2, also when this process was started without standard streams.
            let above = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
            let null: OwnedFd = File::open("/dev/null")?.into();
            Ok((read, [above(&null)?, above(&write)?, above(&write)?]))
        };
        let (read, streams) = pipe().map_err(|error| BuildError::io("read the output of", "a tool", error))?;
        let options = Options { patience: Some(PATIENCE), ..make(streams)? };
        let (log, progress, signals) = (&self.log, &mut *self.progress, self.signals);
        let (finished, tail) = std::thread::scope(|scope| {
            let reader = scope.spawn(move || follow(File::from(read), log, meaning, progress));
            let finished = exec::run(&options, signals);
            // The last holder of the pipe's other end: now the reader comes to the end.
            drop(options);
            (finished, reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let tail = tail.map_err(|error| BuildError::io("write", "the log", error))?;
        if let Ok(finished) = &finished {
            self.interrupted(&finished.passed_on)?;
        }
        Ok((finished, tail))
    }
}
