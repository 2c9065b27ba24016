//! A sealed image in a file or anything else that can be read at random.

use crate::error::ImageError;
use crate::header::{HEADER_LENGTH, Header};
use crate::keys::Section;
use crate::metadata::Metadata;
use crate::verify::{LeafPage, OpenOptions, Verifier};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Reads at any offset, from any thread.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` where the object ends before.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Length of the object in bytes.
    ///
    /// # Errors
    /// The object cannot be asked.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for std::fs::File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|meta| meta.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = io::ErrorKind::UnexpectedEof;
        let start = usize::try_from(offset).map_err(|_| end)?;
        let part = start.checked_add(buf.len()).and_then(|stop| self.get(start..stop)).ok_or(end)?;
        buf.copy_from_slice(part);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for Arc<R> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }
}

/// The chunk that was read last, decrypted: small reads in a row cost one decryption.
type LastChunk = Option<(u64, Vec<u8>)>;

/// An opened image. Every byte it returns was verified.
pub struct Image<R> {
    source: R,
    verifier: Verifier,
    pages: Mutex<Vec<Option<Arc<LeafPage>>>>,
    last: Mutex<LastChunk>,
}

/// Reads an image's header alone.
///
/// # Errors
/// The file cannot be read, is too short, or is no image.
pub fn read_header<R: ReadAt>(source: &R) -> Result<Header, ImageError> {
    let actual = source.size().map_err(ImageError::io("reading the image's size"))?;
    if actual < HEADER_LENGTH as u64 {
        return Err(ImageError::Length { expected: HEADER_LENGTH as u64, actual });
    }
    let mut bytes = [0; HEADER_LENGTH];
    source.read_exact_at(&mut bytes, 0).map_err(ImageError::io("reading the header"))?;
    Ok(Header::parse(&bytes)?)
}

pub(crate) fn read_range<R: ReadAt>(
    source: &R,
    (offset, length): (u64, u64),
    what: &'static str,
) -> Result<Vec<u8>, ImageError> {
    let length = usize::try_from(length).map_err(|_| ImageError::Argument("the range fits into memory"))?;
    let mut bytes = vec![0; length];
    source.read_exact_at(&mut bytes, offset).map_err(ImageError::io(what))?;
    Ok(bytes)
}

impl<R: ReadAt> Image<R> {
    /// Opens an image: header, length, everything that `options` demand, and the page hashes.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn open(source: R, options: &OpenOptions) -> Result<Self, ImageError> {
        let header = read_header(&source)?;
        let actual = source.size().map_err(ImageError::io("reading the image's size"))?;
        if actual != header.file_length() {
            return Err(ImageError::Length { expected: header.file_length(), actual });
        }
        let mut verifier = Verifier::new(header, options)?;
        let hashes = read_range(&source, verifier.page_hashes_range(), "reading the hash table")?;
        verifier.set_page_hashes(&hashes)?;
        let pages = usize::try_from(verifier.header().pages())
            .map_err(|_| ImageError::Argument("the table fits into memory"))?;
        Ok(Self { source, verifier, pages: Mutex::new(vec![None; pages]), last: Mutex::new(None) })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.verifier.header()
    }

    /// Length of the plaintext in bytes.
    #[must_use]
    pub fn plaintext_len(&self) -> u64 {
        self.header().plaintext_length
    }

    fn page(&self, index: u64) -> Result<Arc<LeafPage>, ImageError> {
        let missing = ImageError::Argument("the image has no such table page");
        let Ok(at) = usize::try_from(index) else { return Err(missing) };
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = pages.get_mut(at) else { return Err(missing) };
        if let Some(page) = slot {
            return Ok(page.clone());
        }
        let range = self.verifier.page_range(index).ok_or(missing)?;
        let bytes = read_range(&self.source, range, "reading the hash table")?;
        let page = Arc::new(self.verifier.verify_page(index, &bytes)?);
        *slot = Some(page.clone());
        Ok(page)
    }

    /// The whole plaintext of one chunk, verified.
    ///
    /// # Errors
    /// Damage, another key, a read error.
    pub fn chunk(&self, index: u64) -> Result<Vec<u8>, ImageError> {
        let range = self.verifier.chunk_range(index).ok_or(ImageError::Argument("the image has no such chunk"))?;
        let page = self.page(self.verifier.page_of_chunk(index))?;
        let mut bytes = read_range(&self.source, range, "reading a chunk")?;
        self.verifier.open_chunk(index, &page, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads verified plaintext. Returns less than asked for only at the end (0 past it).
    ///
    /// # Errors
    /// Damage, another key, a read error; then nothing in `buf` may be used.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, ImageError> {
        let size = self.header().chunk_size();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            if at >= self.plaintext_len() {
                break;
            }
            let (index, within) = (at / size, at % size);
            let within = usize::try_from(within).map_err(|_| ImageError::Argument("a chunk fits into memory"))?;
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner).take();
            if last.as_ref().is_none_or(|(cached, _)| *cached != index) {
                last = Some((index, self.chunk(index)?));
            }
            let Some((_, chunk)) = &last else { break };
            let take = (chunk.len() - within).min(buf.len() - done);
            buf[done..done + take].copy_from_slice(&chunk[within..within + take]);
            done += take;
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
        }
        Ok(done)
    }

    /// The metadata.
    ///
    /// # Errors
    /// Damage, no key for a sealed image, or not readable.
    pub fn metadata(&self) -> Result<Metadata, ImageError> {
        Metadata::from_bytes(&self.section(Section::Metadata)?)
    }

    /// The hints; `None`: the image has none.
    ///
    /// # Errors
    /// As [`Self::metadata`].
    pub fn hints(&self) -> Result<Option<Vec<u8>>, ImageError> {
        if self.header().hints_length == 0 { Ok(None) } else { self.section(Section::Hints).map(Some) }
    }

    fn section(&self, section: Section) -> Result<Vec<u8>, ImageError> {
        let (offset, length, _) = self.verifier.section_range(section);
        let bytes = read_range(&self.source, (offset, length), "reading what follows the table")?;
        self.verifier.open_section(section, bytes)
    }
}
