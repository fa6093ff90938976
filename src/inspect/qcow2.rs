//! qcow2, versions 2 and 3, with compressed clusters. Source: `docs/interop/qcow2.txt` of QEMU.
//!
//! The crates for it do not fit: `qcow2` 0.1.2 refuses compressed clusters, and `imago` is asynchronous and takes a
//! storage whose read is an unsafe function over vectors of raw buffers. The lookup itself is two entries.

use std::io;

use super::guest::{Codec, Layout, Opened, Origin, Run};
use super::read::{array, invalid, unsupported};
use crate::bytes::{be32, be64};
use crate::source::Source;

/// Entry of a level 1 or 2 table: the offset in the image.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Entry of a level 2 table: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Entry of a level 2 table: the cluster reads as zeros (version 3).
const ZERO: u64 = 1;

/// Incompatible features that do not change how clusters are read: dirty and corrupt refcounts, compression type.
const HARMLESS: u64 = 0b1011;

/// How many level 2 tables are looked through for a compressed cluster. 64 KiB clusters and a disk of 10 GiB need 20.
const TABLES_SCANNED: u64 = 32;

struct Qcow2 {
    size: u64,
    cluster_bits: u32,
    l1_offset: u64,
    version: u32,
    codec: Codec,
}

impl Qcow2 {
    /// How many bits of a guest offset one level 2 table covers.
    fn table_bits(&self) -> u32 {
        2 * self.cluster_bits - 3
    }

    /// The offset of the level 2 table for entry `index` of level 1; 0 when there is none.
    fn table(&self, image: &dyn Source, index: u64) -> io::Result<u64> {
        let at = self.l1_offset.saturating_add(8 * index);
        Ok(be64(&array::<8>(image, at)?, 0) & OFFSET)
    }

    fn tables(&self) -> u64 {
        self.size.div_ceil(1 << self.table_bits())
    }

    /// Whether there is a compressed cluster in the first tables.
    fn has_compressed(&self, image: &dyn Source) -> io::Result<bool> {
        let mut table = vec![0; 1 << self.cluster_bits];
        for index in 0..self.tables().min(TABLES_SCANNED) {
            let offset = self.table(image, index)?;
            if offset != 0 {
                image.read_at(offset, &mut table)?;
                if table.chunks_exact(8).any(|entry| be64(entry, 0) & COMPRESSED != 0) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Reads the header.
pub(super) fn open(image: &dyn Source) -> io::Result<Opened> {
    let mut header = [0; 112];
    // Version 2 has a header of 72 bytes, and what follows may be short.
    let there = image.len().min(112) as usize;
    image.read_at(0, &mut header[..there])?;
    let version = be32(&header, 4);
    if !(2..=3).contains(&version) {
        return Err(unsupported(format!("qcow2 version {version}: expected 2 or 3")));
    }
    let features = if version == 3 { be64(&header, 72) } else { 0 };
    if features & !HARMLESS != 0 {
        return Err(unsupported(format!("qcow2 incompatible features {features:#x}")));
    }
    if be64(&header, 8) != 0 {
        return Err(unsupported("qcow2 with a backing file"));
    }
    if be32(&header, 32) != 0 {
        return Err(unsupported("encrypted qcow2"));
    }
    let cluster_bits = be32(&header, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(invalid(format!("qcow2 cluster bits {cluster_bits}: expected 9 to 21")));
    }
    let codec = match (version == 3 && be32(&header, 100) > 104, header[104]) {
        (false, _) | (true, 0) => Codec::Deflate,
        (true, 1) => Codec::Zstd,
        (true, other) => return Err(unsupported(format!("qcow2 compression type {other}"))),
    };
    let size = be64(&header, 24);
    let qcow2 = Qcow2 { size, cluster_bits, l1_offset: be64(&header, 40), version, codec };
    let entries = be32(&header, 36);
    if qcow2.tables() > u64::from(entries) {
        return Err(invalid(format!(
            "qcow2 of {size} bytes: expected {} level 1 entries, found {entries}",
            qcow2.tables()
        )));
    }
    let compressed = qcow2.has_compressed(image).unwrap_or(false);
    let detail = format!(
        "compat {}, clusters of {} KiB{}",
        if version == 2 { "0.10" } else { "1.1" },
        (1u32 << cluster_bits) as f64 / 1024.0,
        match (compressed, codec) {
            (false, _) => "",
            (true, Codec::Zstd) => ", compressed with zstd",
            (true, _) => ", compressed with deflate",
        }
    );
    Ok(Opened { layout: Box::new(qcow2), detail, compressed, sector_size: None })
}

impl Layout for Qcow2 {
    fn len(&self) -> u64 {
        self.size
    }

    fn run(&self, image: &dyn Source, at: u64) -> io::Result<Run> {
        let index = at >> self.table_bits();
        let table = self.table(image, index)?;
        if table == 0 {
            let start = index << self.table_bits();
            return Ok(Run { start, len: 1 << self.table_bits(), origin: Origin::Zeros });
        }
        let cluster = at >> self.cluster_bits;
        let within = cluster & ((1 << (self.cluster_bits - 3)) - 1);
        let entry = be64(&array::<8>(image, table + 8 * within)?, 0);
        let origin = if entry & COMPRESSED != 0 {
            // The offset takes the low bits, the number of further 512-byte sectors the rest.
            let bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << bits) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> bits;
            let len = (sectors + 1) * 512 - offset % 512;
            Origin::Packed { offset, len: len.min(image.len().saturating_sub(offset)), codec: self.codec }
        } else if entry & OFFSET == 0 || (self.version == 3 && entry & ZERO != 0) {
            Origin::Zeros
        } else {
            Origin::Image { offset: entry & OFFSET }
        };
        Ok(Run { start: cluster << self.cluster_bits, len: 1 << self.cluster_bits, origin })
    }
}
