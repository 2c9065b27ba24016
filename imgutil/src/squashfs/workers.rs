//! How many threads compress at once, and how many blocks wait for them, so that packing stays within a bound of memory whatever the
//! level, the block size and the number of processors.

use super::data::Compression;

/// What compressing may take when nothing is said, in bytes: with all else that packing keeps in memory less than 150 MB.
pub const MEMORY: u64 = 100 << 20;
/// For blocks that wait to be compressed or written.
const WAITING: u64 = 32 << 20;
/// Of small blocks so many are enough.
const MOST_WAITING: u32 = 1024;
/// A worker beside its compressor: its stack and the allocator's.
const THREAD: u64 = 256 << 10;

/// What compressing blocks of at most `0` bytes takes, in KiB, at zstd levels up to 3, 8, 10, 12 and 22. As zstd estimates it itself
/// (`ZSTD_estimateCCtxSize_usingCParams` of 1.5.4), the most of each group.
const ZSTD: [(u32, [u64; 5]); 5] = [
    (1 << 16, [650, 1040, 1040, 1290, 1750]),
    (1 << 17, [890, 1540, 1280, 2050, 2820]),
    (1 << 18, [1020, 3580, 3580, 4600, 5380]),
    (1 << 19, [1270, 6660, 6660, 8710, 9480]),
    (1 << 20, [1270, 6660, 12_800, 16_890, 17_670]),
];
/// The same for xz (`lzma_raw_encoder_memusage` of 5.4.1 with a dictionary of a block's size).
const XZ: [(u32, u64); 5] = [(1 << 16, 1990), (1 << 17, 2600), (1 << 18, 4070), (1 << 19, 7020), (1 << 20, 12_910)];

/// Threads that compress, and blocks that wait for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workers {
    pub(super) count: u32,
    pub(super) backlog: u32,
}

impl Workers {
    /// At most `wanted` threads that take at most `memory` bytes together; at least one, whatever it takes.
    pub(super) fn within(memory: u64, wanted: u32, compression: Compression, block_size: u32) -> Self {
        let mut workers = Self::of(wanted.max(1), block_size);
        while workers.count > 1 && workers.memory(compression, block_size) > memory {
            workers = Self::of(workers.count - 1, block_size);
        }
        workers
    }

    /// As many blocks as fit: they bridge what holds up those who read and those who write. Two for each worker always.
    fn of(count: u32, block_size: u32) -> Self {
        let fits = u32::try_from(WAITING / u64::from(block_size)).unwrap_or(u32::MAX);
        Self { count, backlog: fits.min(MOST_WAITING).max(2 * count) }
    }

    fn memory(self, compression: Compression, block_size: u32) -> u64 {
        let block = u64::from(block_size);
        // A block that it works on, beside those that wait.
        let worker = compressor(compression, block_size) + block + THREAD;
        u64::from(self.count) * worker + u64::from(self.backlog) * block
    }
}

fn compressor(compression: Compression, block_size: u32) -> u64 {
    let kib = match compression {
        Compression::Zstd(level) => {
            let group = [3, 8, 10, 12].iter().filter(|last| level > **last).count();
            ZSTD.iter().find(|(largest, _)| block_size <= *largest).unwrap_or(&ZSTD[4]).1[group]
        }
        Compression::Xz => XZ.iter().find(|(largest, _)| block_size <= *largest).unwrap_or(&XZ[4]).1,
    };
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_bounds_the_workers_and_not_the_other_way_round() {
        for (wanted, compression, block_size, count, backlog) in [
            // Two processors are never too many.
            (2, Compression::Zstd(22), 1 << 17, 2, 256),
            (2, Compression::Zstd(22), 1 << 20, 2, 32),
            (2, Compression::Xz, 1 << 20, 2, 32),
            // The default on a large machine.
            (64, Compression::Zstd(9), 1 << 17, 41, 256),
            (64, Compression::Zstd(22), 1 << 17, 21, 256),
            (256, Compression::Zstd(1), 1 << 12, 108, 1024),
            (256, Compression::Zstd(22), 1 << 20, 3, 32),
            (256, Compression::Xz, 1 << 20, 4, 32),
            (0, Compression::Zstd(9), 1 << 17, 1, 256),
        ] {
            let workers = Workers::within(MEMORY, wanted, compression, block_size);
            assert_eq!(workers, Workers { count, backlog }, "{wanted} {compression:?} {block_size}");
            assert!(workers.memory(compression, block_size) <= MEMORY);
        }
        assert_eq!(Workers::within(0, 8, Compression::Zstd(22), 1 << 20).count, 1);
    }
}
