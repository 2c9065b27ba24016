//! Whether the machine has room for the writable layer. A memory disk that runs out of memory turns writes into I/O errors, so this is
//! asked before, not found out later.

use std::io;

/// Smallest writable layer that a system boots with.
const SMALLEST: u64 = 64 << 20;
/// What has to stay free for programs when nothing is written yet.
const RESERVE: u64 = 128 << 20;
/// Data compress about so much: a full disk takes a quarter of its size.
const COMPRESSION: u64 = 4;
/// Largest size, in per cent of the memory.
const MOST: u16 = 400;

/// There is not enough.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The share makes no sense.
    #[error("the writable layer has 1 to {MOST} per cent of the memory, not {0}")]
    Percent(u16),
    /// The layer would be too small.
    #[error(
        "a writable layer of {percent} % of {} MiB of memory is {} MiB, less than the {} MiB that a system needs: give it a larger share, or the machine more memory",
        mib(*total), mib(*size), mib(SMALLEST)
    )]
    TooSmall {
        /// The share.
        percent: u16,
        /// The memory in bytes.
        total: u64,
        /// What the share makes.
        size: u64,
    },
    /// It would not fit when it fills up.
    #[error(
        "too little memory for a writable layer of {} MiB: compressed it takes about {} MiB and programs need {} MiB, but only {} of {} MiB are free: give it a smaller share, or the machine more memory",
        mib(*size), mib(size / COMPRESSION), mib(RESERVE), mib(*available), mib(*total)
    )]
    NotFree {
        /// Size of the layer.
        size: u64,
        /// Free memory.
        available: u64,
        /// All memory.
        total: u64,
    },
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// The machine's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    total: u64,
    available: u64,
}

impl Memory {
    pub(super) fn read() -> io::Result<Self> {
        Self::parse(&std::fs::read_to_string("/proc/meminfo")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }

    /// Size of a writable layer of `percent` of the memory, in whole megabytes.
    pub(super) fn overlay(self, percent: u16) -> Result<u64, MemoryError> {
        if percent == 0 || percent > MOST {
            return Err(MemoryError::Percent(percent));
        }
        let Self { total, available } = self;
        let size = (total / 100 * u64::from(percent)) >> 20 << 20;
        if size < SMALLEST {
            return Err(MemoryError::TooSmall { percent, total, size });
        }
        if available < size / COMPRESSION + RESERVE {
            return Err(MemoryError::NotFree { size, available, total });
        }
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(total: u64, available: u64) -> Memory {
        Memory { total: total << 20, available: available << 20 }
    }

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:        2030632 kB\nMemFree:  1 kB\nMemAvailable:     985412 kB\n";
        assert_eq!(Memory::parse(text), Some(Memory { total: 2_030_632 * 1024, available: 985_412 * 1024 }));
        assert_eq!(Memory::parse("MemTotal: 5 kB\n"), None);
        assert_eq!(Memory::parse("MemTotal: x kB\nMemAvailable: 1 kB\n"), None);
        assert!(Memory::read().unwrap().total > 0);
    }

    #[test]
    fn room_is_asked_for_before() {
        assert_eq!(memory(2000, 1500).overlay(50), Ok(1000 << 20));
        assert!(matches!(memory(100, 90).overlay(50), Err(MemoryError::TooSmall { .. })));
        assert!(matches!(memory(2000, 300).overlay(50), Err(MemoryError::NotFree { .. })));
        assert!(matches!(memory(2000, 1900).overlay(400), Err(MemoryError::NotFree { .. })));
        for percent in [0, 401] {
            assert_eq!(memory(2000, 1500).overlay(percent), Err(MemoryError::Percent(percent)));
        }
    }
}
