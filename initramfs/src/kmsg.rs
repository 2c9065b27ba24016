//! The log of a process that has no standard error any more: the kernel's, opened once, before the root is anybody's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Longest record. The kernel refuses longer ones as a whole (linux/kernel/printk: `LOG_LINE_MAX`, 1024 less its own prefix).
const LONGEST: usize = 960;

/// Messages with this target are for the kernel's log alone, whatever their level: of one server among several, which rests or is back, the console
/// says nothing.
pub const ASIDE: &str = "moor_tether::aside";

/// Writes to /dev/kmsg with the priority of the message, so that errors reach the console also where the kernel is `quiet`.
pub struct Kmsg(File);

impl Kmsg {
    /// Opens it.
    ///
    /// # Errors
    /// There is none, or this process may not write to it.
    pub fn open() -> io::Result<Self> {
        OpenOptions::new().write(true).open("/dev/kmsg").map(Self)
    }
}

/// One message. It is written as a whole when it is dropped, because each write is a record.
pub struct Record<'a> {
    file: &'a File,
    text: Vec<u8>,
}

impl Write for Record<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        // A log that cannot be written cannot be complained about.
        let _ = (&mut &*self.file).write_all(shortened(&self.text));
    }
}

/// As much of a message as a record holds, whole characters only: the beginning of a long one is better than nothing.
fn shortened(text: &[u8]) -> &[u8] {
    let is_inside = |byte: &u8| *byte & 0xC0 == 0x80;
    let mut end = text.len().min(LONGEST);
    while end > 0 && text.get(end).is_some_and(is_inside) {
        end -= 1;
    }
    &text[..end]
}

impl<'a> MakeWriter<'a> for Kmsg {
    type Writer = Record<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        self.record(6)
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        self.record(match *meta.level() {
            // Debugging, to the kernel: the least that `loglevel` keeps from the console.
            _ if meta.target() == ASIDE => 7,
            // Critical: a `quiet` kernel shows errors on some distributions' consoles (loglevel 4), on others (RHEL's: 3) nothing less than this.
            Level::ERROR => 2,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        })
    }
}

impl Kmsg {
    fn record(&self, priority: u8) -> Record<'_> {
        Record { file: &self.0, text: format!("<{priority}>moor-tether: ").into_bytes() }
    }
}

/// Sends the log of this process to the kernel's; where that could not be opened, nowhere.
pub fn log_to_kernel(kmsg: io::Result<Kmsg>) {
    if let Ok(kmsg) = kmsg {
        let log = tracing_subscriber::fmt().without_time().with_target(false).with_level(false).with_ansi(false);
        // A second logger is refused; the first one stays.
        let _ = log.with_max_level(Level::INFO).with_writer(kmsg).try_init();
    }
}

/// Sends the log of this process to its standard error.
pub fn log_to_stderr() {
    let log = tracing_subscriber::fmt().without_time().with_target(false).with_ansi(false);
    let _ = log.with_max_level(Level::INFO).with_writer(io::stderr).try_init();
}

/// Panics are in the log too: standard error is nobody's in the background.
pub fn log_panics() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // A record of the kernel's log is one line.
        tracing::error!("a bug, please report it: {}", panic.to_string().replace('\n', " "));
        say(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_and_not_lost() {
        assert_eq!(shortened(b"short"), b"short");
        assert_eq!(shortened(&[b'x'; 5000]).len(), LONGEST);
        let text = format!("{}{}", "x".repeat(LONGEST - 1), "ä".repeat(50));
        assert_eq!(shortened(text.as_bytes()), "x".repeat(LONGEST - 1).as_bytes());
        // An outage names every server with what it did.
        let (read, write) = nix::unistd::pipe().unwrap();
        let kmsg = Kmsg(File::from(write));
        kmsg.record(3).write_all(&[b'y'; 4000]).unwrap();
        drop(kmsg);
        let said = io::read_to_string(File::from(read)).unwrap();
        assert!(said.starts_with("<3>moor-tether: yyy") && said.len() == LONGEST, "{said}");
    }
}
