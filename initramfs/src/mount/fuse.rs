//! A [`ReadOnlyFile`] as a FUSE file system of one directory and one file: as much of the kernel's protocol as these need (Linux:
//! include/uapi/linux/fuse.h). Nothing outside this module knows it.
//!
//! It is our own, because an answer goes out in the parts in which the reader has it, by one system call, and a thread needs a buffer of a few
//! KiB; the libraries for it want each answer in one piece, and room for writes that never come.

use super::{FILE_NAME, Pieces, ReadOnlyFile};
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, IoSlice, Read as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// The protocol: its major version, and the newest minor one that this module was written for.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// Older kernels (before 3.15) take a shorter answer to the first request.
const MINOR_OF_LONG_INIT: u32 = 23;

/// The directory's inode, as the protocol has it, and the file's.
const ROOT: u64 = 1;
const FILE: u64 = 2;
/// Nothing ever changes.
const TTL: Duration = Duration::from_hours(24);
/// How long to wait where the kernel has no memory for a request.
const SHORT_OF: Duration = Duration::from_millis(10);
/// Longest read in one request.
const LONGEST_READ: u32 = 1 << 20;
/// Pages of it, at the smallest page size.
const PAGES: u16 = 256;
/// Longest write: none comes, because the mount is read-only, and the kernel takes no less.
const LONGEST_WRITE: u32 = 4096;
/// Requests that the kernel may have under way in the background, and from how many on it takes that for a jam.
const BACKGROUND: u16 = 64;
const JAM: u16 = 48;
/// Threads that take requests from the kernel. They never wait for the network: such reads are answered by the reader's tasks.
const THREADS: usize = 2;
/// Room for a request: the kernel wants 8 KiB at least, and room for the longest write with its headers.
const REQUEST: usize = 16 << 10;

/// Reads are asked for before those before them were answered.
const ASYNC_READ: u32 = 1;
/// The loop device reads with direct I/O from one thread: without this it waits for each read before it asks for the next, and all programs
/// stand in one line (`fuse_direct_IO`).
const ASYNC_DIO: u32 = 1 << 15;
/// Requests of more than 32 pages.
const MAX_PAGES: u32 = 1 << 22;

/// Requests (`enum fuse_opcode`).
mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// Reads go past the kernel's own memory of the file, as the loop device's do anyway: who reads in a row saves a copy of every byte, and nothing is
/// in memory twice. What is ahead of a reader is read by the reader ([`crate::reader`]).
const DIRECT_IO: u32 = 1 << 0;

/// A session with the kernel, after the handshake.
pub(super) struct Session<F: ReadOnlyFile>(Arc<OneFile<F>>);

impl<F: ReadOnlyFile> Session<F> {
    /// `device` is the /dev/fuse that was mounted.
    pub(super) fn start(file: F, device: File) -> io::Result<Self> {
        let session = OneFile { file, device: Arc::new(device) };
        let mut buffer = vec![0; REQUEST];
        session.shake_hands(&mut buffer)?;
        Ok(Self(Arc::new(session)))
    }

    /// Serves until it is unmounted.
    pub(super) fn run(self) -> io::Result<()> {
        let spawn = |number| {
            let session = self.0.clone();
            std::thread::Builder::new().name(format!("fuse-{number}")).spawn(move || session.serve())
        };
        let threads: Vec<_> = (0..THREADS).map(spawn).collect::<io::Result<_>>()?;
        let join = |thread: std::thread::JoinHandle<io::Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the mount panicked")))
        };
        // All of them end, whatever the first one says.
        threads.into_iter().map(join).fold(Ok(()), Result::and)
    }
}

struct OneFile<F> {
    file: F,
    device: Arc<File>,
}

/// One request.
struct Request<'a> {
    opcode: u32,
    unique: u64,
    inode: u64,
    /// What comes behind the header.
    body: &'a [u8],
}

fn short() -> io::Error {
    io::Error::other("the kernel's request is shorter than its kind has to be")
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes).ok_or_else(short)
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes).ok_or_else(short)
}

impl<'a> Request<'a> {
    /// Length of `struct fuse_in_header`.
    const HEADER: usize = 40;

    fn parse(bytes: &'a [u8]) -> io::Result<Self> {
        Ok(Self {
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            inode: u64_at(bytes, 16)?,
            body: bytes.get(Self::HEADER..).ok_or_else(short)?,
        })
    }
}

/// The way of an answer. Dropped without one, the request is answered by an error: a request without any would hang for ever.
struct Answer {
    device: Arc<File>,
    unique: u64,
    is_open: bool,
}

impl Answer {
    /// Length of `struct fuse_out_header`.
    const HEADER: usize = 16;

    fn good(mut self, parts: &[impl AsRef<[u8]>]) {
        self.send(0, parts);
    }

    fn error(mut self, errno: Errno) {
        self.send(-(errno as i32), &[[0_u8; 0]]);
    }

    fn send(&mut self, code: i32, parts: &[impl AsRef<[u8]>]) {
        self.is_open = false;
        let length = Self::HEADER + parts.iter().map(|part| part.as_ref().len()).sum::<usize>();
        let mut header = Vec::with_capacity(Self::HEADER);
        header.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        header.extend_from_slice(&code.to_ne_bytes());
        header.extend_from_slice(&self.unique.to_ne_bytes());
        let slices: Vec<_> = std::iter::once(IoSlice::new(&header))
            .chain(parts.iter().map(|part| IoSlice::new(part.as_ref())).filter(|part| !part.is_empty()))
            .collect();
        match rustix::io::writev(&*self.device, &slices) {
            // Who asked was interrupted meanwhile, or the mount is gone.
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => {}
            Err(error) => {
                tracing::warn!("the kernel does not take an answer: {error}");
                // Whoever asked must not wait for ever. Where the kernel has ended it by itself, this one finds nobody.
                if code == 0 {
                    self.send(-(Errno::EIO as i32), &[[0_u8; 0]]);
                }
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.is_open {
            self.send(-(Errno::EIO as i32), &[[0_u8; 0]]);
        }
    }
}

/// A structure of the protocol, field by field.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Zero up to this length.
    fn up_to(mut self, length: usize) -> Self {
        self.0.resize(length, 0);
        self
    }
}

/// `DT_DIR` and `DT_REG`, and what they are in a mode (inode(7)).
const DIRECTORY: u32 = 4;
const REGULAR: u32 = 8;
const KIND_SHIFT: u32 = 12;

impl<F: ReadOnlyFile> OneFile<F> {
    fn answer(&self, request: &Request<'_>) -> Answer {
        Answer { device: self.device.clone(), unique: request.unique, is_open: true }
    }

    /// The next request, in `buffer`; `None` once it is unmounted.
    fn next(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&*self.device).read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    // Who asked was interrupted before this one took it.
                    Errno::ENOENT | Errno::EINTR | Errno::EAGAIN => {}
                    Errno::ENODEV => return Ok(None),
                    // Without this thread the root would end; memory comes back.
                    Errno::ENOMEM => std::thread::sleep(SHORT_OF),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Agrees with the kernel on what both can do.
    fn shake_hands(&self, buffer: &mut [u8]) -> io::Result<()> {
        let gone = || io::Error::other("the mount was gone before it began");
        let length = self.next(buffer)?.ok_or_else(gone)?;
        let request = Request::parse(&buffer[..length])?;
        let (major, minor) = (u32_at(request.body, 0)?, u32_at(request.body, 4)?);
        if request.opcode != opcode::INIT || major != MAJOR {
            self.answer(&request).error(Errno::EPROTO);
            return Err(io::Error::other(format!("the kernel speaks version {major}.{minor} of FUSE, not {MAJOR}")));
        }
        let (read_ahead, offered) = (u32_at(request.body, 8)?, u32_at(request.body, 12)?);
        let minor = minor.min(MINOR);
        // struct fuse_init_out
        let answer = Fields::default()
            .u32(MAJOR)
            .u32(minor)
            .u32(read_ahead)
            .u32(offered & (ASYNC_READ | ASYNC_DIO | MAX_PAGES))
            .u16(BACKGROUND)
            .u16(JAM)
            .u32(LONGEST_WRITE)
            .u32(1)
            .u16(PAGES)
            .up_to(if minor < MINOR_OF_LONG_INIT { 24 } else { 64 });
        self.answer(&request).good(&[answer.0]);
        Ok(())
    }

    fn serve(&self) -> io::Result<()> {
        let mut buffer = vec![0; REQUEST];
        while let Some(length) = self.next(&mut buffer)? {
            let request = Request::parse(&buffer[..length])?;
            let answer = self.answer(&request);
            // Without this thread the root would end. The answer is dropped on the way, and with that given; whoever left a lock behind left it whole.
            let served = catch_unwind(AssertUnwindSafe(|| self.serve_one(&request, answer)));
            if served.is_err() {
                tracing::error!("a request failed that must not (kind {}): please report this", request.opcode);
            }
        }
        Ok(())
    }

    fn serve_one(&self, request: &Request<'_>, mut answer: Answer) {
        match self.handle(request) {
            Ok(Handled::Answer(fields)) => answer.good(&[fields.0]),
            Ok(Handled::Read(offset, size)) => self.read(offset, size, answer),
            Ok(Handled::Silence) => answer.is_open = false,
            Err(errno) => answer.error(errno),
        }
    }

    fn handle(&self, request: &Request<'_>) -> Result<Handled, Errno> {
        let bad = |_| Errno::EINVAL;
        let fields = match request.opcode {
            opcode::LOOKUP => {
                let name = request.body.split(|byte| *byte == 0).next().unwrap_or_default();
                if request.inode != ROOT || name != FILE_NAME.as_bytes() {
                    return Err(Errno::ENOENT);
                }
                // struct fuse_entry_out
                let entry = Fields::default().u64(FILE).u64(0).u64(TTL.as_secs()).u64(TTL.as_secs()).u64(0);
                self.attributes(FILE, entry)?
            }
            // struct fuse_attr_out
            opcode::GETATTR => self.attributes(request.inode, Fields::default().u64(TTL.as_secs()).u64(0))?,
            opcode::OPEN => {
                let flags = u32_at(request.body, 0).map_err(bad)?;
                match request.inode {
                    FILE if flags & nix::libc::O_ACCMODE.cast_unsigned() == nix::libc::O_RDONLY.cast_unsigned() => {}
                    FILE => return Err(Errno::EROFS),
                    _ => return Err(Errno::EISDIR),
                }
                // struct fuse_open_out
                Fields::default().u64(0).u32(DIRECT_IO).u32(0)
            }
            opcode::OPENDIR if request.inode == ROOT => Fields::default().u64(0).u64(0),
            opcode::READ => {
                if request.inode != FILE {
                    return Err(Errno::EISDIR);
                }
                // struct fuse_read_in
                let (offset, size) = (u64_at(request.body, 8).map_err(bad)?, u32_at(request.body, 16).map_err(bad)?);
                return Ok(Handled::Read(offset, size));
            }
            opcode::OPENDIR | opcode::READDIR if request.inode != ROOT => return Err(Errno::ENOTDIR),
            opcode::READDIR => {
                let (offset, size) = (u64_at(request.body, 8).map_err(bad)?, u32_at(request.body, 16).map_err(bad)?);
                directory(offset, size as usize)
            }
            // struct fuse_kstatfs: nothing is free, names have 255 bytes at most.
            opcode::STATFS => Fields::default().up_to(40).u32(4096).u32(255).u32(4096).up_to(80),
            opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => Fields::default(),
            opcode::FORGET | opcode::BATCH_FORGET => return Ok(Handled::Silence),
            // The kernel does without, and does not ask again.
            _ => return Err(Errno::ENOSYS),
        };
        Ok(Handled::Answer(fields))
    }

    /// Appends `struct fuse_attr`.
    fn attributes(&self, inode: u64, before: Fields) -> Result<Fields, Errno> {
        let (kind, permissions, links, size) = match inode {
            ROOT => (DIRECTORY, 0o500, 2, 0),
            FILE => (REGULAR, 0o400, 1, self.file.size()),
            _ => return Err(Errno::ENOENT),
        };
        let time = self.file.modified();
        let fields = before.u64(inode).u64(size).u64(size.div_ceil(512)).u64(time).u64(time).u64(time);
        // Nanoseconds of the three times; mode, links; owner, group, device; block size and flags.
        let fields = fields.u32(0).u32(0).u32(0).u32((kind << KIND_SHIFT) | permissions).u32(links);
        Ok(fields.u32(0).u32(0).u32(0).u32(4096).u32(0))
    }

    fn read(&self, offset: u64, size: u32, answer: Answer) {
        let reply = move |result: io::Result<Pieces>| match result {
            Ok(pieces) => answer.good(&pieces),
            Err(error) => {
                tracing::error!("reading at {offset} failed: {error}");
                answer.error(Errno::EIO);
            }
        };
        // A request is never larger than was agreed on; the bound keeps it so whatever the kernel sends.
        self.file.read(offset, size.min(LONGEST_READ) as usize, Box::new(reply));
    }
}

/// What a request comes to.
enum Handled {
    Answer(Fields),
    /// The file's bytes, from an offset on.
    Read(u64, u32),
    /// No answer is expected.
    Silence,
}

/// Entries of the directory from `offset` on, as many as `size` bytes hold (`struct fuse_dirent`).
fn directory(offset: u64, size: usize) -> Fields {
    let entries = [(ROOT, DIRECTORY, "."), (ROOT, DIRECTORY, ".."), (FILE, REGULAR, FILE_NAME)];
    let mut fields = Fields::default();
    for ((inode, kind, name), next) in entries.into_iter().zip(1..) {
        let length = (24 + name.len()).next_multiple_of(8);
        if next <= offset {
            continue;
        }
        if fields.0.len() + length > size {
            break;
        }
        let end = fields.0.len() + length;
        fields = fields.u64(inode).u64(next).u32(u32::try_from(name.len()).unwrap_or(0)).u32(kind);
        fields.0.extend_from_slice(name.as_bytes());
        fields = fields.up_to(end);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl ReadOnlyFile for Nothing {
        fn size(&self) -> u64 {
            1000
        }
        fn modified(&self) -> u64 {
            7
        }
        fn read(&self, _: u64, _: usize, _: super::super::Reply) {}
    }

    #[test]
    fn structures_have_the_kernel_s_lengths() {
        let file = OneFile { file: Nothing, device: Arc::new(File::open("/dev/null").unwrap()) };
        let length = |opcode, inode, body: &[u8]| match file.handle(&Request { opcode, unique: 1, inode, body }) {
            Ok(Handled::Answer(fields)) => Ok(fields.0.len()),
            Ok(_) => Ok(0),
            Err(errno) => Err(errno),
        };
        assert_eq!(length(opcode::LOOKUP, ROOT, b"image\0"), Ok(128));
        assert_eq!(length(opcode::LOOKUP, ROOT, b"other\0"), Err(Errno::ENOENT));
        assert_eq!(length(opcode::LOOKUP, FILE, b"image\0"), Err(Errno::ENOENT));
        assert_eq!(length(opcode::GETATTR, ROOT, &[]), Ok(104));
        assert_eq!(length(opcode::GETATTR, 3, &[]), Err(Errno::ENOENT));
        assert_eq!(length(opcode::OPEN, FILE, &[0; 8]), Ok(16));
        assert_eq!(length(opcode::OPEN, FILE, &[1, 0, 0, 0]), Err(Errno::EROFS));
        assert_eq!(length(opcode::OPEN, ROOT, &[0; 8]), Err(Errno::EISDIR));
        assert_eq!(length(opcode::OPEN, FILE, &[0]), Err(Errno::EINVAL));
        assert_eq!(length(opcode::OPENDIR, FILE, &[0; 8]), Err(Errno::ENOTDIR));
        assert_eq!(length(opcode::STATFS, ROOT, &[]), Ok(80));
        assert_eq!(length(opcode::RELEASE, FILE, &[]), Ok(0));
        assert_eq!(length(99, ROOT, &[]), Err(Errno::ENOSYS));
        let unread = |offset: u64, size: u32| directory(offset, size as usize).0.len();
        assert_eq!((unread(0, 4096), unread(2, 4096), unread(3, 4096), unread(0, 40)), (96, 32, 0, 32));
    }

    #[test]
    fn a_request_that_is_cut_off_is_an_error() {
        for length in 0..Request::HEADER {
            assert!(Request::parse(&[0; Request::HEADER][..length]).is_err(), "{length}");
        }
        assert!(Request::parse(&[0; Request::HEADER]).is_ok());
    }
}
