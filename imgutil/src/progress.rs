//! Progress of long operations: a bar on a terminal, plain lines in a log for anything over two seconds.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The first plain line appears after this; what is faster stays silent.
const QUIET: Duration = Duration::from_secs(2);
/// Plain lines appear so often.
const EVERY: Duration = Duration::from_secs(5);
/// The first one comes earlier by so much.
const HEAD_START: Duration = Duration::from_secs(3);

/// Counts one operation and shows it on standard error.
pub struct Progress {
    verb: &'static str,
    /// What is counted; none: bytes.
    unit: Option<&'static str>,
    shown: Shown,
    done: AtomicU64,
    total: AtomicU64,
}

enum Shown {
    Bar(ProgressBar),
    Lines { started: Instant, last: Mutex<Instant> },
    Nothing,
}

impl Progress {
    /// Starts to show an operation that is counted in bytes; `verb` as in "packing".
    #[must_use]
    pub fn new(verb: &'static str) -> Self {
        Self::start(verb, None)
    }

    /// Starts to show an operation that is counted in something else.
    #[must_use]
    pub fn counting(verb: &'static str, unit: &'static str) -> Self {
        Self::start(verb, Some(unit))
    }

    fn start(verb: &'static str, unit: Option<&'static str>) -> Self {
        let shown = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
            let template = match unit {
                None => "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
                Some(_) => "{msg} {wide_bar} {human_pos}/{human_len} {eta}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(verb);
            Shown::Bar(bar)
        } else {
            let now = Instant::now();
            // As if a line had been printed before, so that the next one is due after QUIET.
            let last = now.checked_sub(HEAD_START).unwrap_or(now);
            Shown::Lines { started: now, last: Mutex::new(last) }
        };
        Self { verb, unit, shown, done: AtomicU64::new(0), total: AtomicU64::new(0) }
    }

    /// Shows nothing (for tests and inner operations).
    #[must_use]
    pub fn silent() -> Self {
        Self { verb: "", unit: None, shown: Shown::Nothing, done: AtomicU64::new(0), total: AtomicU64::new(0) }
    }

    /// Says how many there are in all.
    pub fn total(&self, count: u64) {
        self.total.store(count, Ordering::Relaxed);
        if let Shown::Bar(bar) = &self.shown {
            bar.set_length(count);
        }
    }

    /// So many more are done.
    pub fn advance(&self, count: u64) {
        let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
        match &self.shown {
            Shown::Bar(bar) => bar.set_position(done),
            Shown::Lines { last, .. } => {
                // A thread that finds the lock taken leaves the line to the one that has it.
                if let Ok(mut last) = last.try_lock()
                    && last.elapsed() >= EVERY
                {
                    *last = Instant::now();
                    let total = self.total.load(Ordering::Relaxed);
                    match self.unit {
                        None => eprintln!("{}: {} of {}", self.verb, bytes_text(done), bytes_text(total)),
                        Some(unit) => eprintln!("{}: {done} of {total} {unit}", self.verb),
                    }
                }
            }
            Shown::Nothing => {}
        }
    }

    /// Ends the display; `summary` stays, unless a log would have been silent so far.
    pub fn finish(&self, summary: &str) {
        match &self.shown {
            Shown::Bar(bar) => {
                bar.finish_and_clear();
                eprintln!("{summary}");
            }
            Shown::Lines { started, .. } => {
                if started.elapsed() >= QUIET {
                    eprintln!("{summary}");
                }
            }
            Shown::Nothing => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown
            && !bar.is_finished()
        {
            bar.finish_and_clear(); // an error is printed on a clean line
        }
    }
}

/// A size for people: three figures and a binary unit.
#[must_use]
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[allow(clippy::cast_precision_loss)] // three figures are shown
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_first_line_comes_after_the_quiet_time() {
        assert_eq!(super::HEAD_START, super::EVERY.checked_sub(super::QUIET).expect("later lines are further apart"));
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (1_047_527_424, "999 MiB"),
            (1 << 40, "1.00 TiB"),
        ] {
            assert_eq!(super::bytes_text(bytes), text, "{bytes}");
        }
    }
}
