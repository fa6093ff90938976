//! Compressed clusters of qcow2 images.
//!
//! The format is `docs/interop/qcow2.txt` of QEMU: an L1 table of L2 tables; bit 62 of an L2 entry says that the
//! cluster is compressed, and then the entry holds where its deflate stream starts, in bytes, and how many sectors it
//! touches. Numbers are big-endian. Only the active tables are read; what only a snapshot refers to is kept as it is.

use std::collections::BTreeSet;
use std::io;

use super::region::Region;
use super::zlib::Wrap;
use crate::bytes::{be32, be64};
use crate::source::Source;

/// The first bytes of every qcow2 image.
pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// The longest L1 table, in entries: QEMU's own limit of 32 MiB.
const MAX_L1: u64 = 4 << 20;
/// QEMU's limits of the cluster size, as powers of two: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The bits of an entry that hold the offset of a table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Incompatible features: a compression type is named; L2 entries have 16 bytes.
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Appends the compressed clusters of the image at `start..end` of `source` to `regions`, in the order of the file,
/// each once. Tables that do not lie inside the image are skipped.
pub(super) fn regions(
    source: &dyn Source,
    start: u64,
    end: u64,
    regions: &mut Vec<Region>,
    max_regions: usize,
) -> io::Result<()> {
    let len = end - start;
    let mut header = [0; 112];
    let head = &mut header[..len.min(112) as usize];
    source.read_at(start, head)?;
    let version = be32(&header, 4);
    let cluster_bits = be32(&header, 20);
    let (mut features, mut compression) = (0, 0);
    if version >= 3 {
        features = be64(&header, 72);
        if features & COMPRESSION_TYPE != 0 && be32(&header, 100) > 104 {
            compression = header[104];
        }
    }
    if len < 72 || !CLUSTER_BITS.contains(&cluster_bits) || compression != 0 {
        return Ok(());
    }
    let cluster = 1u64 << cluster_bits;
    let entry_len = if features & EXTENDED_L2 != 0 { 16 } else { 8 };
    let l1_len = u64::from(be32(&header, 36)).min(MAX_L1);
    let l1_at = be64(&header, 40);
    let inside = |at: u64, n: u64| at.checked_add(n).is_some_and(|e| e <= len);
    if !inside(l1_at, l1_len * 8) {
        return Ok(());
    }
    // A set: a table that a hostile L1 names over and over is read once.
    let mut tables = BTreeSet::new();
    let mut entries = vec![0; cluster as usize];
    for at in (0..l1_len * 8).step_by(cluster as usize) {
        let part = &mut entries[..cluster.min(l1_len * 8 - at) as usize];
        source.read_at(start + l1_at + at, part)?;
        tables.extend((0..part.len()).step_by(8).map(|i| be64(part, i) & OFFSET));
    }
    tables.retain(|&at| at != 0 && at % cluster == 0 && inside(at, cluster));

    let mut clusters = BTreeSet::new();
    // Below this bit of a compressed entry is the offset, above it the number of sectors.
    let shift = 62 - (cluster_bits - 8);
    for at in tables {
        source.read_at(start + at, &mut entries)?;
        for i in (0..entries.len()).step_by(entry_len) {
            let entry = be64(&entries, i);
            if entry & COMPRESSED == 0 || clusters.len() >= max_regions.saturating_sub(regions.len()) {
                continue;
            }
            let offset = entry & ((1 << shift) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> shift;
            // The first sector counts from where the stream starts in it. The last one may end beyond the file.
            let max_len = ((sectors + 1) * 512 - offset % 512).min(len.saturating_sub(offset));
            if max_len > 0 {
                clusters.insert((offset, max_len as u32));
            }
        }
    }
    regions.extend(clusters.into_iter().map(|(offset, max_len)| Region::Small {
        offset: start + offset,
        max_len,
        max_plain: cluster as u32,
        wrap: Wrap::Raw,
    }));
    Ok(())
}
