//! Compressed grains of streamOptimized VMDK images.
//!
//! The format is VMware's "Virtual Disk Format 5.0": from `overHead` on, a chain of markers, each at the start of a
//! sector. A grain marker is `lba: u64, size: u32` and then `size` bytes in the zlib format; with a size of 0 it is a
//! marker for `lba` sectors of metadata. Numbers are little-endian.

use std::io;

use super::region::Region;
use super::zlib::Wrap;
use crate::bytes::{le16, le32, le64};
use crate::source::Source;

/// The first bytes of a sparse extent.
pub(super) const MAGIC: &[u8] = b"KDMV";

const SECTOR: u64 = 512;
/// Flag bits of the header: grains are compressed, and each has a marker.
const COMPRESSED_WITH_MARKERS: u32 = 0x30000;
/// The only compression there is.
const DEFLATE: u16 = 1;
/// The longest grain, in sectors: 1 MiB. Every known writer uses 128.
const MAX_GRAIN: u64 = 2048;

/// Appends the grains of the image at `start..end` of `source` to `regions`. Stops at the first marker that makes no
/// sense: what follows is kept as it is.
pub(super) fn regions(
    source: &dyn Source,
    start: u64,
    end: u64,
    regions: &mut Vec<Region>,
    max_regions: usize,
) -> io::Result<()> {
    if end - start < SECTOR {
        return Ok(());
    }
    let mut header = [0; SECTOR as usize];
    source.read_at(start, &mut header)?;
    let grain = le64(&header, 20);
    let algorithm = le16(&header, 77);
    if le32(&header, 8) & COMPRESSED_WITH_MARKERS != COMPRESSED_WITH_MARKERS
        || algorithm != DEFLATE
        || !(1..=MAX_GRAIN).contains(&grain)
    {
        return Ok(());
    }
    // Sectors to bytes from the start of the source; beyond its end when that overflows.
    let at = |sectors: u64| sectors.saturating_mul(SECTOR).saturating_add(start);
    let mut pos = at(le64(&header, 64));
    let mut marker = [0; 12];
    while pos.saturating_add(SECTOR) <= end && regions.len() < max_regions {
        source.read_at(pos, &mut marker)?;
        let (lba, size) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        let next = if size == 0 {
            // The end-of-stream marker is followed by no sectors.
            at(lba).saturating_add(pos + SECTOR - start)
        } else if size > 2 * grain * SECTOR || pos + 12 + size > end {
            return Ok(());
        } else {
            regions.push(Region::Small {
                offset: pos + 12,
                max_len: size as u32,
                max_plain: (grain * SECTOR) as u32,
                wrap: Wrap::Zlib,
            });
            start + (pos - start + 12 + size).next_multiple_of(SECTOR)
        };
        pos = next;
    }
    Ok(())
}
