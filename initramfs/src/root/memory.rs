//! Whether the machine has room for the writable layer, and for an image in memory. A memory disk that runs out of memory turns writes into
//! I/O errors, so this is asked before, not found out later.

use crate::meminfo::Memory;

/// Smallest writable layer that a system boots with.
const SMALLEST: u64 = 64 << 20;
/// What has to stay free for programs when nothing is written yet.
const RESERVE: u64 = 128 << 20;
/// Data compress about so much: a full disk takes a quarter of its size.
const COMPRESSION: u64 = 4;
/// The same of the files of a system, which are programs and libraries for the most part.
const UNPACKED_COMPRESSION: u64 = 2;
/// A file system takes one part in so many of its disk for itself.
const FILESYSTEM: u64 = 16;
/// Largest size, in per cent of the memory.
const MOST: u16 = 400;

/// There is not enough.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The share makes no sense.
    #[error("the writable layer has 1 to {MOST} per cent of the memory, not {0}")]
    Percent(u16),
    /// The limit makes no sense.
    #[error("the writable layer may take 1 to 100 per cent of the memory, not {0}")]
    Limit(u16),
    /// An image does not fit.
    #[error(
        "too little memory for an untethered root: the image takes {} MiB, a full writable layer of {} MiB about {} MiB, and programs need {} MiB, together {} MiB, but only {} of {} MiB are free: choose 'root: tethered', or give the machine more memory",
        mib(*image), mib(*layer), mib(layer / COMPRESSION), mib(RESERVE), mib(image + layer / COMPRESSION + RESERVE), mib(*available), mib(*total)
    )]
    Image {
        /// Size of the image in bytes.
        image: u64,
        /// Size of the layer.
        layer: u64,
        /// Free memory.
        available: u64,
        /// All memory.
        total: u64,
    },
    /// What is in the image does not fit.
    #[error(
        "too little memory for a root that is unpacked in it: its {} MiB take about {} MiB, {} MiB to write about {} MiB, and programs need {} MiB, together {} MiB, but only {} of {} MiB may be used: choose 'root: untethered' or 'root: tethered', or give the machine more memory",
        mib(*files), mib(files / UNPACKED_COMPRESSION), mib(*layer), mib(layer / COMPRESSION), mib(RESERVE),
        mib(files / UNPACKED_COMPRESSION + layer / COMPRESSION + RESERVE), mib(*available), mib(*total)
    )]
    Unpacked {
        /// Bytes of its files.
        files: u64,
        /// Bytes that may be written to it.
        layer: u64,
        /// Free memory, or less where a limit says so.
        available: u64,
        /// All memory.
        total: u64,
    },
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

impl Memory {
    /// Size of a writable layer of `percent` of the memory, in whole megabytes.
    fn layer(self, percent: u16) -> Result<u64, MemoryError> {
        if percent == 0 || percent > MOST {
            return Err(MemoryError::Percent(percent));
        }
        let size = (self.total / 100 * u64::from(percent)) >> 20 << 20;
        if size < SMALLEST {
            return Err(MemoryError::TooSmall { percent, total: self.total, size });
        }
        Ok(size)
    }

    /// Bytes of memory that a disk may take, of `percent` of all.
    pub(super) fn limit(self, percent: Option<u16>) -> Result<Option<u64>, MemoryError> {
        let of_all = |percent: u16| match percent {
            1..=100 => Ok(self.total / 100 * u64::from(percent)),
            _ => Err(MemoryError::Limit(percent)),
        };
        percent.map(of_all).transpose()
    }

    /// Size of the disk of a writable layer of `percent` of the memory. With a `limit` it takes no more than that, however much it holds.
    pub(super) fn overlay(self, percent: u16, limit: Option<u64>) -> Result<u64, MemoryError> {
        let Self { total, available } = self;
        let size = self.layer(percent)?;
        if available < (size / COMPRESSION).min(limit.unwrap_or(u64::MAX)) + RESERVE {
            return Err(MemoryError::NotFree { size, available, total });
        }
        Ok(size)
    }

    /// Whether an image of so many bytes fits beside a writable layer.
    pub(super) fn image(self, image: u64, percent: u16) -> Result<(), MemoryError> {
        let Self { total, available } = self;
        let layer = self.layer(percent)?;
        if available < image.saturating_add(layer / COMPRESSION + RESERVE) {
            return Err(MemoryError::Image { image, layer, available, total });
        }
        Ok(())
    }

    /// Size of a disk for so many bytes of files, and for a writable layer's worth more of them.
    pub(super) fn unpacked(self, files: u64, percent: u16, limit: Option<u64>) -> Result<u64, MemoryError> {
        let Self { total, available } = self;
        let layer = self.layer(percent)?;
        let available = available.min(limit.map_or(u64::MAX, |limit| limit + RESERVE));
        if available < (files / UNPACKED_COMPRESSION).saturating_add(layer / COMPRESSION + RESERVE) {
            return Err(MemoryError::Unpacked { files, layer, available, total });
        }
        let disk = files + layer;
        Ok((disk + disk / FILESYSTEM) >> 20 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(total: u64, available: u64) -> Memory {
        Memory { total: total << 20, available: available << 20 }
    }

    #[test]
    fn room_is_asked_for_before() {
        assert_eq!(memory(2000, 1500).overlay(50, None), Ok(1000 << 20));
        assert!(matches!(memory(100, 90).overlay(50, None), Err(MemoryError::TooSmall { .. })));
        assert!(matches!(memory(2000, 300).overlay(50, None), Err(MemoryError::NotFree { .. })));
        assert!(matches!(memory(2000, 1900).overlay(400, None), Err(MemoryError::NotFree { .. })));
        for percent in [0, 401] {
            assert_eq!(memory(2000, 1500).overlay(percent, None), Err(MemoryError::Percent(percent)));
        }
    }

    #[test]
    fn a_limit_bounds_what_a_full_layer_takes() {
        let memory = memory(2000, 1900);
        let limit = memory.limit(Some(40)).unwrap();
        assert!(limit.is_some_and(|limit| limit.abs_diff(800 << 20) < 1 << 20));
        assert_eq!(memory.overlay(400, limit), Ok(8000 << 20));
        assert_eq!(memory.limit(None), Ok(None));
        for percent in [0, 101] {
            assert_eq!(memory.limit(Some(percent)), Err(MemoryError::Limit(percent)));
        }
    }

    #[test]
    fn an_image_in_memory_has_room_beside_the_layer() {
        // 250 MiB for a full layer of 1000, and 128 for programs.
        assert_eq!(memory(2000, 1500).image(1100 << 20, 50), Ok(()));
        let error = memory(2000, 1500).image(1200 << 20, 50).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the image takes 1200 MiB") && text.contains("together 1578 MiB"), "{text}");
        assert!(text.contains("only 1500 of 2000 MiB are free"), "{text}");
        assert!(memory(2000, 1500).image(u64::MAX, 50).is_err());
    }

    #[test]
    fn unpacked_files_take_half_and_the_limit_counts() {
        let memory = memory(4000, 3000);
        let disk = memory.unpacked(2000 << 20, 50, None).unwrap();
        assert!(disk > 4000 << 20 && disk < 4400 << 20, "{disk}");
        let error = memory.unpacked(8000 << 20, 50, None).unwrap_err().to_string();
        assert!(
            error.contains("its 8000 MiB take about 4000 MiB") && error.contains("only 3000 of 4000 MiB"),
            "{error}"
        );
        assert!(memory.unpacked(2000 << 20, 50, Some(1000 << 20)).is_err());
    }
}
