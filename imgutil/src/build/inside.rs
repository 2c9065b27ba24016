//! Running commands of the image itself during a build, by [`crate::exec`]: nothing of the host is in reach, and nothing is left of them.

use super::BuildError;
use super::backend::Context;
use super::output::{Meaning, NoMeaning, Tail};
use super::plan::Plan;
use crate::exec::{Bind, Finished, Options, Outcome};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Largest answer that is read: names and versions of all packages of a distribution have some 5 MB.
const ANSWER_LIMIT: u64 = 64 << 20;

/// How a command is run.
#[derive(Default)]
pub(super) struct Inside {
    /// Its standard input; nothing by default.
    pub(super) input: Option<File>,
    /// Its standard output; the log by default.
    pub(super) output: Option<File>,
    /// Variables beside the usual ones.
    pub(super) environment: Vec<(String, String)>,
    /// Parts of the host that it sees.
    pub(super) binds: Vec<Bind>,
}

impl Inside {
    /// Sees the plan's repositories that are directories of this host, at their places here.
    pub(super) fn with_repositories_of(plan: &Plan) -> Self {
        let local = |uri: &str| {
            let path = ["copy:", "file:"].iter().find_map(|scheme| uri.strip_prefix(scheme))?;
            let path = PathBuf::from(format!("/{}", path.trim_matches('/')));
            path.is_dir().then(|| Bind { source: path.clone(), target: path, writable: false })
        };
        let binds = plan.repositories.iter().filter_map(|repository| local(&repository.uri)).collect();
        Self { binds, ..Self::default() }
    }

    /// Runs it, and gives how it ended and what it printed last.
    pub(super) fn run(
        self,
        context: &mut Context<'_, '_>,
        meaning: &mut dyn Meaning,
        command: &[OsString],
    ) -> Result<(Finished, Tail), BuildError> {
        let (work, epoch) = (context.work, context.epoch);
        let (input, output) = (self.input.map(OwnedFd::from), self.output.map(OwnedFd::from));
        let (finished, tail) = context.tools.run(meaning, |[nothing, usual, errors]| {
            let mut options = Options::in_tree(&work.root(), command.to_vec())?;
            options.set_name(work.tree());
            options.stdio = Some([input.unwrap_or(nothing), output.unwrap_or(usual), errors]);
            options.binds = self.binds;
            options.environment = self.environment;
            options.environment.extend(epoch.map(|seconds| ("SOURCE_DATE_EPOCH".to_owned(), seconds.to_string())));
            Ok(options)
        })?;
        Ok((finished?, tail))
    }

    /// Runs it; its failure is the build's.
    pub(super) fn succeed(
        self,
        context: &mut Context<'_, '_>,
        doing: &str,
        command: &[OsString],
    ) -> Result<(), BuildError> {
        let (finished, tail) = self.run(context, &mut NoMeaning, command)?;
        for warning in &finished.warnings {
            tracing::warn!("{doing}: {warning}");
        }
        let reason = match finished.outcome {
            Outcome::Exited(0) => return Ok(()),
            Outcome::Exited(code) => format!("exit status {code}: {}", tail.reason()),
            Outcome::Signaled(number) => format!("ended by signal {number}"),
        };
        Err(BuildError::tool(doing, &reason, tail, &context.work.root()))
    }

    /// Runs it and gives what it prints on its standard output; its failure is the build's.
    pub(super) fn answer(
        mut self,
        context: &mut Context<'_, '_>,
        doing: &str,
        command: &[OsString],
    ) -> Result<String, BuildError> {
        // A file, not a pipe: nobody has to read while it is written.
        let failed = |error| BuildError::io("keep the answer of", command[0].clone(), error);
        let mut file = tempfile::tempfile_in(context.work.temporary()).map_err(failed)?;
        self.output = Some(file.try_clone().map_err(failed)?);
        self.succeed(context, doing, command)?;
        let mut text = Vec::new();
        file.rewind().and_then(|()| file.take(ANSWER_LIMIT).read_to_end(&mut text)).map_err(failed)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Runs a command of the image; its failure is the build's.
pub(super) fn in_tree(context: &mut Context<'_, '_>, doing: &str, command: &[OsString]) -> Result<(), BuildError> {
    Inside::default().succeed(context, doing, command)
}
