//! libsquashfs's compressors as a type: they own their memory and cannot be used wrongly.
#![allow(unsafe_code)] // calls into libsquashfs

use super::data::Compression;
use super::error::SquashfsError;
use super::ffi;
use std::ptr::{self, NonNull};

/// Numbers in a superblock.
const XZ: u16 = 4;
const ZSTD: u16 = 6;

impl Compression {
    /// Its number in a superblock.
    pub(super) fn id(self) -> u16 {
        match self {
            Self::Zstd(_) => ZSTD,
            Self::Xz => XZ,
        }
    }
}

/// A compressor or decompressor.
pub(super) struct Compressor(NonNull<ffi::Compressor>);

// SAFETY: the object is plain memory (a context of zstd, zlib, …) that no thread has a tie to; it is not shared (not Sync).
unsafe impl Send for Compressor {}

impl Compressor {
    /// Compresses blocks of at most `block_size` bytes.
    pub(super) fn encoder(compression: Compression, block_size: u32) -> Result<Self, SquashfsError> {
        let level = if let Compression::Zstd(level) = compression { Some(level) } else { None };
        Self::create(compression.id(), block_size, 0, level)
    }

    /// Decompresses what the algorithm `id` of a superblock made.
    pub(super) fn decoder(id: u16, block_size: u32) -> Result<Self, SquashfsError> {
        Self::create(id, block_size, ffi::COMP_FLAG_UNCOMPRESS, None)
    }

    fn create(id: u16, block_size: u32, flags: u16, level: Option<u32>) -> Result<Self, SquashfsError> {
        let step = "set up the compressor";
        let mut config = ffi::CompressorConfig::default();
        // SAFETY: `config` is a valid structure of the library's layout.
        let code =
            unsafe { ffi::sqfs_compressor_config_init(&raw mut config, u32::from(id), block_size as usize, flags) };
        if code != 0 {
            return Err(SquashfsError::library(step, code));
        }
        if let Some(level) = level {
            config.level = level;
        }
        let mut object = ptr::null_mut();
        // SAFETY: both pointers are valid; the object is owned from here on.
        let code = unsafe { ffi::sqfs_compressor_create(&raw const config, &raw mut object) };
        match NonNull::new(object) {
            Some(object) if code == 0 => Ok(Self(object)),
            _ => Err(SquashfsError::library(step, code)),
        }
    }

    /// For other objects of the library; valid as long as `self`.
    pub(super) fn as_ptr(&self) -> *mut ffi::Compressor {
        self.0.as_ptr()
    }

    /// Writes the block of options that follows the superblock; true if there was one to write.
    pub(super) fn write_options(&mut self, file: *mut ffi::File) -> Result<bool, SquashfsError> {
        // SAFETY: the object is alive; `file` is a live file object of the caller.
        let written = unsafe { (self.0.as_ref().write_options)(self.0.as_ptr(), file) };
        if written < 0 {
            return Err(SquashfsError::library("write the compressor's options", written));
        }
        Ok(written > 0)
    }

    /// Decompresses `input` into `output`; the number of bytes, or `None` when `input` is damaged or holds more than fits.
    pub(super) fn decompress(&mut self, input: &[u8], output: &mut [u8]) -> Option<usize> {
        let input_size = u32::try_from(input.len()).ok()?;
        let output_size = u32::try_from(output.len()).ok()?;
        // SAFETY: the object is alive and not used elsewhere (`&mut self`); pointers and sizes are of the two slices.
        let size = unsafe {
            (self.0.as_ref().do_block)(self.0.as_ptr(), input.as_ptr(), input_size, output.as_mut_ptr(), output_size)
        };
        usize::try_from(size).ok().filter(|size| *size > 0 && *size <= output.len())
    }
}

impl Drop for Compressor {
    fn drop(&mut self) {
        // SAFETY: the object is owned, alive, and not used after this.
        unsafe { destroy(self.0.as_ptr()) }
    }
}

/// `sqfs_destroy`, which is an inline function of the headers.
///
/// # Safety
/// `object` must be a live object of the library; it must not be used afterwards.
pub(super) unsafe fn destroy<T>(object: *mut T) {
    let object: *mut ffi::Object = object.cast();
    // SAFETY: every object begins with its table of functions (`sqfs/predef.h`).
    unsafe {
        if let Some(destroy) = (*object).destroy {
            destroy(object);
        }
    }
}
