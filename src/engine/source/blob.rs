//! Blobs of seekable zstd: independent frames and a seek table, so that any byte is one frame away.
//!
//! The format is zstd's own ["seekable format"](https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md):
//! frames, each with its content size and checksum, then a skippable frame with the sizes of all. `zstd -d` reads it.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use rayon::prelude::*;
use zeekstd::SeekTable;
use zeekstd::seek_table::Format;

use super::cluster::{Cache, ClusterCodec, ClusterMap, Clustered, Extent, MAX_CLUSTER, MAX_STORED, Origin};
use super::{Reader, Source};

/// The decoded length of frames that are read here and there, in bytes.
pub const FRAME: usize = 4 << 20;

/// That of what is strongly compressed: structures of a file system repeat over more than [`FRAME`], and a disk has a few
/// frames of them. Larger ones cost more to get at one byte, and more memory.
pub const LONG_FRAME: usize = 16 << 20;

/// Bytes of the integrity field that ends a seek table: frame count, descriptor, magic number.
const FOOTER: usize = 9;

/// The least that a seek table spends on a frame, in bytes.
const TABLE_ENTRY: u64 = 8;

/// The memory that a frame takes when its blob is open, in bytes: its extent, and its entry in the parsed table.
const FRAME_MEMORY: u64 = size_of::<Extent>() as u64 + 24;

struct Frames {
    blob: Arc<dyn Source>,
    table: SeekTable,
}

impl ClusterCodec for Frames {
    fn count(&self) -> u32 {
        self.table.num_frames()
    }

    fn decoded_len(&self, id: u32) -> u32 {
        // Checked in `open` to be at most `MAX_CLUSTER`.
        self.table.frame_size_decomp(id).unwrap_or(0) as u32
    }

    fn quick(&self) -> bool {
        true
    }

    fn decode(&self, id: u32, mut buffer: Vec<u8>) -> io::Result<Vec<u8>> {
        let start = self.table.frame_start_comp(id).map_err(io::Error::other)?;
        let len = self.table.frame_size_comp(id).map_err(io::Error::other)?;
        let mut packed = vec![0; len as usize];
        self.blob.read_at(start, &mut packed)?;
        buffer.reserve_exact(self.decoded_len(id) as usize);
        zstd::bulk::Decompressor::new()
            .and_then(|mut zstd| zstd.decompress_to_buffer(&packed, &mut buffer))
            .map_err(|e| {
                io::Error::new(io::ErrorKind::InvalidData, format!("zstd frame {id} of a blob: {e}"))
            })?;
        Ok(buffer)
    }
}

/// Opens a blob of seekable zstd as the plain bytes in it.
pub fn open(blob: Arc<dyn Source>, cache: Arc<Cache>) -> io::Result<Clustered> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("zstd blob: {what}"));
    let mut reader = Reader::new(&*blob);
    // The parser allocates for as many frames as the footer claims: make sure that they can exist.
    let mut footer = [0; FOOTER];
    reader.seek(SeekFrom::End(-(FOOTER as i64).min(blob.len() as i64)))?;
    reader.read_exact(&mut footer)?;
    let [a, b, c, d, ..] = footer;
    let claimed = u64::from(u32::from_le_bytes([a, b, c, d]));
    if claimed * TABLE_ENTRY > blob.len() {
        return Err(invalid(format!("a seek table of {claimed} frames in {} bytes", blob.len())));
    }
    cache.reserve(claimed * FRAME_MEMORY, &format!("the {claimed} frames of a zstd blob"))?;
    reader.rewind()?;
    let table = SeekTable::from_seekable(&mut reader).map_err(|e| invalid(format!("no seek table: {e}")))?;
    if table.size_comp() > blob.len() {
        return Err(invalid(format!("frames of {} bytes in {}", table.size_comp(), blob.len())));
    }
    for (form, len, most) in [
        ("decoded", table.max_frame_size_decomp(), MAX_CLUSTER),
        ("stored", table.max_frame_size_comp(), MAX_STORED),
    ] {
        if len > u64::from(most) {
            return Err(invalid(format!("a frame of {len} bytes, {form}: at most {most} are read")));
        }
    }
    let mut extents = Vec::with_capacity(table.num_frames() as usize);
    for id in 0..table.num_frames() {
        let start = table.frame_start_decomp(id).map_err(io::Error::other)?;
        let len = table.frame_size_decomp(id).map_err(io::Error::other)?;
        if len > 0 {
            extents.push(Extent { start, len, origin: Origin::Cluster { id, offset: 0 } });
        }
    }
    let len = table.size_decomp();
    let codec = Arc::new(Frames { blob: blob.clone(), table });
    Ok(Clustered::new(ClusterMap { len, extents, codec }, blob, cache))
}

/// Writes seekable zstd, compressing frames on all cores. [`Writer::finish`] must be called.
pub struct Writer<W: Write> {
    out: W,
    level: i32,
    /// The decoded length of every frame but the last, in bytes.
    frame: usize,
    /// Whole frames that wait for enough others to keep all cores busy, and the one being filled.
    pending: Vec<Vec<u8>>,
    table: SeekTable,
}

impl<W: Write> Writer<W> {
    /// Writes to `out` at zstd's `level`, in frames of so many bytes: [`FRAME`] or [`LONG_FRAME`].
    pub fn new(out: W, level: i32, frame: usize) -> Self {
        Self { out, level, frame, pending: vec![], table: SeekTable::new() }
    }

    fn compress_pending(&mut self) -> io::Result<()> {
        let (level, window) = (self.level, self.frame.ilog2());
        let frames = std::mem::take(&mut self.pending);
        let packed: Vec<io::Result<Vec<u8>>> = frames
            .par_iter()
            .map(|plain| {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                compressor.include_checksum(true)?;
                // Matches may reach back over the whole frame at every level.
                compressor.window_log(window)?;
                compressor.compress(plain)
            })
            .collect();
        for (plain, packed) in frames.iter().zip(packed) {
            let packed = packed?;
            self.table.log_frame(packed.len() as u32, plain.len() as u32).map_err(io::Error::other)?;
            self.out.write_all(&packed)?;
        }
        Ok(())
    }

    /// Writes what is left and the seek table, and gives back the writer beneath.
    pub fn finish(mut self) -> io::Result<W> {
        self.compress_pending()?;
        io::copy(&mut self.table.into_format_serializer(Format::Foot), &mut self.out)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Writer<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.pending.last().is_none_or(|frame| frame.len() == self.frame) {
            if self.pending.len() >= rayon::current_num_threads() {
                self.compress_pending()?;
            }
            self.pending.push(Vec::with_capacity(self.frame.min(buf.len().max(1 << 16))));
        }
        let Some(frame) = self.pending.last_mut() else { unreachable!("a frame was just pushed") };
        let n = buf.len().min(self.frame - frame.len());
        frame.extend_from_slice(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
