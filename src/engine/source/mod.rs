//! Sources: plain bytes with positioned reads.
//!
//! Everything a disk image is put together from is a source: a run of [`Zeros`], a [`File`], a seekable-zstd
//! [`blob`], the files of a live rootfs ([`erofs`], [`squashfs`]), a [`Concat`] of others and a [`delta`] over
//! others. Sources nest, and nothing is unpacked to a temporary file to read them.

pub mod blob;
pub mod cluster;
mod decode;
pub mod delta;
pub mod erofs;
pub mod files;
pub mod rootfs;
pub mod squashfs;

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use cluster::Trace;

/// Plain bytes of a known length that can be read at any position.
///
/// The one suite every source must pass is `tests/sources.rs`.
pub trait Source: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Fills all of `buf` from `offset`. A read that reaches past the end is `UnexpectedEof` and reads nothing;
    /// damaged data is `InvalidData`, with a text that says what was damaged.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Whether there is not a single byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes from `offset` on are known to be zero without reading them; 0 when nothing is known. Never
    /// reaches past the end.
    fn zeros_at(&self, _offset: u64) -> u64 {
        0
    }

    /// Appends to `trace` the clusters that reading `len` bytes at `offset` decodes. `at` is where the reader of the
    /// outermost source will be by then: each use is stamped with its own position counted from there. `None` when there
    /// are more than the trace has room for.
    fn trace(&self, _offset: u64, _len: u64, _at: u64, trace: &mut Trace) -> Option<()> {
        trace.step()
    }
}

/// Checks that `len` bytes at `offset` lie inside `total`; the `UnexpectedEof` of [`Source::read_at`] otherwise.
pub fn check_range(total: u64, offset: u64, len: usize) -> io::Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= total => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("read of {len} bytes at {offset} reaches past the end at {total}"),
        )),
    }
}

/// A run of zero bytes of any length; it takes no space and no time.
pub struct Zeros(pub u64);

impl Source for Zeros {
    fn len(&self) -> u64 {
        self.0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.0, offset, buf.len())?;
        buf.fill(0);
        Ok(())
    }

    fn zeros_at(&self, offset: u64) -> u64 {
        self.0.saturating_sub(offset)
    }
}

/// Bytes in memory.
impl Source for Vec<u8> {
    fn len(&self) -> u64 {
        Vec::len(self) as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(Source::len(self), offset, buf.len())?;
        let start = offset as usize;
        buf.copy_from_slice(&self[start..start + buf.len()]);
        Ok(())
    }
}

/// A regular file, or a part of one. Its length is taken once, when it is opened.
pub struct File {
    file: std::fs::File,
    start: u64,
    len: u64,
}

impl File {
    /// The whole of `file`.
    pub fn new(file: std::fs::File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, start: 0, len })
    }

    /// `len` bytes of `file` from `start` on. That they exist is found out by reading.
    pub fn part(file: std::fs::File, start: u64, len: u64) -> Self {
        Self { file, start, len }
    }
}

impl Source for File {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len, offset, buf.len())?;
        self.file.read_exact_at(buf, self.start + offset)
    }

    /// Asks the file system for the hole at `offset` (`SEEK_DATA`).
    fn zeros_at(&self, offset: u64) -> u64 {
        let end = self.start + self.len;
        let from = self.start + offset;
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(from)) {
            Ok(data) => data.min(end).saturating_sub(from),
            // No data up to the end of the file: all of it is a hole. Any other error: nothing is known.
            Err(rustix::io::Errno::NXIO) if from < end => {
                let size = self.file.metadata().map_or(0, |m| m.len());
                size.min(end).saturating_sub(from)
            }
            Err(_) => 0,
        }
    }
}

/// A window of another source.
pub struct Slice {
    inner: Arc<dyn Source>,
    start: u64,
    len: u64,
}

impl Slice {
    /// `len` bytes of `inner` from `start` on; an error when they are not all there.
    pub fn new(inner: Arc<dyn Source>, start: u64, len: u64) -> io::Result<Self> {
        match start.checked_add(len) {
            Some(end) if end <= inner.len() => Ok(Self { inner, start, len }),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("a part of {len} bytes at {start} of a source of {}", inner.len()),
            )),
        }
    }
}

impl Source for Slice {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len, offset, buf.len())?;
        self.inner.read_at(self.start + offset, buf)
    }

    fn zeros_at(&self, offset: u64) -> u64 {
        self.inner.zeros_at(self.start + offset).min(self.len.saturating_sub(offset))
    }

    fn trace(&self, offset: u64, len: u64, at: u64, trace: &mut Trace) -> Option<()> {
        self.inner.trace(self.start + offset, len, at, trace)
    }
}

/// Several sources one after the other.
pub struct Concat {
    parts: Vec<Arc<dyn Source>>,
    /// Where each part starts, and after the last the whole length.
    starts: Vec<u64>,
}

impl Concat {
    /// Puts `parts` one after the other; an error when the lengths add up to more than a `u64` holds.
    pub fn new(parts: Vec<Arc<dyn Source>>) -> io::Result<Self> {
        let mut starts = vec![0u64];
        for part in &parts {
            let end = starts[starts.len() - 1].checked_add(part.len()).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "the lengths of the sources overflow")
            })?;
            starts.push(end);
        }
        Ok(Self { parts, starts })
    }

    /// The part that holds `offset`, which is inside, and the offset in it.
    fn find(&self, offset: u64) -> (usize, u64) {
        let part = self.starts.partition_point(|&start| start <= offset) - 1;
        (part, offset - self.starts[part])
    }
}

impl Source for Concat {
    fn len(&self) -> u64 {
        self.starts[self.parts.len()]
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(self.len(), offset, buf.len())?;
        while !buf.is_empty() {
            let (part, inner) = self.find(offset);
            let n = (self.parts[part].len() - inner).min(buf.len() as u64) as usize;
            let (now, rest) = buf.split_at_mut(n);
            self.parts[part].read_at(inner, now)?;
            (buf, offset) = (rest, offset + n as u64);
        }
        Ok(())
    }

    fn zeros_at(&self, offset: u64) -> u64 {
        if offset >= self.len() {
            return 0;
        }
        let (part, inner) = self.find(offset);
        self.parts[part].zeros_at(inner)
    }

    fn trace(&self, mut offset: u64, mut len: u64, mut at: u64, trace: &mut Trace) -> Option<()> {
        while len > 0 && offset < self.len() {
            let (part, inner) = self.find(offset);
            let n = (self.parts[part].len() - inner).min(len);
            self.parts[part].trace(inner, n, at, trace)?;
            (offset, at, len) = (offset + n, at + n, len - n);
        }
        Some(())
    }
}

/// Reads a source from start to end.
pub struct Reader<'a> {
    source: &'a dyn Source,
    pos: u64,
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `source`.
    pub fn new(source: &'a dyn Source) -> Self {
        Self { source, pos: 0 }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (self.source.len() - self.pos).min(buf.len() as u64) as usize;
        self.source.read_at(self.pos, &mut buf[..n])?;
        self.pos += n as u64;
        Ok(n)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.source.len().checked_add_signed(n),
            SeekFrom::Current(n) => self.pos.checked_add_signed(n),
        };
        self.pos = target
            .map(|n| n.min(self.source.len()))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the start"))?;
        Ok(self.pos)
    }
}
