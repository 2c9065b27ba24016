//! A cpio archive in the `newc` format, which the kernel unpacks behind an initramfs (kernel: Documentation/driver-api/early-userspace/
//! buffer-format.rst). Only what the site's archive needs: directories and plain files, owned by root.

/// An archive in the making.
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Default for Archive {
    fn default() -> Self {
        Self { bytes: Vec::new(), inode: 1 }
    }
}

impl Archive {
    /// Adds a directory; parents come first.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | mode, content);
    }

    /// The archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let links = if mode & 0o040_000 == 0 { 1 } else { 2 };
        // Inode, mode, uid, gid, links, mtime, size, device and special device (major, minor each), name length, checksum.
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self.inode += 1;
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_unpacks_it() {
        let mut archive = Archive::default();
        archive.directory("etc");
        archive.file("etc/a", 0o644, b"content\n");
        archive.file("etc/empty", 0o600, b"");
        let dir = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["-id", "--quiet"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("etc/a")).unwrap(), b"content\n");
        assert_eq!(std::fs::metadata(dir.path().join("etc/empty")).unwrap().len(), 0);
    }
}
