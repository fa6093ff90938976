//! Reading a source in the ways that parsers and the crates for GPT, FAT, ext4 and tar want it.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use crate::source::{Slice, Source};

/// `N` bytes at `offset`.
pub(super) fn array<const N: usize>(source: &dyn Source, offset: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    source.read_at(offset, &mut bytes)?;
    Ok(bytes)
}

/// `len` bytes at `offset`; what lies past the end is zero.
pub(super) fn padded(source: &dyn Source, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let there = source.len().saturating_sub(offset).min(len as u64) as usize;
    source.read_at(offset, &mut bytes[..there])?;
    Ok(bytes)
}

/// `len` bytes of `source` from `start` on, or as many of them as there are, and whether that is all.
pub(super) fn part(source: &Arc<dyn Source>, start: u64, len: u64) -> io::Result<(Arc<dyn Source>, bool)> {
    let start = start.min(source.len());
    let there = len.min(source.len() - start);
    Ok((Arc::new(Slice::new(source.clone(), start, there)?), there == len))
}

/// Text up to the first NUL, without the blanks around it; `None` when nothing is left.
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]).trim().to_string();
    (!text.is_empty()).then_some(text)
}

/// A UUID as text, from its bytes in the order of the text.
pub(super) fn uuid(bytes: [u8; 16]) -> String {
    let hex = hex::encode(bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// `InvalidData` with a text.
pub(super) fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// `Unsupported` with a text.
pub(super) fn unsupported(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text.into())
}

/// A reader that gives up after a number of bytes.
///
/// A file system or archive with a loop in it would keep the crate that walks it busy for ever; here it runs into the
/// limit. It cannot write: `gpt` and `fatfs` ask for a writer, and never use it to read.
pub(super) struct Reader {
    source: Arc<dyn Source>,
    pos: u64,
    left: u64,
}

impl Reader {
    /// Starts at the first byte of `source`, and reads at most `limit` bytes in all.
    pub(super) fn new(source: Arc<dyn Source>, limit: u64) -> Self {
        Self { source, pos: 0, left: limit }
    }

    fn fill(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(buf.len() as u64)
            .ok_or_else(|| invalid("more had to be read than a sound one needs"))?;
        self.source.read_at(offset, buf)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("pos", &self.pos).finish_non_exhaustive()
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.len().saturating_sub(self.pos).min(buf.len() as u64) as usize;
        self.fill(self.pos, &mut buf[..n])?;
        self.pos += n as u64;
        Ok(n)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.pos = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.source.len().checked_add_signed(n),
            SeekFrom::Current(n) => self.pos.checked_add_signed(n),
        }
        .ok_or_else(|| invalid("a position outside of what a u64 holds"))?;
        Ok(self.pos)
    }
}

impl Write for Reader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(unsupported("inspecting does not write"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ext4_view::Ext4Read for Reader {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.fill(start_byte, dst)?)
    }
}
