//! Reading and writing TPM structures: big-endian numbers and sized buffers (TPM 2.0 Library, Part 2: Structures).

use crate::TpmError;

/// A cursor over bytes from outside. Every read is bounded by what is there.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], TpmError> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or(TpmError::Truncated(self.what))?;
        self.bytes = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TpmError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, TpmError> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, TpmError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, TpmError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, TpmError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A TPM2B: a length of two bytes, then as many.
    pub(crate) fn sized(&mut self) -> Result<&'a [u8], TpmError> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }

    pub(crate) fn end(self) -> Result<(), TpmError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(TpmError::Trailing(self.what)) }
    }
}

/// Appends a TPM2B. `bytes` is shorter than 65,536 in every structure of ours.
pub(crate) fn put_sized(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), TpmError> {
    let length = u16::try_from(bytes.len()).map_err(|_| TpmError::TooLong)?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}
