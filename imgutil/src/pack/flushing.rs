//! A file that is written out while it grows, so that the sync at the end has little left to do.
//!
//! A thread of its own asks the kernel to begin: the call waits where the disk's queue is full, and whoever writes has others waiting
//! for him, above all the threads that compress.

use rustix::fs::Advice;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::num::NonZero;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// So many bytes are begun to be written out at once.
const STEP: u64 = 8 << 20;

/// The file.
pub(super) struct Flushing {
    file: File,
    position: u64,
    /// What lies before is on its way to the disk, or there.
    flushed: u64,
    behind: Option<Behind>,
}

/// The thread that follows.
struct Behind {
    ranges: Sender<Range<u64>>,
    thread: JoinHandle<()>,
}

impl Flushing {
    /// `file` must be empty.
    ///
    /// # Errors
    /// No second handle for the file, or no thread.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let (ranges, incoming) = channel();
        let second = file.try_clone()?;
        let thread = std::thread::Builder::new().name("write-out".into()).spawn(move || follow(&second, &incoming))?;
        Ok(Self { file, position: 0, flushed: 0, behind: Some(Behind { ranges, thread }) })
    }

    fn begin_to_write_out(&mut self) {
        if let Some(behind) = &self.behind {
            // It ends only with its sender.
            let _ = behind.ranges.send(self.flushed..self.position);
        }
        self.flushed = self.position;
    }
}

fn follow(file: &File, ranges: &Receiver<Range<u64>>) {
    for range in ranges {
        // "Not needed" makes the kernel begin to write the range, without waiting for its end; pages that are still dirty stay in the
        // cache, where they are read back from. A file system that does not take the advice loses nothing but the head start.
        let _ = rustix::fs::fadvise(file, range.start, NonZero::new(range.end - range.start), Advice::DontNeed);
    }
}

impl Write for Flushing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.position += written as u64;
        if self.position >= self.flushed + STEP {
            self.begin_to_write_out();
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Read for Flushing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for Flushing {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        // Whoever leaves the end comes back to read what he has written, or to write little.
        if self.position > self.flushed {
            self.begin_to_write_out();
        }
        self.position = self.file.seek(to)?;
        Ok(self.position)
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        if let Some(Behind { ranges, thread }) = self.behind.take() {
            drop(ranges);
            // It cannot fail.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_there_and_can_be_read_back() {
        let mut file = Flushing::new(tempfile::tempfile().expect("file")).expect("thread");
        let bytes: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
        for _ in 0..6 {
            file.write_all(&bytes).expect("writes");
        }
        file.rewind().expect("seeks");
        file.write_all(b"first").expect("writes");
        file.rewind().expect("seeks");
        let mut seen = Vec::new();
        file.read_to_end(&mut seen).expect("reads");
        assert_eq!(seen.len(), 18 << 20);
        assert!(seen.starts_with(b"first\x05") && seen.ends_with(&bytes));
        assert!(file.flushed >= 16 << 20);
    }
}
