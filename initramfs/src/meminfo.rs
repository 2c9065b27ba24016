//! The machine's memory, as the kernel tells it in /proc/meminfo.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// More than the file has: some 50 lines.
const LONGEST: usize = 8 << 10;

/// The machine's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All that the kernel has.
    pub(crate) total: u64,
    /// What programs could get without anything being swapped out.
    pub(crate) available: u64,
}

impl Memory {
    pub(crate) fn read() -> io::Result<Self> {
        Source::open()?.read()
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }
}

/// The file, open: it can be read where no path leads to it any more.
pub(crate) struct Source(File);

impl Source {
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/meminfo").map(Self)
    }

    pub(crate) fn read(&self) -> io::Result<Memory> {
        let mut bytes = [0; LONGEST];
        // One call from the beginning: the kernel writes the whole of it anew.
        let length = self.0.read_at(&mut bytes, 0)?;
        let text = std::str::from_utf8(&bytes[..length]).map_err(io::Error::other)?;
        Memory::parse(text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:        2030632 kB\nMemFree:  1 kB\nMemAvailable:     985412 kB\n";
        assert_eq!(Memory::parse(text), Some(Memory { total: 2_030_632 * 1024, available: 985_412 * 1024 }));
        assert_eq!(Memory::parse("MemTotal: 5 kB\n"), None);
        assert_eq!(Memory::parse("MemTotal: x kB\nMemAvailable: 1 kB\n"), None);
        let source = Source::open().unwrap();
        for _ in 0..2 {
            let memory = source.read().unwrap();
            assert!(memory.total > memory.available && memory.available > 0, "{memory:?}");
        }
    }
}
