//! Readers and writers that more than one module needs; each does one thing.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Zeros are found and skipped in pieces of this many bytes: the block size of the file systems we write to.
pub const ZERO_BLOCK: usize = 4096;

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // In pieces of 64 bytes, which the compiler turns into vector instructions.
    let (chunks, tail) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |a, b| a | b) == 0) && tail.iter().all(|&b| b == 0)
}

/// Large buffers that were used and are used again: to get the pages of a new one from the system takes as long as to fill
/// it. Keeps a few, whatever it is given.
#[derive(Default)]
pub struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// How many are kept.
    const KEPT: usize = 8;

    /// An empty buffer, with room if there is one that was used.
    pub fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Takes back a buffer.
    pub fn give(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < Self::KEPT {
            free.push(buffer);
        }
    }
}

/// Writes a regular file and leaves a hole wherever a whole aligned [`ZERO_BLOCK`] of zeros is written.
pub struct SparseWriter {
    file: File,
    pos: u64,
}

impl SparseWriter {
    /// Writes to `file`, which is empty, from its start.
    pub fn new(file: File) -> Self {
        Self { file, pos: 0 }
    }

    /// Leaves a hole of `len` bytes.
    pub fn skip(&mut self, len: u64) {
        self.pos += len;
    }

    /// Gives the file its full length, also where it ends in a hole, and returns it.
    pub fn finish(self) -> io::Result<File> {
        self.file.set_len(self.pos)?;
        Ok(self.file)
    }
}

impl Write for SparseWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let mut rest = buf;
        while !rest.is_empty() {
            // Up to the next block boundary, then by whole blocks of the same kind.
            let first = (ZERO_BLOCK - (self.pos % ZERO_BLOCK as u64) as usize).min(rest.len());
            let zero = is_zero(&rest[..first]);
            let mut n = first;
            while n < rest.len() {
                let next = ZERO_BLOCK.min(rest.len() - n);
                if is_zero(&rest[n..n + next]) != zero {
                    break;
                }
                n += next;
            }
            if !zero {
                self.file.write_all_at(&rest[..n], self.pos)?;
            }
            self.pos += n as u64;
            rest = &rest[n..];
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All of a file of at most `limit` bytes.
pub fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// An unnamed file in `dir` that is gone when it is closed.
pub fn scratch_file(dir: &Path) -> io::Result<File> {
    tempfile::tempfile_in(dir)
}
