//! Ctrl-C and SIGTERM while a tree is being built: noticed between two files, so that what was built can be removed.

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Holds signals back from this thread while it lives.
pub(super) struct Interrupts {
    pending: SignalFd,
    before: SigSet,
}

impl Interrupts {
    /// From here on the signals wait until somebody asks.
    pub(super) fn hold_back() -> Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        let before = SigSet::thread_get_mask().context("cannot read the signal mask")?;
        signals.thread_block().context("cannot hold signals back")?;
        let pending = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot watch for signals")?;
        Ok(Self { pending, before })
    }

    /// An error if a signal has come.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(signal) = self.pending.read_signal().context("cannot watch for signals")? {
            let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
            let name = Signal::try_from(number).map_or("a signal", Signal::as_str);
            bail!("interrupted by {name}: nothing is left of it");
        }
        Ok(())
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // It was the mask a moment ago, so the kernel takes it.
        let _ = self.before.thread_set_mask();
    }
}
