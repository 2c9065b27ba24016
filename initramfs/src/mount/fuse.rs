//! A [`ReadOnlyFile`] as a FUSE file system of one directory and one file, by the `fuser` crate. Nothing outside this module knows it.

use super::{FILE_NAME, ReadOnlyFile};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, Request,
    SessionACL,
};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::time::{Duration, SystemTime};

/// The file's inode; the directory is [`INodeNo::ROOT`].
const FILE: INodeNo = INodeNo(2);
/// Nothing ever changes.
const TTL: Duration = Duration::from_hours(24);
/// Longest read in one request. The kernel derives it from the longest *write* that a file system takes; none comes, because the
/// mount is read-only.
const LONGEST_READ: u32 = 1 << 20;
/// Requests that the kernel may have under way in the background.
const BACKGROUND: u16 = 64;
/// Threads that take requests from the kernel. They never wait for the network: reads are answered by the reader's tasks.
const THREADS: usize = 2;

/// A session with the kernel, after the handshake.
pub(super) struct Session<F: ReadOnlyFile>(fuser::Session<OneFile<F>>);

impl<F: ReadOnlyFile> Session<F> {
    /// `device` is the /dev/fuse that was mounted.
    pub(super) fn start(file: F, device: File) -> io::Result<Self> {
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        fuser::Session::from_fd(OneFile { file }, device.into(), SessionACL::Owner, config).map(Self)
    }

    /// Serves until it is unmounted.
    pub(super) fn run(self) -> io::Result<()> {
        self.0.run()
    }
}

struct OneFile<F> {
    file: F,
}

impl<F: ReadOnlyFile> OneFile<F> {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 2, 0),
            FILE => (FileType::RegularFile, 0o400, 1, self.file.size()),
            _ => return None,
        };
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(self.file.modified());
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl<F: ReadOnlyFile> Filesystem for OneFile<F> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Where the kernel wants less, it says how much, and that is taken.
        if let Err(most) = config.set_max_write(LONGEST_READ) {
            let _ = config.set_max_write(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&TTL, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            reply.error(Errno::EISDIR);
        } else if flags.acc_mode() == OpenAccMode::O_RDONLY {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        } else {
            reply.error(Errno::EROFS);
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if inode != FILE {
            reply.error(Errno::EISDIR);
            return;
        }
        let answer = move |result: io::Result<Vec<u8>>| match result {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => {
                tracing::error!("reading at {offset} failed: {error}");
                reply.error(Errno::EIO);
            }
        };
        // A request is never larger than was agreed on; the bound keeps it so whatever the kernel sends.
        self.file.read(offset, size.min(LONGEST_READ) as usize, Box::new(answer));
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if inode != INodeNo::ROOT {
            reply.error(Errno::ENOTDIR);
            return;
        }
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        for ((inode, kind, name), next) in entries.into_iter().zip(1..) {
            if next > offset && reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
