//! For unit tests: what `mksquashfs` makes of a directory. It asks nothing of what it packs.

use super::Source;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

/// A squashfs in a file.
pub(crate) struct Packed(File);

impl Source for Packed {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn size(&self) -> u64 {
        self.0.metadata().map_or(0, |metadata| metadata.len())
    }
}

/// Packs a directory into the file beside it with the ending `.squashfs`.
pub(crate) fn pack(directory: &Path) -> Packed {
    let file = directory.with_extension("squashfs");
    let packed = Command::new("mksquashfs").arg(directory).arg(&file).args(["-noappend", "-quiet"]).output();
    assert!(packed.is_ok_and(|output| output.status.success()), "mksquashfs");
    Packed(File::open(file).expect("opens"))
}
