//! A file that is written out while it grows, so that the sync at the end has little left to do.

use rustix::fs::Advice;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::num::NonZero;

/// So many bytes are begun to be written out at once.
const STEP: u64 = 8 << 20;

/// The file.
pub(super) struct Flushing {
    file: File,
    position: u64,
    /// What lies before is on its way to the disk, or there.
    flushed: u64,
}

impl Flushing {
    /// `file` must be empty.
    pub(super) fn new(file: File) -> Self {
        Self { file, position: 0, flushed: 0 }
    }
}

impl Write for Flushing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.position += written as u64;
        if let Some(length) = NonZero::new(self.position.saturating_sub(self.flushed))
            && length.get() >= STEP
        {
            // "Not needed" makes the kernel begin to write the range, without waiting; pages that are still dirty stay in the cache,
            // where they are read back from. A file system that does not take the advice loses nothing but the head start.
            let _ = rustix::fs::fadvise(&self.file, self.flushed, Some(length), Advice::DontNeed);
            self.flushed = self.position;
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
        self.position = self.file.seek(to)?;
        Ok(self.position)
    }
}
