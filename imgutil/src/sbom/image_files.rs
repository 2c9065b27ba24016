//! Files of a packed tree, found by name: what [`super::database`] reads without unpacking the image.

use super::database::Files;
use crate::squashfs::Source;
use crate::system::System;
use anyhow::Result;
use std::cell::RefCell;
use std::path::PathBuf;

/// The files of an open image.
pub(crate) struct ImageFiles<S>(RefCell<System<S>>);

impl<S: Source> ImageFiles<S> {
    /// Of an image with these file systems and their mount points.
    pub(crate) fn open(parts: Vec<(PathBuf, S)>) -> Result<Self> {
        Ok(Self(RefCell::new(System::open(parts)?)))
    }
}

impl<S: Source> Files for ImageFiles<S> {
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        self.0.borrow_mut().read(path, limit)
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        Ok(self.0.borrow_mut().list(path)?.unwrap_or_default())
    }
}
