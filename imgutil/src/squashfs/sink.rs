//! The two objects through which libsquashfs writes: a file that only grows, and a block writer that only appends.
//!
//! Neither reads back, truncates or rewinds: what has gone into the sealing output is sealed (a chunk index is sealed at
//! most once per key). The superblock at the start is the caller's business (`patch_start`).
#![allow(unsafe_code)] // tables of C function pointers, called by libsquashfs

use super::ffi;
use std::ffi::{c_int, c_void};
use std::io::{self, Write};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the bytes go, and what went wrong.
pub(super) struct SinkState<W> {
    out: W,
    position: u64,
    failure: Option<io::Error>,
}

impl<W: Write> SinkState<W> {
    fn append(&mut self, bytes: &[u8]) -> c_int {
        if self.failure.is_some() {
            return ffi::ERROR_IO;
        }
        if let Err(error) = self.out.write_all(bytes) {
            self.failure = Some(error);
            return ffi::ERROR_IO;
        }
        self.position += bytes.len() as u64;
        0
    }
}

/// A shared handle on the output. libsquashfs calls it from the thread that calls libsquashfs; the lock makes sure.
pub(super) struct Sink<W>(Arc<Mutex<SinkState<W>>>);

impl<W> Clone for Sink<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<W: Write> Sink<W> {
    pub(super) fn new(out: W) -> Self {
        Self(Arc::new(Mutex::new(SinkState { out, position: 0, failure: None })))
    }

    fn lock(&self) -> MutexGuard<'_, SinkState<W>> {
        // A panic elsewhere leaves the state as it was between two writes, so it can be looked at.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written so far.
    pub(super) fn position(&self) -> u64 {
        self.lock().position
    }

    /// Appends bytes that libsquashfs does not make (superblock, padding).
    pub(super) fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        match state.append(bytes) {
            0 => Ok(()),
            _ => Err(state.failure.take().unwrap_or_else(|| io::Error::other("the output failed before"))),
        }
    }

    /// The failure of the output that a library call stumbled over.
    pub(super) fn take_failure(&self) -> Option<io::Error> {
        self.lock().failure.take()
    }

    /// Gives the output back; `None` while an object still holds it.
    pub(super) fn into_inner(self) -> Option<W> {
        let state = Arc::into_inner(self.0)?.into_inner().unwrap_or_else(PoisonError::into_inner);
        Some(state.out)
    }
}

/// Owns an object that C holds a pointer to: it is reached through this one pointer only, and never moves.
pub(super) struct Shared<T>(NonNull<T>);

impl<T> Shared<T> {
    fn new(object: T) -> Self {
        Self(NonNull::from(Box::leak(Box::new(object))))
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a box; the library's objects that used it are destroyed before (field order).
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// A `sqfs_file_t` over a [`Sink`]. The table comes first, so that a pointer to one is a pointer to the other.
#[repr(C)]
pub(super) struct SinkFile<W> {
    table: ffi::File,
    sink: Sink<W>,
}

impl<W> Shared<SinkFile<W>> {
    /// What libsquashfs is given. It must not outlive `self`.
    pub(super) fn as_ptr(&self) -> *mut ffi::File {
        self.0.as_ptr().cast()
    }
}

impl<W: Write> SinkFile<W> {
    pub(super) fn create(sink: Sink<W>) -> Shared<Self> {
        let table = ffi::File {
            base: ffi::Object { destroy: None, copy: None },
            read_at: Self::read_at,
            write_at: Self::write_at,
            get_size: Self::get_size,
            truncate: Self::truncate,
        };
        Shared::new(Self { table, sink })
    }

    unsafe extern "C" fn read_at(_file: *mut ffi::File, _offset: u64, _buffer: *mut c_void, _size: usize) -> c_int {
        ffi::ERROR_UNSUPPORTED
    }

    unsafe extern "C" fn write_at(file: *mut ffi::File, offset: u64, data: *const c_void, size: usize) -> c_int {
        // SAFETY: libsquashfs passes the pointer that `as_ptr` gave it, and `size` readable bytes at `data`.
        let (this, bytes) = unsafe { (&*file.cast::<Self>(), bytes(data.cast(), size)) };
        let mut state = this.sink.lock();
        if offset != state.position {
            return ffi::ERROR_UNSUPPORTED;
        }
        state.append(bytes)
    }

    unsafe extern "C" fn get_size(file: *const ffi::File) -> u64 {
        // SAFETY: as in `write_at`.
        unsafe { &*file.cast::<Self>() }.sink.position()
    }

    unsafe extern "C" fn truncate(file: *mut ffi::File, size: u64) -> c_int {
        // SAFETY: as in `write_at`.
        let here = unsafe { &*file.cast::<Self>() }.sink.position();
        if size == here { 0 } else { ffi::ERROR_UNSUPPORTED }
    }
}

/// A `sqfs_block_writer_t` over a [`Sink`]. Duplicates never reach it: they are decided before.
#[repr(C)]
pub(super) struct SinkBlocks<W> {
    table: ffi::BlockWriter,
    sink: Sink<W>,
    file_start: u64,
    blocks: u64,
}

impl<W> Shared<SinkBlocks<W>> {
    /// What libsquashfs is given. It must not outlive `self`.
    pub(super) fn as_ptr(&self) -> *mut ffi::BlockWriter {
        self.0.as_ptr().cast()
    }
}

impl<W: Write> SinkBlocks<W> {
    pub(super) fn create(sink: Sink<W>) -> Shared<Self> {
        let table = ffi::BlockWriter {
            base: ffi::Object { destroy: None, copy: None },
            write_data_block: Self::write_data_block,
            get_block_count: Self::get_block_count,
        };
        Shared::new(Self { table, sink, file_start: 0, blocks: 0 })
    }

    /// `sqfs/block_writer.h`: the location of a file's last block is answered with the location of its first. A block
    /// of zeros is not stored; a block of size 0 only marks the end of a file.
    unsafe extern "C" fn write_data_block(
        writer: *mut ffi::BlockWriter,
        _user: *mut c_void,
        size: u32,
        _checksum: u32,
        flags: u32,
        data: *const u8,
        location: *mut u64,
    ) -> c_int {
        // SAFETY: libsquashfs passes the pointer that `as_ptr` gave it and calls from one thread at a time (blocks are
        // taken from its queue by the thread that appends), `size` readable bytes at `data`, and a valid `location`.
        let (this, bytes, location) =
            unsafe { (&mut *writer.cast::<Self>(), bytes(data, size as usize), &mut *location) };
        let mut state = this.sink.lock();
        let is_file_data = flags & ffi::BLK_FRAGMENT_BLOCK == 0;
        *location = state.position;
        if is_file_data && flags & ffi::BLK_FIRST_BLOCK != 0 {
            this.file_start = state.position;
        }
        if size != 0 && flags & ffi::BLK_IS_SPARSE == 0 {
            let code = state.append(bytes);
            if code != 0 {
                return code;
            }
            this.blocks += 1;
        }
        if is_file_data && flags & ffi::BLK_LAST_BLOCK != 0 {
            *location = this.file_start;
        }
        0
    }

    unsafe extern "C" fn get_block_count(writer: *const ffi::BlockWriter) -> u64 {
        // SAFETY: as in `write_data_block`.
        unsafe { &*writer.cast::<Self>() }.blocks
    }
}

/// A slice of what C describes by pointer and length; the pointer may be null when the length is 0.
///
/// # Safety
/// `size` bytes at `data` must be readable for the life of the slice.
unsafe fn bytes<'a>(data: *const u8, size: usize) -> &'a [u8] {
    if size == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, size) }
}
